"""Seconds of each phase of a training step, images a second and peak memory, for the three families.

    python benchmarks/bench_step.py --out benchmarks/results/step_<machine>_<yyyymm>.md

Arms: `naive` (benchmarks/naive.py, modulated convolutions grouped by sample: what plain-torch code bases
of the family run), `ref` (our plain torch), `auto` (native kernels where there are any). The phases of all
families and arms are measured in turn in one process, so that what else the machine does hits all of them
alike; medians are reported. Images a second follow from the medians and the intervals of the lazy phases:
batch / (Gmain + Greg/4 + Dmain + Dreg/16). Memory is that of a process of its own for each arm: what two
steps need above the process that is ready to step. Random weights, the bundled pictures, no augmentation.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import naive
import torch
from measuring import ROOT, machine, seconds, table, write_report

from finetune.config import FAMILIES, TrainConfig
from finetune.train import loop
from finetune.train.run import Prepared, prepare
from finetune.train.watch import Watch
from torch_utils.ops import impl

ARMS = ("naive", "ref", "auto")
PHASES = ("Gmain", "Greg", "Dmain", "Dreg")


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


@contextlib.contextmanager
def running(arm: str, prepared: Prepared) -> Iterator[Prepared]:
    """Inside the block, the run steps as the arm does."""
    if arm == "naive":
        synthesis = {**prepared.plan.synthesis, "fused_modconv": True}
        plan = dataclasses.replace(prepared.plan, synthesis=synthesis)
        with naive.instead_of_ours():
            yield dataclasses.replace(prepared, plan=plan)
        return
    impl.set_default_impl(arm)
    try:
        yield prepared
    finally:
        impl.set_default_impl(None)


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
        repeats.setdefault(name, []).append(seconds(phase, device))


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


def peak_memory(family: str, arm: str, options: argparse.Namespace) -> int | None:
    """MiB that two steps need above a process that is ready to step, measured in a process of its own.

    None where the process did not live to tell: the machine has too little memory.
    """
    command = [sys.executable, __file__, "--only-memory", "--families", family, "--arms", arm]
    for name in (
        "resolution",
        "cbase",
        "cmax",
        "batch",
        "sd_weight",
        "sd_backbone",
        "threads",
        "device",
        "seed",
    ):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    if done.returncode == -signal.SIGKILL:
        return None
    done.check_returncode()
    return round(float(done.stdout.split()[-1]))


def only_memory(options: argparse.Namespace, device: torch.device) -> None:
    """Print the MiB of one family and arm: resident memory on a CPU, torch's allocations on a GPU."""
    prepared = build(options.families[0], options)
    with running(options.arms[0], prepared) as run:
        if device.type == "cuda":
            before = torch.cuda.memory_allocated(device)
            for _ in range(2):
                measure(run, {}, device)
            print((torch.cuda.max_memory_allocated(device) - before) / 2**20)
            return
        before = resident("VmRSS")
        for _ in range(2):
            measure(run, {}, device)
        print(resident("VmHWM") - before)


def resident(what: str) -> float:
    """A line of /proc/self/status in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(what)) / 1024


def results_of(options: argparse.Namespace, device: torch.device) -> Iterator[dict[str, dict[str, dict]]]:
    """Measure all families and arms in turn; what is known after each round."""
    pairs = [(family, arm) for family in options.families for arm in options.arms]
    # First, while this process holds nothing: the naive arm takes most of a machine's memory.
    memory = {pair: peak_memory(*pair, options) if options.memory else None for pair in pairs}
    runs = {family: build(family, options) for family in options.families}
    repeats: dict[tuple[str, str], dict[str, list[float]]] = {pair: {} for pair in pairs}
    for number in range(options.repeats + 1):  # the first round finds memory and kernels
        for family, arm in pairs:
            with running(arm, runs[family]) as prepared:
                measure(prepared, repeats[family, arm] if number else {}, device)
        if number:
            yield {
                family: {
                    arm: {**summary(run, repeats[family, arm]), "peak_mib": memory[family, arm]}
                    for arm in options.arms
                }
                for family, run in runs.items()
            }


def rows(results: dict[str, dict[str, dict]]) -> list[list[str]]:
    """One row a family and arm, with what it gains over the first arm."""
    found = []
    for family, arms in results.items():
        first = next(iter(arms.values()))
        for arm, result in arms.items():
            phases = [str(result["phases_ms"].get(name, "–")) for name in PHASES]
            ratio = f"{result['img_per_sec'] / first['img_per_sec']:.1f}×"
            memory = "–" if result["peak_mib"] is None else f"{result['peak_mib']}"
            found.append([family, arm, str(result["img_per_sec"]), ratio, *phases, memory])
    return found


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--families", nargs="+", default=FAMILIES, choices=FAMILIES)
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS)
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
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="do not measure memory")
    parser.add_argument("--only-memory", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="write the table and the JSON to this Markdown file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if options.only_memory:
        only_memory(options, device)
        return

    header = ["family", "arm", "images a second", f"against {options.arms[0]}"]
    header += [f"{name} (ms)" for name in PHASES] + ["peak memory (MiB)"]
    text = ""
    for results in results_of(options, device):
        text = table(header, rows(results))
        if options.out:  # after each round, so that a run that is cut off leaves what it has
            settings = {
                key: value for key, value in vars(options).items() if key not in ("out", "only_memory")
            }
            record = {"machine": machine(device), "settings": settings, "results": results}
            write_report(options.out, "Training step", f"python {' '.join(sys.argv)}", [text], record)
    print(text)


if __name__ == "__main__":
    main()
