"""Commands that are printed can be pasted, whatever the names of files."""

import os
import shlex
import signal

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from tiny_runs import after_each_step, options

from finetune.cli import cli
from finetune.errors import ConfigError
from finetune.options import OPTIONS, flag
from finetune.train.prepare import load_for_training


@pytest.fixture
def place(tmp_path):
    """A folder whose name a shell would change, with a data set in it."""
    place = tmp_path / "it's $HOME & more"
    (place / "images" / ("ü" * 120)).mkdir(parents=True)
    for index in range(4):
        pixels = np.random.default_rng(index).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(place / "images" / ("ü" * 120) / f"{index}.png")
    return place


def paste(output, start):
    """Run the printed command that begins with `start`."""
    line = next(line for line in output.splitlines() if start in line)
    return CliRunner().invoke(cli, shlex.split(line[line.index(start) :])[1:])


def test_commands_of_a_run_can_be_pasted(place, monkeypatch):
    monkeypatch.chdir(place)
    asked = options(lambda _: place / "images" / ("ü" * 120), place, kimg=0.008)
    words = [f"{flag(name)}={value}" for name, value in asked.given().items() if OPTIONS[name] is not None]
    with monkeypatch.context() as patch:
        after_each_step(patch, lambda state: os.kill(os.getpid(), signal.SIGTERM))
        stopped = CliRunner().invoke(cli, ["train", *words])
    assert stopped.exit_code == 0, stopped.output
    done = paste(stopped.stdout, "finetune train --resume")
    assert done.exit_code == 0, done.output
    images = paste(done.stdout, "finetune generate --network")
    assert images.exit_code == 0 and len(list((place / "images").glob("seed*.png"))) == 16


def test_command_after_prepare_can_be_pasted(place, golden_dir):
    words = ["dataset", "prepare", str(place / "images"), str(place / "a b.zip"), "--labels", "folders"]
    made = CliRunner().invoke(cli, words)
    assert made.exit_code == 0, made.output
    made = made.stdout.replace("CHECKPOINT", str(golden_dir / "stylegan2-32.pkl"))
    done = paste(f"{made.rstrip()} --sd-weight 0 --dry-run", "finetune train --resume")
    assert done.exit_code == 0 and "1 classes" in done.output, done.output


def test_folder_without_state_names_its_snapshot_quoted(place):
    (place / "network-snapshot-000001.pkl").touch()
    with pytest.raises(ConfigError) as error:
        load_for_training(str(place))
    assert f"--resume {shlex.quote(str(place / 'network-snapshot-000001.pkl'))}" in str(error.value)
