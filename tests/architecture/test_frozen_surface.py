"""The names that other people's pickles import, with the signatures that they call."""

from __future__ import annotations

import importlib
import inspect
import math

import pytest

EMPTY = inspect.Parameter.empty
RESAMPLE = dict(padding=0, flip_filter=False, gain=1, impl="auto")

# module: function: argument -> default, in order
SIGNATURES = {
    "torch_utils.ops.upfirdn2d": {
        "setup_filter": dict(
            f=EMPTY, device="cpu", normalize=True, flip_filter=False, gain=1, separable=None
        ),
        "upfirdn2d": dict(x=EMPTY, f=EMPTY, up=1, down=1, **RESAMPLE),
        "upsample2d": dict(x=EMPTY, f=EMPTY, up=2, **RESAMPLE),
        "downsample2d": dict(x=EMPTY, f=EMPTY, down=2, **RESAMPLE),
        "filter2d": dict(x=EMPTY, f=EMPTY, **RESAMPLE),
    },
    "torch_utils.ops.bias_act": {
        "bias_act": dict(
            x=EMPTY, b=None, dim=1, act="linear", alpha=None, gain=None, clamp=None, impl="auto"
        ),
    },
    "torch_utils.ops.filtered_lrelu": {
        "filtered_lrelu": dict(
            **dict(x=EMPTY, fu=None, fd=None, b=None, up=1, down=1, padding=0, gain=math.sqrt(2), slope=0.2),
            **dict(clamp=None, flip_filter=False, impl="auto"),
        ),
    },
    "torch_utils.ops.conv2d_resample": {
        "conv2d_resample": dict(
            **dict(x=EMPTY, w=EMPTY, f=None, up=1, down=1, padding=0, groups=1),
            **dict(flip_weight=True, flip_filter=False),
        ),
    },
    "torch_utils.ops.conv2d_gradfix": {
        "conv2d": dict(input=EMPTY, weight=EMPTY, bias=None, stride=1, padding=0, dilation=1, groups=1),
        "conv_transpose2d": dict(
            **dict(input=EMPTY, weight=EMPTY, bias=None, stride=1, padding=0, output_padding=0),
            **dict(groups=1, dilation=1),
        ),
        "no_weight_gradients": dict(disable=True),
    },
    "torch_utils.ops.grid_sample_gradfix": {"grid_sample": dict(input=EMPTY, grid=EMPTY)},
    "torch_utils.ops.fma": {"fma": dict(a=EMPTY, b=EMPTY, c=EMPTY)},
    "torch_utils.misc": {
        "assert_shape": dict(tensor=EMPTY, ref_shape=EMPTY),
        "constant": dict(value=EMPTY, shape=None, dtype=None, device=None, memory_format=None),
        "suppress_tracer_warnings": dict(),
        "profiled_function": dict(fn=EMPTY),
    },
    "torch_utils.persistence": {
        "persistent_class": dict(cls=EMPTY),
        "_reconstruct_persistent_obj": dict(meta=EMPTY),
    },
}


@pytest.mark.parametrize("module", SIGNATURES)
def test_frozen_surface_signatures(module):
    for name, expected in SIGNATURES[module].items():
        parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters
        assert {key: p.default for key, p in parameters.items()} == expected, name
        assert list(parameters) == list(expected), name
        assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters.values()), name


def test_frozen_surface_activation_attributes():
    from torch_utils.ops.bias_act import activation_funcs

    assert set(activation_funcs) == set("linear relu lrelu tanh sigmoid elu selu softplus swish".split())
    for spec in activation_funcs.values():
        assert spec.def_gain in (1, math.sqrt(2)) and spec.def_alpha in (0, 0.2)


def test_frozen_surface_names_in_files():
    import dnnlib
    from torch_utils import persistence

    assert dnnlib.EasyDict is dnnlib.util.EasyDict
    assert (dnnlib.EasyDict.__module__, dnnlib.EasyDict.__qualname__) == ("dnnlib.util", "EasyDict")
    assert persistence._reconstruct_persistent_obj.__module__ == "torch_utils.persistence"
