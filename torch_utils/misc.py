"""Small helpers that model files use."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch


def assert_shape(tensor: torch.Tensor, ref_shape: Sequence[int | None]) -> None:
    """Raise AssertionError unless `tensor` has the shape `ref_shape`, where None stands for any size."""
    if tensor.ndim != len(ref_shape):
        raise AssertionError(f"expected shape {list(ref_shape)}, got {list(tensor.shape)}")
    for dim, (size, expected) in enumerate(zip(tensor.shape, ref_shape)):
        if expected is not None and size != expected:
            raise AssertionError(f"expected {int(expected)} in dimension {dim}, got {list(tensor.shape)}")


@functools.lru_cache(maxsize=256)
def _constant(values: bytes, value_shape, numpy_dtype, shape, dtype, device, memory_format) -> torch.Tensor:
    # A tensor born in inference mode could never take part in training afterwards.
    with torch.inference_mode(False):
        array = np.frombuffer(values, dtype=numpy_dtype).reshape(value_shape).copy()
        tensor = torch.from_numpy(array).to(dtype=dtype)
        if shape is not None:
            tensor = tensor.expand(shape)
        return tensor.to(device=device).contiguous(memory_format=memory_format)


def constant(value: Any, shape=None, dtype=None, device=None, memory_format=None) -> torch.Tensor:
    """Return a tensor of fixed values, made once and kept: do not write to it.

    value: number, nested list or array. shape: broadcast to it. dtype, device: torch's defaults if None.
    """
    array = np.asarray(value)
    if dtype is None:
        dtype = torch.get_default_dtype()
    if device is None:
        device = torch.get_default_device()
    if memory_format is None:
        memory_format = torch.contiguous_format
    shape = None if shape is None else tuple(shape)
    return _constant(
        array.tobytes(), array.shape, array.dtype.str, shape, dtype, torch.device(device), memory_format
    )


@contextlib.contextmanager
def suppress_tracer_warnings() -> Iterator[None]:
    """Suppress torch.jit's TracerWarning inside the block."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=torch.jit.TracerWarning)
        yield


def profiled_function(fn: Callable) -> Callable:
    """Decorate a function so that profiler traces show its name."""

    @functools.wraps(fn)
    def wrapper(*args, **kwargs):
        with torch.autograd.profiler.record_function(fn.__name__):
            return fn(*args, **kwargs)

    return wrapper


def named_params_and_buffers(module: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Return (name, tensor) of every parameter, then of every buffer."""
    return [*module.named_parameters(), *module.named_buffers()]


def copy_params_and_buffers(src: torch.nn.Module, dst: torch.nn.Module, require_all: bool = False) -> None:
    """Copy every tensor of `src` into the tensor of the same name in `dst`, which keeps its requires_grad.

    Raises KeyError naming them if `require_all` and `dst` has tensors that `src` lacks, ValueError for
    unequal shapes.
    """
    source = dict(named_params_and_buffers(src))
    target = named_params_and_buffers(dst)
    missing = [name for name, _ in target if name not in source]
    if require_all and missing:
        raise KeyError(f"no source for {', '.join(missing)}")
    with torch.no_grad():
        for name, tensor in target:
            if name not in source:
                continue
            if source[name].shape != tensor.shape:
                raise ValueError(f"{name}: source is {list(source[name].shape)}, target {list(tensor.shape)}")
            tensor.copy_(source[name])
