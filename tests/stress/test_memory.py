"""Train a tiny network for STRESS_STEPS (2,000) steps: the memory of its processes must not grow.

A tiny StyleGAN2 with ADA, path length, R1 and self-distillation, two data workers that decode images (the
set does not fit the cache), a line in the log every 20 steps and a snapshot with its state every 200. Twice
a second the resident memory of the process and its workers is read from /proc, without the pages of files,
which the system takes and gives back as it likes. After the first quarter of the steps a line is fitted, by
the median of all slopes. A leak raises the lowest value that is seen, a peak does not: both the line and
the lowest of the last quarter against that of the second are limited. About eight minutes on two cores.
Linux only.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytestmark = [
    pytest.mark.stress,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc"),
]
ROOT = Path(__file__).resolve().parents[2]
STEPS = int(os.environ.get("STRESS_STEPS", "2000"))
ALLOWED_KIB = 512  # a 1,000 steps, all processes together
BATCH, TICK_STEPS, SAVE_STEPS = 4, 20, 200
TINY = (
    "--scratch stylegan2 --resolution 64 --cbase 256 --cmax 16 --z-dim 16 --map-depth 2 --aug ada "
    "--target 0 "  # so that p rises at once, and the pipe has something to do
    "--sd-backbone l2 --sd-weight 0.1 --sd-interval 2 --device cpu --workers 2 --keep 2 "
    "--metrics none"
).split()
SET_BYTES = 257 << 20  # decoded: more than the cache holds
START = 0.25  # fraction of the steps that is ignored


def write_set(path: Path) -> int:
    """Write a zip of random 64×64 images; return their number."""
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
    """Return the resident memory that belongs to no file, None if the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:"))]
    return sum(found) if found else None


def children_of(pid: int) -> list[int]:
    """List the child processes, the oldest first."""
    try:
        return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def steps_done(outdir: Path) -> int:
    """Return the steps by the last line of the log."""
    for path in outdir.glob("0*/log.jsonl"):
        lines = path.read_text(encoding="utf-8").splitlines()
        if lines:
            return json.loads(lines[-1])["step"]
    return 0


def watch(process: subprocess.Popen, outdir: Path) -> list[dict[str, int]]:
    """Return samples `{"step", "main", "worker 0", "worker 1", "all"}` (KiB) of a run until it ends."""
    samples = []
    while process.poll() is None:
        time.sleep(0.5)
        workers = [resident_kib(pid) for pid in children_of(process.pid)]
        values = {"main": resident_kib(process.pid)}
        values |= {f"worker {number}": value for number, value in enumerate(workers)}
        if len(workers) == 2 and None not in values.values() and (step := steps_done(outdir)):
            sample = {name: value or 0 for name, value in values.items()}
            samples.append({"step": step, **sample, "all": sum(sample.values())})
    return samples


def growth(samples: list[dict[str, int]], name: str) -> dict[str, Any]:
    """Return the growth of the memory of one process after the start, in KiB."""
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


def test_train_memory_is_constant(tmp_path):
    data, outdir, log = tmp_path / "set.zip", tmp_path / "runs", tmp_path / "log.txt"
    write_set(data)
    words = [sys.executable, "-m", "finetune", "train", "--data", data, "--outdir", outdir, *TINY]
    words += ["--batch", BATCH, "--kimg", STEPS * BATCH / 1000]
    words += ["--tick", TICK_STEPS * BATCH / 1000, "--snap", SAVE_STEPS // TICK_STEPS]
    with open(log, "wb") as stream:
        process = subprocess.Popen(list(map(str, words)), stdout=stream, stderr=stream, cwd=ROOT)
        samples = watch(process, outdir)
    assert process.returncode == 0 and steps_done(outdir) == STEPS, log.read_text(errors="replace")[-3000:]
    for name in ("main", "worker 0", "worker 1", "all"):
        print(growth(samples, name))
    together = growth(samples, "all")
    between = STEPS / 2 / 1000  # thousands of steps from the second quarter to the last
    assert together["kib_per_1000_steps"] <= ALLOWED_KIB
    assert together["lowest_kib"] / between <= ALLOWED_KIB
