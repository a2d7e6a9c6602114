"""The CUDA kernels, run on the CPU by an emulator: the very sources, plans and gradients that a GPU gets.

Every specialisation is a program to compile, so most of the case list is marked slow.
"""

from __future__ import annotations

import pytest
import torch
from cases import CASES, derivatives, loss, tensors
from cuda_emulator import emulated as emulated

from torch_utils.ops.native import autograd, cuda

EXACT = 1e-12


def named(case):
    return f"{case.op}-{case.id}"


@pytest.fixture
def on_cuda(emulated, monkeypatch):
    """Ops on CPU tensors go the way of CUDA tensors."""
    monkeypatch.setattr(autograd, "kernels", lambda x: cuda)
    return emulated


ALWAYS = {
    "upfirdn2d": "stylegan2_up wavelet_separable axes_differ channels_last gaps_and_transposed",
    "filtered_lrelu": "stylegan3_t stylegan3_r clamp_bites several_tiles_or_strips both_filters_2d_flipped",
    "bias_act": "act_lrelu act_swish clamp_bites_tanh channels_last dense_layer_odd",
}
IN_HALF = {"upfirdn2d": "stylegan2_down", "filtered_lrelu": "stylegan3_t", "bias_act": "clamp_bites_lrelu"}


def sorted_out(fast):
    """The case list, everything that is not named in `fast` marked slow."""
    slow = pytest.mark.slow
    return [
        pytest.param(case, id=named(case), marks=() if case.id in fast[case.op].split() else slow)
        for case in CASES
    ]


@pytest.mark.parametrize("case", sorted_out(ALWAYS))
def test_float64_is_exact_to_the_second_derivative(case, on_cuda):
    made = tensors(case, torch.float64)
    exact = derivatives(case, made, impl="ref")
    actual = derivatives(case, made, impl="cpu")
    assert [value.shape for value in actual] == [value.shape for value in exact]
    assert max(loss(actual, exact), default=0) < EXACT, loss(actual, exact)
    assert on_cuda or made["x"].numel() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", sorted_out(IN_HALF))
def test_other_types_lose_no_more_than_twice_what_torch_does(case, dtype, on_cuda):
    made = tensors(case, dtype)
    wide = {key: value if value is None else value.double() for key, value in made.items()}
    exact = derivatives(case, wide, order=1, impl="ref")
    plain = loss(derivatives(case, made, order=1, impl="ref"), exact)
    actual = loss(derivatives(case, made, order=1, impl="cpu"), exact)
    rounding = (8 if dtype == torch.float32 else 2) * torch.finfo(dtype).eps
    assert all(a <= max(2 * p, rounding) for a, p in zip(actual, plain)), (actual, plain)
