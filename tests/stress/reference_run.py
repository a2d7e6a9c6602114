"""Compare what two checkouts compute in training, bit for bit.

    git worktree add --detach ../reference 55a9cab
    python tests/stress/reference_run.py --before ../reference

Runs each scenario with the command line of both checkouts in turn, 40 steps of tiny networks on one CPU
thread, and compares what the runs left: G, D, G_ema, the teacher, Adam's moments, ADA's state, the mean path
length, the norms behind `auto:`, random states, the order of the data, the log and the events. Times and
memory are left out.

Differences that are intended since 55a9cab. What has only been added is left out (ADDED): the averages of
post-hoc EMA, and the shape of the first block in the arguments of a new discriminator. The others are not
reached by these scenarios:

- After a run was killed, ticks and snapshots come at the same numbers of images as without the kill.
- The learning rates in a state file are those of the last step, not those after the warm-up.

Diagnostics begin again after a rollback (RESTARTED), which is left out of the comparison of such a run.

On CPUs, the features of StyleGAN2 are channels-last now, and 1x1 convolutions of images are products of
matrices: the same sums in another order. Both are disabled here (SITECUSTOMIZE).
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
STEPS, BATCH = 40, 4

# Parts of a state file: name here -> names it has had. Anything that is renamed gets a second name.
PARTS = {
    "networks": ("networks",), "opt_G": ("opt_G",), "opt_D": ("opt_D",), "ada": ("ada",),
    "path_mean": ("path_mean",), "sd_norms": ("sd_norms",), "nimg": ("nimg",), "step": ("step",),
    "random": ("random",), "sampler": ("sampler",),
}  # fmt: skip
# Beginnings of keys of the log.
RESTARTED = ("update_cosine", "sd_cosine", "sd_ratio", "straightness", "path_per_kimg")
TIMES = ("sec", "img_per_sec", "sec_per_phase", "memory_gib")  # keys of the log that differ from run to run
EVENT = ("event", "nimg", "step", "number", "lr_G", "lr_D")  # keys of an event that are compared

TINY = {"cbase": 128, "cmax": 8, "z_dim": 8, "w_dim": 8, "map_depth": 2}
# Options that 55a9cab needs and later checkouts do not have: w has as many dimensions as z.
REMOVED = ("w_dim",)
COMMON = {
    "batch": BATCH, "kimg": STEPS * BATCH / 1000, "tick": 8 * BATCH / 1000, "snap": 100, "device": "cpu",
    "workers": 0, "seed": 3, "save_every_min": 0, "sd_backbone": "l2", "sd_weight": 0.5,
    "metrics": "none",
}  # fmt: skip
SCRATCH_2 = {"scratch": "stylegan2", "resolution": 16, **TINY}
# Augmentation that is in use after four steps: D's mean sign is above a target of 0 now and then.
ADA = {"aug": "ada", "target": 0.0, "augpipe": "bgc"}
RESUME = {"resume": str(GOLDEN / "stylegan2-ada-32.pkl"), "data": "labels32.zip", "fit": "stretch"}

# Each scenario is a list of runs; the later ones resume the first. `poison` makes a weight NaN after so many
# optimizer steps.
SCENARIOS: dict[str, list[dict[str, Any]]] = {
    "stylegan2 with labels, mixing and path length": [
        {**SCRATCH_2, **ADA, "data": "labels16.zip", "cond": True, "mirror": True, "lr_warmup_kimg": 0.05}
    ],
    "stylegan3-t": [{"scratch": "stylegan3-t", "resolution": 16, **TINY, **ADA}],
    "stylegan3-r from scratch with blur": [{"scratch": "stylegan3-r", "resolution": 16, **TINY, **ADA}],
    "auto: with a teacher of its own": [
        {**RESUME, **ADA, "sd_weight": "auto:0.2", "sd_teacher_kimg": 0.1, "sd_interval": 2, "freezed": 1}
    ],
    "initial teacher and a new discriminator": [
        {**RESUME, "sd_teacher": "initial", "new_d": True, "d_warmup_kimg": 0.04, "lr_warmup_kimg": 0.06}
    ],
    "micro-batches": [
        {**SCRATCH_2, **ADA, "batch": 8, "batch_gpu": 4, "kimg": 0.32, "sd_weight": "auto:0.2"}
    ],
    "two processes": [
        {**SCRATCH_2, **ADA, "batch": 8, "batch_gpu": 4, "kimg": 0.32, "sd_weight": "auto:0.2", "gpus": 2}
    ],
    "one rollback": [
        {**SCRATCH_2, **ADA, "snap": 1, "on_divergence": "rollback", "lr_warmup_kimg": 0.1, "poison": 50}
    ],
    "one resume": [
        {**SCRATCH_2, **ADA, "kimg": 0.08, "sd_weight": "auto:0.2", "sd_teacher_kimg": 0.1},
        {"kimg": 0.16, "lr_warmup_kimg": 0.2, "glr": 0.001},
    ],
}

# Networks and constructor arguments that 55a9cab does not save.
ADDED = {"power-0.05", "power-0.10", "base_shape"}

# Imported by every Python process of a run. After optimizer step POISON one weight of G becomes NaN, once;
# features are in planes, as those of 55a9cab are.
SITECUSTOMIZE = """
import os, torch
left, step = [int(os.environ.get("POISON", 0))], torch.optim.Adam.step
def poisoned(self, *args, **kwargs):
    result = step(self, *args, **kwargs)
    left[0] -= 1
    if left[0] == 0:
        with torch.no_grad():
            self.param_groups[0]["params"][0].fill_(float("nan"))
    return result
torch.optim.Adam.step = poisoned
from finetune.models import stylegan2
from torch_utils.ops import conv2d_gradfix
stylegan2.features_format = lambda *given: torch.contiguous_format
conv2d_gradfix._is_thin = lambda *given: False
"""


def write_images(path: Path, resolution: int, num_classes: int = 0, count: int = 12) -> None:
    """Write a zip of random images, with labels if there are classes."""
    rng = np.random.default_rng(resolution)
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(count):
            coarse = rng.integers(0, 256, size=[4, 4, 3], dtype=np.uint8)
            stream = io.BytesIO()
            Image.fromarray(coarse).resize((resolution, resolution), Image.Resampling.BILINEAR).save(
                stream, "PNG"
            )
            archive.writestr(f"{i:03d}.png", stream.getvalue())
        if num_classes:
            labels = [[f"{i:03d}.png", i % num_classes] for i in range(count)]
            archive.writestr("dataset.json", json.dumps({"labels": labels}))


def words(options: dict[str, Any]) -> list[str]:
    """The options as a command line has them."""
    found = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        found += (
            [f"--{flag}" if value else f"--no-{flag}"]
            if isinstance(value, bool)
            else [f"--{flag}", str(value)]
        )
    return found


def train(checkout: Path, runs: list[dict[str, Any]], work: Path, outdir: Path) -> Path:
    """Carry out one scenario with a checkout and return its run folder."""
    for number, options in enumerate(runs):
        options = dict(options)
        environment = {**os.environ, "PYTHONPATH": f"{checkout}{os.pathsep}{work}", "OMP_NUM_THREADS": "1"}
        environment["POISON"] = str(options.pop("poison", 0))
        if number == 0:
            options = {**COMMON, "data": "plain16.zip", **options, "outdir": str(outdir)}
            options["data"] = str(work / options["data"])
        else:
            (run_dir,) = outdir.iterdir()
            options["resume"] = str(run_dir)
        fields = (checkout / "finetune" / "config.py").read_text(encoding="utf-8")
        options = {name: options[name] for name in options if name not in REMOVED or f" {name}: " in fields}
        command = [sys.executable, "-m", "finetune", "train", *words(options)]
        done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{checkout}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
    (run_dir,) = outdir.iterdir()
    return run_dir


def outcome(run_dir: Path) -> dict[str, Any]:
    """What a run left that has to be equal: the newest state, the log and the events."""
    path = max(run_dir.glob("training-state-*.pt"), key=lambda path: path.name)
    content = torch.load(path, map_location="cpu", weights_only=True)
    state = {name: next(content[key] for key in keys if key in content) for name, keys in PARTS.items()}
    for name in ("opt_G", "opt_D"):
        state[name] = state[name]["state"]
    lines = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    events = run_dir / "events.jsonl"
    happened = [json.loads(line) for line in events.read_text().splitlines()] if events.is_file() else []
    left_out = RESTARTED if any(each["event"] == "rollback" for each in happened) else ()
    log = [
        {key: value for key, value in line.items() if key not in TIMES and not key.startswith(left_out)}
        for line in lines
    ]
    return {
        "state": state,
        "log": log,
        # Resumes were recorded in about.json before they became events.
        "events": [{key: each.get(key) for key in EVENT} for each in happened if each["event"] != "resume"],
    }


def differences(a: Any, b: Any, name: str = "") -> list[str]:
    """Name every place where two nested values are not equal."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b):
            return []
        size = float((a.double() - b.double()).abs().max()) if a.shape == b.shape and a.numel() else "shape"
        return [f"{name}: differs by {size}"]
    if isinstance(a, dict) and isinstance(b, dict):
        found = [
            f"{name}/{key}: only in one of them" for key in sorted({*map(str, a.keys() ^ b.keys())} - ADDED)
        ]
        return found + [
            each for key in a if key in b for each in differences(a[key], b[key], f"{name}/{key}")
        ]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        found = [] if len(a) == len(b) else [f"{name}: {len(a)} and {len(b)} items"]
        return found + [
            each for i, (x, y) in enumerate(zip(a, b)) for each in differences(x, y, f"{name}/{i}")
        ]
    return [] if a == b else [f"{name}: {a!r} and {b!r}"]


def check_reached(name: str, found: dict[str, Any]) -> None:
    """Raise where a scenario did not do what it is for."""
    state, kinds = found["state"], [event["event"] for event in found["events"]]
    reached = {
        "40 steps": state["step"] == STEPS,
        "distillation": any("loss_sd" in line for line in found["log"]),
        "path length": "stylegan3" in name or float(state["path_mean"]) != 0,
        "augmentation": "new discriminator" in name or state["ada"]["p"] > 0,
        "norms": ("auto" in name) <= (float(state["sd_norms"][1]) > 0),
        "teacher": ("teacher" in name) <= ("teacher" in state["networks"]),
        "rollback": ("rollback" in name) == ("rollback" in kinds),
    }
    if missing := [what for what, is_reached in reached.items() if not is_reached]:
        raise SystemExit(f"{name}: the scenario no longer reaches {', '.join(missing)}.")


def compare(before: Path, after: Path, only: str = "") -> int:
    """Run the scenarios whose names contain `only` and return how many of them differ."""
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "sitecustomize.py").write_text(SITECUSTOMIZE, encoding="utf-8")
        write_images(work / "plain16.zip", 16)
        write_images(work / "labels16.zip", 16, 3)
        write_images(work / "labels32.zip", 32, 3)
        for number, (name, runs) in enumerate(SCENARIOS.items()):
            if only not in name:
                continue
            started = time.monotonic()
            left = [
                outcome(train(checkout.resolve(), runs, work, work / f"{number}-{side}"))
                for side, checkout in (("before", before), ("after", after))
            ]
            check_reached(name, left[0])
            found = differences(*left)
            print(
                f"{name}: {'equal' if not found else 'DIFFERENT'} ({time.monotonic() - started:.0f} s)",
                flush=True,
            )
            for line in found[:12]:
                print(f"    {line}", flush=True)
            failed += bool(found)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", type=Path, required=True, help="checkout to compare with")
    parser.add_argument("--after", type=Path, default=ROOT, help="checkout to check (default: this one)")
    parser.add_argument("--only", default="", help="run the scenarios whose names contain this text")
    given = parser.parse_args()
    return 1 if compare(given.before, given.after, given.only) else 0


if __name__ == "__main__":
    sys.exit(main())
