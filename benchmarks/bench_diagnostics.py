"""Measure the cost of the diagnostics: their time per tick, as a fraction of the tick.

    python benchmarks/bench_diagnostics.py --out benchmarks/results/diagnostics_<machine>_<yyyymm>.md

Once a tick two gradients are compared (two backward passes through G beside the one of the step) and the
weights are copied to the CPU. Both are the phase `diagnose` of the log. Every family takes its phases in turn
in one process, so other load on the machine affects all equally; medians are reported. Seconds of a
tick follow from the medians, the intervals of the lazy phases and the number of steps in the default tick of
runs of --kimg. Random weights, the bundled images, no augmentation.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import _checkout  # noqa: F401
import torch
from bench_step import build, parser_of_steps
from measuring import machine, table, write_report

from finetune.device import resolve_device
from finetune.options import FAMILIES
from finetune.recipes import tick_kimg
from finetune.train import steps
from finetune.train.diagnostics import Diagnostics
from finetune.train.prepare import Prepared
from finetune.train.stats import Stats

HEADER = ["family", "parameters of G", "diagnose (ms)", "copies in it (ms)", "step (ms)"]


class Run:
    """One family, its phases timed by the clock of training."""

    def __init__(self, prepared: Prepared) -> None:
        self.prepared, self.state, self.plan = prepared, prepared.state, prepared.plan
        self.state.nimg = 1  # behind the middle of a tick of one image
        self.stats = Stats(self.plan.device, 1.0)
        self.stats.diagnostics = Diagnostics(self.state)
        size = [self.plan.batch, prepared.facts.channels, *prepared.image_set.size]
        img = torch.rand(size, generator=torch.Generator().manual_seed(0)) * 2 - 1
        labels = self.plan.labels(self.plan.batch)
        self.reals = list(
            zip(img.to(self.plan.device).split(self.plan.batch_gpu), labels.split(self.plan.batch_gpu))
        )
        self.seconds: dict[str, list[float]] = {}

    def take_all(self) -> None:
        """Run every phase once."""
        state, plan, stats = self.state, self.plan, self.stats
        diagnostics: Any = stats.diagnostics
        state.step = 0  # distillation is due
        diagnostics.due = False
        steps.generator_step(state, plan, stats)
        steps.discriminator_step(state, plan, self.reals, stats)
        steps.r1_step(state, plan, self.reals, stats)
        if plan.path_interval:
            steps.path_length_step(state, plan, stats)
        self.keep(stats.clock.read())
        diagnostics.due = True
        steps.generator_step(state, plan, stats)
        compared = stats.clock.read()["diagnose"]
        with stats.phase("diagnose"):
            diagnostics.read(state)
        copied = stats.clock.read()["diagnose"]
        self.keep({"diagnose": compared + copied, "copies": copied})
        stats.restart(1)

    def keep(self, found: dict[str, float]) -> None:
        """Add the seconds of phases."""
        for name, value in found.items():
            self.seconds.setdefault(name, []).append(value)

    def summary(self, ticks: dict[float, float]) -> dict[str, Any]:
        """Return medians in ms, and the fraction of the diagnostics in ticks (of runs of some kimg)."""
        plan = self.plan
        median = {
            name: statistics.median(values[1:]) for name, values in self.seconds.items()
        }  # not the first
        every = {"Gdistill": plan.distillation.interval if plan.distillation else 1, "Dreg": plan.r1_interval}
        every["Greg"] = plan.path_interval or 1
        step = sum(
            value / every.get(name, 1) for name, value in median.items() if name not in ("diagnose", "copies")
        )
        steps = {kimg: max(1, round(tick * 1000 / plan.batch)) for kimg, tick in ticks.items()}
        return {
            "phases_ms": {name: round(value * 1000, 2) for name, value in median.items()},
            "intervals": every,
            "parameters": sum(each.numel() for each in self.state.G.parameters()),
            "step_ms": round(step * 1000, 2),
            "steps_in_a_tick": steps,
            "share": {
                kimg: median["diagnose"] / (count * step + median["diagnose"])
                for kimg, count in steps.items()
            },
        }


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--families", nargs="+", default=["stylegan2", "stylegan3-t"], choices=FAMILIES)
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument("--cbase", type=int, default=1024)
    parser.add_argument("--cmax", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--kimg", nargs="+", type=float, default=[200.0, 8.0], help="lengths of runs")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--sd-backbone", default="efficientnet-lite0")
    parser.add_argument("--sd-weight", type=float, default=0.1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ticks = {kimg: tick_kimg(kimg) for kimg in options.kimg}
    sizes = argparse.Namespace(**{**vars(parser_of_steps().parse_args([])), **vars(options)})
    runs = {family: Run(build(family, sizes)) for family in options.families}
    for _ in range(options.repeats + 1):
        for run in runs.values():
            run.take_all()
    results = {family: run.summary(ticks) for family, run in runs.items()}
    header = [*HEADER, *(f"fraction, {kimg:g} kimg (tick {tick:g})" for kimg, tick in ticks.items())]
    rows = []
    for family, each in results.items():
        counts = each["steps_in_a_tick"]
        shares = [f"{share:.2%} ({counts[kimg]} steps)" for kimg, share in each["share"].items()]
        medians = [each["phases_ms"]["diagnose"], each["phases_ms"]["copies"], each["step_ms"]]
        rows.append([family, f"{each['parameters']:,}", *medians, *shares])
    text = table(header, rows)
    print(text)
    if options.out:
        settings = {name: value for name, value in vars(options).items() if name != "out"} | {"ticks": ticks}
        record = {"machine": machine(resolve_device(options.device)), "settings": settings}
        command = f"python {' '.join(sys.argv)}"
        write_report(options.out, "What the diagnostics cost", command, [text], record)


if __name__ == "__main__":
    main()
