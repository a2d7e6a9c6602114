"""Seconds of each phase of a training step, and images a second, for the three families.

    python benchmarks/bench_step.py --out benchmarks/results/step_<machine>_<yyyymm>.md

The phases of all families are measured in turn in one process, so that what else the machine does hits all
of them alike; medians are reported. Images a second follow from the medians and the intervals of the lazy
phases: batch / (Gmain + Greg/4 + Dmain + Dreg/16). Random weights, the bundled pictures, no augmentation.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch

import finetune
from finetune.config import FAMILIES, TrainConfig
from finetune.train import loop
from finetune.train.run import Prepared, prepare
from finetune.train.watch import Watch

ROOT = Path(__file__).resolve().parents[1]


def build(family: str, options: argparse.Namespace) -> Prepared:
    """A run of one family at the sizes asked for, ready to step."""
    return prepare(
        TrainConfig(
            data=str(ROOT / "finetune" / "demo" / "faces-3d.zip"),
            scratch=family,
            resolution=options.resolution,
            fit="stretch",
            cbase=options.cbase * (2 if family == "stylegan3-r" else 1),
            cmax=options.cmax * (2 if family == "stylegan3-r" else 1),
            batch=options.batch,
            aug="noaug",
            sd_weight=options.sd_weight,
            sd_backbone=options.sd_backbone,
            device=options.device,
            seed=options.seed,
            workers=0,
        )
    )


def measure(prepared: Prepared, repeats: dict[str, list[float]], device: torch.device) -> None:
    """Run every phase once and add its seconds to `repeats`."""
    state, plan = prepared.state, prepared.plan
    watch = Watch(device, 1e9, lambda state, numbers: None)
    img = torch.rand([plan.batch, prepared.facts.channels, *[prepared.facts.resolution] * 2], device=device)
    reals = list(zip((img * 2 - 1).split(plan.batch_gpu), plan.labels(plan.batch).split(plan.batch_gpu)))
    phases = {
        "Gmain": lambda: loop.generator_step(state, plan, watch),
        "Dmain": lambda: loop.discriminator_step(state, plan, reals, watch),
        "Dreg": lambda: loop.r1_step(state, plan, reals, watch),
    }
    if plan.path_interval:
        phases["Greg"] = lambda: loop.path_length_step(state, plan, watch)
    for name, phase in phases.items():
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        phase()
        if device.type == "cuda":
            torch.cuda.synchronize()
        repeats.setdefault(name, []).append(time.perf_counter() - started)


def summary(prepared: Prepared, repeats: dict[str, list[float]]) -> dict:
    """Medians in milliseconds and what they mean in images a second."""
    plan = prepared.plan
    medians = {name: statistics.median(values) for name, values in repeats.items()}
    seconds = medians["Gmain"] + medians["Dmain"] + medians["Dreg"] / plan.r1_interval
    if plan.path_interval:
        seconds += medians["Greg"] / plan.path_interval
    return {
        "phases_ms": {name: round(value * 1000, 1) for name, value in medians.items()},
        "img_per_sec": round(plan.batch / seconds, 2),
        "repeats": len(repeats["Gmain"]),
    }


def machine(device: torch.device) -> dict:
    """Where this was measured."""
    cpu = platform.processor()
    if (info := Path("/proc/cpuinfo")).is_file():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = f"{names[0]}, {len(names)} cores" if names else cpu
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "finetune": finetune.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--families", nargs="+", default=FAMILIES, choices=FAMILIES)
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--cbase", type=int, default=4096, help="doubled for stylegan3-r")
    parser.add_argument("--cmax", type=int, default=128, help="doubled for stylegan3-r")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--sd-weight", type=float, default=0.0)
    parser.add_argument("--sd-backbone", default="efficientnet-lite0")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the table and the JSON to this Markdown file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)

    runs = {family: build(family, options) for family in options.families}
    repeats: dict[str, dict[str, list[float]]] = {family: {} for family in runs}
    for prepared in runs.values():  # the first pass finds memory and kernels
        measure(prepared, {}, device)
    for _ in range(options.repeats):
        for family, prepared in runs.items():
            measure(prepared, repeats[family], device)

    results = {family: summary(prepared, repeats[family]) for family, prepared in runs.items()}
    settings = {key: value for key, value in vars(options).items() if key != "out"}
    lines = ["| family | images a second | " + " | ".join(("Gmain", "Greg", "Dmain", "Dreg")) + " (ms) |"]
    lines.append("| --- " * 6 + "|")
    for family, result in results.items():
        phases = [str(result["phases_ms"].get(name, "–")) for name in ("Gmain", "Greg", "Dmain", "Dreg")]
        lines.append(f"| {family} | {result['img_per_sec']} | " + " | ".join(phases) + " |")
    print("\n".join(lines))
    if options.out:
        record = {"machine": machine(device), "settings": settings, "results": results}
        text = "# Training step\n\n`python benchmarks/bench_step.py`; settings and versions stand below.\n\n"
        text += "\n".join(lines) + "\n\n```json\n" + json.dumps(record, indent=1, default=str) + "\n```\n"
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
