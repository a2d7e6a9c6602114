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


PARTS = ["correctness", "speed"]


def stages(part, *options, **variables):
    """(name, seconds, command) of every stage."""
    done = gpu_sh("--part", part, "--dry-run", *options, **variables)
    assert done.returncode == 0 and done.stderr == ""
    *found, total = [line.split(" | ") for line in done.stdout.splitlines()]
    most = 300 * (6 if "--cpu" in options else 1)
    assert int(total[1]) == min(most, sum(int(limit) for _, limit, _ in found))
    return [(name, int(limit), command.split()) for name, limit, command in found]


class Parsed(Exception):
    pass


@pytest.mark.parametrize("options", [[], ["--cpu"]], ids=["cuda", "cpu"])
@pytest.mark.parametrize(("part", "programs"), [("correctness", 1), ("speed", 7)])
def test_gpu_script_every_benchmark_takes_its_options(part, programs, options, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    parse = argparse.ArgumentParser.parse_args

    def stop(self, *args):
        parse(self, *args)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    count = 0
    for _, _, command in stages(part, *options):
        if not command[1].startswith("benchmarks/"):
            continue
        module = importlib.import_module(Path(command[1]).stem)
        monkeypatch.setattr(sys, "argv", command[1:])
        with pytest.raises(Parsed):
            module.main()
        count += 1
    assert count == programs


def test_gpu_script_stage_that_hangs_leaves_time_for_others():
    assert all(limit <= 300 * 0.6 for part in PARTS for _, limit, _ in stages(part))


def test_gpu_script_marked_tests_run_without_the_benchmark_plugin():
    tests = next(command for name, _, command in stages("correctness") if name == "tests")
    assert "-p no:benchmark" in " ".join(tests) and "-m gpu" in " ".join(tests)


def test_gpu_script_order_of_stages():
    names = [name for name, _, _ in stages("speed")]
    assert names[1:4] == ["stylegan2-256", "stylegan3-t-256", "stylegan3-r-256"]
    assert names[-1] == "ops-channels-last"


def test_gpu_script_results_path():
    for options, variables, folder in (
        ([], {}, "benchmarks/results"),
        ([], {"OUT": "/tmp/b"}, "/tmp/b"),
        (["/tmp/a"], {"OUT": "/tmp/b"}, "/tmp/a"),
    ):
        done = gpu_sh("--part", "speed", "--dry-run", *options, **variables)
        assert done.stdout.splitlines()[-1].endswith(f"| to {folder}")


PYTHON = """#!/bin/sh
case "$*" in
    *measuring.py*) echo toaster ;;
    *"doctor --build"*) exit 124 ;;
    *doctor*) echo "first line"; echo "no such thing" >&2; exit 3 ;;
    *) echo "| --- |"; echo "| ran $1 |" ;;
esac
"""


def test_gpu_script_records_failures_and_skips_finished_stages(tmp_path):
    python, out = tmp_path / "python", tmp_path / "out"
    python.write_text(PYTHON)
    python.chmod(0o755)
    done = gpu_sh("--part", "correctness", "--cpu", out, PYTHON=python)
    assert done.returncode == 1
    ends = dict(line[3:].split(": ", 1) for line in done.stdout.splitlines() if line.startswith("== "))
    assert ends["doctor"].startswith("failed with exit code 3: no such thing (")
    assert ends["build"].startswith("cut off after 360 s (")
    assert ends["tests"].startswith("ok (") and ends["precision"].startswith("ok (")
    (log,), (report,) = out.glob("correctness_toaster_*.log"), out.glob("correctness_toaster_*.md")
    assert "first line" in log.read_text()
    assert "| --- |\n| ran benchmarks/check_precision.py |" in report.read_text()
    again = gpu_sh("--part", "correctness", "--cpu", out, PYTHON=python).stdout
    assert (
        "tests: done before" in again and "precision: done before" in again and "== doctor: failed" in again
    )
    (tmp_path / "git").write_text("#!/bin/sh\necho 1234567\n")
    (tmp_path / "git").chmod(0o755)
    path = f"{tmp_path}:/usr/bin:/bin"
    later = gpu_sh("--part", "correctness", "--cpu", out, PYTHON=python, PATH=path).stdout
    assert "done before" not in later and "commit 1234567)" in later


def test_gpu_script_uses_visible_cards_and_keeps_tables_of_failed_stages(tmp_path):
    python, out = tmp_path / "python", tmp_path / "out"
    python.write_text("""#!/bin/sh
case "$*" in
    *device_count*) echo 2 ;;
    *measuring.py*) echo toaster ;;
    *--out*) for last; do :; done; echo "| --- | $CUDA_VISIBLE_DEVICES |" >"$last"; exit 3 ;;
esac
""")
    python.chmod(0o755)
    assert gpu_sh("--part", "speed", out, PYTHON=python, CUDA_VISIBLE_DEVICES="5,7").returncode == 1
    (report,) = out.glob("speed_toaster_*.md")
    kept = report.read_text()
    assert kept.count("| --- | 5 |") == 3 and kept.count("| --- | 7 |") == 4
    assert "<!-- stylegan2-256: failed with exit code 3" in kept


def test_gpu_script_interrupted_stage_keeps_its_table(tmp_path):
    """As where the whole script is ended from outside."""
    python, out = tmp_path / "python", tmp_path / "out"
    stop = '    *check*) echo "| --- |"; exec sleep 60 ;;\n    *) echo'
    python.write_text(PYTHON.replace("    *) echo", stop))
    python.chmod(0o755)
    command = ["bash", str(SCRIPT), "--part", "correctness", "--cpu", str(out)]
    variables = {"PATH": "/usr/bin:/bin", "PYTHON": str(python)}
    with subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True) as script:
        while "check_precision" not in script.stdout.readline():
            pass
        time.sleep(2)
        script.terminate()
        assert script.wait(timeout=20) != 0
    (report,) = out.glob("*.md")
    assert "<!-- precision: cut off -->\n\n| --- |" in report.read_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--part", "speed", "--fast"], "unknown option --fast"),
        ([], "--part is missing"),
        (["--part", "x"], "x:"),
    ],
)
def test_gpu_script_wrong_options_are_named(options, words):
    done = gpu_sh(*options)
    assert done.returncode == 2 and words in done.stderr


def test_gpu_script_cpu_time_on_request(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    measuring, ticks = importlib.import_module("measuring"), iter(range(10))
    monkeypatch.setattr(measuring, "clock", lambda: next(ticks))
    cpu = measuring.torch.device("cpu")
    assert measuring.seconds(lambda: next(ticks), cpu) == 2
    measuring.count_cpu_time()
    assert measuring.clock is time.process_time and measuring.torch.get_num_threads() == 1


@pytest.mark.slow
@pytest.mark.parametrize(("part", "tables"), [("correctness", 1), ("speed", 7)])
def test_gpu_script_all_stages_run_on_a_cpu(part, tables, tmp_path):
    done = gpu_sh("--part", part, "--cpu", tmp_path, PYTHON=sys.executable, FINETUNE_CACHE=tmp_path / "cache")
    assert done.returncode == 0, done.stdout[-3000:]
    (report,) = tmp_path.glob("*.md")
    assert report.read_text().count("| --- ") and report.read_text().count("\n## ") == tables
