"""Measure the web page of a generator in a headless Chromium, with and without a morph.

    python benchmarks/bench_web.py --out benchmarks/results/web_<machine>_<yyyymm>.md

The status line of a page states the time of an image: mapping, synthesis and drawing, here for one seed after
the other. A morph is measured between a network and itself with other weights, at the position 0.5. The first
image of a page is not counted.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import os
import sys
import tempfile
from pathlib import Path

import _checkout  # noqa: F401
import torch
from browser import chromium, missing, open_page, serve, set_controls
from measuring import ROOT, machine, table, write_report

import finetune
from finetune.export.web import write_page

DEMO = ROOT / "finetune" / "demo" / "faces-3d-64.pkl"


def milliseconds(folder: Path, backend: str, count: int) -> list[float]:
    """Return the time of each of `count` images of a page, as its status line has it."""
    with serve(folder) as address, chromium() as driver:
        open_page(driver, f"{address}?backend={backend}")
        status = [set_controls(driver, seed=seed, alpha=0.5) for seed in range(count)]
    return [float(text.split()[1]) for text in status]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", type=Path, nargs="+", default=[DEMO], help="[default: the bundled one]")
    parser.add_argument("--backend", choices=["wasm", "webgpu"], default="wasm")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    arguments = parser.parse_args()
    if reason := missing():
        parser.error(reason)

    rows = [row for network in arguments.network for row in measure(network, arguments)]
    header = ["network", "page", "median (ms)", "10 % (ms)", "90 % (ms)", "images/s", "difference to torch"]
    tables = [table(header, rows), f"Load average at the end: {os.getloadavg()[0]:.1f}."]
    print("\n\n".join(tables))
    if arguments.out:
        command = " ".join(["python", "benchmarks/bench_web.py", *sys.argv[1:]])
        facts = {"machine": machine(torch.device("cpu"))}
        write_report(arguments.out, "The page of a generator", command, tables, facts)


def measure(network: Path, arguments: argparse.Namespace) -> list[list[str]]:
    """Return the rows of one network: its page, and that of a morph."""
    checkpoint = finetune.load(network)
    other = copy.deepcopy(checkpoint.best)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.01)
    originals = {"one network": None, "morph": dataclasses.replace(checkpoint, G_ema=other)}
    rows = []
    for name, original in originals.items():
        with tempfile.TemporaryDirectory() as folder:
            page = write_page(Path(folder), checkpoint, original=original)
            times = sorted(milliseconds(Path(folder), arguments.backend, arguments.images))
        low, median, high = (times[round(part * (len(times) - 1))] for part in (0.1, 0.5, 0.9))
        numbers = [f"{value:.0f}" for value in (median, low, high, 1000 / median)]
        rows.append([network.name, name, *numbers, f"{page.max_difference:.1e}"])
    return rows


if __name__ == "__main__":
    main()
