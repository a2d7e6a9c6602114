"""Measure seconds per 1,000 images of whole training steps, by phase, and peak memory, by family.

    python benchmarks/bench_step.py --out benchmarks/results/step_<machine>_<yyyymm>.md

The training loop runs as in `finetune train`, on one batch of random pixels, without logs and snapshots.
Cycles of 16 steps are timed, in which every lazy phase runs at its interval, after `--warmup` cycles that
build kernels, allocate memory and are reported as "first". Phases are those of the loop's own clock. Peak
memory on a GPU is what torch has reserved, from the second cycle on: cuDNN tries algorithms in the first.
With `--graphs off`, what was allocated at once is reported as well, which would not count the pool of graphs.
As in training, freed memory stays in the process on a CPU (finetune/train/allocator.py).
`--profile` adds one more cycle under torch.profiler and its slowest CUDA kernels; "busy" is the fraction of a
cycle in which a kernel runs: time covered by kernels, over the time of a cycle without the profiler.

Arms: `naive` (benchmarks/naive.py, modulated convolutions grouped by sample: what plain-torch code bases
of the family run), `ref` (our plain torch), `auto` (native kernels where there are any). Families and arms
run in turn, `--rounds` times, each time from new random weights; medians of all cycles are reported.
`--cbase` and `--cmax` are what `finetune train` takes: StyleGAN3-R's generator has twice as many channels.
`--distances` are those of self-distillation (`--sd-weight auto:1`), one after another: `none` is plain
training, `lpips-vgg-random` LPIPS-VGG without its weights, for timing.

bench_against.py compares the steps of two checkouts by this program.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import itertools
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import _checkout
import naive
import torch
from kernel_trace import kernel_table, kernels_of
from measuring import report, table
from torch.profiler import ProfilerActivity, profile

from finetune.config import TrainConfig
from finetune.device import training_math
from finetune.metrics.perceptual import build_distance
from finetune.options import BACKBONES, FAMILIES, GRAPHS, PRECISIONS, TrainOptions
from finetune.train import allocator
from finetune.train.divergence import DivergenceMonitor
from finetune.train.graphs import Graphs
from finetune.train.prepare import Prepared, prepare
from finetune.train.signals import StopSignal
from finetune.train.state import RunCounters
from finetune.train.stats import Stats, peak_memory_gib
from finetune.train.train import Run, train
from torch_utils.ops import impl

ARMS = ("naive", "ref", "auto")
PEAKS = ("gib", "allocated_gib", "first_gib")
CYCLE = 16  # steps: the least common multiple of the intervals of all phases
NONE, RANDOM_VGG = "none", "lpips-vgg-random"


def build(family: str, options: argparse.Namespace, distance: str = NONE) -> Prepared:
    """Build a run of one family at the requested sizes, ready to step."""
    random_vgg = distance == RANDOM_VGG
    settings: dict[str, Any] = {
        "data": str(_checkout.ROOT / "finetune" / "demo" / "faces-3d.zip"),
        "scratch": family,
        "resolution": options.resolution,
        "fit": "stretch",
        "cbase": options.cbase,
        "cmax": options.cmax,
        "batch": options.batch,
        "batch_gpu": options.batch_gpu or options.batch,
        "aug": "noaug",
        "sd_weight": 0.0 if distance == NONE else "auto:1",
        # l2 has no weights; the random network takes its place below.
        "sd_backbone": "l2" if random_vgg else None if distance == NONE else distance,
        "sd_interval": 4 if random_vgg else None,
        "precision": options.precision,
        "deterministic": options.deterministic,
        "device": options.device,
        "seed": options.seed,
        "workers": 0,
    }
    prepared = prepare(TrainOptions(**settings))
    if not random_vgg or prepared.plan.distillation is None:
        return prepared
    network = build_distance("lpips-vgg", 3, prepared.plan.device, random_trunk=True)
    distillation = dataclasses.replace(prepared.plan.distillation, distance=network)
    return dataclasses.replace(prepared, plan=dataclasses.replace(prepared.plan, distillation=distillation))


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


class Cycles:
    """Times the cycles of a run, which reports each of them as a tick, and profiles the last one if asked."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self.device, self.batch = device, options.batch
        self.warmup, self.last = options.warmup, options.warmup + options.cycles
        self.total = self.last + options.profile
        self.first: list[float] = []
        self.seconds: list[float] = []
        self.phases: Counter[str] = Counter()
        self.profiled = 0.0
        # Without the operators, whose records would take longer than the steps.
        self.profiler = profile(activities=[ProfilerActivity.CUDA]) if options.profile else None
        self.count = 0
        self.first_gib = 0.0
        self.started = time.perf_counter()

    def tick(self, state: Any, numbers: dict[str, Any]) -> None:
        """End a cycle and begin the next one."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - self.started
        self.count += 1
        if self.count == 1 and self.device.type == "cuda":
            # cuDNN tries algorithms in the first cycle, some with a workspace that is never used again.
            self.first_gib = peak_memory_gib(self.device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        # Printed at once, in case the run is cut off before the table.
        parts = {name: round(value, 3) for name, value in numbers["sec_per_phase"].items()}
        kimg = CYCLE * self.batch / 1000
        print(f"cycle {self.count}: {seconds / kimg:.3f} s/kimg, {parts}", file=sys.stderr, flush=True)
        if self.count <= self.warmup:
            self.first.append(seconds)
        elif self.count <= self.last:
            self.seconds.append(seconds)
            self.phases.update(numbers["sec_per_phase"])
        else:
            self.profiler.stop()
            self.profiled = seconds
        if self.last == self.count < self.total:
            self.profiler.start()
        self.started = time.perf_counter()


def bare(config: TrainConfig, state: Any, plan: Any, batches: Iterator, cycles: Cycles) -> Run:
    """Return a run with nothing around the loop: no run folder, no metrics, no saves."""
    return Run(
        config=config,
        state=state,
        plan=plan,
        counters=RunCounters(),
        batches=batches,
        stats=Stats(plan.device, plan.tick_nimg),
        monitor=DivergenceMonitor(),
        validation=Mock(measure=Mock(return_value=None)),
        checkpointer=Mock(count_unreadable=Mock(return_value=0)),
        run_dir=Mock(),
        page=Mock(),
        display=Mock(tick=cycles.tick),
        stop=StopSignal(),
    )


def measure(family: str, arm: str, distance: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run the cycles of one family, arm and distance; what they took."""
    prepared = build(family, options, distance)
    device = prepared.plan.device
    shape = [options.batch, prepared.facts.channels, *prepared.image_set.size]
    generator = torch.Generator().manual_seed(options.seed)
    img = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    if device.type == "cuda":
        img = img.pin_memory()
        torch.cuda.reset_peak_memory_stats(device)

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        labels = prepared.image_set.random_labels(options.batch, generator)
        while True:
            yield img, labels

    if device.type == "cpu":
        allocator.keep_freed_memory()
    cycles = Cycles(options, device)
    nimg = CYCLE * options.batch
    math = training_math(
        options.precision, deterministic=options.deterministic, benchmark=options.cudnn_benchmark
    )
    with math, running(arm, prepared) as run:
        plan = dataclasses.replace(run.plan, total_nimg=cycles.total * nimg)
        plan = dataclasses.replace(plan, tick_nimg=nimg, snap_nimg=nimg * (cycles.total + 1))
        # Fine-tuning has no blur, whose width would change from step to step.
        graphs = Graphs(device, enabled=options.graphs == "auto")
        plan = dataclasses.replace(plan, blur_sigma=0.0, graphs=graphs)
        with graphs.stream():
            train(bare(run.config, run.state, plan, batches(), cycles))
    on_cuda = device.type == "cuda"
    allocated = torch.cuda.max_memory_allocated(device) / 2**30 if on_cuda else 0.0
    return {
        "first": cycles.first,
        "cycles": cycles.seconds,
        "phases": {name: value / len(cycles.seconds) for name, value in cycles.phases.items()},
        "first_gib": cycles.first_gib if on_cuda else None,
        "gib": peak_memory_gib(device) if on_cuda else None,
        "allocated_gib": allocated if on_cuda and not graphs.enabled else None,
        "profiled": cycles.profiled,
        "kernels": kernels_of(cycles.profiler) if options.profile else None,
    }


Results = dict[tuple[str, str, str], dict[str, Any]]  # by family, arm and distance


def results_of(options: argparse.Namespace) -> Iterator[Results]:
    """Measure all families, arms and distances in turn; yield the results after each."""
    results: Results = {}
    for _ in range(options.rounds):
        for key in itertools.product(options.families, options.arms, options.distances):
            found = measure(*key, options)
            before = results.get(key)
            found["cycles"] = (before["cycles"] if before else []) + found["cycles"]
            results[key] = found
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            yield results


def tables(results: Results, options: argparse.Namespace) -> list[str]:
    """Return s/kimg of each family, arm and distance, the phases, and the kernels of the profiled ones."""
    kimg = CYCLE * options.batch / 1000
    phases = sorted({name for result in results.values() for name in result["phases"]})
    header = ["family", "arm", "distance", "s/kimg", "images/s", "cycles (s)", "first (s)", "busy"]
    header += ["peak (GiB)", "allocated (GiB)", "first peak (GiB)"]
    header += [f"{name} (s/kimg)" for name in phases]
    rows, listed = [], []
    for key, result in results.items():
        median = statistics.median(result["cycles"])
        busy = "–"
        if result["kernels"] is not None:
            kernels, covered = result["kernels"]
            busy = f"{covered / median:.0%}"
            name = f"{CYCLE} steps, {', '.join(key)}"
            listed.append(kernel_table(name, kernels, covered, median, result["profiled"]))
        rows.append([
            *(*key, f"{median / kimg:.3g}", f"{1000 * kimg / median:.4g}"),
            *(" ".join(f"{each:.2f}" for each in result[name]) for name in ("cycles", "first")),
            *(busy, *(f"{result[name]:.2f}" if result[name] else "–" for name in PEAKS)),
            *(f"{result['phases'].get(name, 0.0) / kimg:.3g}" for name in phases),
        ])  # fmt: skip
    return [table(header, rows), *listed]


def add_shared_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that bench_against.py has as well."""
    parser.add_argument("--families", nargs="+", default=FAMILIES, choices=FAMILIES)
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--cbase", type=int, default=4096)
    parser.add_argument("--cmax", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=1, help="cycles before those that count")
    parser.add_argument("--cycles", type=int, default=2, help="cycles of 16 steps in each round")
    parser.add_argument("--rounds", type=int, default=1, help="how often everything takes its turn")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the report to this Markdown file")


def parser_of_steps() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add_shared_options(parser)
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS)
    parser.add_argument("--batch-gpu", type=int, help="images at once; by default the batch")
    parser.add_argument("--distances", nargs="+", default=[NONE], choices=(NONE, RANDOM_VGG, *BACKBONES))
    parser.add_argument("--precision", default="auto", choices=PRECISIONS)
    parser.add_argument("--graphs", default="auto", choices=GRAPHS, help="CUDA graphs of the phases")
    parser.add_argument("--deterministic", action="store_true", help="as `finetune train --deterministic`")
    tries = argparse.BooleanOptionalAction
    parser.add_argument("--cudnn-benchmark", action=tries, default=True, help="let cuDNN try its algorithms")
    parser.add_argument("--profile", action="store_true", help="list the slowest kernels of one more cycle")
    return parser


def main() -> None:
    options = parser_of_steps().parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if options.profile and device.type != "cuda":
        sys.exit("--profile: kernels are those of a GPU; add --device cuda.")
    text = ""
    for results in results_of(options):
        text = report("Training step", device, options.seed, tables(results, options))
        if options.out:  # after each, so that a run that is cut off leaves what it has
            options.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
