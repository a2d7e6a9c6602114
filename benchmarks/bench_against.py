"""Compare the speed of a training step with that of another checkout.

    git worktree add ../before COMMIT
    python benchmarks/bench_against.py ../before --families stylegan2 --rounds 3

Each checkout runs its own bench_step.py with `--arms auto`, in alternating subprocesses. The table has the
median of the rounds, and each of them in parentheses. Up to commit 55a9cab, bench_step.py has no cycles: it
times every phase by itself.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

import _checkout
import torch
from bench_step import add_shared_options
from measuring import report, table

from finetune.train import allocator

# `time.perf_counter` is the clock of all versions of bench_step.py.
CHILD = """
import runpy, sys, time
if sys.argv[1] == "cpu": time.perf_counter = time.process_time
del sys.argv[:2]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def images_per_sec(root: Path, family: str, options: argparse.Namespace) -> float:
    """Run bench_step.py of a checkout in a subprocess and return images a second of its table."""
    program = root / "benchmarks" / "bench_step.py"
    words = ["--families", family, "--arms", "auto"]
    for name in ("resolution", "cbase", "cmax", "batch", "threads", "device", "seed"):
        words += [f"--{name}", str(getattr(options, name))]
    cycles = ["--warmup", str(options.warmup), "--cycles", str(options.cycles)]
    words += cycles if "--cycles" in program.read_text() else ["--no-memory"]
    clock = "cpu" if options.cpu_time else "wall"
    # Without -P, Python looks for packages in the working folder before PYTHONPATH.
    command = [sys.executable, "-P", "-c", CHILD, clock, str(program), *words]
    env = os.environ | {
        "PYTHONPATH": f"{program.parent}{os.pathsep}{root}",
        # Training keeps freed memory at 55a9cab as well, its bench_step.py does not.
        "MALLOC_MMAP_THRESHOLD_": str(allocator.LARGEST_BLOCK),
        "MALLOC_TRIM_THRESHOLD_": str(allocator.NEVER_TRIM),
    }
    try:
        text = subprocess.check_output(command, env=env, text=True)
    except subprocess.CalledProcessError as error:  # which has printed why
        sys.exit(f"{program} failed with exit code {error.returncode}")
    header, _, row = [line.split("|") for line in text.splitlines() if line.startswith("|")]
    found = {name.strip(): value for name, value in zip(header, row)}
    return float(found.get("images/s") or found["images a second"])


def comparison(options: argparse.Namespace) -> str:
    """Return images a second of both checkouts and their ratio, by family."""
    roots = [_checkout.ROOT, options.checkout.resolve()]
    rates: dict[str, list[list[float]]] = {family: [[], []] for family in options.families}
    for _ in range(options.rounds):
        for family, pair in rates.items():
            for root, values in zip(roots, pair):
                values.append(images_per_sec(root, family, options))
    rows = []
    for family, pair in rates.items():
        ours, theirs = map(statistics.median, pair)
        each = ["; ".join(f"{value:.4g}" for value in values) for values in pair]
        rows.append([family, f"{ours:.4g} ({each[0]})", f"{theirs:.4g} ({each[1]})", f"{ours / theirs:.2f}"])
    unit = "images per processor second" if options.cpu_time else "images/s"
    return table(["family", f"{unit} (each)", "the other checkout (each)", "ratio"], rows)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("checkout", type=Path, help="folder of the other checkout")
    parser.add_argument("--cpu-time", action="store_true", help="count processor seconds: for busy machines")
    add_shared_options(parser)
    options = parser.parse_args()
    if not (options.checkout / "benchmarks" / "bench_step.py").is_file():
        parser.error(f"{options.checkout}: no benchmarks/bench_step.py in it; must be another checkout")
    if options.cpu_time and torch.device(options.device).type == "cuda":
        parser.error("--cpu-time: a GPU's work takes no CPU time")
    torch.set_num_threads(options.threads)
    title = "Training step against another checkout"
    text = report(title, torch.device(options.device), options.seed, [comparison(options)])
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
