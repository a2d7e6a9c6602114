import contextlib

import numpy as np
import torch


def constant(value, shape=None, dtype=None, device=None, memory_format=None):
    tensor = torch.as_tensor(np.asarray(value), dtype=dtype or torch.get_default_dtype(), device=device)
    tensor = tensor if shape is None else tensor.expand(shape)
    return tensor.contiguous(memory_format=memory_format or torch.contiguous_format)


def assert_shape(tensor, ref_shape):
    assert tensor.ndim == len(ref_shape)
    assert all(want is None or int(want) == size for size, want in zip(tensor.shape, ref_shape))


@contextlib.contextmanager
def suppress_tracer_warnings():
    yield


def profiled_function(fn):
    return fn
