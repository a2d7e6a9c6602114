"""Which implementation of an op runs: one place for the rule that every op follows.

`impl=` of the call comes first, then `set_default_impl` (the option `--ops`), then the variable FINETUNE_OPS,
then 'auto'. 'auto' decides once per process, op and kind of device, logs one line, and never fails; a name
never falls back.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
import warnings

from torch_utils.ops.native.building import NativeUnavailable

KNOWN = ("auto", "ref", "cpu", "cuda")
OPS = ("bias_act", "upfirdn2d", "filtered_lrelu")
VARIABLE = "FINETUNE_OPS"

log = logging.getLogger("torch_utils.ops")


class SlowOpsWarning(UserWarning):
    """An op runs in plain torch because its native kernels are not to be had here."""


class UnknownImplementation(ValueError):
    """A name that no implementation has."""


class ImplementationUnavailable(RuntimeError):
    """The implementation that was named cannot run here; a name never falls back."""


_decided: dict[tuple[str, str, str], str] = {}  # (op, impl, device type) -> implementation
_default: str | None = None
_lock = threading.RLock()


def choose(op: str, impl: str, device_type: str = "cpu") -> str:
    """Return 'ref', 'cpu' or 'cuda': what runs for `impl` on tensors of `device_type` (`x.device.type`).

    One look into a dictionary, except the first time. Raises ValueError for a name that does not exist,
    RuntimeError for one that cannot run; 'auto' never raises.
    """
    decided = _decided.get((op, impl, device_type))
    return _decide(op, impl, device_type) if decided is None else decided


# torch.compile takes the answer for a constant instead of tracing into locks, files and compilers.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def set_default_impl(impl: str | None) -> None:
    """Let `impl` stand for 'auto' in this process, before FINETUNE_OPS; None takes that back.

    Raises ValueError for a name that does not exist. What torch.compile has compiled keeps what it has.
    """
    global _default
    if impl is not None:
        _check_name(impl, "set_default_impl")
    with _lock:
        _default = impl
        _decided.clear()


def default_impl() -> str:
    """What 'auto' means in this process: 'auto', or the name that was set for it."""
    if _default is not None:
        return _default
    name = os.environ.get(VARIABLE, "").strip().lower() or "auto"
    _check_name(name, f"the environment variable {VARIABLE}")
    return name


def explain(device_types: list[str]) -> list[dict[str, str]]:
    """What each op would run on each kind of device and why; nothing is decided by asking."""
    found = []
    for device_type in device_types:
        try:
            wanted = default_impl()
            if wanted == "ref":
                runs, why = "plain torch", "asked for"
            elif wanted not in ("auto", device_type):
                runs, why = "nothing", f"the {wanted} kernels work on {wanted} tensors alone"
            else:
                runs, why = "native kernels", _native(device_type)[1]
        except NativeUnavailable as error:
            runs, why = "plain torch" if wanted == "auto" else "nothing", str(error)
        found += [{"op": op, "device": device_type, "runs": runs, "why": why} for op in OPS]
    return found


def fall_back(op: str, impl: str, device_type: str, error: NativeUnavailable) -> str:
    """Return 'ref' and stay there, with one warning, after kernels that were chosen failed to build or load.

    Raises RuntimeError where a name was given, which never falls back.
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
        name, why = _native(device_type)
    except NativeUnavailable as error:
        log.info("%s on %s: plain torch (%s)", op, device_type, error.cause)
        if device_type in NATIVE_DEVICES:
            _warn(device_type, error)
        return "ref"
    log.info("%s on %s: native kernels (%s)", op, device_type, why)
    return name


def _named(op: str, name: str, device_type: str) -> str:
    if name == "ref":
        return name
    try:
        if name != device_type:
            raise NativeUnavailable(f"the {name} kernels work on {name} tensors alone")
        return _native(device_type)[0]
    except NativeUnavailable as error:
        raise ImplementationUnavailable(_refusal(op, name, device_type, error)) from error


NATIVE_DEVICES = ("cpu", "cuda")


def _native(device_type: str) -> tuple[str, str]:
    """The implementation in kernels for a kind of device, and what it is. Raises NativeUnavailable."""
    from torch_utils import custom_ops

    if device_type == "cpu":
        return "cpu", custom_ops.cpu_library_info()
    if device_type == "cuda":
        custom_ops.have_cuda_kernels()
        _trial()
        return "cuda", "compiled for each form at first use"
    raise NativeUnavailable(f"there are no kernels for {device_type}")


@functools.cache
def _trial_says() -> str | None:
    import torch

    from torch_utils.ops.native import prebuild

    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return prebuild.trial(torch.device("cuda", torch.cuda.current_device()))


def _trial() -> None:
    """Run each kernel once beside plain torch: a GPU or driver that nobody has met must not spoil a run."""
    if said := _trial_says():
        raise NativeUnavailable(f"a trial of the CUDA kernels failed: {said}", "Please report this.")


def _check_name(impl: str, where: str) -> None:
    if impl not in KNOWN:
        raise UnknownImplementation(
            f"{where}: impl must be one of {', '.join(map(repr, KNOWN))}, got {impl!r}"
        )


def _refusal(op: str, name: str, device_type: str, error: NativeUnavailable) -> str:
    return f"{op}: impl={name!r} cannot run on {device_type}: {error}. Or use 'auto' or 'ref'."


_warned: set[str] = set()


def _warn(device_type: str, error: NativeUnavailable) -> None:
    """One warning per kind of device, whatever the number of ops and calls."""
    if device_type in _warned:
        return
    _warned.add(device_type)
    remedy = f" {error.remedy}" if error.remedy else ""
    warnings.warn(
        f"The ops run in plain torch on {device_type}, right but slow: {error.cause}.{remedy}",
        SlowOpsWarning,
        stacklevel=2,
    )
