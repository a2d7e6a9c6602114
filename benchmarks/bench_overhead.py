"""Measure the Python overhead of a call of each op, on images of 4 by 4 pixels.

    python benchmarks/bench_overhead.py --out benchmarks/results/overhead_<machine>_<yyyymm>.md

Plain torch and the native kernels, without gradients, with a graph being recorded, and with its backward
pass, in turn in one process; medians over rounds of many calls. On a CPU with one thread, in CPU time, which
other programs disturb little; on a GPU, the wall time of launching.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import _checkout  # noqa: F401
import torch
from measuring import machine, table, write_report

from torch_utils.ops.bias_act import bias_act
from torch_utils.ops.filtered_lrelu import filtered_lrelu
from torch_utils.ops.upfirdn2d import upfirdn2d


def ops(x: torch.Tensor, b: torch.Tensor) -> dict[str, Callable[[str], torch.Tensor]]:
    """Return a call of each op as the networks make them; each takes `impl`."""
    f = torch.tensor([1.0, 3, 3, 1], device=x.device) / 8
    square = torch.outer(f, f)
    return {
        "bias_act": lambda impl: bias_act(x, b, act="lrelu", clamp=256, impl=impl),
        "upfirdn2d": lambda impl: upfirdn2d(x, square, up=2, padding=[2, 1, 2, 1], gain=4, impl=impl),
        "filtered_lrelu": lambda impl: filtered_lrelu(x, f, f, b, 2, 2, 3, clamp=256, impl=impl),
    }


def micros(call: Callable[[], object], count: int, clock: Callable[[], float]) -> float:
    """Return the microseconds of one call among many."""
    started = clock()
    for _ in range(count):
        call()
    return (clock() - started) / count * 1e6


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--calls", type=int, default=200, help="of a round")
    parser.add_argument("--out", type=Path, help="write the table to this Markdown file")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.set_num_threads(1)
    native, clock = device.type, time.perf_counter if device.type == "cuda" else time.process_time
    x = torch.randn(1, 2, 4, 4, device=device)
    wants = x.clone().requires_grad_(True)
    b = torch.randn(2, device=device)

    calls: dict[tuple[str, str, str], Callable[[], object]] = {}
    for impl in ("ref", native):
        for name, op in ops(x, b).items():
            calls[name, "no gradient", impl] = lambda op=op, impl=impl: op(impl)
        for name, op in ops(wants, b).items():
            calls[name, "graph recorded", impl] = lambda op=op, impl=impl: op(impl)
            dy = torch.ones_like(op(impl))
            calls[name, "with backward", impl] = lambda op=op, impl=impl, dy=dy: torch.autograd.grad(
                op(impl), wants, dy
            )
    rounds: dict[tuple[str, str, str], list[float]] = {key: [] for key in calls}
    for number in range(options.rounds + 1):  # the first is not counted
        for key, call in calls.items():
            taken = micros(call, options.calls, clock)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if number:
                rounds[key].append(taken)
    results = {key: statistics.median(values) for key, values in rounds.items()}
    rows = [
        [name, when, f"{results[name, when, 'ref']:.1f}", f"{results[name, when, native]:.1f}"]
        for name, when, impl in results
        if impl == native
    ]
    text = table(["op", "call", "ref (µs)", f"{native} (µs)"], sorted(rows))
    print(text)
    if options.out:
        settings = {key: value for key, value in vars(options).items() if key != "out"}
        record = {"machine": machine(device), "settings": settings}
        write_report(options.out, "What a call costs", f"python {' '.join(sys.argv)}", [text], record)


if __name__ == "__main__":
    main()
