"""Read the kernels of a GPU from a trace of torch.profiler, and list the slowest of them."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import _checkout  # noqa: F401
from measuring import table

LISTED = 25


def kernels_of(profiler: Any) -> tuple[dict[str, tuple[int, float]], float]:
    """Return (name -> (calls, seconds), seconds covered by at least one kernel)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return kernels_in(json.loads(path.read_text(errors="replace"))["traceEvents"])


def kernels_in(events: list[dict[str, Any]]) -> tuple[dict[str, tuple[int, float]], float]:
    """Return the kernels, copies and fills in a trace of torch.profiler, which counts microseconds."""
    ran = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    calls: Counter[str] = Counter()
    total: Counter[str] = Counter()
    covered = end = 0.0
    for event in sorted(ran, key=lambda event: event["ts"]):
        calls[event["name"]] += 1
        total[event["name"]] += event["dur"] / 1e6
        stop = event["ts"] + event["dur"]
        covered += max(0.0, stop - max(end, event["ts"]))
        end = max(end, stop)
    return {name: (calls[name], total[name]) for name in calls}, covered / 1e6


def kernel_table(
    name: str, kernels: dict[str, tuple[int, float]], covered: float, cycle: float, profiled: float
) -> str:
    """Return the slowest kernels of a cycle, and its seconds without and with the profiler."""
    total = sum(seconds for _, seconds in kernels.values())
    slowest = sorted(kernels.items(), key=lambda item: -item[1][1])[:LISTED]
    rows = [
        [f"{sec * 1000:.2f}", f"{sec / (total or 1):.1%}", calls, f"`{kernel[:100].replace('|', '/')}`"]
        for kernel, (calls, sec) in slowest
    ]
    calls = sum(count for count, _ in kernels.values())
    head = (
        f"Kernels of {name}: {calls} calls, {total:.3f} s in all, {covered:.3f} s covered; "
        f"the cycle takes {cycle:.3f} s, under the profiler {profiled:.3f} s."
    )
    return head + "\n\n" + table(["ms", "fraction", "calls", "kernel"], rows)
