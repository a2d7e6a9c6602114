"""Train a tiny network for a few thousand steps and look at the memory of its processes: is it flat?

    scripts/memory --out benchmarks/results/memory_<machine>_<yyyymm>.md

A tiny StyleGAN2 with ADA, path length, R1 and self-distillation, two data workers that decode pictures (the
set is too large to be kept in memory), a line in the log every 20 steps and a snapshot with its state every
200. Every half second the memory of the process and of its workers is read from /proc: what is resident and
belongs to them, without the pages of files, which the system takes and gives back as it likes. The first
quarter of the steps is the start; after it a straight line is fitted, by the median of all slopes. A peak is
no growth: what leaks never comes back, and lifts the lowest that is seen. Exits with 1 where memory grows by
more than `--allowed` a 1,000 steps, by the line or by the lowest of the last quarter against that of the
second; with 2 where training failed. Linux only.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import ROOT, machine, table, write_report
from PIL import Image

BATCH, TICK_STEPS, SAVE_STEPS = 4, 20, 200
TINY = (
    "--scratch stylegan2 --resolution 64 --cbase 256 --cmax 16 --z-dim 16 --w-dim 16 --map-depth 2 --aug ada "
    "--target 0 "  # so that p rises at once, and the pipe has something to do
    "--sd-backbone l2 --sd-weight 0.1 --sd-interval 2 --device cpu --workers 2 --keep 2"
).split()
SET_BYTES = 257 << 20  # decoded: more than is read into memory
START = 0.25  # of the steps, which are not looked at


def write_set(path: Path) -> int:
    """A zip of random 64×64 pictures; how many."""
    rng = np.random.RandomState(0)
    count = SET_BYTES // (64 * 64 * 3) + 1
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(count):
            small = Image.fromarray(rng.randint(0, 256, (8, 8, 3), np.uint8))
            stream = io.BytesIO()
            small.resize((64, 64), Image.Resampling.BICUBIC).save(stream, "TIFF")
            archive.writestr(f"{number:05}.tif", stream.getvalue())
    return count


def resident_kib(pid: int) -> int | None:
    """Resident memory of a process that belongs to no file, None where it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:"))]
    return sum(found) if found else None


def children_of(pid: int) -> list[int]:
    """The processes that a process has started, the oldest first."""
    try:
        return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def steps_done(outdir: Path) -> int:
    """Steps by the last line of the log."""
    for path in outdir.glob("0*/log.jsonl"):
        lines = path.read_text(encoding="utf-8").splitlines()
        if lines:
            return json.loads(lines[-1])["step"]
    return 0


def watch(process: subprocess.Popen, outdir: Path, interval: float) -> list[dict[str, int]]:
    """Samples `{"step", "main", "worker 0", "worker 1", "all"}` (KiB) while a run trains."""
    samples = []
    while process.poll() is None:
        time.sleep(interval)
        workers = [resident_kib(pid) for pid in children_of(process.pid)]
        values = {"main": resident_kib(process.pid)}
        values |= {f"worker {number}": value for number, value in enumerate(workers)}
        if len(workers) == 2 and None not in values.values() and (step := steps_done(outdir)):
            sample = {name: value or 0 for name, value in values.items()}
            samples.append({"step": step, **sample, "all": sum(sample.values())})
    return samples


def growth(samples: list[dict[str, int]], name: str) -> dict[str, Any]:
    """How the memory of one process goes on after the start; a straight line, KiB."""
    last = samples[-1]["step"]
    later = [each for each in samples if each["step"] >= START * last]
    steps = np.array([each["step"] for each in later], dtype=float)
    memory = np.array([each[name] for each in later], dtype=float)
    thin = slice(None, None, max(1, len(later) // 400))
    runs, rises = (values[thin, None] - values[None, thin] for values in (steps, memory))
    slope = float(np.median(rises[runs > 0] / runs[runs > 0])) * 1000
    return {
        "process": name,
        "at_first_kib": samples[0][name],
        "after_start_kib": int(memory[0]),
        "at_end_kib": int(memory[-1]),
        "max_growth_kib": int(memory.max() - memory[0]),
        "lowest_kib": int(memory[steps >= 0.75 * last].min() - memory[steps < 0.5 * last].min()),
        "kib_per_1000_steps": round(slope, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--interval", type=float, default=0.5, help="seconds between two looks")
    parser.add_argument("--allowed", type=float, default=512, help="KiB a 1,000 steps, all together")
    parser.add_argument("--out", type=Path, help="write what was seen to this Markdown file")
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        data, outdir = Path(folder) / "set.zip", Path(folder) / "runs"
        count = write_set(data)
        words = [sys.executable, "-m", "finetune", "train", "--data", data, "--outdir", outdir, *TINY]
        words += ["--batch", BATCH, "--kimg", options.steps * BATCH / 1000]
        words += ["--tick", TICK_STEPS * BATCH / 1000, "--snap", SAVE_STEPS // TICK_STEPS]
        log = Path(folder) / "log.txt"
        with open(log, "wb") as stream:
            process = subprocess.Popen(list(map(str, words)), stdout=stream, stderr=stream, cwd=ROOT)
            samples = watch(process, outdir, options.interval)
        if process.returncode or steps_done(outdir) != options.steps:
            print(log.read_text(errors="replace")[-3000:], file=sys.stderr)
            sys.exit(2)
    results = [growth(samples, name) for name in ("main", "worker 0", "worker 1", "all")]
    rows = [[each["process"], *(f"{value:,}" for value in list(each.values())[1:])] for each in results]
    between = (
        options.steps / 2 / 1000
    )  # thousands of steps from the middle of one quarter to that of the other
    together = results[-1]
    flat = max(together["kib_per_1000_steps"], together["lowest_kib"] / between) <= options.allowed
    text = table(
        [
            "process",
            "at the first tick, KiB",
            f"after {START:.0%} of the steps",
            "at the end",
            "most above the start",
            "lowest, last quarter against second",
            "KiB a 1,000 steps",
        ],
        rows,
    )
    verdict = (
        f"{options.steps:,} steps, {len(samples)} looks, {count:,} pictures: after the start, memory is "
        f"{'flat' if flat else 'NOT flat'} (at most {options.allowed:g} KiB a 1,000 steps)."
    )
    print(f"{text}\n\n{verdict}")
    if options.out:
        thinned = samples[:: max(1, len(samples) // 40)]
        record = {
            "machine": machine(torch.device("cpu")),
            "train": " ".join([*TINY, f"--batch {BATCH}"]),
            "sec": round(time.monotonic() - started),
            "results": results,
            "samples": [json.dumps(each) for each in thinned],
        }
        write_report(
            options.out,
            "Memory of a run",
            f"scripts/memory {' '.join(sys.argv[1:])}".strip(),
            [text, verdict],
            record,
        )
    sys.exit(not flat)


if __name__ == "__main__":
    main()
