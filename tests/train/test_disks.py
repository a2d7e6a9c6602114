"""Disks that are full or turn read-only under a run: what was saved stays whole. Needs the right to mount."""

import io
import subprocess

import pytest
import torch
from rich.console import Console
from tiny_runs import after_each_step, options, quiet

from finetune.errors import TrainingError
from finetune.options import TrainOptions
from finetune.train import checkpointing, run

pytestmark = pytest.mark.slow


@pytest.fixture
def disk(tmp_path):
    """Call with a size in KiB: a new file system of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = []

    def make(kib):
        command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(place)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("nothing can be mounted here")
        mounted.append(place)
        return place

    yield make
    for each in mounted:
        subprocess.run(["umount", "-l", str(each)], check=True)


def said_by(config):
    """What a run says that ends because it cannot save."""
    console = Console(file=io.StringIO(), width=300)
    with pytest.raises(
        TrainingError, match=r"(?s)The end of the run cannot be saved.*Earlier saves are intact"
    ):
        run(config, console=console)
    return console.file.getvalue()


def whole_states(place):
    (run_dir,) = (place / "runs").iterdir()
    assert not list(run_dir.glob(".*")), "a temporary file is left"
    return [checkpointing.read_state(path)["nimg"] for path in checkpointing.states_of(run_dir)]


def test_train_full_disk_keeps_earlier_saves(images, disk, monkeypatch):
    place = disk(2000)
    filled = place / "of somebody else"

    def fill(state):
        if state.nimg == 20:  # at the next save there is nothing left, though there was when the run began
            filled.write_bytes(bytes(10**5))
            while True:
                try:
                    with open(filled, "ab") as file:
                        file.write(bytes(4096))
                except OSError:
                    break

    with monkeypatch.context() as patch:
        after_each_step(patch, fill)
        said = said_by(options(images, place, kimg=0.064))
    assert "0.032 kimg: not saved, and training continues: Not enough space in" in said
    assert whole_states(place) == [16, 0]
    filled.unlink()
    (run_dir,) = (place / "runs").iterdir()
    assert run(TrainOptions(resume=str(run_dir)), console=quiet()).nimg == 64


def test_train_read_only_disk(images, disk, monkeypatch):
    place = disk(20_000)

    def freeze(state):
        if state.nimg == 20:
            subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)

    with monkeypatch.context() as patch:
        after_each_step(patch, freeze)
        said = said_by(options(images, place, kimg=0.064))
    assert "0.032 kimg: not saved, and training continues" in said and "Read-only" in said
    assert whole_states(place) == [16, 0]
    (run_dir,) = (place / "runs").iterdir()
    (snapshot,) = run_dir.glob("network-snapshot-*.pkl")
    from finetune import load

    assert all(bool(torch.isfinite(each).all()) for each in load(snapshot).G_ema.state_dict().values())
