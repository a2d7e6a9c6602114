"""Measure the build time of the kernels: cold, with each compiler, and warm, from the cache.

    python benchmarks/bench_build.py --out benchmarks/results/build_<machine>_<yyyymm>.md

No GPU is needed. The CUDA kernels are those of a training step of a network (G, D and their
second gradients, in one precision; found by running the step on meta tensors), and all that
`finetune doctor --build` builds for an architecture. Every build has an empty cache. "one by one": as
at run time; "side by side": ahead of time. CPU seconds are listed beside wall time, because other programs
may run. Warm: a new process finds and loads everything, Python and torch being there
already.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import _checkout  # noqa: F401
import torch
from measuring import ROOT, machine, table, write_report

from finetune.models import stylegan2, stylegan3
from torch_utils import custom_ops
from torch_utils.ops import impl
from torch_utils.ops.native import cuda, library, prebuild
from torch_utils.ops.native.building import NativeUnavailable, cpu_build, cuda_build
from torch_utils.ops.native.plan import LaunchPlan

RADIAL = dict(conv_kernel=1, channel_base=65536, channel_max=1024, use_radial_filters=True)
ALL = "all of doctor --build"
SOME_ADDRESS = 4096  # aligned, and never looked at


@contextlib.contextmanager
def recorded(capability: tuple[int, int], dtype: torch.dtype) -> Iterator[set[LaunchPlan]]:
    """Record the kernels that the ops on meta tensors would need on a GPU; run none."""
    plans: set[LaunchPlan] = set()

    def record(
        op: str, x: torch.Tensor, pointers: dict[str, int], numbers: tuple[Any, ...], with_sums: bool = False
    ) -> torch.Tensor | None:
        p = cuda._MAKE[op](*(dtype if value is torch.float32 else value for value in numbers))
        for name in pointers:
            setattr(p, name, SOME_ADDRESS)
        plan = importlib.import_module(f"torch_utils.ops.native.{op}.plan").plan(p, capability)
        plans.add(plan.specialization())
        return cuda.empty_sums(plan.grid[:1], x) if with_sums else None

    before = cuda._run, library.kernels
    cuda._run, library.kernels = record, lambda x: cuda
    for op in impl.registered():
        impl._decided[op, "auto", "meta"] = "cuda"
    try:
        yield plans
    finally:
        cuda._run, library.kernels = before
        for op in impl.registered():
            del impl._decided[op, "auto", "meta"]


def step(family: str, resolution: int, batch: int = 4) -> None:
    """Run every kernel of a training step: G with its second gradient, D with R1's, G without gradients."""
    options = {"fused_modconv": "pointwise"}  # as training calls it
    with torch.device("meta"):
        if family == "stylegan2":
            G = stylegan2.Generator(512, 0, 512, resolution, 3)
        else:
            G = stylegan3.Generator(512, 0, 512, resolution, 3, **(RADIAL if family == "stylegan3-r" else {}))
        D = stylegan2.Discriminator(0, resolution, 3)
        G.to("meta"), D.to("meta")
        ws = G.mapping(torch.randn(batch, 512), None)
        img = G.synthesis(ws, **options)
        if family == "stylegan2":
            (slope,) = torch.autograd.grad(img.square().sum(), ws, create_graph=True)
            slope.square().sum().backward()
        D(G.synthesis(ws.detach(), **options), None).sum().backward()
        real = torch.randn(batch, 3, resolution, resolution).requires_grad_(True)
        (slope,) = torch.autograd.grad(D(real, None).sum(), real, create_graph=True)
        slope.square().sum().backward()
        with torch.no_grad():
            G.synthesis(ws, **options)


def asked_for(
    family: str, resolution: int, capability: tuple[int, int] = (9, 0), dtype: torch.dtype = torch.float16
) -> list[LaunchPlan]:
    """Return the CUDA specializations of a training step of a network of the published sizes."""
    with recorded(capability, dtype) as plans:
        step(family, resolution)
    return sorted(plans)


def cold(build: Callable[[], Any]) -> dict[str, float] | str:
    """Return the seconds of a build with an empty cache, or why there is none."""
    kept = os.environ.get("FINETUNE_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FINETUNE_CACHE"] = folder
        wall, cpu = time.perf_counter(), cpu_seconds()
        try:
            build()
        except NativeUnavailable as error:
            return str(error)
        finally:
            os.environ.pop("FINETUNE_CACHE")
            if kept is not None:
                os.environ["FINETUNE_CACHE"] = kept
        return {"wall": time.perf_counter() - wall, "cpu": cpu_seconds() - cpu}


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and its children that have ended."""
    return sum(
        used.ru_utime + used.ru_stime
        for used in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


WARM = """
import json, sys, time, torch
from torch_utils import custom_ops
from torch_utils.ops.native.plan import LaunchPlan
plans = [LaunchPlan(*p[:3], tuple(map(tuple, p[3])), *map(tuple, p[4:6]), p[6]) for p in json.load(sys.stdin)]
capability = tuple(map(int, sys.argv[1:3]))
started = time.perf_counter()
custom_ops.cpu_library()
library = time.perf_counter() - started
started = time.perf_counter()
for plan in plans:
    custom_ops.cubin(plan, capability)
print(library, time.perf_counter() - started)
"""


def warm(plans: list[LaunchPlan], capability: tuple[int, int], repeats: int) -> tuple[float, float]:
    """Return the least seconds to find and load the CPU library, and every binary of `plans`."""
    with tempfile.TemporaryDirectory() as folder:
        variables = {**os.environ, "FINETUNE_CACHE": folder, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", WARM, *map(str, capability)]
        found = []
        for _ in range(repeats + 1):  # the first one builds
            done = subprocess.run(
                command, env=variables, input=json.dumps(plans), text=True, stdout=subprocess.PIPE, check=True
            )
            found.append([float(value) for value in done.stdout.split()])
        return tuple(map(min, zip(*found[1:])))  # type: ignore[return-value]


def ways(plans: list[LaunchPlan], capability: tuple[int, int]) -> dict[str, Callable[[], Any]]:
    """Return how CUDA kernels can be built."""
    return {
        "NVRTC one by one": lambda: [cuda_build.nvrtc(plan, capability) for plan in plans],
        "NVRTC side by side": lambda: cuda_build.nvrtc_many(plans, capability),
        "ninja and nvcc": lambda: cuda_build.nvcc(plans, capability),
    }


def cells(found: dict[str, float] | str) -> list[str]:
    """Return seconds and CPU seconds of a row, or why there are none."""
    if isinstance(found, str):
        return [found, "–"]
    return [f"{found[key]:.3g}" if key in found else "–" for key in ("wall", "cpu")]


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--arch", default="9.0", metavar="X.Y", help="compute capability")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--families", nargs="+", default=["stylegan2", "stylegan3-t", "stylegan3-r"])
    parser.add_argument("--only-networks", action="store_true", help="leave out the list of doctor --build")
    parser.add_argument("--repeats", type=int, default=3, help="processes for the warm times")
    parser.add_argument("--out", type=Path, help="write the table to this Markdown file")
    options = parser.parse_args()
    major, minor = map(int, options.arch.split("."))
    capability = (major, minor)
    sets = {
        f"{name}, {options.resolution} px": asked_for(name, options.resolution, capability)
        for name in options.families
    }
    if not options.only_networks:
        sets[ALL] = prebuild.specializations(capability)
    results: dict[str, Any] = {"CPU library, ninja and C++ compiler": cold(cpu_build.build)}
    for name, plans in sets.items():
        for way, build in ways(plans, capability).items():
            if (name, way) == (ALL, "NVRTC one by one"):
                continue
            title = f"{name}: {len(plans)} kernels, {way}"
            results[title] = cold(build)
            print(title, results[title], flush=True)
    most = max((plans for name, plans in sets.items() if name != ALL), key=len)
    library, binaries = warm(most, capability, options.repeats)
    results["CPU library, warm"] = {"wall": library}
    results[f"{len(most)} kernels of one network, warm"] = {"wall": binaries}
    rows = [[name, *cells(found)] for name, found in results.items()]
    text = table(["what is built", "seconds", "CPU seconds"], rows)
    print(text)
    if options.out:
        settings = {key: value for key, value in vars(options).items() if key != "out"}
        compilers = {key: custom_ops.explain()[key] for key in ("cxx", "nvcc", "nvrtc", "ninja")}
        record = {"machine": machine(torch.device("cpu")), "compilers": compilers, "settings": settings}
        write_report(options.out, "Building the kernels", f"python {' '.join(sys.argv)}", [text], record)


if __name__ == "__main__":
    main()
