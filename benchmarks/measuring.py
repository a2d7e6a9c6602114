"""Shared by the benchmarks: interleaved medians, the ceilings of the machine, and result files."""

from __future__ import annotations

import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _checkout import ROOT as ROOT

import finetune

clock = time.perf_counter


def count_cpu_time() -> None:
    """Use one thread, and count its CPU seconds, which other programs on the machine disturb less."""
    global clock
    clock = time.process_time
    torch.set_num_threads(1)


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Return seconds of one call by `clock`, on a GPU until its work is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = clock()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - started


def interleaved(
    calls: dict[str, Callable[[], Any]], device: torch.device, repeats: int, budget: float = 60.0
) -> dict[str, float]:
    """Return the median seconds of every call, called in turn so that other load affects all alike.

    The first round is not counted. `repeats` rounds, fewer (but three) once `budget` seconds are spent. A GPU
    gets short calls in runs of up to twenty, or the launches would be measured.
    """
    rounds: dict[str, list[float]] = {name: [] for name in calls}
    inner = dict.fromkeys(calls, 1)
    started = time.perf_counter()
    for number in range(repeats + 1):
        for name, call in calls.items():
            run = [call] * inner[name]
            taken = seconds(lambda run=run: [one() for one in run], device) / len(run)  # type: ignore[misc]
            if number == 0 and device.type == "cuda":
                taken = seconds(call, device)  # now that kernels are built
                inner[name] = max(1, min(20, int(0.02 / taken)))
            if number:
                rounds[name].append(taken)
        if number >= 3 and time.perf_counter() - started > budget:
            break
    return {name: statistics.median(values) for name, values in rounds.items()}


def ceilings(device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """Return the limits of the machine: bytes/s of a large copy, flops/s of a large product."""
    on_gpu = device.type == "cuda"
    count = (1 << 30 if on_gpu else 1 << 26) // dtype.itemsize
    source, target = (torch.ones(count, dtype=dtype, device=device) for _ in range(2))
    size = 8192 if on_gpu else 2048
    a, b = (torch.ones(size, size, dtype=torch.float32, device=device) for _ in range(2))
    product = torch.empty_like(a)
    calls = {"copy": lambda: target.copy_(source), "product": lambda: torch.mm(a, b, out=product)}
    medians = interleaved(calls, device, repeats=10, budget=10)
    return {
        "bytes_per_sec": 2 * count * dtype.itemsize / medians["copy"],
        "flops_per_sec": 2 * size**3 / medians["product"],
    }


def machine(device: torch.device) -> dict[str, Any]:
    """Return where this was measured, and with which versions."""
    cpu = platform.processor()
    if (info := Path("/proc/cpuinfo")).is_file():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = f"{names[0]}, {len(names)} cores" if names else cpu
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "instructions": torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "finetune": finetune.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def short_name(device: torch.device) -> str:
    """Return the processor as a part of a file's name."""
    name = machine(device)["device"].replace("NVIDIA", "").replace("Processor", "")
    words = re.sub(r"\([^)]*\)", "", name).replace(" cores", "core").replace(" core", "core")
    return "-".join(re.findall(r"[a-z0-9]+", words.lower()))


def write_report(path: Path, title: str, command: str, tables: list[str], record: dict[str, Any]) -> None:
    """Write the command, the machine with versions and date, the settings, and the tables."""
    groups = {name: value for name, value in record.items() if isinstance(value, dict)}
    facts = [f"{name}: " + ", ".join(f"{k} {v}" for k, v in group.items()) for name, group in groups.items()]
    text = "\n\n".join([f"# {title}", f"`{command}`", *facts, *tables]) + "\n"
    path.write_text(text, encoding="utf-8")


def report(title: str, device: torch.device, seed: int, tables: list[str]) -> str:
    """Print and keep the report of a benchmark: command, machine, tables."""
    facts = machine(device)
    versions = f"torch {facts['torch']}, Python {facts['python']}, finetune {facts['finetune']}"
    if device.type == "cuda":
        versions += f", CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    lines = [
        f"## {title}",
        f"`python benchmarks/{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}`",
        f"{facts['device']}; {versions}; {facts['threads']} CPU threads; seed {seed}; {facts['date']}.",
        *tables,
    ]
    return "\n\n".join(lines) + "\n"


def table(header: list[str], rows: list[list[Any]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "| --- " * len(header) + "|"]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


if __name__ == "__main__":
    wanted = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        sys.exit(f"torch {torch.__version__} sees no CUDA device: nothing can be measured on one")
    print(short_name(torch.device(wanted)))
