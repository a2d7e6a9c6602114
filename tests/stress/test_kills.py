"""Kill a training run with SIGKILL at random moments, resume it, and compare the end with an undisturbed run.

A tiny StyleGAN2 with every kind of state is trained once without disturbance, and once with a kill after a
random time until STRESS_KILLS (100) of them have landed; then to its end. Four of five times count from the
moment at which training begins, the fifth from the start of the process. Saves are frequent, so that kills
land inside them. About ten seconds a kill on one core.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.train import checkpointing

pytestmark = pytest.mark.stress
ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "finetune" / "demo" / "faces-flat.zip"
KILLS = int(os.environ.get("STRESS_KILLS", "100"))
KIMG, LONGEST_SEC, SEED = 20, 3, 0
TINY = (
    "--scratch stylegan2 --resolution 64 --fit stretch --cbase 256 --cmax 16 --z-dim 16 "
    "--map-depth 2 --batch 4 --aug ada --target 0 --augpipe blit --sd-backbone l2 --sd-weight auto:0.2 "
    "--device cpu --workers 2 --snap 1 --keep 2 --metrics none"
).split()
PARTS = "networks opt_G opt_D ada path_mean sd_norms nimg step random sampler".split()


def command(*words: object) -> list[str]:
    """Return `finetune train` with further words."""
    return [sys.executable, "-m", "finetune", "train", *map(str, words)]


def new_run(outdir: Path, kimg: float = KIMG) -> list[str]:
    """Return the command of a new run; a tick, and so a save, every eight images."""
    return command("--data", IMAGES, "--outdir", outdir, *TINY, "--kimg", kimg, "--tick", 0.008)


def last_state(run_dir: Path) -> dict[str, Any]:
    """Read the newest valid state of a run."""
    found = checkpointing.find_state(run_dir)
    assert found is not None, f"{run_dir} has no state"
    return found.content


def differences(a: Any, b: Any, name: str = "") -> list[str]:
    """Return the names of what differs in a single bit."""
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [name]
    if isinstance(a, dict):
        return [found for key in a | b for found in differences(a.get(key), b.get(key), f"{name}/{key}")]
    if isinstance(a, list):
        pairs = enumerate(zip(a, b, strict=True))
        return [found for index, (x, y) in pairs for found in differences(x, y, f"{name}/{index}")]
    return [] if a == b else [name]


def run_in(outdir: Path) -> Path | None:
    """Find the run that has saved a first state; runs killed before that are ignored."""
    found = [path for path in sorted(outdir.glob("0*")) if checkpointing.states_of(path)]
    return found[0] if found else None


def until_it_trains(process: subprocess.Popen[bytes]) -> None:
    """Wait for the line that names the run folder."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(b"Run folder:"):
            return


def disturb(outdir: Path) -> dict[str, int]:
    """Start, kill and resume a run; return counts of what happened."""
    rng = random.Random(SEED)
    seen = dict(kills=0, in_a_save=0, before_the_first_state=0, without_state=0, went_back=0, finished=0)
    newest = -1
    while seen["kills"] < KILLS:
        run_dir = run_in(outdir)
        words = new_run(outdir) if run_dir is None else command("--resume", run_dir)
        pipe = subprocess.PIPE
        with subprocess.Popen(words, stdout=pipe, stderr=pipe, cwd=ROOT) as process:
            # Starting takes long; most kills are to come during training and saves.
            if seen["kills"] % 5:
                until_it_trains(process)
            try:
                process.wait(rng.uniform(0, LONGEST_SEC))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                seen["kills"] += 1
            else:
                assert process.stderr is not None
                assert process.returncode == 0, process.stderr.read().decode()[-2000:]
                seen["finished"] += 1
                break
        run_dir = run_in(outdir)
        if run_dir is None:
            seen["before_the_first_state"] += 1
            continue
        left = [path for path in run_dir.glob(".*.tmp")]
        seen["in_a_save"] += bool(left)
        for path in left:
            path.unlink()
        try:
            nimg = last_state(run_dir)["nimg"]
        except Exception as error:
            print(f"no valid state after kill {seen['kills']}: {error}")
            seen["without_state"] += 1
            continue
        seen["went_back"] += nimg < newest
        newest = max(nimg, newest)
        print(f"kill {seen['kills']}: {nimg} images", flush=True)
    return seen


def test_resume_after_kills_is_bit_exact(tmp_path):
    seen = disturb(tmp_path / "killed")
    print(seen)
    assert seen["without_state"] == 0 and seen["went_back"] == 0
    run_dir = run_in(tmp_path / "killed")
    assert run_dir is not None, "no run has saved a first state"
    # Both runs end 200 images after the last kill.
    kimg = min(KIMG, (last_state(run_dir)["nimg"] + 200) // 4 * 4 / 1000)
    if not seen["finished"]:
        resume = command("--resume", run_dir, "--kimg", kimg)
        subprocess.run(resume, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    whole = tmp_path / "whole"
    subprocess.run(new_run(whole, kimg), check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    a, b = last_state(next(iter(whole.glob("0*")))), last_state(run_dir)
    assert a["nimg"] == round(kimg * 1000)
    assert [found for part in PARTS for found in differences(a[part], b[part], part)] == []
