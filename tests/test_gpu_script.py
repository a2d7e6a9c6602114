"""benchmarks/gpu.sh, as far as a machine without a GPU can tell: what it would run, and that it goes on."""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"


def gpu_sh(*options, **variables):
    return subprocess.run(
        ["bash", str(SCRIPT), *map(str, options)],
        env={"PATH": "/usr/bin:/bin", **{name: str(value) for name, value in variables.items()}},
        capture_output=True,
        text=True,
        check=False,
    )


def stages(*options, **variables):
    """(name, seconds, command) of every stage."""
    done = gpu_sh("--dry-run", *options, **variables)
    assert done.returncode == 0 and done.stderr == ""
    *found, total = [line.split(" | ") for line in done.stdout.splitlines()]
    assert int(total[1]) == sum(int(limit) for _, limit, _ in found)
    return [(name, int(limit), command.split()) for name, limit, command in found]


class Parsed(Exception):
    pass


@pytest.mark.parametrize("options", [[], ["--cpu"]], ids=["cuda", "cpu"])
def test_every_benchmark_takes_its_options(options, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    parse = argparse.ArgumentParser.parse_args

    def stop(self, *args):
        parse(self, *args)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    seen = set()
    for _, _, command in stages(*options, OUT="somewhere"):
        if not command[1].startswith("benchmarks/"):
            continue
        module = importlib.import_module(Path(command[1]).stem)
        monkeypatch.setattr(sys, "argv", command[1:])
        with pytest.raises(Parsed):
            module.main()
        assert command[-1].startswith("somewhere/")
        seen.add(module.__name__)
    assert seen == {"bench_ops", "bench_step", "bench_build", "bench_overhead", "check_float16"}


def test_all_of_it_takes_less_than_ten_minutes():
    found = stages()
    assert sum(limit for _, limit, _ in found) <= 590
    assert [name for name, _, _ in found][:3] == ["doctor", "doctor-build", "tests"]
    assert "-m gpu" in " ".join(found[2][2])


def test_results_go_where_they_are_wanted():
    ends = [
        stages(*options, **variables)[-1][2][-1].rpartition("/")[0]
        for options, variables in (([], {}), ([], {"OUT": "/tmp/b"}), (["/tmp/a"], {"OUT": "/tmp/b"}))
    ]
    assert ends == ["benchmarks/results", "/tmp/b", "/tmp/a"]


PYTHON = """#!/bin/sh
case "$*" in
    *measuring.py*) echo toaster ;;
    *"doctor --build"*) exit 124 ;;
    *doctor*) echo "first line"; echo "no such thing" >&2; exit 3 ;;
    *) echo "ran $1" ;;
esac
"""


def test_what_fails_is_written_down_and_the_rest_still_runs(tmp_path):
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    done = gpu_sh("--cpu", tmp_path / "out", PYTHON=python)
    assert done.returncode == 1
    *_, summary = done.stdout.partition("== summary")
    said = {line.split()[0]: line.split(" s  ")[1] for line in summary.splitlines()[1:]}
    assert said["doctor"] == "failed with exit code 3: no such thing"
    assert said["doctor-build"] == "cut off after 360 s; what was written by then stays"
    assert {value for name, value in said.items() if not name.startswith("doctor")} == {"ok"}
    assert len(said) == len(stages())
    (log,) = (tmp_path / "out").glob("gpu-log_toaster_*.txt")
    assert "first line" in log.read_text() and summary in log.read_text()


def test_an_option_that_does_not_exist_is_named():
    done = gpu_sh("--fast")
    assert done.returncode == 2 and "unknown option --fast" in done.stderr


def test_cpu_time_is_counted_where_it_is_asked_for(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    measuring, ticks = importlib.import_module("measuring"), iter(range(10))
    monkeypatch.setattr(measuring, "clock", lambda: next(ticks))
    cpu = measuring.torch.device("cpu")
    assert measuring.seconds(lambda: next(ticks), cpu) == 2
    measuring.count_cpu_time()
    assert measuring.clock is time.process_time and measuring.torch.get_num_threads() == 1


@pytest.mark.slow
def test_all_stages_run_on_a_cpu(tmp_path):
    done = gpu_sh("--cpu", tmp_path, PYTHON=sys.executable)
    assert done.returncode == 0, done.stdout[-3000:]
    assert len(list(tmp_path.glob("*.md"))) == 7
