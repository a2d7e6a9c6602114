"""`finetune train` as a person types it."""

import io
import zipfile

import click
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from finetune.cli import cli
from finetune.cli.train import command
from finetune.config import TrainConfig, flag


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "dots.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(4):
            stream = io.BytesIO()
            Image.fromarray(np.full([16, 16, 3], 60 * i, dtype=np.uint8)).save(stream, "PNG")
            archive.writestr(f"{i}.png", stream.getvalue())
    return path


def call(*arguments):
    return CliRunner().invoke(cli, ["train", *map(str, arguments)])


SCRATCH = (
    "--scratch",
    "stylegan2",
    "--resolution",
    16,
    "--cbase",
    128,
    "--cmax",
    8,
    "--z-dim",
    8,
    "--w-dim",
    8,
)
SHORT = ("--kimg", 0.008, "--batch", 4, "--tick", 0.004, "--sd-backbone", "l2", "--device", "cpu")


def test_every_option_is_a_field_and_every_field_an_option():
    names = {parameter.name: parameter for parameter in command.params if isinstance(parameter, click.Option)}
    assert names.keys() - {"dry_run", "ops", "offline", "gpus"} == set(TrainConfig.__dataclass_fields__)
    for name, field in TrainConfig.__dataclass_fields__.items():
        assert flag(name) in names[name].opts
        assert not names[name].required
        if name != "data":
            assert names[name].default == field.default


def test_help_explains_every_option():
    result = call("--help")
    assert result.exit_code == 0
    assert all(flag(name) in result.output for name in TrainConfig.__dataclass_fields__)


def test_a_dry_run_shows_the_table_and_writes_nothing(pictures, tmp_path):
    result = call(*SCRATCH, *SHORT, "--data", pictures, "--outdir", tmp_path / "runs", "-n")
    assert result.exit_code == 0, result.output
    assert "4 images" in result.output and "0.0002 res²/batch at 16 px, batch 4" in result.output
    assert "Dry run" in result.output
    assert not (tmp_path / "runs").exists()


def test_a_run_prints_plain_lines_and_says_what_to_do_next(pictures, tmp_path):
    result = call(*SCRATCH, *SHORT, "--data", pictures, "--outdir", tmp_path / "runs", "--desc", "dots!")
    assert result.exit_code == 0, result.output
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert run_dir.name == "00000-dots-stylegan2-16-dots"
    ticks = [line for line in result.output.splitlines() if "img/s" in line]
    assert len(ticks) == 2 and all("left" in line and " SD " in line and " G " in line for line in ticks)
    assert f"finetune generate --network {run_dir / 'network-snapshot-000000.008.pkl'}" in result.output


def test_all_problems_of_the_options_come_at_once(pictures):
    result = call("--data", pictures, "--kimg", -1, "--p", 3, "--cbase", 512)
    assert result.exit_code == 2
    lines = ("--resume PICKLE", "--kimg -1.0", "--p 3.0", "--cbase 512")
    assert all(words in result.stderr for words in lines)
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--resume", "nothing.pkl"), "nothing.pkl does not exist"),
        ((*SCRATCH, "--sd-backbone", "vgg"), "lpips-vgg"),
        ((*SCRATCH, "--labels", "folders"), "no image is in a folder"),
    ],
)
def test_mistakes_end_with_exit_code_2_and_a_hint(arguments, words, pictures, tmp_path):
    result = call("--data", pictures, *SHORT, *arguments, "--outdir", tmp_path / "runs")
    assert result.exit_code == 2
    assert words in result.stderr and "Traceback" not in result.output
    assert not (tmp_path / "runs").exists()
