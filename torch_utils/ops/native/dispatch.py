"""Operators of torch that call kernels: through the dispatcher, or past it for plain tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from torch_utils.ops import impl as choice

from .building import NativeUnavailable

NAMESPACE = "stylegan_ops"
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_library = torch.library.Library(NAMESPACE, "DEF")


def is_plain(x: torch.Tensor) -> bool:
    """Return whether `x` is memory that a kernel may be called on, with no mode or transform active."""
    return (
        type(x) in _PLAIN
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._len_torch_dispatch_stack()
    )


def is_exporting() -> bool:
    """Return whether a graph is being recorded (torch.jit.trace, torch.onnx, torch.export).

    Readers of such a graph support torch's own operators only.
    """
    if not torch.compiler.is_compiling():
        return torch.jit.is_tracing()
    if hasattr(torch.compiler, "is_exporting"):
        return torch.compiler.is_exporting()
    return not torch.compiler.is_dynamo_compiling()  # torch 2.6: only torch.export traces without dynamo


def attempt(run: Callable[..., torch.Tensor], op: str, impl: str, *args: Any) -> torch.Tensor | None:
    """Return `run(*args)`, or None if the kernels turn out to be unavailable and plain torch may step in.

    Raises RuntimeError if an implementation was named, which never falls back.
    """
    if torch.compiler.is_compiling():
        return run(*args)
    try:
        return run(*args)
    except NativeUnavailable as error:
        choice.fall_back(op, impl, args[0].device.type, error)
        return None


class NativeOp:
    """A registered operator of flat arguments, and an `autograd.Function` for plain tensors in eager mode.

    The Function takes less time than the dispatcher with a Python autograd kernel: 11 against 33 us for a
    forward call, 87 against 147 us with its backward (one CPU core, torch 2.14). A training step at 64 px
    makes 300 such calls in 120 ms, most of which it waits for launches.
    """

    def __init__(self, name: str, schema: str, num_tensors: int, kernel: Callable[..., Any]) -> None:
        """Define the operator; only its first `num_tensors` arguments may need gradients."""
        self.name, self.num_tensors, self.kernel = name, num_tensors, kernel
        _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        self.registered = getattr(getattr(torch.ops, NAMESPACE), name)

    def register(self, fake, setup_context, backward, kernel=None) -> None:
        """Register fake kernel and gradients, and `kernel` if the dispatcher needs one of its own."""
        for device in ("CPU", "CUDA"):
            _library.impl(self.name, kernel or self.kernel, device)
        name = f"{NAMESPACE}::{self.name}"
        torch.library.register_fake(name, fake, lib=_library)
        torch.library.register_autograd(name, backward, setup_context=setup_context, lib=_library)

        def forward(ctx, *inputs):
            output = self.kernel(*inputs)
            setup_context(ctx, inputs, output)
            return output

        # torch binds arguments by signature for a Function with setup_context, which takes longer than this.
        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self._function = type(self.name, (torch.autograd.Function,), methods)

    def __call__(self, *args: Any) -> Any:
        if not is_plain(args[0]):
            return self.registered(*args)
        if torch.is_grad_enabled():
            for tensor in args[: self.num_tensors]:
                if tensor is not None and tensor.requires_grad:
                    return self._function.apply(*args)
        return self.kernel(*args)
