"""Time the kernels of filtered_lrelu on a GPU for every tile that fits, beside the tile that is chosen.

    python benchmarks/bench_tiles.py --out benchmarks/results/tiles_<machine>_<yyyymm>.md

The layers of StyleGAN3 in bench_ops.py, in float16: forward without and with recorded bits, and backward. The
constants in torch_utils/ops/native/filtered_lrelu/plan.py are chosen by such times.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import _checkout  # noqa: F401
import torch
from bench_ops import GPU_CASES, OURS, Case, tensors
from measuring import interleaved, report, table

from torch_utils.ops.native import cuda
from torch_utils.ops.native.filtered_lrelu import plan, tensor_cores

MODES = ("forward", "forward, recording", "backward")
Tile = tuple[int, ...]  # width and height first


def call_of(case: Case, made: dict[str, Any], mode: str) -> Callable[[], Any]:
    """Return a call that launches the kernel in one mode."""
    inputs = {name: value for name, value in made.items() if value is not None}
    inputs["x"].requires_grad_(mode != MODES[0])

    def forward() -> torch.Tensor:
        return OURS[case.op](**inputs, **case.options, impl=inputs["x"].device.type)

    if mode != MODES[2]:
        return forward
    y = forward()
    dy = torch.randn_like(y)
    return lambda: torch.autograd.grad(y, inputs["x"], dy, retain_graph=True)  # bits of y are kept


class Tiles:
    """Takes the place of `best_tile` of both kernels to learn what tiles there are, and to choose one."""

    def __init__(self) -> None:
        self.found: list[Tile] = []
        self.chosen: Tile | None = None
        self.forced: Tile | None = None

    def of_plan(self, p: Any, axes: Any, limit: int, original: Any = plan.best_tile) -> Tile:
        pairs = [(width, height) for width in plan._widths(p, axes) for height in plan._heights(p, axes)]
        tiles = [(*pair, axes.shared_bytes(p, *pair)) for pair in pairs]
        return self.forced or self._keep(
            [tile for tile in tiles if tile[2] <= limit], original(p, axes, limit)
        )

    def on_tensor_cores(self, p: Any, limit: int, original: Any = tensor_cores.best_tile) -> Tile:
        return self.forced or self._keep(list(tensor_cores.tiles(p, limit)), original(p, limit))

    def _keep(self, found: list[Tile], chosen: Tile) -> Tile:
        self.found, self.chosen = found, chosen
        return chosen


def times_of(call: Callable[[], Any], device: torch.device) -> tuple[Tile, dict[Tile, float]]:
    """Return the tile that is chosen, and milliseconds by tile."""
    tiles = Tiles()
    with (
        mock.patch.object(plan, "best_tile", tiles.of_plan),
        mock.patch.object(tensor_cores, "best_tile", tiles.on_tensor_cores),
    ):
        cuda._launches.clear()
        call()
        assert tiles.chosen
        times = {}
        for tile in tiles.found:
            cuda._launches.clear()
            tiles.forced = tile
            times[tile] = 1000 * interleaved({"": call}, device, 3, budget=1)[""]
    cuda._launches.clear()
    return tiles.chosen, times


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--match", default="", help="only layers whose name contains this")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the table to this Markdown file")
    options = parser.parse_args()
    options.dtype, options.channels_last = torch.float16, False
    device = torch.device(options.device)
    generator = torch.Generator(device).manual_seed(options.seed)
    rows, losses = [], []
    for case in GPU_CASES:
        if case.op != "filtered_lrelu" or options.match not in case.name:
            continue
        for mode in MODES:
            chosen, times = times_of(call_of(case, tensors(case, options, generator), mode), device)
            best = min(times, key=times.__getitem__)
            losses.append(times[chosen] / times[best])
            shown = [f"{tile[0]}×{tile[1]}: {times[tile]:.3f}" for tile in (chosen, best)]
            rows.append([case.name, mode, *shown, f"{losses[-1]:.2f}", len(times)])
            print(*rows[-1], sep=" | ", file=sys.stderr, flush=True)
    header = ["layer", "mode", "chosen tile: ms", "best tile: ms", "ratio", "tiles"]
    mean = f"Geometric mean of the ratios: {math.exp(statistics.fmean(map(math.log, losses))):.3f}."
    text = report("Tiles of filtered_lrelu", device, options.seed, [table(header, rows), mean])
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
