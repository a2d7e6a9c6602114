"""Choose the implementation of an op, by one rule for all registered ops.

`impl=` of the call comes first, then `set_default_impl` (the option `--ops`), then the variable FINETUNE_OPS,
then 'auto'. 'auto' decides once per process, op and kind of device, logs one line, and never fails; a name
never falls back.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterator

import torch

from torch_utils.ops.native.building import NativeUnavailable

KNOWN = ("auto", "ref", "cpu", "cuda")
VARIABLE = "FINETUNE_OPS"

log = logging.getLogger("torch_utils.ops")


class SlowOpsWarning(UserWarning):
    """An op runs in plain torch because its native kernels are unavailable here."""


class UnknownImplementation(ValueError):
    """No implementation has this name."""


class ImplementationUnavailable(RuntimeError):
    """The named implementation is unavailable; named implementations never fall back."""


TOLERANCE = 1e-4  # of a trial, in float32

_trials: dict[str, Callable[[torch.device], float]] = {}
_devices: dict[str, tuple[str, ...]] = {}  # op -> device types that it has kernels for
_decided: dict[tuple[str, str, str], str] = {}  # (op, impl, device type) -> implementation
_default: str | None = None
_lock = threading.RLock()


def register(
    op: str, trial: Callable[[torch.device], float], devices: tuple[str, ...] = ("cpu", "cuda")
) -> None:
    """Register `op`; `trial` returns how far its kernels on one of `devices` are from the reference.

    Differences are to be added: unlike Python's max, a sum keeps a NaN.
    """
    _trials[op], _devices[op] = trial, devices


def registered() -> tuple[str, ...]:
    """Return the ops that are imported."""
    return tuple(_trials)


def choose(op: str, impl: str, device_type: str = "cpu") -> str:
    """Return 'ref', 'cpu' or 'cuda', which runs for `impl` on tensors of `device_type` (`x.device.type`).

    One look into a dictionary, except the first time. Raises ValueError for a name that does not exist,
    RuntimeError for one that cannot run; 'auto' never raises.
    """
    decided = _decided.get((op, impl, device_type))
    return _decide(op, impl, device_type) if decided is None else decided


# torch.compile takes the answer for a constant instead of tracing into locks, files and compilers.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def set_default_impl(impl: str | None) -> None:
    """Use `impl` for 'auto' in this process, before FINETUNE_OPS; None resets that.

    Raises ValueError for an unknown name. Code that torch.compile has compiled keeps its implementation.
    """
    global _default
    if impl is not None:
        _check_name(impl, "set_default_impl")
    with _lock:
        _default = impl
        _decided.clear()


@contextlib.contextmanager
def using(impl: str) -> Iterator[None]:
    """Use `impl` for 'auto' inside the block, as `set_default_impl` does."""
    before = _default
    set_default_impl(impl)
    try:
        yield
    finally:
        set_default_impl(before)


def default_impl() -> str:
    """Return what 'auto' stands for in this process: 'auto', or the name that was set."""
    if _default is not None:
        return _default
    name = os.environ.get(VARIABLE, "").strip().lower() or "auto"
    _check_name(name, f"the environment variable {VARIABLE}")
    return name


def explain(device_types: list[str]) -> list[dict[str, str]]:
    """Return what each op would run on each kind of device and why, without deciding it."""
    return [
        {"op": op, "device": device_type, **_explain(op, device_type)}
        for device_type in device_types
        for op in registered()
    ]


def _explain(op: str, device_type: str) -> dict[str, str]:
    wanted = default_impl()
    if wanted == "ref":
        return {"runs": "plain torch", "why": "asked for"}
    if device_type == "cpu" and device_type not in _devices[op]:
        return {"runs": "plain torch", "why": "its only kernels are for " + ", ".join(_devices[op])}
    try:
        if wanted not in ("auto", device_type):
            raise NativeUnavailable(f"the {wanted} kernels work on {wanted} tensors only")
        return {"runs": "native kernels", "why": _native(op, device_type)[1]}
    except NativeUnavailable as error:
        return {"runs": "plain torch" if wanted == "auto" else "nothing", "why": str(error)}


def fall_back(op: str, impl: str, device_type: str, error: NativeUnavailable) -> str:
    """Switch to 'ref' permanently, with one warning, after kernels failed to build or load.

    Raises RuntimeError if an implementation was named, which never falls back.
    """
    with _lock:
        if (default_impl() if impl == "auto" else impl) != "auto":
            raise ImplementationUnavailable(_refusal(op, device_type, device_type, error)) from error
        key = (op, impl, device_type)
        if _decided.get(key) != "ref":
            _decided[key] = "ref"
            log.info("%s on %s: plain torch (%s)", op, device_type, error.cause)
            _warn(device_type, error)
        return "ref"


def _decide(op: str, impl: str, device_type: str) -> str:
    _check_name(impl, op)
    with _lock:
        key = (op, impl, device_type)
        if key not in _decided:
            name = default_impl() if impl == "auto" else impl
            _decided[key] = _automatic(op, device_type) if name == "auto" else _named(op, name, device_type)
        return _decided[key]


def _automatic(op: str, device_type: str) -> str:
    try:
        name, why = _native(op, device_type)
    except NativeUnavailable as error:
        log.info("%s on %s: plain torch (%s)", op, device_type, error.cause)
        if device_type in _devices[op]:
            _warn(device_type, error)
        return "ref"
    log.info("%s on %s: native kernels (%s)", op, device_type, why)
    return name


def _named(op: str, name: str, device_type: str) -> str:
    if name == "ref":
        return name
    try:
        if name != device_type:
            raise NativeUnavailable(f"the {name} kernels work on {name} tensors only")
        return _native(op, device_type)[0]
    except NativeUnavailable as error:
        raise ImplementationUnavailable(_refusal(op, name, device_type, error)) from error


def _native(op: str, device_type: str) -> tuple[str, str]:
    """Return the native implementation for a kind of device, and its build. Raises NativeUnavailable."""
    from torch_utils import custom_ops

    if device_type not in _devices[op]:
        raise NativeUnavailable(f"there are no kernels for {device_type}")
    if device_type == "cpu":
        return "cpu", custom_ops.cpu_library_info()
    custom_ops.have_cuda_kernels()
    if problem := _problem_on_cuda(op):
        raise NativeUnavailable(f"a trial of the CUDA kernels failed: {problem}", "Please report this.")
    return "cuda", "compiled for each specialization at first use"


@functools.cache
def _problem_on_cuda(op: str) -> str | None:
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return problem(op, torch.device("cuda", torch.cuda.current_device()))


def problem(op: str, device: torch.device) -> str | None:
    """Run the trial of an op on a device, and return what is wrong with it, or None."""
    try:
        error = _trials[op](device)
    except Exception as failure:
        return f"{op} fails on {device}: {failure}"
    return None if error < TOLERANCE else f"{op} is wrong on {device}, by {error:g}"


def _check_name(impl: str, where: str) -> None:
    if impl not in KNOWN:
        raise UnknownImplementation(
            f"{where}: impl must be one of {', '.join(map(repr, KNOWN))}, got {impl!r}"
        )


def _refusal(op: str, name: str, device_type: str, error: NativeUnavailable) -> str:
    return f"{op}: impl={name!r} cannot run on {device_type}: {error}. Or use 'auto' or 'ref'."


_warned: set[str] = set()


def _warn(device_type: str, error: NativeUnavailable) -> None:
    """Warn once per kind of device, whatever the number of ops and calls."""
    if device_type in _warned:
        return
    _warned.add(device_type)
    remedy = f" {error.remedy}" if error.remedy else ""
    warnings.warn(
        f"Falling back to the PyTorch reference ops on {device_type} (slower): {error.cause}.{remedy}",
        SlowOpsWarning,
        stacklevel=2,
    )
