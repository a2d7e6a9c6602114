"""Measure time and memory of short commands, and of opening a checkpoint, compared with torch's own.

    python benchmarks/bench_start.py --out benchmarks/results/start_<machine>_<yyyymm>.md

Every command is a subprocess with one thread; they alternate, and medians of processor time (which other
programs disturb less than the clock), of wall time and of peak memory are reported. The data set of
`dataset check` is made first: small images in folders of 1,000; "unchanged" checks it again. So is the
checkpoint: StyleGAN2 with random weights (G, D and G_ema of the usual size), and a file of `torch.save` with
the same tensors. Subtract the row "imports" from those of opening.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import _checkout  # noqa: F401
import numpy as np
import torch
from measuring import ROOT, report, table
from PIL import Image

from finetune.export.stylegan_pickle import save_stylegan_pickle
from finetune.models import stylegan2

DEMO = ROOT / "finetune" / "demo" / "faces-3d-64.pkl"
IMPORTS = "import hashlib, os, torch, finetune.checkpoint.load as load, finetune.models.stylegan2"

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


def make_networks(folder: Path, resolution: int) -> None:
    """Write the same random networks as a StyleGAN pickle and with `torch.save`."""
    torch.manual_seed(0)
    shape = {"c_dim": 0, "img_resolution": resolution, "img_channels": 3}
    G = stylegan2.Generator(z_dim=512, w_dim=512, mapping_kwargs={"num_layers": 8}, **shape)
    networks = {"G": G, "D": stylegan2.Discriminator(**shape), "G_ema": stylegan2.Generator(**G.init_kwargs)}
    save_stylegan_pickle(folder / "network.pkl", **networks)
    torch.save({name: net.state_dict() for name, net in networks.items()}, folder / "tensors.pt")


def commands_of(folder: Path, num_images: int) -> dict[str, list[str]]:
    """Return the arguments of Python for each row of the table."""
    finetune = ["-m", "finetune"]
    pickle, tensors = str(folder / "network.pkl"), str(folder / "tensors.pt")
    torch_load = f"{IMPORTS}; kept = torch.load({tensors!r})"
    sha256 = f"hashlib.file_digest(open({tensors!r}, 'rb'), 'sha256')"
    openings = {
        "imports": IMPORTS,
        "torch.load": torch_load,
        "torch.load, and SHA-256 of the file": f"{torch_load}; {sha256}",
        "finetune.load (with SHA-256)": f"{IMPORTS}; kept = load.load({pickle!r})",
    }
    size = os.path.getsize(pickle) / 1e6
    outdir = str(folder / "images")
    return {
        "import torch": ["-c", "import torch"],
        f"inspect ({DEMO.stat().st_size / 1e6:.0f} MB)": [*finetune, "inspect", str(DEMO)],
        "generate, one image, kernels built": [
            *(*finetune, "generate", "--network", str(DEMO), "--seeds", "0", "--outdir", outdir),
        ],
        f"dataset check, {num_images:,} unchanged": check_of(folder),
        # Ending Python as usual reads more of the libraries than the imports do.
        **{f"{name}, {size:.0f} MB": ["-c", f"{code}; os._exit(0)"] for name, code in openings.items()},
    }


def check_of(folder: Path) -> list[str]:
    return ["-m", "finetune", "dataset", "check", str(folder / "set"), "--resolution", "16"]


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=70_000)
    parser.add_argument("--resolution", type=int, default=1024, help="of the checkpoint")
    parser.add_argument("--out", type=Path, help="write the table to this Markdown file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_set(folder / "set", options.images)
        # In a process of its own: the peak of a subprocess starts with the memory of its parent.
        making = multiprocessing.get_context("spawn").Process(
            target=make_networks, args=(folder, options.resolution)
        )
        making.start()
        making.join()
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        environment["FINETUNE_CACHE"] = str(folder / "cache")
        first = cost(check_of(folder), environment)
        cost(["-c", "from torch_utils import custom_ops; custom_ops.cpu_library()"], environment)
        commands = commands_of(folder, options.images)
        rounds: dict[str, list[tuple[float, float, float]]] = {name: [] for name in commands}
        for _ in range(options.rounds):
            for name, words in commands.items():
                rounds[name].append(cost(words, environment))
    medians = {name: tuple(map(statistics.median, zip(*costs))) for name, costs in rounds.items()}
    medians[f"dataset check, {options.images:,} for the first time (once)"] = first
    rows = [[name, f"{cpu:.2f}", f"{wall:.2f}", f"{mib:.0f}"] for name, (cpu, wall, mib) in medians.items()]
    parts = [
        table(["command", "CPU (s)", "wall (s)", "peak memory (MiB)"], rows),
        f"Load average at the end: {os.getloadavg()[0]:.1f}.",
    ]
    text = report("Starting commands, opening checkpoints", torch.device("cpu"), 0, parts)
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
