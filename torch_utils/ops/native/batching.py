"""What torch.vmap makes of the native ops: one more batch is a longer batch, or more channels.

Images fold the batch into their first axis, where it costs no copy; where a bias goes along, each batch has
its own, so the batch is folded into the axis of the bias. Each rule takes the op, to call it once on what it
folded, and then what torch hands to such rules; it returns the outputs and their batch axes.
"""

from __future__ import annotations

import torch


def fold(tensor: torch.Tensor | None, batch_axis: int | None, size: int, axis: int) -> torch.Tensor | None:
    """Merge the batch into `axis`; what has no batch is repeated."""
    if tensor is None:
        return None
    if batch_axis is None:
        shape = list(tensor.shape)
        tensor = tensor.unsqueeze(axis).expand(*shape[:axis], size, *shape[axis:])
    else:
        tensor = tensor.movedim(batch_axis, axis)
    return tensor.flatten(axis, axis + 1)


def unfold(tensor: torch.Tensor, size: int, axis: int) -> torch.Tensor:
    """Take the batch out of `axis` again, in front of what is left of it."""
    return tensor.unflatten(axis, (size, tensor.shape[axis] // size))


def upfirdn2d(op, info, in_dims, x, f, *numbers):
    _refuse_filters(in_dims[1])
    y = op(fold(x, in_dims[0], info.batch_size, 0), f, *numbers)
    return unfold(y, info.batch_size, 0), 0


def filtered_lrelu(op, info, in_dims, x, fu, fd, b, *numbers):
    _refuse_filters(*in_dims[1:3])
    axis = 0 if in_dims[3] is None else 1
    x = fold(x, in_dims[0], info.batch_size, axis)
    b = b if axis == 0 else fold(b, in_dims[3], info.batch_size, 0)
    y, mask = op(x, fu, fd, b, *numbers)
    y, record = unfold(y, info.batch_size, axis), numbers[-1]
    if not record:
        return (y, mask), (axis, None)
    return (y, unfold(mask, info.batch_size, axis)), (axis, axis)


def filtered_lrelu_gate(op, info, in_dims, x, mask, fu, fd, *numbers):
    _refuse_filters(*in_dims[2:4])
    x, mask = (fold(t, axis, info.batch_size, 0) for t, axis in zip((x, mask), in_dims))
    return unfold(op(x, mask, fu, fd, *numbers), info.batch_size, 0), 0


def bias_act(op, info, in_dims, x, b, dim, *numbers):
    size, axis = info.batch_size, _axis(x, in_dims[0], dim)
    y = op(fold(x, in_dims[0], size, axis), fold(b, in_dims[1], size, 0), dim, *numbers)
    return unfold(y, size, axis), axis


def bias_act_grad(op, info, in_dims, dy, x, b, y, dim, *numbers):
    size, axis = info.batch_size, _axis(dy, in_dims[0], dim)
    dy, x, y = (fold(t, a, size, axis) for t, a in zip((dy, x, y), (in_dims[0], in_dims[1], in_dims[3])))
    dx, db = op(dy, x, fold(b, in_dims[2], size, 0), y, dim, *numbers)
    dx, with_db = unfold(dx, size, axis), numbers[-1]
    if not with_db:
        return (dx, db), (axis, None)
    return (dx, unfold(db, size, 0)), (axis, 0)


def bias_act_grad2(op, info, in_dims, dy, ddx, x, b, y, dim, *numbers):
    size, axis = info.batch_size, _axis(dy, in_dims[0], dim)
    b = fold(b, in_dims[3], size, 0)
    images = zip((dy, ddx, x, y), (*in_dims[:3], in_dims[4]))
    dy, ddx, x, y = (fold(t, a, size, axis) for t, a in images)
    return unfold(op(dy, ddx, x, b, y, dim, *numbers), size, axis), axis


def _axis(tensor, batch_axis, dim):
    """The axis of the bias; any, where without a bias `dim` need not exist."""
    return dim if dim < tensor.ndim - (batch_axis is not None) else 0


def _refuse_filters(*batch_axes):
    if any(axis is not None for axis in batch_axes):
        raise NotImplementedError("torch.vmap over the filters of an op: call it once for each filter")
