"""Measure time and memory of short commands, compared with `import torch`.

    python benchmarks/bench_start.py --out benchmarks/results/start_<machine>_<yyyymm>.md

Every command is a subprocess with one thread; they alternate, and medians of processor time (which other
programs disturb less than the clock), of wall time and of peak memory are reported. The data set of
`dataset check` is made first: small images in folders of 1,000; "unchanged" checks it again.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import _checkout  # noqa: F401
import numpy as np
import torch
from measuring import ROOT, machine, table
from PIL import Image

DEMO = ROOT / "finetune" / "demo" / "faces-3d-64.pkl"


# A subprocess inherits the peak memory of its parent, so a small one starts it.
MEASURE = """
import resource, subprocess, sys, time
started = time.perf_counter()
subprocess.run([sys.executable, *sys.argv[1:]], stdout=subprocess.DEVNULL, check=True)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_utime + used.ru_stime, time.perf_counter() - started, used.ru_maxrss / 1024)
"""


def cost(words: list[str], environment: dict[str, str]) -> tuple[float, float, float]:
    """Return CPU seconds, wall seconds and peak MiB of a subprocess and its workers."""
    command = [sys.executable, "-c", MEASURE, *words]
    cpu, wall, mib = map(float, subprocess.check_output(command, env=environment, text=True).split())
    return cpu, wall, mib


def make_set(folder: Path, num_images: int) -> None:
    rng = np.random.RandomState(0)
    for i in range(num_images):
        path = folder / f"{i // 1000:05}" / f"img{i:08}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.randint(0, 256, (16, 16, 3), np.uint8)).save(path)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=70_000)
    parser.add_argument("--out", type=Path, help="write the table to this Markdown file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_set(folder / "set", options.images)
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        cached = environment | {"FINETUNE_CACHE": str(folder / "cache")}
        generate = ["generate", "--network", str(DEMO), "--seeds", "0", "--outdir", str(folder / "images")]
        check = ["-m", "finetune", "dataset", "check", str(folder / "set"), "--resolution", "16"]
        first = cost(check, cached)
        commands = {
            "import torch": (["-c", "import torch"], environment),
            f"inspect ({DEMO.stat().st_size / 1e6:.0f} MB)": (
                ["-m", "finetune", "inspect", str(DEMO)],
                environment,
            ),
            "generate, one image, kernels built": (["-m", "finetune", *generate], environment),
            f"dataset check, {options.images:,} unchanged": (check, cached),
        }
        cost(["-c", "from torch_utils import custom_ops; custom_ops.cpu_library()"], environment)
        rounds: dict[str, list[tuple[float, float, float]]] = {name: [] for name in commands}
        for _ in range(options.rounds):
            for name, (words, each) in commands.items():
                rounds[name].append(cost(words, each))
    medians = {name: tuple(map(statistics.median, zip(*costs))) for name, costs in rounds.items()}
    medians[f"dataset check, {options.images:,} for the first time (once)"] = first
    rows = [[name, f"{cpu:.2f}", f"{wall:.2f}", f"{mib:.0f}"] for name, (cpu, wall, mib) in medians.items()]
    text = table(["command", "CPU (s)", "wall (s)", "peak memory (MiB)"], rows)
    print(text)
    if options.out:
        facts = machine(torch.device("cpu"))
        setting = ", ".join(f"{key} {value}" for key, value in facts.items() if value is not None)
        load = f"Load average at the end: {os.getloadavg()[0]:.1f}."
        head = f"# Starting commands\n\n`python {' '.join(sys.argv)}`"
        options.out.write_text(f"{head}\n\n{text}\n\n{setting}\n{load}\n")


if __name__ == "__main__":
    main()
