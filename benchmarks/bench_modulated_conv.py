"""Measure four implementations of the modulated convolution, forward and with the backward pass.

    python benchmarks/bench_modulated_conv.py --out benchmarks/results/modulated_conv_<machine>_<yyyymm>.md

grouped: the weights of every sample, one grouped convolution. scaled: features scaled, convolved, scaled
again. loop: the weights of every sample, a convolution each. products: as grouped, a batch of matrix
products, for 1x1 alone. All ways of a shape run in turn in one process; medians are reported. What training
uses follows from this table: `finetune/train/prepare.py` ("pointwise" on a CPU) and
`torch_utils/ops/conv2d_gradfix.py`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import _checkout  # noqa: F401
import torch
import torch.nn.functional as F
from measuring import interleaved, machine, table, write_report

from finetune.train.allocator import keep_freed_memory

# batch, channels in, channels out, pixels, kernel; where it occurs
SHAPES = (
    ((8, 128, 128, 16, 3), "StyleGAN2, 16²"),
    ((8, 64, 64, 64, 3), "StyleGAN2, 64²"),
    ((8, 64, 3, 64, 1), "StyleGAN2, colors"),
    ((8, 128, 128, 36, 3), "T, 36²"),
    ((8, 128, 128, 84, 3), "T, 84²"),
    ((8, 81, 64, 84, 3), "T 64 px, odd channels"),
    ((8, 256, 256, 36, 1), "R, 36²"),
    ((8, 256, 256, 52, 1), "R, 52²"),
    ((8, 203, 161, 84, 1), "R 64 px, odd channels"),
    ((8, 128, 3, 64, 1), "R, colors"),
    ((1, 128, 128, 84, 3), "T, one sample"),
)


def weights_of(weight, styles, demodulation):
    """Return the modulated weights `[N, O, I, k, k]`."""
    return weight * styles[:, None, :, None, None] * demodulation[:, :, None, None, None]


def grouped(x, weight, styles, demodulation):
    batch, _, height, width = x.shape
    w = weights_of(weight, styles, demodulation).flatten(0, 1)
    y = F.conv2d(x.reshape(1, -1, height, width), w, padding=weight.shape[2] // 2, groups=batch)
    return y.reshape(batch, -1, height, width)


def scaled(x, weight, styles, demodulation):
    y = F.conv2d(x * styles[:, :, None, None], weight, padding=weight.shape[2] // 2)
    return y * demodulation[:, :, None, None]


def loop(x, weight, styles, demodulation):
    w = weights_of(weight, styles, demodulation)
    return torch.cat([F.conv2d(xi[None], wi, padding=weight.shape[2] // 2) for xi, wi in zip(x, w)])


def products(x, weight, styles, demodulation):
    w = weights_of(weight, styles, demodulation).flatten(2)
    return torch.bmm(w, x.flatten(2)).unflatten(2, x.shape[2:])


WAYS = {"grouped": grouped, "scaled": scaled, "loop": loop, "products": products}


def measure(shape, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return milliseconds of every way."""
    batch, channels_in, channels_out, size, kernel = shape
    generator = torch.Generator().manual_seed(options.seed)
    inputs = [
        torch.randn(batch, channels_in, size, size, generator=generator),
        torch.randn(channels_out, channels_in, kernel, kernel, generator=generator) / channels_in,
        torch.rand(batch, channels_in, generator=generator) + 0.5,
        torch.rand(batch, channels_out, generator=generator) + 0.5,
    ]
    inputs = [value.to(options.device).requires_grad_(True) for value in inputs]
    dy = torch.randn(batch, channels_out, size, size, generator=generator).to(options.device)
    ways = {name: way for name, way in WAYS.items() if name != "products" or kernel == 1}

    def forward(way):
        with torch.no_grad():
            way(*inputs)

    def both(way):
        torch.autograd.grad(way(*inputs), inputs, dy)

    result = {}
    for key, run in (("forward", forward), ("both", both)):
        calls = {name: lambda run=run, way=way: run(way) for name, way in ways.items()}
        medians = interleaved(calls, torch.device(options.device), options.repeats)
        result[key] = {name: value * 1000 for name, value in medians.items()}
    return result


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the table to this Markdown file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    rows = []
    for shape, where in SHAPES:
        result = measure(shape, options)
        cells = [
            f"{result[key][name]:.3g}" if name in result[key] else "–" for key in result for name in WAYS
        ]
        rows.append([where, "×".join(map(str, shape)), *cells])
    header = ["where", "N×I×O×size×k", *(f"{name}, forward (ms)" for name in WAYS)]
    text = table([*header, *(f"{name}, with backward (ms)" for name in WAYS)], rows)
    print(text)
    if options.out:
        settings = {key: value for key, value in vars(options).items() if key != "out"}
        record = {"machine": machine(torch.device(options.device)), "settings": settings}
        write_report(options.out, "Modulated convolution", f"python {' '.join(sys.argv)}", [text], record)


if __name__ == "__main__":
    main()
