"""`finetune watch`: lines without a terminal, a panel on one, and the end of a run."""

import io
import json
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner
from rich.console import Console

import finetune.cli.watch as watch
from finetune.cli import cli
from finetune.report import read_run
from torch_utils.files import this_process


def test_watch_prints_lines_and_ends_with_the_run(make_run):
    result = CliRunner().invoke(cli, ["watch", str(make_run())])
    lines = result.output.splitlines()
    assert result.exit_code == 0 and len(lines) == 52
    assert (
        lines[9].split()
        == "40.00 kimg 66.7 img/s 10:00 elapsed G 1.946 D 0.700 SD 1.100 random-fid@1000 0.6".split()
    )
    assert lines[-2:] == ["    4.00 kimg  ADA is at <its> limit.", "    8.00 kimg  Resumed."]


def test_run_of_a_killed_process_is_not_running(make_run):
    run = read_run(make_run(kimg=100.0))
    assert run.is_running
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (run.path / "run.lock").write_text(json.dumps(this_process() | {"pid": ended.pid}))
    assert not run.is_running


def test_watch_follows_a_growing_log(make_run, monkeypatch):
    folder = make_run(kimg=100.0)

    def grow(seconds):
        line = {"nimg": 200_000, "kimg": 200.0, "sec": 3000.0, "img_per_sec": 0.4, "loss_G": 1.5}
        with open(folder / "log.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        (folder / "run.lock").unlink(missing_ok=True)

    monkeypatch.setattr(watch.time, "sleep", grow)
    result = CliRunner().invoke(cli, ["watch", str(folder)])
    assert result.output.splitlines()[-1] == "  200.00 kimg     2.5 s/img  50:00 elapsed  G 1.500"


def test_watch_of_a_stopped_run_names_the_command(make_run):
    folder = make_run("00001-it's", kimg=100.0)
    os.utime(folder / "run.lock", (0, 0))
    result = CliRunner().invoke(cli, ["watch", str(folder)])
    assert "stopped writing at 100 of 200 kimg." in result.output
    assert result.output.splitlines()[-1].startswith("To resume: finetune train --resume '/")


def test_watch_panel_fits_a_narrow_terminal(make_run):
    console = Console(file=io.StringIO(), width=48)
    console.print(watch.panel(read_run(make_run(kimg=100.0)), console.width))
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 48
    assert any(line.startswith("loss G ") and "▁" in line for line in text.splitlines())
    for words in ("100 of 200 kimg", "25:00 left", "loss G", "metrics at 80 kimg: random-fid", "ADA is at"):
        assert words in text.replace("\n", " "), words


@pytest.mark.parametrize("values, drawn", [([1.0], "▁"), ([0, 1], "▁█"), (range(16), "▁▂▃▄▅▆▇█")])
def test_sparkline_averages_to_the_width(values, drawn):
    assert watch.sparkline(list(values), 8) == drawn
