"""Measure the memory that each phase of a training step takes, on a CPU in float32 (Linux).

    python benchmarks/bench_memory.py --out benchmarks/results/memory_phases_<machine>_<yyyymm>.md

Every phase runs with one micro-batch; the table has the peak above the memory before the phase. Features of
layers that are float16 on CUDA take half of it there.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import _checkout  # noqa: F401
import bench_step
import torch
from measuring import machine, table

from finetune.train import steps
from finetune.train.stats import Stats


def memory_gib(field: str) -> float:
    """Return VmRSS (now) or VmHWM (peak) of this process."""
    line = next(each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith(field))
    return int(line.split()[1]) / 2**20


def peak_gib(call: Callable[[], None]) -> float:
    """Return the peak of memory during a call, above that before it."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM becomes VmRSS
    before = memory_gib("VmRSS")
    call()
    return memory_gib("VmHWM") - before


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--family", default="stylegan2")
    parser.add_argument("--resolution", type=int, default=1024)
    parser.add_argument("--cbase", type=int, default=32768)
    parser.add_argument("--cmax", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the table to this Markdown file")
    options = parser.parse_args()
    more = {"precision": "auto", "deterministic": False, "device": "cpu", "batch_gpu": 0, "seed": 0}
    given = argparse.Namespace(**vars(options), **more)
    prepared = bench_step.build(options.family, given, bench_step.RANDOM_VGG)
    state, plan = prepared.state, prepared.plan
    stats = Stats(plan.device)
    shape = [options.batch, prepared.facts.channels, *prepared.image_set.size]
    reals = [(torch.randn(shape), plan.labels(options.batch))]
    main_phases = {
        "Gmain with distillation (LPIPS-VGG)": partial(steps.generator_step, state, plan, stats),
        "Dmain": partial(steps.discriminator_step, state, plan, reals, stats),
    }
    lazy = {"Dreg (R1)": partial(steps.r1_step, state, plan, reals, stats)}
    if plan.path_interval:
        lazy["Greg (path length)"] = partial(steps.path_length_step, state, plan, stats)
    rows = []
    for name, call in (main_phases | lazy).items():
        if name in main_phases:
            call()  # which allocates gradients and Adam's averages
        rows.append([name, f"{peak_gib(call):.2f}"])
        print(*rows[-1], file=sys.stderr, flush=True)
    parameters = sum(each.numel() for net in (state.G, state.D) for each in net.parameters())
    text = table([f"micro-batch {options.batch}", "peak above that before the phase (GiB)"], rows)
    text += f"\n\nG and D have {parameters / 1e6:.1f} million parameters."
    print(text)
    if options.out:
        facts = machine(torch.device("cpu"))
        setting = ", ".join(f"{key} {value}" for key, value in facts.items() if value is not None)
        title = f"# Memory of the phases of a step: {options.family}, {options.resolution} px"
        options.out.write_text(f"{title}\n\n`python {' '.join(sys.argv)}`\n\n{text}\n\n{setting}\n")


if __name__ == "__main__":
    main()
