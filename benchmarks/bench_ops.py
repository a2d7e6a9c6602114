"""Measure each op, forward and with the backward pass: naive, reference, native, and the floor.

    python benchmarks/bench_ops.py --out benchmarks/results/ops_<machine>_<yyyymm>.md

The shapes are those of StyleGAN2 and StyleGAN3-T/R at 64 to 256 px (batch 8) on a CPU, at 256 to 1024 px on
a GPU. All implementations of a case run in turn in one process; medians are reported. The floor is the time
that the nearer of two ceilings allows, measured in the same process: bytes that must move (inputs read,
outputs written, once each) at the speed of a large copy, and multiplications that must be done (polyphase, no
zeros) at the speed of a large matrix product. "of floor" is floor divided by the native forward time. Freed
memory is kept for all implementations, as in training; with `--fresh-memory` every large result gets new
pages, as in a program that does not care.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _checkout  # noqa: F401
import naive
import torch
from measuring import ceilings, count_cpu_time, interleaved, report, table

from finetune.train.allocator import keep_freed_memory
from torch_utils.ops import bias_act, filtered_lrelu, upfirdn2d

OURS = {
    "bias_act": bias_act.bias_act,
    "upfirdn2d": upfirdn2d.upfirdn2d,
    "filtered_lrelu": filtered_lrelu.filtered_lrelu,
}
NAIVE = {"bias_act": naive.bias_act, "upfirdn2d": naive.upfirdn2d, "filtered_lrelu": naive.filtered_lrelu}
F32 = 4


@dataclass(frozen=True)
class Case:
    """One call. taps: of the filter(s), an int for separable taps, a pair for a 2-D filter."""

    op: str
    name: str
    shape: tuple[int, int, int, int]
    options: dict[str, Any]
    fu: int | tuple[int, int] | None = None
    fd: int | tuple[int, int] | None = None


def lrelu(name, shape, up, down, padding, fu=12, fd=12) -> Case:
    return Case("filtered_lrelu", name, shape, dict(up=up, down=down, padding=padding, clamp=256), fu, fd)


SQUARE = (4, 4)


def fir(name, shape, taps=SQUARE, **options) -> Case:
    return Case("upfirdn2d", name, shape, options, taps)


def act(name, shape, act="lrelu", **options) -> Case:
    return Case("bias_act", name, shape, dict(act=act, **options))


RADIAL = (12, 12)
CPU_CASES = (
    lrelu("yardstick: up 2, down 2", (8, 128, 52, 52), 2, 2, [9, 8, 9, 8]),
    lrelu("yardstick: up 4, down 2", (8, 64, 84, 84), 4, 2, [-6, -9, -6, -9], fu=24),
    lrelu("T 64-256 px, 36²", (8, 128, 38, 38), 2, 2, [9, 8, 9, 8]),
    lrelu("T 64-256 px, 36² to 52²", (8, 128, 38, 38), 4, 2, [-6, -9, -6, -9], fu=24),
    lrelu("T 64 px, 84²", (8, 102, 86, 86), 2, 2, [9, 8, 9, 8]),
    lrelu("T 128 px, 84² to 148²", (8, 76, 86, 86), 4, 2, [-6, -9, -6, -9], fu=24),
    lrelu("T 256 px, 276²", (8, 16, 278, 278), 2, 2, [9, 8, 9, 8]),
    lrelu("T 64 px, critical, cropped", (8, 64, 86, 86), 2, 2, [-11, -12, -11, -12]),
    lrelu("R 64-256 px, 36²", (8, 256, 36, 36), 2, 2, [11, 10, 11, 10], fd=RADIAL),
    lrelu("R 64-256 px, 52² to 84²", (8, 256, 52, 52), 4, 2, [-2, -5, -2, -5], fu=24, fd=RADIAL),
    lrelu("R 64 px, 84²", (8, 203, 84, 84), 2, 2, [11, 10, 11, 10], fd=RADIAL),
    lrelu("R 256 px, 276²", (8, 32, 276, 276), 2, 2, [11, 10, 11, 10]),
    lrelu("colors: no filter", (8, 3, 256, 256), 1, 1, 0, fu=None, fd=None),
    fir("up 2 (yardstick)", (8, 128, 64, 64), up=2, padding=[2, 1, 2, 1], gain=4),
    fir("down 2", (8, 128, 64, 64), down=2, padding=[1, 1, 1, 1]),
    fir("skip image up 2", (8, 3, 64, 64), up=2, padding=[2, 1, 2, 1], gain=4),
    fir("D skip down 2", (8, 64, 128, 128), down=2, padding=[1, 1, 1, 1]),
    fir("D skip down 2", (8, 32, 256, 256), down=2, padding=[1, 1, 1, 1]),
    fir("blur after up-convolution", (8, 64, 129, 129), padding=[1, 1, 1, 1], gain=4),
    fir("blur before down-convolution", (8, 32, 256, 256), padding=[2, 2, 2, 2]),
    fir("12 separable taps, down 2", (8, 3, 256, 256), 12, down=2, padding=[5, 5, 5, 5]),
    act("lrelu", (8, 128, 64, 64), gain=math.sqrt(2)),
    act("lrelu, clamp", (8, 64, 128, 128), clamp=256),
    act("lrelu, clamp", (8, 32, 256, 256), clamp=256),
    act("linear, clamp (colors)", (8, 3, 256, 256), act="linear", clamp=256),
    act("tanh", (8, 64, 64, 64), act="tanh"),
    act("swish", (8, 64, 64, 64), act="swish"),
    act("dense layer", (8, 512, 1, 1)),
)
GPU_CASES = (
    lrelu("T 256 px, 52²", (8, 512, 54, 54), 2, 2, [9, 8, 9, 8]),
    lrelu("T 256 px, 148²", (8, 512, 150, 150), 2, 2, [9, 8, 9, 8]),
    lrelu("T 256 px, 148² to 276²", (8, 362, 150, 150), 4, 2, [-6, -9, -6, -9], fu=24),
    lrelu("T 1024 px, 1044²", (4, 32, 1046, 1046), 2, 2, [9, 8, 9, 8]),
    lrelu("R 256 px, 148²", (8, 1024, 148, 148), 2, 2, [11, 10, 11, 10], fd=RADIAL),
    lrelu("R 256 px, 148² to 276²", (4, 724, 148, 148), 4, 2, [-2, -5, -2, -5], fu=24, fd=RADIAL),
    fir("up 2", (8, 128, 256, 256), up=2, padding=[2, 1, 2, 1], gain=4),
    fir("down 2", (8, 128, 256, 256), down=2, padding=[1, 1, 1, 1]),
    fir("down 2", (4, 64, 1024, 1024), down=2, padding=[1, 1, 1, 1]),
    fir("blur", (4, 64, 1024, 1024), padding=[2, 2, 2, 2]),
    fir("skip image up 2", (8, 3, 512, 512), up=2, padding=[2, 1, 2, 1], gain=4),
    act("lrelu", (8, 256, 256, 256), clamp=256),
    act("lrelu", (4, 64, 1024, 1024), clamp=256),
    act("linear, clamp (colors)", (8, 3, 1024, 1024), act="linear", clamp=256),
)


def tensors(case: Case, options: argparse.Namespace, generator: torch.Generator) -> dict[str, Any]:
    """Return random pixels of one case, and StyleGAN2's taps or random ones."""
    memory = torch.channels_last if options.channels_last else torch.contiguous_format
    drawn = {"generator": generator, "device": options.device}
    x = torch.randn(case.shape, **drawn).to(options.dtype)
    made: dict[str, Any] = {"x": x.contiguous(memory_format=memory)}
    if case.op != "upfirdn2d":
        made["b"] = torch.randn(case.shape[1], **drawn).to(options.dtype)
    names = {"upfirdn2d": ("f",), "filtered_lrelu": ("fu", "fd"), "bias_act": ()}[case.op]
    for name, taps in zip(names, (case.fu, case.fd)):
        f = None if taps is None else torch.rand(taps, **drawn)
        if taps == SQUARE:  # the kernels take less time for a product of two filters, as this one is
            line = torch.tensor([1.0, 3, 3, 1], device=options.device)
            f = line.outer(line)
        made[name] = None if f is None else f / f.sum()
    return made


def call_of(op: Callable, case: Case, made: dict[str, Any], backward: bool, **more: Any) -> Callable[[], Any]:
    """Return a call without arguments: forward only, or forward and backward to image and bias."""
    inputs = {name: value for name, value in made.items() if value is not None}
    if not backward:

        def forward():
            with torch.no_grad():
                op(**inputs, **case.options, **more)

        return forward
    for name in ("x", "b"):
        if name in inputs:
            inputs[name] = inputs[name].detach().clone().requires_grad_(True)  # clone keeps the layout
    wanted = [inputs[name] for name in ("x", "b") if name in inputs]
    dy = torch.randn_like(op(**inputs, **case.options, **more))

    def both():
        torch.autograd.grad(op(**inputs, **case.options, **more), wanted, dy)

    return both


def work(case: Case, out: torch.Size, itemsize: int) -> tuple[float, float]:
    """Return (bytes, flops) of a forward pass that touches everything once and multiplies no zero."""
    batch, channels, height, width = case.shape
    pixels_out = math.prod(out)
    moved = (math.prod(case.shape) + pixels_out) * itemsize
    if case.op == "bias_act":
        return moved, 3.0 * pixels_out
    up, down = case.options.get("up", 1), case.options.get("down", 1)
    if case.op == "upfirdn2d":
        return moved, 2.0 * filter_cost(case.fu, up, down, height, out[2], out[3], width) * batch * channels
    taps_d = 1 if case.fd is None else case.fd if isinstance(case.fd, int) else case.fd[0]
    grid_h, grid_w = (out[2] - 1) * down + taps_d, (out[3] - 1) * down + taps_d
    cost = filter_cost(case.fu, up, 1, height, grid_h, grid_w, width) if case.fu else 0.0
    cost += filter_cost(case.fd, 1, down, grid_h, out[2], out[3], grid_w) if case.fd else 0.0
    return moved, 2.0 * (cost + grid_h * grid_w) * batch * channels


def filter_cost(taps, up, down, in_h, out_h, out_w, in_w) -> float:
    """Return multiplications per plane: 2-D at once, or along the cheaper axis first."""
    if not isinstance(taps, int):
        return out_h * out_w * taps[0] * taps[1] / up**2
    per_tap = taps / up
    return min(in_h * out_w, in_w * out_h) * per_tap + out_h * out_w * per_tap


def run(case: Case, options: argparse.Namespace, limits: dict[str, float]) -> dict[str, Any]:
    """Measure one case."""
    device = torch.device(options.device)
    generator = torch.Generator(device).manual_seed(options.seed)  # a CPU would draw for half a minute
    made = tensors(case, options, generator)
    native = "cuda" if device.type == "cuda" else "cpu"
    arms: dict[str, tuple[Callable, dict]] = {"naive": (NAIVE[case.op], {})}
    arms |= {name: (OURS[case.op], {"impl": name}) for name in ("ref", native)}
    arms = {name: arm for name, arm in arms.items() if name in options.arms}
    result: dict[str, Any] = {"case": dataclasses.asdict(case)}
    for key, backward in (("forward", False), ("both", True)):
        calls = {name: call_of(op, case, made, backward, **more) for name, (op, more) in arms.items()}
        medians = interleaved(calls, device, options.repeats, options.budget)
        result[key] = {name: value * 1000 for name, value in medians.items()}
    inputs = {name: value for name, value in made.items() if value is not None}
    out = OURS[case.op](**inputs, **case.options).shape
    moved, flops = work(case, out, options.dtype.itemsize)
    floor = max(moved / limits["bytes_per_sec"], flops / limits["flops_per_sec"])
    result |= {"bytes": moved, "flops": flops, "floor_ms": floor * 1000}
    best = native if native in arms else list(arms)[-1]
    result["of_floor"] = floor * 1000 / result["forward"][best]
    if "naive" in arms and best != "naive":
        result["ratio"] = {key: result[key]["naive"] / result[key][best] for key in ("forward", "both")}
    return result


def row(result: dict[str, Any], arms: list[str]) -> list[Any]:
    case = result["case"]
    cells = [case["op"], case["name"], "×".join(map(str, case["shape"]))]
    for key in ("forward", "both"):
        cells += [f"{result[key][arm]:.3g}" if arm in result[key] else "–" for arm in arms]
        cells.append(f"{result['ratio'][key]:.1f}×" if "ratio" in result else "–")
    return [*cells, f"{result['of_floor']:.0%}"]


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--ops", nargs="+", default=list(OURS), choices=list(OURS))
    parser.add_argument("--arms", nargs="+", default=["naive", "ref", "cpu", "cuda"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16", "float64"))
    parser.add_argument("--channels-last", action="store_true", help="give images in channels-last memory")
    parser.add_argument("--fresh-memory", action="store_true", help="leave the allocator as it is")
    parser.add_argument("--match", default="", help="only cases whose name contains this")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--budget", type=float, default=20.0, help="seconds after which three repeats do")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="one thread, CPU time: for busy machines")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the table to this Markdown file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.cpu_time:
        if torch.device(options.device).type == "cuda":
            parser.error("--cpu-time: a GPU's work takes no CPU time")
        options.threads = 1
        count_cpu_time()
    options.dtype = getattr(torch, options.dtype)
    device = torch.device(options.device)
    if not options.fresh_memory:
        keep_freed_memory()
    limits = ceilings(device, options.dtype)
    ceiling = (
        f"Ceilings: copy {limits['bytes_per_sec'] / 1e9:.4g} GB/s, float32 product "
        f"{limits['flops_per_sec'] / 1e12:.3g} TFLOP/s. Images are {options.dtype}."
    )
    print(ceiling, file=sys.stderr, flush=True)

    results: list[dict[str, Any]] = []
    arms = [
        arm for arm in ("naive", "ref", "cuda" if device.type == "cuda" else "cpu") if arm in options.arms
    ]
    header = ["op", "case", "shape", *(f"{arm}, forward (ms)" for arm in arms), "naive / native"]
    header += [*(f"{arm}, with backward (ms)" for arm in arms), "naive / native", "of floor"]
    text = ""
    for case in GPU_CASES if device.type == "cuda" else CPU_CASES:
        if case.op in options.ops and options.match in case.name:
            results.append(run(case, options, limits))
            print(" | ".join(map(str, row(results[-1], arms))), file=sys.stderr, flush=True)
            rows = [row(result, arms) for result in results]
            text = report("Ops", device, options.seed, [ceiling, table(header, rows)])
            if options.out:  # after each, so that a run that is cut off leaves what it has
                options.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
