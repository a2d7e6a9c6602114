"""Small images and small runs for the tests of training."""

from __future__ import annotations

import io
import json
import shutil
import zipfile

import numpy as np
import pytest
from PIL import Image
from tiny_runs import options, quiet

from finetune.train.train import run


@pytest.fixture(autouse=True)
def no_pages(request, monkeypatch):
    """Leave out previews and pages, which have tests of their own, to save a fifth of the time of a run."""
    if request.path.name != "test_page.py" and "all_files" not in request.node.name:
        monkeypatch.setattr("finetune.train.page.write_report", lambda *args, **kwargs: None)


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Call with (resolution, num_classes): a zip of 12 colored discs, with labels if there are classes."""
    made = {}

    def make(resolution: int, num_classes: int = 0):
        if (resolution, num_classes) not in made:
            path = tmp_path_factory.mktemp("images") / f"discs{resolution}-{num_classes}.zip"
            rng = np.random.default_rng(1)
            axis = np.linspace(-1, 1, resolution)
            with zipfile.ZipFile(path, "w") as archive:
                for i in range(12):
                    center, color = rng.uniform(-0.4, 0.4, size=2), rng.integers(0, 256, size=3)
                    inside = np.hypot(axis[:, None] - center[0], axis[None] - center[1]) < 0.5
                    pixels = np.where(inside[..., None], color, 255).astype(np.uint8)
                    stream = io.BytesIO()
                    Image.fromarray(pixels).save(stream, "PNG")
                    archive.writestr(f"{i:03d}.png", stream.getvalue())
                if num_classes:
                    labels = [[f"{i:03d}.png", i % num_classes] for i in range(12)]
                    archive.writestr("dataset.json", json.dumps({"labels": labels}))
            made[resolution, num_classes] = path
        return made[resolution, num_classes]

    return make


@pytest.fixture(scope="session")
def parent(images, tmp_path_factory):
    """The result of a finished run of tiny_runs.options; tests only read it."""
    return run(options(images, tmp_path_factory.mktemp("parent")), console=quiet())


@pytest.fixture
def finished_dir(parent, tmp_path):
    """A copy of the folder of `parent`, to be changed."""
    return shutil.copytree(parent.run_dir, tmp_path / parent.run_dir.name)
