"""The CUDA kernels, run on the CPU by an emulator: the very sources, plans and gradients that a GPU gets.

Every specialization is a program to compile, so most of the case list is marked slow.
"""

from __future__ import annotations

import ctypes

import pytest
import torch
from cuda_emulator import emulated as emulated
from op_cases import CASES, derivatives, gradients_by_recorded_bits, loss, run, tensors

from torch_utils import custom_ops
from torch_utils.ops import bias_act, conv2d_resample, filtered_lrelu, impl, upfirdn2d
from torch_utils.ops import fma as fma
from torch_utils.ops import unit_distance as unit_distance
from torch_utils.ops.native import cuda, library, params, prebuild
from torch_utils.ops.native.filtered_lrelu import tensor_cores

EXACT = 1e-12
TENSOR_CORES = "sg_filtered_lrelu_tensor_cuda"


def named(case):
    return f"{case.op}-{case.id}"


@pytest.fixture
def on_cuda(emulated, monkeypatch):
    """Ops on CPU tensors go the way of CUDA tensors."""
    monkeypatch.setattr(library, "kernels", lambda x: cuda)
    return emulated


@pytest.fixture
def small_tiles(monkeypatch):
    """Tensor cores filter at most 32 x 26 outputs in a block."""
    monkeypatch.setattr(tensor_cores, "WARPS", (2,))
    monkeypatch.setattr(tensor_cores, "MAX_WIDTH", 32)


ALWAYS = {
    "upfirdn2d": "stylegan2_up wavelet_separable channels_last channels_last_blur",
    "filtered_lrelu": "stylegan3_t stylegan3_r several_tiles_or_strips",
    "bias_act": "act_swish channels_last",
}
IN_HALF = {
    "upfirdn2d": "stylegan2_down channels_last_blur",
    "filtered_lrelu": "stylegan3_t_tiles stylegan3_t_grows_even stylegan3_r_tiles "
    "stylegan3_r_grows_even 2d_filter_of_16 odd_up_filter_grows odd_2d_down_filter",
    "bias_act": "clamp_bites_lrelu",
}
ON_TENSOR_CORES = """stylegan3_t stylegan3_t_grows stylegan3_t_tiles stylegan3_t_grows_even
    stylegan3_r_tiles stylegan3_r_grows_even 2d_filter_of_16 odd_up_filter_grows"""


def sorted_out(fast):
    """The case list, everything that is not named in `fast` marked slow."""
    slow = pytest.mark.slow
    return [
        pytest.param(case, id=named(case), marks=() if case.id in fast[case.op].split() else slow)
        for case in CASES
    ]


@pytest.mark.parametrize("case", sorted_out(ALWAYS))
def test_cuda_emulated_float64_is_exact_to_the_second_derivative(case, on_cuda):
    made = tensors(case, torch.float64)
    exact = derivatives(case, made, impl="ref")
    actual = derivatives(case, made, impl="cpu")
    assert [value.shape for value in actual] == [value.shape for value in exact]
    assert max(loss(actual, exact), default=0) < EXACT, loss(actual, exact)
    assert on_cuda or made["x"].numel() == 0


@pytest.mark.parametrize(
    "dtype",
    [torch.float16]
    + [pytest.param(each, marks=pytest.mark.slow) for each in (torch.float32, torch.bfloat16)],
)
@pytest.mark.parametrize("case", sorted_out(IN_HALF))
def test_cuda_emulated_other_dtypes_error_at_most_twice_torch(case, dtype, on_cuda, small_tiles):
    made = tensors(case, dtype)
    wide = {key: value if value is None else value.double() for key, value in made.items()}
    exact = derivatives(case, wide, order=1, impl="ref")
    plain = loss(derivatives(case, made, order=1, impl="ref"), exact)
    found = derivatives(case, made, order=1, impl="cpu")
    if case.id in ON_TENSOR_CORES.split():
        assert {plan.entry == TENSOR_CORES for plan in on_cuda} == {dtype == torch.float16}
    if any(plan.entry == TENSOR_CORES for plan in on_cuda):
        exact[1:] = gradients_by_recorded_bits(case, made)
    actual = loss(found, exact)
    rounding = (8 if dtype == torch.float32 else 2) * torch.finfo(dtype).eps
    assert all(a <= max(2 * p, rounding) for a, p in zip(actual, plain)), (actual, plain)


RECORDING = {
    "stylegan3_r": torch.float32,
    "several_tiles_or_strips": torch.float32,
    "stylegan3_r_tiles": torch.float16,
    "stylegan3_t_tiles": torch.float16,
}


@pytest.mark.parametrize("case", [case for case in CASES if case.id in RECORDING], ids=named)
def test_cuda_emulated_recording_for_a_gradient_changes_no_bit(case, on_cuda, small_tiles):
    """In float32, tiles differ where bits are recorded, and the order of sums does not."""
    made = tensors(case, RECORDING[case.id])
    plain = run(case, made, impl="cpu")
    recorded = run(case, {**made, "x": made["x"].requires_grad_(True)}, impl="cpu")
    assert torch.equal(recorded, plain)
    first, second = (dict(plan.defines) for plan in on_cuda)
    assert first.pop("SG_MODE") == params.ACTIVATE and second.pop("SG_MODE") == params.RECORD
    if RECORDING[case.id] == torch.float16:  # the order of sums depends on the tile
        assert first == second and on_cuda[0].grid == on_cuda[1].grid


@pytest.mark.parametrize(("name", "row"), [("stylegan3_r_tiles", 30), ("stylegan3_t_tiles", 27)])
def test_cuda_emulated_tensor_cores_spread_nan_to_neighbors_only(name, row, on_cuda, small_tiles):
    """Matrices multiply what they do not need by zero, which NaN survives."""
    case = next(case for case in CASES if case.id == name)
    made = tensors(case, torch.float16)
    clean = run(case, made, impl="cpu")
    made["x"][0, 0, row, 27] = torch.nan
    expected, actual = run(case, made, impl="ref").isnan(), run(case, made, impl="cpu")
    assert on_cuda[0].entry == TENSOR_CORES and on_cuda[0].grid[0] > 1
    near = torch.nn.functional.max_pool2d(expected.half(), 43, 1, 21).bool()
    assert 0 < expected.sum() <= actual.isnan().sum() and not (actual.isnan() & ~near).any()
    assert actual[expected].isnan().all() and torch.equal(actual[~near], clean[~near])


def radial_gradient(dy, impl="cpu", dtype=torch.float16):
    """The gradient of a layer of StyleGAN3-R with four channels, for a gradient of its outputs."""
    case = next(case for case in CASES if case.id == "stylegan3_r_tiles")
    made = {name: value.to(dtype) for name, value in tensors(case, torch.float16).items()}
    x = made["x"].repeat(1, 4, 1, 1).requires_grad_(True)
    y = run(case, {**made, "x": x, "b": made["b"].repeat(4)}, impl=impl)
    return torch.autograd.grad(y, x, dy(y.shape).to(dtype))[0]


def drawn(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).half()


def test_cuda_emulated_gradient_of_small_numbers_is_nearly_rounded_once(on_cuda):
    def small(shape):
        return (drawn(shape).float() * 1e-5).half()

    exact = radial_gradient(small, "ref", torch.float64)
    error, rounding = (each.double() - exact for each in (radial_gradient(small), exact.half()))
    assert on_cuda[-1].entry == TENSOR_CORES and error.norm() < 2 * rounding.norm()


def test_cuda_emulated_gradient_spreads_nan_to_neighbors_only(on_cuda):
    def with_nan(shape):
        dy = drawn(shape)
        dy[0, 0, 30, 27] = torch.nan
        return dy

    expected = radial_gradient(with_nan, "ref").isnan()
    clean, actual = radial_gradient(drawn), radial_gradient(with_nan)
    near = torch.nn.functional.max_pool2d(expected.half(), 37, 1, 18).bool()
    assert 0 < expected.sum() and actual[expected].isnan().all() and torch.equal(actual[~near], clean[~near])


def test_cuda_emulated_gradient_takes_more_tiles_than_blocks(on_cuda, monkeypatch):
    expected, right = radial_gradient(drawn), tensor_cores.plan
    assert on_cuda[-1].grid[0] > 3
    monkeypatch.setattr(tensor_cores, "plan", lambda *args: right(*args)._replace(grid=(3, 1, 1)))
    assert torch.equal(radial_gradient(drawn), expected) and on_cuda[-1].grid[0] == 3


def test_cuda_emulated_trial_finds_kernels_that_fail_or_differ(on_cuda, monkeypatch):
    cpu = torch.device("cpu")
    assert [impl.problem(op, cpu) for op in impl.registered()] == [None] * 5
    right = cuda._run

    def wrong(op, x, pointers, *rest):
        sums = right(op, x, pointers, *rest)
        ctypes.memset(pointers["y"], 0, 64)
        return sums

    monkeypatch.setattr(cuda, "_run", wrong)
    assert impl.problem("upfirdn2d", cpu).startswith("upfirdn2d is wrong on cpu, by ")

    def nan_in_gradient(op, x, pointers, *rest):
        right(op, x, pointers, *rest)
        if pointers.keys() & {"db", "s"}:
            ctypes.memset(pointers.get("db", pointers["out"]), 255, 4)

    monkeypatch.setattr(cuda, "_run", nan_in_gradient)
    for op in ("bias_act", "fma", "unit_distance"):
        assert impl.problem(op, cpu) == f"{op} is wrong on cpu, by nan"
    monkeypatch.setattr(cuda, "_run", lambda *args: 1 / 0)
    assert impl.problem("bias_act", cpu) == "bias_act fails on cpu: division by zero"


@pytest.mark.parametrize("separable", [True, False])
def test_cuda_emulated_trial_in_half_runs_on_tensor_cores(separable, on_cuda, monkeypatch):
    x = torch.randn(2, 3, 12, 12)
    b, f = torch.tensor([0.5, -0.5, 0.1]), torch.tensor([1.0, 3, 3, 1]) / 8
    wave = torch.arange(8).mul(0.4).sin()
    fd = wave / 4 if separable else wave.outer(wave.flip(0)) / 16
    error = filtered_lrelu._trial_in_half(x, b, f, fd)
    assert error < impl.TOLERANCE / 4
    assert {plan.entry for plan in on_cuda} == {TENSOR_CORES}
    right = cuda._run

    def wrong(op, x, pointers, *rest):
        sums = right(op, x, pointers, *rest)
        ctypes.memset(pointers["y"], 0, 64)
        return sums

    monkeypatch.setattr(cuda, "_run", wrong)
    assert filtered_lrelu._trial_in_half(x, b, f, fd) > impl.TOLERANCE
    monkeypatch.setattr(cuda, "_run", lambda *args: (wrong if "b" not in args[2] else right)(*args))
    assert filtered_lrelu._trial_in_half(x, b, f, fd) > impl.TOLERANCE


def test_cuda_emulated_failed_trial_falls_back_for_that_op(monkeypatch):
    wrong = "upfirdn2d is wrong on cuda:0, by 2"
    monkeypatch.setattr(impl, "_problem_on_cuda", lambda op: wrong if op == "upfirdn2d" else None)
    monkeypatch.setattr(custom_ops, "have_cuda_kernels", lambda: None)
    impl.set_default_impl(None)
    impl._warned.clear()
    try:
        with pytest.warns(impl.SlowOpsWarning, match=f"a trial of the CUDA kernels failed: {wrong}"):
            assert impl.choose("upfirdn2d", "auto", "cuda") == "ref"
        with pytest.raises(impl.ImplementationUnavailable, match="a trial of the CUDA kernels failed"):
            impl.choose("upfirdn2d", "cuda", "cuda")
        assert impl.choose("bias_act", "auto", "cuda") == "cuda"
    finally:
        impl.set_default_impl(None)
        impl._warned.clear()


def test_cuda_emulated_prebuild_matches_networks(on_cuda):
    """Forward and backward of a layer of each kind: no specialization that `prebuild` does not list."""
    listed = prebuild.specializations((9, 0))
    taps = upfirdn2d.setup_filter([1, 3, 3, 1])
    features = torch.randn(1, 2, 16, 16, requires_grad=True)
    weights = torch.randn(2, 2, 3, 3)
    for resampling in (dict(up=2), dict(down=2)):
        y = conv2d_resample.conv2d_resample(features, weights, taps, padding=1, **resampling)
        y.backward(torch.randn_like(y))
    image = torch.randn(1, 3, 16, 16)  # in float32, which no network keeps channels-last
    upfirdn2d.upsample2d(image, taps)
    upfirdn2d.downsample2d(image, taps)
    maps = torch.randn(1, 8, 4, 4).to(memory_format=torch.channels_last).requires_grad_(True)
    y = bias_act.bias_act(maps, torch.randn(8), act="relu", gain=1)  # LPIPS, whose convolutions are torch's
    library.unit_distance(y, maps.detach(), torch.randn(8)).mean().backward()
    asked = {plan.specialization() for plan in on_cuda}
    assert len(asked) > 5 and asked <= set(listed)
