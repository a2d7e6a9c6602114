"""`finetune train` as a person types it."""

import io
import zipfile

import click
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from finetune.cli import cli
from finetune.cli.train import GROUPS, command
from finetune.config import TrainConfig
from finetune.options import OPTIONS, TrainOptions, flag


@pytest.fixture(scope="module")
def images(tmp_path_factory):
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
)
SHORT = ("--kimg", 0.008, "--batch", 4, "--tick", 0.004, "--sd-backbone", "l2", "--device", "cpu",
         "--metrics", "none")  # fmt: skip


def test_train_options_match_fields():
    names = {parameter.name: parameter for parameter in command.params if isinstance(parameter, click.Option)}
    assert names.keys() - {"dry_run", "gpus"} == set(TrainOptions.__dataclass_fields__)
    assert list(TrainOptions.__dataclass_fields__) == list(TrainConfig.__dataclass_fields__)
    for name in OPTIONS:
        assert flag(name) in names[name].opts
        assert not names[name].required


def test_train_options_default_to_none():
    context = command.make_context("train", [])
    assert {context.params[name] for name in OPTIONS} == {None}


def test_train_has_at_most_53_options():
    """50, and --sd-preset, --sd-augment and --deterministic for people who repeat a paper or a run."""
    assert len(command.params) <= 53


def test_train_help_groups_options_with_defaults():
    result = call("--help")
    assert result.exit_code == 0
    headings = [line[:-1] for line in result.output.splitlines() if line.endswith(":") and line[0] != " "]
    assert headings == [*GROUPS, "Other"]
    context = command.make_context("train", [])
    texts = {each.name: each.get_help_record(context)[1] for each in command.params}
    for name, option in OPTIONS.items():
        assert flag(name) in result.output and texts[name].startswith(option.help)
        is_stated = "[default: " in texts[name] or "[required " in texts[name]
        assert is_stated == (name not in ("resume", "scratch", "new_d"))


def test_train_dry_run_writes_nothing(images, tmp_path):
    result = call(*SCRATCH, *SHORT, "--data", images, "--outdir", tmp_path / "runs", "-n")
    assert result.exit_code == 0, result.output
    assert "4 images" in result.output and "0.0002 res²/batch at 16 px, batch 4" in result.output
    assert "Dry run" in result.output
    assert not (tmp_path / "runs").exists()


def test_train_prints_plain_lines(images, tmp_path):
    result = call(*SCRATCH, *SHORT, "--data", images, "--outdir", tmp_path / "runs")
    assert result.exit_code == 0, result.output
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert run_dir.name == "00000-dots-stylegan2-16"
    ticks = [line for line in result.output.splitlines() if "img/s" in line]
    assert len(ticks) == 2 and all("left" in line and " SD " in line and " G " in line for line in ticks)
    assert f"finetune generate --network {run_dir / 'network-snapshot-000000.008.pkl'}" in result.output


def test_train_lists_all_option_problems(images):
    result = call("--data", images, "--kimg", -1, "--p", 3, "--cbase", 512)
    assert result.exit_code == 2
    lines = ("--resume PICKLE", "--kimg -1.0", "--p 3.0", "--cbase 512")
    assert all(words in result.stderr for words in lines)
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--resume", "nothing.pkl"), "nothing.pkl does not exist"),
        ((*SCRATCH, "--sd-backbone", "vgg"), "lpips-vgg"),
        ((*SCRATCH, "--labels", "folders"), "no image is in a subfolder"),
    ],
)
def test_train_mistakes_exit_2_with_hint(arguments, words, images, tmp_path):
    result = call("--data", images, *SHORT, *arguments, "--outdir", tmp_path / "runs")
    assert result.exit_code == 2
    assert words in result.stderr and "Traceback" not in result.output
    assert not (tmp_path / "runs").exists()
