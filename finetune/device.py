"""Choice of the device, and precision of float32 products."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

from finetune.errors import ConfigError
from torch_utils.ops import conv2d_gradfix

# cuBLAS computes the same product in the same order each time with these, which it reads when it starts.
WORKSPACE_VARIABLE, WORKSPACES = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")
# Algorithms that cuDNN tries for each shape, those it expects to be fastest first. With torch's default of
# 10, the first steps took longer and the others the same time (StyleGAN2 on an H200).
ALGORITHMS = 4


def resolve_device(name: str = "auto") -> torch.device:
    """Turn `--device` (`auto`, `cpu`, `cuda`, `cuda:1`, `mps`) into a torch device that exists.

    `auto` prefers CUDA, then MPS, then the CPU. Raises ConfigError if the named device does not exist.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device {name}: not a device. Use auto, cpu, cuda, cuda:1 or mps.") from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise ConfigError(f"--device {name}: torch sees {count} CUDA devices. Use --device auto.")
    elif device.type == "mps":
        if not torch.backends.mps.is_available():
            raise ConfigError("--device mps: torch sees no Apple GPU. Use --device auto.")
    elif device.type != "cpu":
        raise ConfigError(f"--device {name}: not supported. Use auto, cpu, cuda or mps.")
    return device


@contextlib.contextmanager
def float32_math(*, tf32: bool = False, split: bool = False, benchmark: bool | None = None) -> Iterator[None]:
    """Set how CUDA computes float32 convolutions and products inside the block, and restore it afterwards.

    In float32 by default, as the original networks were trained and their golden numbers require; torch
    itself leaves cuDNN's convolutions in TF32, which keeps 10 bits of mantissa. `tf32` allows it for
    convolutions and matrix products. `split` computes convolutions, and products by `conv2d_gradfix.bmm`,
    as `conv2d_gradfix.split_float32` does. Products of float16 matrices are summed in float32, as their
    convolutions are: in float16, torch's default, partial sums can overflow. `benchmark` sets
    `torch.backends.cudnn.benchmark`, with a few algorithms to try; None leaves it as it is.
    """
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before, limit = cudnn.benchmark, cudnn.benchmark_limit
    sums_in_half = matmul.allow_fp16_reduced_precision_reduction
    matmul.allow_fp16_reduced_precision_reduction = False
    if benchmark is not None:
        cudnn.benchmark = benchmark
        if limit is not None:  # None in a torch without cuDNN
            cudnn.benchmark_limit = ALGORITHMS
    try:
        with conv2d_gradfix.tf32(tf32), conv2d_gradfix.split_float32(split):
            yield
    finally:
        cudnn.benchmark = before
        matmul.allow_fp16_reduced_precision_reduction = sums_in_half
        if limit is not None:
            cudnn.benchmark_limit = limit


@contextlib.contextmanager
def training_math(precision: str, *, deterministic: bool = False, benchmark: bool = True) -> Iterator[None]:
    """Compute float32 as set by `--precision`, with cuDNN tuned for the fixed shapes of a run.

    `deterministic` uses algorithms that give the same bits each time; cuDNN then chooses by rules, not by
    measured times. Call `fix_workspace` before.
    """
    split = precision in ("auto", "fp16")
    benchmark = benchmark and not deterministic
    with float32_math(tf32=precision == "tf32", split=split, benchmark=benchmark):
        with deterministic_algorithms() if deterministic else contextlib.nullcontext():
            yield


@contextlib.contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """Let torch use deterministic algorithms only, and raise RuntimeError for an operation that has none."""
    before = torch.get_deterministic_debug_mode()
    settings: Any = torch.utils.deterministic
    fills = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)  # cuDNN follows
    settings.fill_uninitialized_memory = False  # costs time, and nothing reads that memory
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
        settings.fill_uninitialized_memory = fills


def fix_workspace() -> None:
    """Set the variable that deterministic matrix products need; without effect after the first product."""
    if os.environ.get(WORKSPACE_VARIABLE) not in WORKSPACES:
        os.environ[WORKSPACE_VARIABLE] = WORKSPACES[0]
