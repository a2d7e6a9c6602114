"""Measure images per second of `finetune train` alone and beside a process that keeps one core busy.

    python benchmarks/bench_busy.py --out benchmarks/results/busy_<machine>_<yyyymm>.md

Each run is a subprocess that trains the demo checkpoint at batch 8; the four kinds alternate, and the
table has medians. "Busy waiting" is what OpenMP does by default (GOMP_SPINCOUNT=300000): its
threads keep their cores while they wait. `finetune` sets OMP_WAIT_POLICY=passive unless it is set already.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import _checkout  # noqa: F401
import torch
from measuring import ROOT, machine, table

DEMO = ROOT / "finetune" / "demo"
WAITING = {"as finetune waits": {}, "busy waiting": {"GOMP_SPINCOUNT": "300000"}}
TICK = 16  # images, of runs of this length
START_SEC = 300  # for everything before the first tick


def speed(environment: dict[str, str], seconds: float) -> float:
    """Return images per second of training, from the first log line on, for `seconds` or until it ends."""
    with tempfile.TemporaryDirectory() as folder:
        data = ["--resume", str(DEMO / "faces-3d-64.pkl"), "--data", str(DEMO / "faces-3d.zip")]
        options = [
            "--outdir",
            folder,
            "--batch",
            "8",
            "--kimg",
            "0.32",
            "--sd-weight",
            "0",
            "--metrics",
            "none",
        ]
        run = subprocess.Popen(
            [sys.executable, "-m", "finetune", "train", *data, *options, "--device", "cpu"],
            env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
            stdout=subprocess.DEVNULL,
        )
        try:
            first = wait_for_line(Path(folder), run)
            with contextlib.suppress(subprocess.TimeoutExpired):
                run.wait(seconds)
            last = lines(Path(folder))[-1]
        finally:
            run.kill()
            run.wait()
    # Of a run so slow that no second tick came, an upper bound.
    return max(last["nimg"] - first["nimg"], TICK) / max(last["sec"] - first["sec"], seconds / 2)


def wait_for_line(folder: Path, run: subprocess.Popen) -> dict:
    end = time.monotonic() + START_SEC
    while time.monotonic() < end and run.poll() is None:
        if found := lines(folder):
            return found[0]
        time.sleep(0.2)
    raise RuntimeError(f"training wrote no line into its log (exit code {run.poll()})")


def lines(folder: Path) -> list[dict]:
    text = "".join(path.read_text() for path in folder.glob("*/log.jsonl"))
    return [json.loads(line) for line in text.split("\n")[:-1]]


@contextlib.contextmanager
def busy_process(wanted: bool) -> Iterator[None]:
    """Keep one core busy meanwhile."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if wanted else None
    try:
        yield
    finally:
        if process is not None:
            process.kill()
            process.wait()


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=15.0, help="of each run, after its first tick")
    parser.add_argument("--out", type=Path, help="write the table to this Markdown file")
    options = parser.parse_args()
    speeds: dict[tuple[str, bool], list[float]] = {}
    loads = []
    for _ in range(options.rounds):
        for name, environment in WAITING.items():
            for is_busy in (False, True):
                loads.append(os.getloadavg()[0])
                with busy_process(is_busy):
                    speeds.setdefault((name, is_busy), []).append(speed(environment, options.seconds))
                print(name, is_busy, f"{speeds[name, is_busy][-1]:.2f} images/s", flush=True)
    rows = []
    for name in WAITING:
        alone, beside = (statistics.median(speeds[name, is_busy]) for is_busy in (False, True))
        rows.append([name, f"{alone:.2f}", f"{beside:.2f}", f"{alone / beside:.2f}×"])
    text = table(["threads", "alone (images/s)", "beside a busy process", "slower by"], rows)
    print(text)
    if options.out:
        facts = machine(torch.device("cpu"))
        setting = ", ".join(f"{key} {value}" for key, value in facts.items() if value is not None)
        bound = f"A speed of {TICK / (options.seconds / 2):.2f} is an upper bound: no second tick came."
        other = f"{bound} Load average before each run: {min(loads):.1f} to {max(loads):.1f}."
        head = f"# Training beside a busy process\n\n`python {' '.join(sys.argv)}`"
        options.out.write_text(f"{head}\n\n{text}\n\n{setting}\n{other}\n")


if __name__ == "__main__":
    main()
