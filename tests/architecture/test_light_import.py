"""`import finetune`, `finetune --help` and every command's help load nothing heavy."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finetune.cli import COMMANDS

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "torchvision", "numpy", "PIL", "scipy", "lpips", "rich", "requests", "safetensors")


# What a program with torch may still do without: half of its start-up and 170 MB.
COMPILERS = ("torch._dynamo", "torch.fx.experimental.symbolic_shapes", "sympy")
LATE = (*COMPILERS, "torchvision", "lpips", "torch_fidelity", "tensorboard")
CHECKPOINTS = [f"tests/golden/{path.name}" for path in sorted((ROOT / "tests/golden").glob("*.pkl"))]


def loaded_by(code: str, watched: tuple[str, ...] = HEAVY) -> list[str]:
    """The modules of `watched` that are loaded in a fresh process after `code`."""
    report = f"import json, sys; print(); print(json.dumps([m for m in {watched!r} if m in sys.modules]))"
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"{code}\n{report}"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    print(f"{time.perf_counter() - started:.3f} s, process and interpreter included")
    return json.loads(done.stdout.splitlines()[-1])


def run_cli(*args: str) -> str:
    return f"from finetune.cli import cli\ncli({list(args)!r}, standalone_mode=False)"


def test_import_finetune_is_light():
    assert loaded_by("import finetune; finetune.__version__; dir(finetune); finetune.FinetuneError") == []


def test_import_finetune_loads_attributes_lazily():
    import finetune
    from finetune import resolve
    from finetune.checkpoint.load import Checkpoint

    assert finetune.load is resolve.load
    assert finetune.Checkpoint is Checkpoint
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = finetune.lod  # codespell:ignore lod


@pytest.mark.parametrize("args", [["--help"], ["--version"], []], ids=["help", "version", "bare"])
def test_help_and_version_are_light(args):
    code = run_cli(*args)
    if not args:  # bare `finetune` shows the help and fails
        code = f"import click\ntry:\n    exec({code!r})\nexcept click.exceptions.NoArgsIsHelpError:\n    pass"
    assert loaded_by(code) == []


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_commands_is_light(name):
    assert loaded_by(run_cli(name, "--help")) == []


def test_inspect_and_generate_imports(tmp_path):
    commands = [run_cli("inspect", path) for path in CHECKPOINTS]
    for path in CHECKPOINTS:
        label = ["--class", "0"] if path.endswith(("2-32-orig.pkl", "2-64-cond.pkl")) else []
        outdir = str(tmp_path / Path(path).stem)
        commands.append(run_cli("generate", "--network", path, "--seeds", "0", "--outdir", outdir, *label))
    assert loaded_by("\n".join(commands), LATE) == []
    assert len(list(tmp_path.glob("*/seed0000.png"))) == len(CHECKPOINTS) > 6
