"""`finetune doctor`: versions, compilers, how the ops run, and building kernels ahead of time."""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import click


@click.command("doctor", short_help="Show versions, compilers and how the ops run on this machine.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
@click.option("--clean", is_flag=True, help="Empty the cache of built kernels first.")
@click.option("--build", is_flag=True, help="Build the kernels for this CPU and the GPUs of this machine.")
@click.option(
    "--arch",
    multiple=True,
    metavar="X.Y",
    help="With --build: for GPUs of this compute capability.",
)
def command(as_json: bool, clean: bool, build: bool, arch: tuple[str, ...]) -> None:
    """Show versions, working compilers, and the implementation of each op per device, with the reason.

    Compilers are tested on three lines of code. None is required: if kernels cannot be
    built, the ops run in plain torch, which is correct but slower.
    """
    from finetune.errors import ConfigError
    from torch_utils import custom_ops

    if arch and not build:
        raise ConfigError(f"--arch {arch[0]}: has an effect only with --build. Use --build --arch {arch[0]}.")
    done: list[str] = []
    if clean:
        from torch_utils.ops.native.building import cache

        files, size = cache.clean()
        done.append(f"{cache.ops_folder()} is empty: {files} files, {size / 2**20:.1f} MiB removed")
    built = True
    if build:
        sentences, built = build_everything(capabilities(arch))
        done += sentences
    with custom_ops.without_build():
        facts = describe()
    facts["done"] = done
    click.echo(json.dumps(facts, indent=2) if as_json else as_text(facts))
    if not built:  # what --build promises a script
        raise SystemExit(1)


def capabilities(arch: tuple[str, ...]) -> list[tuple[int, int]]:
    """Return the given capabilities, else those of the GPUs here. Raises ConfigError for other text."""
    import torch

    from finetune.errors import ConfigError

    found = []
    for text in arch:
        major, _, minor = text.partition(".")
        if not (major.isdecimal() and minor.isdecimal()):
            raise ConfigError(f"--arch {text}: not a compute capability. Use one like 8.6 or 9.0.")
        found.append((int(major), int(minor)))
    if not arch:
        found = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    return sorted(set(found))


def build_everything(wanted: list[tuple[int, int]]) -> tuple[list[str], bool]:
    """Build what can be built; a sentence for each, and whether all of it was built."""
    import time

    from torch_utils import custom_ops

    started, built = time.perf_counter(), True
    try:
        info = custom_ops.cpu_library_info()
        done = [f"CPU kernels are ready ({info}, {time.perf_counter() - started:.1f} s)"]
    except custom_ops.NativeUnavailable as error:
        done, built = [f"CPU kernels cannot be built: {error}"], False
    for capability in wanted:
        from torch_utils.ops.native import prebuild

        started, name = time.perf_counter(), f"sm_{capability[0]}{capability[1]}"
        plans = prebuild.specializations(capability)
        try:
            maker = custom_ops.build_cuda(plans, capability)
            taken = time.perf_counter() - started
            done.append(f"CUDA kernels for {name} are ready: {len(plans)} by {maker} in {taken:.1f} s")
        except custom_ops.NativeUnavailable as error:
            done.append(f"CUDA kernels for {name} cannot be built: {error}")
            built = False
    if not wanted:
        done.append("CUDA kernels: this machine has no GPU. To build for another, use e.g. --arch 9.0.")
    return done, built


def describe() -> dict[str, Any]:
    """Return the facts as plain values; the keys are a contract with scripts."""
    import torch

    import dnnlib
    import finetune
    import torch_utils
    from torch_utils import custom_ops
    from torch_utils.ops import (  # noqa: F401 (they register)
        bias_act,
        filtered_lrelu,
        fma,
        impl,
        unit_distance,
        upfirdn2d,
    )

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    facts: dict[str, Any] = {
        "finetune": finetune.__version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cuda_of_torch": torch.version.cuda,
        "driver": driver_version(),
        "gpus": [
            {"name": torch.cuda.get_device_name(i), "capability": list(torch.cuda.get_device_capability(i))}
            for i in range(torch.cuda.device_count())
        ],
        # What the GPUs are, what torch was compiled for, what NVRTC can compile for.
        "architectures": {
            "gpus": [f"sm_{major}{minor}" for major, minor in capabilities(())],
            "torch": torch.cuda.get_arch_list(),
            "nvrtc": nvrtc_architectures(),
        },
        "threads": torch.get_num_threads(),
        "packages": {m.__name__: folder_of(m) for m in (finetune, dnnlib, torch_utils)},
        **custom_ops.explain(),
        "caches": caches(),
        "asked_for": {"variable": os.environ.get(impl.VARIABLE, ""), "impl": impl.default_impl()},
    }
    facts["ops"] = impl.explain(devices)
    if facts["cpu_library"].get("cause") == custom_ops.NOT_BUILT:
        for op in facts["ops"]:
            if op["why"].startswith(custom_ops.NOT_BUILT):
                op |= {"runs": "native kernels", "why": "built at first use"}
    return facts


def folder_of(package: Any) -> str:
    """Return the folder of a package: another copy of `dnnlib` or `torch_utils` may come first."""
    return str(next(iter(package.__path__)))


def caches() -> dict[str, dict[str, Any]]:
    """Return every cache folder, its content, and whether it is writable."""
    from torch_utils.files import cache_folder
    from torch_utils.ops.native.building import cache

    found = {}
    for name in ("ops", "checkpoints", "metrics", "scans", "onnxruntime-web", "locks"):
        folder = cache_folder() / name
        files, size = cache.size(folder)
        found[name] = {"folder": str(folder), "files": files, "bytes": size, "writable": is_writable(folder)}
    return found


def is_writable(folder: Path) -> bool:
    """Return whether files can be created in a folder (or the folder itself), by creating one."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def nvrtc_architectures() -> list[str]:
    """Return the architectures that NVRTC can compile for; empty without NVRTC."""
    try:
        from cuda.bindings import nvrtc

        return [f"sm_{number}" for number in nvrtc.nvrtcGetSupportedArchs()[1]]
    except Exception:
        return []


def driver_version() -> str | None:
    """Return the newest CUDA version that the driver supports, None without one."""
    import ctypes

    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        version = ctypes.c_int()
        if driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return f"CUDA {version.value // 1000}.{version.value % 1000 // 10}"


def as_text(facts: dict[str, Any]) -> str:
    """Return the same facts as lines of `name  value`."""
    lines = [(name, facts[name]) for name in ("finetune", "python", "platform", "torch")]
    lines.append(
        ("CUDA", f"torch for CUDA {facts['cuda_of_torch']}" if facts["cuda_of_torch"] else "torch for CPUs")
    )
    lines.append(("driver", facts["driver"] or "none"))
    for gpu in facts["gpus"]:
        lines.append(("GPU", f"{gpu['name']} (sm_{gpu['capability'][0]}{gpu['capability'][1]})"))
    lines += [(name, folder) for name, folder in facts["packages"].items()]
    for name, title in (
        ("cxx", "C++ compiler"),
        ("nvcc", "nvcc"),
        ("nvrtc", "NVRTC"),
        ("cpu_library", "CPU kernels"),
    ):
        lines.append((title, tool(facts[name])))
    lines.append(("ninja", facts["ninja"] or "not found: files are compiled one at a time"))
    for name, title in (("torch", "torch built for"), ("nvrtc", "NVRTC compiles for")):
        lines.append((title, " ".join(facts["architectures"][name]) or "no GPU"))
    for name, kept in facts["caches"].items():
        size = f"{kept['files']} files, {kept['bytes'] / 2**20:.1f} MiB"
        lines.append((f"cache: {name}", f"{kept['folder']} ({size})"))
        if not kept["writable"]:
            remedy = "FINETUNE_CACHE=/another/folder moves it"
            lines.append(("", f"cannot be written: nothing is kept; {remedy}"))
    if facts["asked_for"]["impl"] != "auto":
        lines.append(("requested", facts["asked_for"]["impl"]))
    for op in facts["ops"]:
        lines.append((f"{op['op']} on {op['device']}", f"{op['runs']}: {op['why']}"))
    lines += [("done", sentence) for sentence in facts["done"]]
    return "\n".join(f"{name:<24}{value}" for name, value in lines)


def tool(found: dict[str, Any]) -> str:
    """Describe one compiler."""
    if not found["works"]:
        return f"{found['cause']}. {found['remedy']}".strip()
    return " ".join(filter(None, (found.get("version"), f"({found['path']})" if "path" in found else "")))
