"""Every `finetune …` command in the documents can be typed; those without network or GPU are run (slow)."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch
from PIL import Image

import finetune
from finetune.cli import cli

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").glob("*.md"))]
# Options that make a command of a page short; the last value given counts.
SHORTER = {
    "demo": ["--kimg", "0.05"],
    "evaluate": ["--num", "20"],
    "video": ["--steps", "2"],
    "project": ["--steps", "2"],
}
KIMG = ("0.05", "0.08")  # of the first and of each later `train` of a page
NEEDS_NETWORK = re.compile(r"ffhq-256|https?:")


def commands(page: Path) -> list[list[str]]:
    """The words after `finetune` of each command in the shell blocks of a page."""
    found = []
    text = page.read_text(encoding="utf-8")
    for block in re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["finetune"]:
                found.append(words[1:])
    return found


ALL = [(page.name, words) for page in PAGES for words in commands(page)]


def parse(words: list[str]) -> None:
    """Parse a command as the program does, without running it."""
    context = cli.make_context("finetune", list(words))
    while isinstance(context.command, click.Group):
        rest = [*getattr(context, "_protected_args", ()), *context.args]
        name, command, rest = context.command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)


@pytest.mark.parametrize(("page", "words"), ALL, ids=[f"{page}: {shlex.join(words)}" for page, words in ALL])
def test_documented_command_is_accepted(monkeypatch, page, words):
    monkeypatch.setattr(os, "environ", dict(os.environ))  # which --ops and --offline change
    monkeypatch.setattr(click.Path, "convert", lambda self, value, param, ctx: value)  # files need not exist
    parse(words)


def test_documented_commands_are_found():
    assert len(ALL) > 40 and {words[0] for _, words in ALL} >= {"train", "generate", "video", "export"}
    with pytest.raises(click.UsageError):
        parse(["generate", "--no-such-option"])


def shorter(words: list[str], num_trainings: int) -> list[str]:
    if words[0] == "train":
        return [*words, "--kimg", KIMG[min(num_trainings, 1)], "--metrics", "none"]
    if "--tune" in words:
        return [*words, *SHORTER["project"], "--tune", "2"]
    return [*words, *SHORTER.get(words[0], [])]


@pytest.mark.slow
@pytest.mark.parametrize("page", ["quickstart.md", "making-images.md"])
def test_documented_commands_run(tmp_path, page):
    (tmp_path / "finetune").mkdir()
    shutil.copytree(ROOT / "finetune/demo", tmp_path / "finetune/demo", ignore=shutil.ignore_patterns("*.py"))
    for name, color in (("face", "gold"), ("other", "orange")):
        Image.new("RGB", (80, 64), color).save(tmp_path / f"{name}.png")
    (tmp_path / "run.py").write_text("from finetune.cli import main\nmain()\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FINETUNE_OFFLINE": "1"}
    program = [sys.executable, "-P", "run.py"]
    if page == "making-images.md":  # which uses what the demo writes
        pytest.importorskip("av", reason="needs PyAV (the extra `video`)")
        subprocess.run([*program, "demo", *SHORTER["demo"]], cwd=tmp_path, env=environment)
    num_run = num_trainings = 0
    for words in commands(ROOT / "docs" / page):
        if any(NEEDS_NETWORK.search(word) for word in words) and words[0] != "checkpoints":
            continue
        done = subprocess.run(
            [*program, *shorter(words, num_trainings)],
            cwd=tmp_path, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, f"finetune {shlex.join(words)}\n{done.stdout}{done.stderr}"
        num_run, num_trainings = num_run + 1, num_trainings + (words[0] == "train")
    assert num_run > 5


# Options that make a command on stand-ins possible: their size, and the metrics that need no download.
OFFLINE = ["--sd-backbone", "efficientnet-lite0"]
FITTING = {"dataset check": ["--network", "ffhq.pkl"], "dataset prepare": ["--resolution", "64"]}


@pytest.mark.slow
@pytest.mark.parametrize("page", ["formats.md", "onnx.md", "data.md", "metrics.md", "training.md"])
def test_documented_commands_run_on_stand_ins(tmp_path, page):
    """With small files in place of those that a reader has: checkpoints, images, a run."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FINETUNE_OFFLINE": "1"}

    def run(*words: str) -> None:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "finetune", *words],
            cwd=tmp_path, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, f"finetune {shlex.join(words)}\n{done.stdout}{done.stderr}"

    demo = ROOT / "finetune/demo"
    (tmp_path / "finetune").mkdir()
    shutil.copytree(demo, tmp_path / "finetune/demo", ignore=shutil.ignore_patterns("*.py"))
    for name in ("ffhq.pkl", "better.pkl"):
        shutil.copy(demo / "faces-3d-64.pkl", tmp_path / name)
    shutil.copy(demo / "faces-flat.zip", tmp_path / "images.zip")
    shutil.unpack_archive(tmp_path / "images.zip", tmp_path / "images")
    run("convert", "ffhq.pkl", "editor.pt")
    weights = finetune.load(ROOT / "tests/golden/stylegan3-t-32.pkl").G_ema.state_dict()
    torch.save(weights, tmp_path / "weights.pth")  # which does not state how its network is built
    if page in ("formats.md", "training.md"):
        run(*shorter(["train", "--resume", "ffhq.pkl", "--data", "images", "--batch", "8", *OFFLINE], 0))
        (made,) = (tmp_path / "runs").iterdir()
        for name in ("00000-cats-stylegan2-256", "00000-images-stylegan2-256"):
            if made.name != name:
                shutil.copytree(made, tmp_path / "runs" / name)
    if page == "data.md":
        (tmp_path / "images.zip").unlink()  # which it makes
    num_run = 0
    for words in commands(ROOT / "docs" / page):
        name = " ".join(words[:2]) if words[0] == "dataset" else words[0]
        if "DATA" in words or "fid" in words[-1].split(","):  # a form, and a metric that downloads weights
            continue
        more = OFFLINE if words[0] == "train" and "--data" in words else FITTING.get(name, [])
        run(*shorter(words, 1), *more)
        num_run += 1
    assert num_run
