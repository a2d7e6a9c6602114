"""The helpers of torch_utils.misc, and dnnlib's EasyDict."""

from __future__ import annotations

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch

import dnnlib
from torch_utils import misc


def test_assert_shape():
    misc.assert_shape(torch.zeros(2, 3), [2, None])
    misc.assert_shape(torch.zeros(2, 3), (None, torch.tensor(3)))
    for wrong in ([2], [2, 4], [None, None, 3], []):
        with pytest.raises(AssertionError, match=r"\[2, 3\]"):
            misc.assert_shape(torch.zeros(2, 3), wrong)


def test_constant_values_and_shapes():
    assert misc.constant(3).dtype == torch.float32
    assert misc.constant([[1, 2], [3, 4]]).tolist() == [[1, 2], [3, 4]]
    assert misc.constant(np.arange(3), dtype=torch.int64).tolist() == [0, 1, 2]
    assert misc.constant(1.5, shape=[2, 3], dtype=torch.float16).tolist() == [[1.5] * 3] * 2
    last = misc.constant(0, shape=[1, 4, 2, 2], memory_format=torch.channels_last)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert misc.constant(1, device="cpu").device == torch.device("cpu")


def test_constant_is_cached_across_inference_mode():
    assert misc.constant([1.0, 2.0]) is misc.constant([1.0, 2.0])
    assert misc.constant([1.0, 2.0]) is not misc.constant([1.0, 3.0])
    with torch.inference_mode():
        made_inside = misc.constant([7.0, 8.0, 9.0])
    x = torch.ones(3, requires_grad=True)
    (x * made_inside).sum().backward()
    assert x.grad.tolist() == [7, 8, 9]


def test_suppress_tracer_warnings():
    with misc.suppress_tracer_warnings():
        warnings.warn("quiet", torch.jit.TracerWarning, stacklevel=1)
        with pytest.warns(UserWarning):
            warnings.warn("loud", UserWarning, stacklevel=1)
    with pytest.warns(torch.jit.TracerWarning):
        warnings.warn("loud again", torch.jit.TracerWarning, stacklevel=1)


def test_profiled_function():
    @misc.profiled_function
    def add_one(x, by=1):
        """Add."""
        return x + by

    assert add_one(1, by=2) == 3 and add_one.__name__ == "add_one" and add_one.__doc__ == "Add."
    with torch.autograd.profiler.profile() as profile:
        add_one(torch.zeros(1))
    assert "add_one" in {event.name for event in profile.function_events}


def test_copy_params_and_buffers():
    source, target = torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3).requires_grad_(False)
    torch.nn.init.normal_(source.weight)
    source.running_mean.fill_(5)
    misc.copy_params_and_buffers(source, target, require_all=True)
    assert torch.equal(target.weight, source.weight) and target.running_mean.tolist() == [5, 5, 5]
    assert source.weight.requires_grad and not target.weight.requires_grad
    names = [name for name, _ in misc.named_params_and_buffers(target)]
    assert names == ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]

    without_bias = torch.nn.Linear(2, 2, bias=False)
    target = torch.nn.Linear(2, 2)
    bias = target.bias.clone()
    misc.copy_params_and_buffers(without_bias, target)
    assert torch.equal(target.weight, without_bias.weight) and torch.equal(target.bias, bias)
    with pytest.raises(KeyError, match="bias"):
        misc.copy_params_and_buffers(without_bias, target, require_all=True)
    with pytest.raises(ValueError, match=r"weight.*\[3, 2\].*\[2, 2\]"):
        misc.copy_params_and_buffers(torch.nn.Linear(2, 3), target)


def test_easy_dict():
    d = dnnlib.EasyDict(a=1)
    d.b = dnnlib.util.EasyDict(c=2)
    assert d["b"].c == 2 and d.a == 1 and dict(d) == {"a": 1, "b": {"c": 2}}
    del d.a
    assert "a" not in d
    for attempt in (lambda: d.a, lambda: delattr(d, "a")):
        with pytest.raises(AttributeError, match="a"):
            attempt()
    for twin in (copy.deepcopy(d), pickle.loads(pickle.dumps(d))):
        assert twin == d and type(twin.b) is dnnlib.EasyDict and twin.b is not d.b
    assert dnnlib.EasyDict.__module__ == "dnnlib.util", "the name in every pickle"
