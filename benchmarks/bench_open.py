"""Seconds and peak memory of opening a checkpoint, beside `torch.load` of the same tensors.

    python benchmarks/bench_open.py --out benchmarks/results/open_<machine>_<yyyymm>.md

Makes a StyleGAN2 checkpoint with random weights (G, D and G_ema of the usual size) and the same tensors as a
file of `torch.save`. Every opening is a subprocess with one thread; they alternate. The table has medians of
CPU time, wall time and peak memory of the whole process, and what remains without the imports.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
from pathlib import Path

import _checkout  # noqa: F401
import torch
from bench_start import cost
from measuring import ROOT, machine, table

from finetune.export.stylegan_pickle import save_stylegan_pickle
from finetune.models import stylegan2

IMPORTS = "import hashlib, os, torch, finetune.checkpoint.load as load, finetune.models.stylegan2"


def make_files(folder: Path, resolution: int) -> None:
    """Write the same random networks as a StyleGAN pickle and with `torch.save`."""
    torch.manual_seed(0)
    shape = {"c_dim": 0, "img_resolution": resolution, "img_channels": 3}
    G = stylegan2.Generator(z_dim=512, w_dim=512, mapping_kwargs={"num_layers": 8}, **shape)
    networks = {"G": G, "D": stylegan2.Discriminator(**shape), "G_ema": stylegan2.Generator(**G.init_kwargs)}
    save_stylegan_pickle(folder / "network.pkl", **networks)
    torch.save({name: net.state_dict() for name, net in networks.items()}, folder / "tensors.pt")


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--resolution", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="write the table to this Markdown file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        # In a process of its own: the peak of a subprocess starts with the memory of its parent.
        making = multiprocessing.get_context("spawn").Process(
            target=make_files, args=(Path(temporary), options.resolution)
        )
        making.start()
        making.join()
        pickle, tensors = Path(temporary, "network.pkl"), Path(temporary, "tensors.pt")
        size = pickle.stat().st_size / 1e6
        torch_load = f"{IMPORTS}; kept = torch.load({str(tensors)!r})"
        commands = {
            "imports": IMPORTS,
            "torch.load": torch_load,
            "torch.load, and SHA-256 of the file": (
                f"{torch_load}; hashlib.file_digest(open({str(tensors)!r}, 'rb'), 'sha256')"
            ),
            "finetune.load (with SHA-256)": f"{IMPORTS}; kept = load.load({str(pickle)!r})",
        }
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        rounds: dict[str, list[tuple[float, float, float]]] = {name: [] for name in commands}
        for _ in range(options.rounds):
            for name, words in commands.items():
                # Ending Python as usual reads more of the libraries than the imports do.
                rounds[name].append(cost(["-c", f"{words}; os._exit(0)"], environment))
    medians = {name: tuple(map(statistics.median, zip(*costs))) for name, costs in rounds.items()}
    rows = []
    for name, values in medians.items():
        net = [a - b for a, b in zip(values, medians["imports"])]
        cells = (f"{a:.{digits}f} ({b:.{digits}f})" for a, b, digits in zip(values, net, (2, 2, 0)))
        rows.append([name, *cells])
    text = table([f"{size:.0f} MB", "CPU (s)", "wall (s)", "peak memory (MiB)"], rows)
    print(text)
    if options.out:
        facts = machine(torch.device("cpu"))
        setting = ", ".join(f"{key} {value}" for key, value in facts.items() if value is not None)
        load = f"Load average at the end: {os.getloadavg()[0]:.1f}. Seed 0, {options.rounds} rounds."
        title = f"# Opening a checkpoint of {options.resolution} px: whole process (without the imports)"
        options.out.write_text(f"{title}\n\n`python {' '.join(sys.argv)}`\n\n{text}\n\n{setting}\n{load}\n")


if __name__ == "__main__":
    main()
