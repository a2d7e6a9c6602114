from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import numpy as np
import pytest
import tiny_runs
from PIL import Image

import finetune
from finetune.errors import CheckpointError

ROOT = Path(__file__).parents[1]
FUNCTIONS = ("load", "save", "fine_tune", "generate", "evaluate")


@pytest.fixture
def images(tmp_path):
    def write(size):
        folder = tmp_path / "images"
        folder.mkdir(exist_ok=True)
        random = np.random.RandomState(0)
        for index in range(8):
            Image.fromarray(random.randint(0, 256, [size, size, 3], np.uint8)).save(folder / f"{index}.png")
        return folder

    return write


def test_python_functions_work_after_every_submodule_was_imported(images, tmp_path):
    for module in pkgutil.walk_packages(finetune.__path__, "finetune."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    options = tiny_runs.options(images, tmp_path, kimg=0.008)
    run = finetune.fine_tune(options, console=tiny_runs.quiet())
    checkpoint = finetune.load(run.run_dir)
    made = finetune.generate(checkpoint, range(2), truncation_psi=0.5)
    assert [image.size for image in made] == [(16, 16)] * 2
    again = finetune.generate(run.snapshot, [1], truncation_psi=0.5, device="cpu")
    assert np.array_equal(np.asarray(again[0]), np.asarray(made[1]))
    found = finetune.evaluate(checkpoint, images(16), ["random-fid"], num=4, workers=0, cache=False)
    assert found["random-fid"].value > 0
    result = finetune.save(checkpoint, tmp_path / "better.safetensors")
    assert result.max_difference == 0 and finetune.load(tmp_path / "better.safetensors").G_ema is not None


def test_python_functions_are_typed_and_documented():
    text = (ROOT / "docs/python.md").read_text(encoding="utf-8")
    for name in FUNCTIONS:
        function = getattr(finetune, name)
        assert name in finetune.__all__ and function.__doc__, name
        signature = inspect.signature(function)
        annotations = [parameter.annotation for parameter in signature.parameters.values()]
        assert inspect.Signature.empty not in (*annotations, signature.return_annotation), name
        assert f"`{name}(" in text and f"finetune.{name}(" in text, name
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    compile(code[1], "python.md", "exec")


def test_python_generate_without_generator(golden_dir):
    checkpoint = dataclasses.replace(finetune.load(golden_dir / "stylegan2-32.pkl"), G=None, G_ema=None)
    with pytest.raises(CheckpointError, match="has no generator, only D"):
        finetune.generate(checkpoint, [0])
