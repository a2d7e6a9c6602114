"""The case list: every implementation against plain torch in float64, values, first and second gradients."""

from __future__ import annotations

import pytest
import torch
from op_cases import CASES, derivatives, gradients_by_recorded_bits, loss, run, tensors

from torch_utils.ops import fma as fma
from torch_utils.ops import impl
from torch_utils.ops import unit_distance as unit_distance

NATIVE = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
EXACT = 1e-12  # of the largest value, in float64


def named(case):
    return f"{case.op}-{case.id}"


@pytest.mark.parametrize("device", NATIVE)
@pytest.mark.parametrize("case", CASES, ids=named)
def test_ops_float64_is_exact_to_the_second_derivative(case, device):
    exact = derivatives(case, tensors(case, torch.float64, device), impl="ref")
    actual = derivatives(case, tensors(case, torch.float64, device), impl=device)
    assert [value.shape for value in actual] == [value.shape for value in exact]
    assert max(loss(actual, exact), default=0) < EXACT, loss(actual, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("device", NATIVE)
@pytest.mark.parametrize("case", CASES, ids=named)
def test_ops_other_dtypes_error_at_most_twice_torch(case, device, dtype):
    """Of values and first gradients.

    Sums of a few terms differ by some roundings whoever adds them: so much is free, in float32 eight, in half
    precision, which is rounded once, two.
    """
    made = tensors(case, dtype, device)
    wide = {key: value if value is None else value.double() for key, value in made.items()}
    exact = derivatives(case, wide, order=1, impl="ref")
    plain = loss(derivatives(case, made, order=1, impl="ref"), exact)
    if case.op == "filtered_lrelu" and dtype == torch.float16 and device == "cuda" and made["x"].numel():
        exact[1:] = gradients_by_recorded_bits(case, made)  # tensor cores round the upsampled image
    actual = loss(derivatives(case, made, order=1, impl=device), exact)
    rounding = (8 if dtype == torch.float32 else 2) * torch.finfo(dtype).eps
    assert all(a <= max(2 * p, rounding) for a, p in zip(actual, plain)), (actual, plain)


@pytest.mark.parametrize("case", [c for c in CASES if c.id.startswith(("stylegan", "channels"))], ids=named)
def test_ops_results_do_not_depend_on_the_number_of_threads(case):
    made = tensors(case, torch.float32)
    one = derivatives(case, made, order=1, impl="cpu")
    torch.set_num_threads(3)
    assert all(torch.equal(a, b) for a, b in zip(derivatives(case, made, order=1, impl="cpu"), one))


def test_ops_auto_takes_the_kernels():
    chosen = {op: impl.choose(op, "auto", "cpu") for op in impl.registered()}
    on_cuda_only = {"fma": "ref", "unit_distance": "ref"}
    assert chosen == {"bias_act": "cpu", "upfirdn2d": "cpu", "filtered_lrelu": "cpu", **on_cuda_only}
    made = tensors(CASES[0], torch.float32)
    assert torch.equal(run(CASES[0], made), run(CASES[0], made, impl="cpu"))
