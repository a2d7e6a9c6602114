"""The frame of the program: commands by name, errors as messages with exit codes, shared option types."""

import importlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import finetune.cli
from finetune.cli import COMMANDS, cli
from finetune.cli.options import GridSize, LocalPath, NumberRange, parse_numbers
from finetune.errors import ConfigError, FinetuneError
from finetune.version import __version__

ROOT = Path(__file__).parents[2]


class OutOfMemoryError(RuntimeError):
    """Named like torch's."""


def run_raising(monkeypatch, error, *args):
    """Run a command whose body raises `error`."""

    @click.command("demo")
    def command():
        raise error

    monkeypatch.setattr("finetune.cli.demo.command", command)
    return CliRunner().invoke(cli, [*args, "demo"])


def test_help_one_line_per_command():
    result = CliRunner().invoke(cli, ["--help"], terminal_width=100)
    assert result.exit_code == 0
    lines = result.output.split("Commands:\n")[1].splitlines()[: len(COMMANDS)]
    assert [line.split()[0] for line in lines] == list(COMMANDS)
    assert all(line.rstrip().endswith(".") and len(line.split()) > 3 for line in lines), lines


def test_commands_match_files():
    folder = Path(finetune.cli.__file__).parent
    defining = {
        path.stem for path in folder.glob("*.py") if "\ndef command(" in path.read_text(encoding="utf-8")
    }
    assert defining == set(COMMANDS)


def test_unknown_command_and_version():
    result = CliRunner().invoke(cli, ["tran"])
    assert result.exit_code == 2
    assert "No such command 'tran'" in result.output
    assert CliRunner().invoke(cli, ["--version"]).output == f"finetune {__version__}\n"


def test_explain_user_error_exits_2(monkeypatch):
    error = ConfigError(
        ["--kimg 0: must be greater than 0.", "--batch 3: must be even."], hint="Read the help."
    )
    result = run_raising(monkeypatch, error)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert (
        result.stderr
        == "Error: --kimg 0: must be greater than 0.\n--batch 3: must be even.\nRead the help.\n"
    )


def test_explain_os_error_exits_2(monkeypatch):
    result = run_raising(monkeypatch, PermissionError(13, "Permission denied", "/root/runs"))
    assert (result.exit_code, result.stderr) == (2, "Error: /root/runs: Permission denied.\n")


def test_explain_cuda_out_of_memory(monkeypatch):
    result = run_raising(
        monkeypatch, OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nlong tail")
    )
    assert result.exit_code == 2
    assert "Tried to allocate 2 GiB" in result.stderr
    assert "--batch-gpu" in result.stderr
    assert "long tail" not in result.stderr


def test_explain_out_of_memory(monkeypatch):
    result = run_raising(monkeypatch, MemoryError("Unable to allocate 314. GiB"))
    assert result.exit_code == 2 and "Out of memory" in result.stderr


def test_internal_error_with_several_ranks_shows_traceback(monkeypatch):
    importlib.import_module("torch")  # as every rank has
    monkeypatch.setenv("RANK", "1")
    failed = run_raising(monkeypatch, KeyError("missing key"))
    assert failed.exit_code == 1 and "Traceback" in failed.stderr and "raise error" in failed.stderr
    refused = run_raising(monkeypatch, ConfigError("--kimg 0: too few."))
    assert refused.exit_code == 2 and "Traceback" not in refused.stderr


def test_internal_error_shows_traceback_only_with_debug(monkeypatch):
    quiet = run_raising(monkeypatch, KeyError("missing key"))
    assert quiet.exit_code == 1
    assert "KeyError: 'missing key'\nInternal error (finetune" in quiet.stderr
    assert "finetune --debug" in quiet.stderr
    assert "Traceback" not in quiet.stderr
    assert "Traceback" in run_raising(monkeypatch, KeyError("missing key"), "--debug").stderr
    monkeypatch.setenv("FINETUNE_DEBUG", "1")
    assert "Traceback" in run_raising(monkeypatch, FinetuneError("no")).stderr


def test_interrupt_exits_130(monkeypatch):
    result = run_raising(monkeypatch, KeyboardInterrupt())
    assert result.exit_code == 130
    assert result.stderr.strip() == "Interrupted."


def test_python_m_finetune():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "finetune", "generate", "--network", "no-such-file.pkl"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "Missing option" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="a POSIX signal")
def test_sigint_exits_130():
    code = (
        "import os, signal, click, finetune.cli.demo as demo\n"
        "from finetune.cli import main\n"
        "import sys; sys.argv = ['finetune', 'demo']\n"
        "demo.command = click.Command('demo', callback=lambda: os.kill(os.getpid(), signal.SIGINT))\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode in (130, -signal.SIGINT)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("text", "seeds"),
    [
        ("7", [7]),
        ("0-3,42", [0, 1, 2, 3, 42]),
        (" 5 , 1 - 2", [5, 1, 2]),
        ("4294967295", [2**32 - 1]),
        ("3-3", [3]),
    ],
)
def test_parse_numbers(text, seeds):
    assert parse_numbers(text) == seeds


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "'' is not a seed"),
        ("1,,2", "'' is not a seed"),
        ("1-", "'1-' is not a seed"),
        ("-3", "'-3' is not a seed"),
        ("1.5", "'1.5' is not a seed"),
        ("a-b", "'a-b' is not a seed"),
        ("9-2", "runs backwards. Write 2-9"),
        ("4294967296", "above the largest one, 4294967295"),
        ("0-99999999", "more than 1,000,000 numbers"),
    ],
)
def test_parse_numbers_errors(text, says):
    with pytest.raises(ValueError, match=says):
        parse_numbers(text)
    with pytest.raises(click.BadParameter, match=says):
        NumberRange("seed").convert(text, None, None)


def test_grid_size_convert():
    assert GridSize().convert("8x4", None, None) == (8, 4)
    assert GridSize().convert("1X2", None, None) == (1, 2)
    for wrong in ("8", "8x", "x4", "0x4", "8x-1", "8*4"):
        with pytest.raises(click.BadParameter, match="columns x rows, like 8x4"):
            GridSize().convert(wrong, None, None)


def test_paths_expand_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert LocalPath(path_type=Path).convert("~/runs", None, None) == Path("/home/me/runs")
    assert LocalPath().convert(Path("~none-such/runs"), None, None) == "~none-such/runs"

    def parameters(command):
        yield from command.params
        for each in getattr(command, "commands", {}).values():
            yield from parameters(each)

    for name in COMMANDS:
        for parameter in parameters(importlib.import_module(f"finetune.cli.{name}").command):
            assert isinstance(parameter.type, LocalPath) or not isinstance(parameter.type, click.Path), name


def test_openmp_wait_policy_default():
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_DISPLAY_ENV": "verbose"}
    environment.pop("OMP_WAIT_POLICY", None)
    done = subprocess.run(
        [sys.executable, "-m", "finetune", "inspect", "tests/golden/stylegan2-tf-32.pkl"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    shown = dict(re.findall(r"(OMP_WAIT_POLICY|GOMP_SPINCOUNT) = '(\w+)'", done.stderr))
    if not shown:
        pytest.skip("torch's OpenMP library does not show its settings")
    assert shown["OMP_WAIT_POLICY"] == "PASSIVE" and shown.get("GOMP_SPINCOUNT", "0") == "0"


def test_openmp_wait_policy_of_the_user_stays(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    monkeypatch.setattr(sys, "argv", ["finetune", "--version"])
    with pytest.raises(SystemExit):
        finetune.cli.main()
    assert os.environ["OMP_WAIT_POLICY"] == "active"
