"""The CUDA sources compile, without a GPU, for every architecture that is supported."""

from __future__ import annotations

import importlib
import math

import pytest
import torch

from torch_utils.ops.native import cuda, params, specs
from torch_utils.ops.native.bias_act.plan import plan as bias_act_plan
from torch_utils.ops.native.building import NativeUnavailable, compilers, cuda_build
from torch_utils.ops.native.filtered_lrelu.plan import plan as filtered_lrelu_plan
from torch_utils.ops.native.plan import is_wide
from torch_utils.ops.native.upfirdn2d.plan import plan as upfirdn2d_plan

ARCHITECTURES = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]
F16, F32 = torch.float16, torch.float32
SQRT2 = 2**0.5


def strides(shape, channels_last=False):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, device="meta").to(memory_format=layout).stride()


def struct_of(op, *numbers):
    p = cuda._MAKE[op](*numbers)
    for name in ("input", "ref", "out", "x", "y", "b"):
        if hasattr(p, name):
            setattr(p, name, 4096)  # aligned, and never looked at
    return p


def lrelu(dtype, size, up, down, pad, fu, fd, mode):
    """A layer of StyleGAN3, forward or, with gates, backward."""
    x, out = (4, 128, size, size), 36
    spec = specs.FilteredLreluSpec(up, down, pad, pad, out, out, False, up**2 * SQRT2, 0.2, 256.0)
    mask = None
    if mode != params.ACTIVATE:
        mask = (4, 128, 2 * out + 10, 64)
    if mode == params.GATE:
        spec = specs.GateSpec(*spec[:9], 2 * out + 10, 3, -4)
    y = (4, 128, out, out)
    return struct_of("filtered_lrelu", x, strides(x), strides(y), dtype, (fu, fd), mask, spec, mode)


def fir(dtype, up, down, taps, channels_last=False):
    x = (4, 64, 128, 128)
    y = (4, 64, 128 * up // down, 128 * up // down)
    spec = specs.Upfirdn2dSpec(up, up, down, down, 2, 2, *y[2:], False, 4.0)
    return struct_of("upfirdn2d", x, strides(x, channels_last), strides(y, channels_last), dtype, taps, spec)


def act(dtype, name, order, clamp=256.0, with_db=False, channels_last=False):
    x = torch.Size((4, 512, 128, 128))
    spec = specs.BiasActSpec(1, name, 0.2, SQRT2, clamp)
    p = struct_of("bias_act", x, strides(x, channels_last), dtype, True, spec, order)
    p.db = 4096 if with_db else None
    return p


def product(dtype, channels, channels_last, addend, with_gradients=False):
    """A modulation or demodulation, or the gradients of one."""
    p = struct_of("fma", torch.Size((4, channels, 38, 38)), not channels_last, dtype, addend, True)
    p.c = 4096 if addend else None
    if with_gradients:
        p.other = p.db = 4096
        p.dc = 4096 if channels_last else None
    return p


def compared(dtype, channels, with_s, with_w=True):
    """Maps of a perceptual distance, or their gradient."""
    p = struct_of("unit_distance", torch.Size((4, channels, 38, 38)), dtype)
    p.w, p.s = 4096 if with_w else None, 4096 if with_s else None
    return p


T, R = (12,), (12, 12)
SPECS = {
    "lrelu_t": ("filtered_lrelu", lambda: lrelu(F16, 38, 2, 2, 9, T, T, params.RECORD)),
    "lrelu_t_backward": ("filtered_lrelu", lambda: lrelu(F16, 36, 2, 2, 13, T, T, params.GATE)),
    "lrelu_t_grows": ("filtered_lrelu", lambda: lrelu(F32, 38, 4, 2, -6, (24,), T, params.RECORD)),
    "lrelu_t_grows_half": ("filtered_lrelu", lambda: lrelu(F16, 38, 4, 2, -6, (24,), T, params.RECORD)),
    "lrelu_t_grows_backward": ("filtered_lrelu", lambda: lrelu(F16, 52, 2, 4, 41, T, (24,), params.GATE)),
    "lrelu_r": ("filtered_lrelu", lambda: lrelu(F16, 36, 2, 2, 11, T, R, params.RECORD)),
    "lrelu_r_backward": ("filtered_lrelu", lambda: lrelu(F16, 36, 2, 2, 11, R, T, params.GATE)),
    "lrelu_r_grows_backward": ("filtered_lrelu", lambda: lrelu(F16, 52, 2, 4, 42, R, (24,), params.GATE)),
    "lrelu_r_float": ("filtered_lrelu", lambda: lrelu(F32, 36, 2, 2, 11, T, R, params.RECORD)),
    "lrelu_r_grows": ("filtered_lrelu", lambda: lrelu(F16, 38, 4, 2, -6, (24,), R, params.ACTIVATE)),
    "lrelu_generate": ("filtered_lrelu", lambda: lrelu(torch.bfloat16, 38, 2, 2, 9, T, T, params.ACTIVATE)),
    "lrelu_double": ("filtered_lrelu", lambda: lrelu(torch.float64, 38, 2, 2, 9, T, T, params.RECORD)),
    "fir_up": ("upfirdn2d", lambda: fir(F16, 2, 1, (4, 4))),
    "fir_down": ("upfirdn2d", lambda: fir(F32, 1, 2, (4, 4))),
    "fir_channels_last": ("upfirdn2d", lambda: fir(F16, 1, 1, (4, 4), True)),
    "fir_separable": ("upfirdn2d", lambda: fir(torch.bfloat16, 1, 2, (12,))),
    "act_lrelu": ("bias_act", lambda: act(F16, "lrelu", 0)),
    "act_lrelu_backward": ("bias_act", lambda: act(F16, "lrelu", 1)),
    "act_lrelu_db": ("bias_act", lambda: act(F16, "lrelu", 1, with_db=True)),
    "act_lrelu_db_channels_last": ("bias_act", lambda: act(F16, "lrelu", 1, -1.0, True, True)),
    "act_swish_db_double": ("bias_act", lambda: act(torch.float64, "swish", 1, 256.0, True, True)),
    "act_swish_twice": ("bias_act", lambda: act(torch.bfloat16, "swish", 2)),
    "fma_planes": ("fma", lambda: product(F16, 64, False, params.NUMBER)),
    "fma_planes_map": ("fma", lambda: product(F32, 64, False, params.MAP)),
    "fma_planes_backward": ("fma", lambda: product(F16, 64, False, 0, True)),
    "fma_pixels": ("fma", lambda: product(F16, 512, True, params.MAP)),
    "fma_pixels_backward": ("fma", lambda: product(F16, 512, True, 0, True)),
    "fma_pixels_odd_backward": ("fma", lambda: product(torch.bfloat16, 37, True, 0, True)),
    "fma_double_backward": ("fma", lambda: product(torch.float64, 64, True, 0, True)),
    "distance_vgg": ("unit_distance", lambda: compared(F32, 64, False)),
    "distance_vgg_backward": ("unit_distance", lambda: compared(F32, 512, True)),
    "distance_effnet_backward": ("unit_distance", lambda: compared(F32, 112, True, False)),
    "distance_odd": ("unit_distance", lambda: compared(torch.bfloat16, 37, False)),
    "distance_half_backward": ("unit_distance", lambda: compared(F16, 512, True)),
    "distance_double_backward": ("unit_distance", lambda: compared(torch.float64, 64, True)),
    "distance_most_channels_backward": ("unit_distance", lambda: compared(F32, 2047, True)),
    "act_double": ("bias_act", lambda: act(torch.float64, "softplus", 0)),
}
# One of each source.
ON_ALL = (
    "lrelu_t",
    "lrelu_r",
    "lrelu_r_backward",
    "fir_up",
    "fma_pixels_backward",
    "act_lrelu_db",
    "distance_vgg_backward",
)


def plan_of(name, capability):
    op, make = SPECS[name]
    return importlib.import_module(f"torch_utils.ops.native.{op}.plan").plan(make(), capability)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path))


def compiled(make):
    try:
        binary = make()
    except NativeUnavailable as error:
        if "cannot compile" in error.cause and "three lines" not in error.cause:
            raise
        pytest.skip(error.cause)
    assert binary[:4] == b"\x7fELF"
    return binary


@pytest.mark.parametrize("name", SPECS)
def test_cuda_every_spec_compiles_with_nvrtc(name):
    compiled(lambda: cuda_build.nvrtc(plan_of(name, (9, 0)), (9, 0)))


# Some 2 s of one core each: the others, of which none is the first or last, are slow tests.
QUICK = ((7, 5), (8, 0), (12, 0))
CAPABILITIES = [
    pytest.param(c, marks=() if c in QUICK else pytest.mark.slow) for c in ARCHITECTURES if c != (9, 0)
]


@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
def test_cuda_every_architecture_compiles_with_nvrtc(capability):
    for name in ON_ALL:
        compiled(lambda name=name: cuda_build.nvrtc(plan_of(name, capability), capability))


@pytest.mark.slow
def test_cuda_nvcc_compiles_the_same_sources():
    try:
        compilers.nvcc()
    except NativeUnavailable as error:
        pytest.skip(error.cause)
    plans = [plan_of(name, (8, 0)) for name in ON_ALL]
    for binary in cuda_build.nvcc(plans, (8, 0)):
        assert binary[:4] == b"\x7fELF"
    assert all(cuda_build.find(plan, (8, 0)) for plan in plans)


@pytest.mark.parametrize("name", SPECS)
def test_cuda_launch_is_one_that_a_gpu_takes(name):
    for capability in ARCHITECTURES:
        plan = plan_of(name, capability)
        assert 0 < plan.grid[0] < 2**31 and plan.grid[1:] == (1, 1) and math.prod(plan.block) % 32 == 0
        assert (
            plan.shared_bytes
            <= {(7, 5): 64, (8, 0): 163, (9, 0): 227, (10, 0): 227}.get(capability, 99) * 1024
        )


def test_cuda_tensor_cores_take_clamped_float16_and_its_gradients():
    entry = "sg_filtered_lrelu_tensor_cuda"
    others = ("lrelu_t_grows", "lrelu_r_float", "lrelu_generate", "lrelu_double")  # of other types
    for capability in ARCHITECTURES:
        for name in SPECS:
            takes = plan_of(name, capability).entry == entry
            fits = name.startswith("lrelu") and name not in others
            assert takes == (fits and capability >= (8, 0)), (name, capability)
    for change in (
        dict(clamp=-1.0),
        dict(clamp=1e5),
        dict(up_gain=1e-3),
        dict(dtype=params.DTYPES[torch.bfloat16]),
    ):
        p = SPECS["lrelu_r"][1]()
        for field, value in change.items():
            setattr(p, field, value)
        assert filtered_lrelu_plan(p, (9, 0)).entry != entry, change


@pytest.mark.parametrize("channels", [32, 64, 96, 512])
def test_cuda_channels_last_half_precision_moves_16_bytes_at_once(channels):
    """Eight channels a thread in the layers of StyleGAN2, whose images are one pixel larger than even."""
    taps = torch.Size((4, 4))
    for before, after, up, down in ((257, 256, 1, 1), (256, 257, 1, 1), (64, 128, 2, 1), (128, 64, 1, 2)):
        x, y = torch.Size((2, channels, before, before)), torch.Size((2, channels, after, after))
        spec = specs.Upfirdn2dSpec(up, up, down, down, 1, 1, after, after, False, 1.0)
        p = struct_of("upfirdn2d", x, strides(x, True), strides(y, True), F16, taps, spec)
        plan = upfirdn2d_plan(p, (9, 0))
        assert {"SG_CHANNELS_LAST": 1, "SG_VECTOR": 8}.items() <= dict(plan.defines).items()
    x = torch.Size((2, channels, 17, 17))
    for order in (0, 1):
        spec = specs.BiasActSpec(1, "lrelu", 0.2, SQRT2, 256.0)
        plan = bias_act_plan(struct_of("bias_act", x, strides(x, True), F16, order == 0, spec, order), (9, 0))
        assert {"SG_VECTOR": 8, "SG_BIAS": 2 if order == 0 else 0}.items() <= dict(plan.defines).items()


def test_cuda_offsets_beyond_31_bits_are_counted_in_64():
    """Sizes past 2^31 elements: the plan asks for wide offsets, long before a product of them overflows."""
    for op, small, large in (
        ("bias_act", (4, 64, 128, 128), (8, 128, 1024, 2048)),
        ("upfirdn2d", (4, 64, 128, 128), (64, 512, 256, 256)),
        ("filtered_lrelu", (4, 64, 128, 128), (64, 512, 256, 256)),
    ):
        found = []
        for shape in (small, large):
            shape = torch.Size(shape)
            spec = {
                "bias_act": specs.BiasActSpec(1, "lrelu", 0.2, 1.0, -1.0),
                "upfirdn2d": specs.Upfirdn2dSpec(1, 1, 1, 1, 2, 2, *shape[2:], False, 1.0),
                "filtered_lrelu": specs.FilteredLreluSpec(2, 2, 9, 9, *shape[2:], False, 4.0, 0.2, -1.0),
            }[op]
            numbers = {
                "bias_act": (shape, strides(shape), F16, True, spec, 0),
                "upfirdn2d": (shape, strides(shape), strides(shape), F16, (4, 4), spec),
                "filtered_lrelu": (shape, strides(shape), strides(shape), F16, (T, T), None, spec, 0),
            }[op]
            plan = importlib.import_module(f"torch_utils.ops.native.{op}.plan").plan(
                struct_of(op, *numbers), (9, 0)
            )
            found.append(("SG_INDEX_64", 1) in plan.defines)
            assert plan.grid[0] < 2**31
        assert found == [False, True], op
    assert not is_wide(2**30 - 1) and is_wide(2**30)
