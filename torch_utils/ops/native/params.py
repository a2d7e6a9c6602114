"""The structs that the kernels take, mirrored from their headers.

The same bytes go to a C++ function by address and to a CUDA kernel by value. A test compares sizes and
offsets with the compiler's.
"""

from __future__ import annotations

import ctypes

import torch

OK, UNSUPPORTED, NO_MEMORY = 0, 1, 2
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
ACTIVATIONS = {
    "linear": 1,
    "relu": 2,
    "lrelu": 3,
    "tanh": 4,
    "sigmoid": 5,
    "elu": 6,
    "selu": 7,
    "softplus": 8,
    "swish": 9,
}
ACTIVATE, RECORD, GATE = 0, 1, 2
NO_ADDEND, NUMBER, MAP = 0, 1, 2

_p, _i, _l, _d = ctypes.c_void_p, ctypes.c_int, ctypes.c_longlong, ctypes.c_double


def _fields(kind, names: str):
    return [(name, kind) for name in names.split()]


class BiasAct(ctypes.Structure):
    """bias_act/bias_act.h"""

    _fields_ = [
        *_fields(_p, "input in2 ref b out db"),
        *_fields(_l, "size bias_size bias_step"),
        *_fields(_d, "alpha gain clamp"),
        *_fields(_i, "dtype act order num_threads"),
    ]


class Fma(ctypes.Structure):
    """fma/fma.h"""

    _fields_ = [
        *_fields(_p, "input other b c out db dc"),
        *_fields(_l, "size c_step"),
        *_fields(_i, "n channels planar addend dtype reserved"),
    ]


class UnitDistance(ctypes.Structure):
    """unit_distance/unit_distance.h"""

    _fields_ = [
        *_fields(_p, "x y w s out"),
        *_fields(_l, "positions"),
        *_fields(_i, "channels dtype"),
    ]


class Upfirdn2d(ctypes.Structure):
    """upfirdn2d/upfirdn2d.h"""

    _fields_ = [
        *_fields(_p, "x f y"),
        *_fields(_l * 4, "x_stride y_stride"),
        *_fields(
            _i, "n c in_h in_w out_h out_w f_h f_w up_x up_y down_x down_y pad_x0 pad_y0 flip_filter dtype"
        ),
        *_fields(_d, "gain"),
        *_fields(_i, "num_threads reserved"),
    ]


class FilteredLrelu(ctypes.Structure):
    """filtered_lrelu/filtered_lrelu.h"""

    _fields_ = [
        *_fields(_p, "x fu fd b y mask sums"),
        *_fields(_l * 4, "x_stride y_stride"),
        *_fields(_i, "n c in_h in_w out_h out_w fu_h fu_w fd_h fd_w up down pad_x0 pad_y0"),
        *_fields(_i, "mask_h mask_w mask_row_bytes mask_off_x mask_off_y flip_filter mode dtype"),
        *_fields(_d, "up_gain slope clamp"),
        *_fields(_i, "num_threads tile_h"),
    ]
