"""The forms that every implementation of an op is held to; the id of a case says why it is there."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from torch_utils.ops.bias_act import bias_act
from torch_utils.ops.filtered_lrelu import _spec, filtered_lrelu
from torch_utils.ops.native import library
from torch_utils.ops.upfirdn2d import filter_size, parse_padding, upfirdn2d


class Case(NamedTuple):
    """One call. fu, fd: number of taps, or (height, width) of a 2-D filter; upfirdn2d has fu alone.

    layout: "channels_last", or "gaps" for a slice of a larger, transposed tensor.
    """

    id: str
    op: str
    shape: tuple[int, ...]
    options: dict[str, Any]
    fu: Any = None
    fd: Any = None
    layout: str = ""
    bias: bool = True


def fir(id, shape, fu, layout="", **options):
    return Case(id, "upfirdn2d", shape, options, fu, layout=layout)


def lrelu(id, shape, fu, fd, layout="", bias=True, **options):
    return Case(id, "filtered_lrelu", shape, options, fu, fd, layout, bias)


def act(id, shape, layout="", bias=True, **options):
    return Case(id, "bias_act", shape, options, layout=layout, bias=bias)


CASES = [
    fir("stylegan2_up", (2, 3, 8, 8), (4, 4), up=2, padding=[2, 1, 2, 1], gain=4),
    fir("stylegan2_down", (2, 3, 9, 12), (4, 4), down=2, padding=1),
    fir("blur_after_up_convolution", (1, 4, 17, 17), (4, 4), padding=1, gain=4),
    fir("wavelet_separable", (1, 3, 20, 24), 12, down=2, padding=[5, 6, 5, 6]),
    fir("separable_up", (1, 2, 9, 7), 12, up=2, padding=[6, 5, 6, 5]),
    fir("no_filter_at_all", (2, 2, 6, 5), None, up=2, padding=[0, 1, 0, 1]),
    fir("flipped_and_not_a_product", (1, 2, 9, 11), (3, 5), flip_filter=True, padding=2),
    fir("axes_differ", (1, 2, 7, 9), (2, 3), up=[3, 1], down=[2, 3], padding=[2, 1, 0, 3]),
    fir("up_and_down_without_common_factor", (1, 1, 11, 10), 7, up=3, down=2, padding=4),
    fir("negative_padding_crops", (1, 2, 12, 13), (4, 4), up=2, padding=[-3, -2, 5, -4]),
    fir("wider_than_a_vector_and_odd", (1, 1, 5, 131), (4, 4), up=2, padding=[2, 1, 2, 1]),
    fir("one_pixel_in_and_out", (1, 2, 1, 1), (3, 3), padding=1),
    fir("batch_of_none", (0, 3, 8, 8), (4, 4), up=2, padding=[2, 1, 2, 1]),
    fir("channels_last", (2, 8, 9, 8), (4, 4), "channels_last", up=2, padding=[2, 1, 2, 1]),
    fir("channels_last_odd_channels", (2, 3, 9, 8), (4, 4), "channels_last", down=2, padding=1),
    fir("gaps_and_transposed", (2, 3, 8, 9), (4, 4), "gaps", down=2, padding=1),
    lrelu("stylegan3_t", (1, 2, 20, 20), 12, 12, up=2, down=2, padding=[9, 8, 9, 8], clamp=256),
    lrelu("stylegan3_t_grows", (1, 2, 14, 15), 24, 12, up=4, down=2, padding=[-6, -9, -6, -9], clamp=256),
    lrelu("stylegan3_r", (1, 2, 16, 16), 12, (12, 12), up=2, down=2, padding=[11, 10, 11, 10]),
    lrelu("stylegan3_r_grows", (1, 1, 12, 13), 24, (12, 12), up=4, down=2, padding=[-2, -5, -2, -5]),
    lrelu("its_gradient_shrinks", (1, 1, 20, 22), 12, 24, up=2, down=4, padding=[13, 12, 13, 12]),
    lrelu("stylegan3_colors", (2, 3, 9, 9), None, None, gain=1, slope=1, clamp=256),
    lrelu("clamp_bites", (1, 2, 15, 14), 12, 12, up=2, down=2, padding=[9, 8, 9, 8], clamp=0.3),
    lrelu("odd_columns_of_mask", (1, 1, 9, 35), 5, 3, up=2, down=1, padding=[2, 2, 2, 2]),
    lrelu("wide_mask_rows", (1, 1, 4, 90), 12, 12, up=2, down=2, padding=[9, 8, 9, 8]),
    lrelu("several_tiles_or_strips", (1, 1, 90, 70), 12, 12, up=2, down=2, padding=[9, 8, 9, 8]),
    lrelu("no_bias_steep_slope", (2, 2, 8, 9), 4, 4, bias=False, up=2, down=2, padding=3, slope=1.5),
    lrelu("up_three_down_two", (1, 2, 8, 7), 5, (3, 2), up=3, down=2, padding=[4, 3, 2, 5]),
    lrelu("both_filters_2d_flipped", (1, 2, 9, 8), (3, 4), (2, 5), up=2, padding=4, flip_filter=True),
    lrelu("crops_beyond_the_image", (1, 1, 24, 24), 12, 12, up=2, down=2, padding=[-11, -12, -11, -12]),
    lrelu("one_pixel", (1, 3, 1, 1), 12, 12, up=2, down=2, padding=[11, 11, 11, 11]),
    lrelu("batch_of_none", (0, 2, 8, 8), 12, 12, up=2, down=2, padding=[9, 8, 9, 8]),
    lrelu("channels_last", (2, 3, 12, 11), 12, 12, "channels_last", up=2, down=2, padding=[9, 8, 9, 8]),
    lrelu("gaps_and_transposed", (2, 3, 9, 12), 12, 12, "gaps", up=2, down=2, padding=[9, 8, 9, 8]),
    *(act(f"act_{name}", (2, 3, 5, 7), act=name) for name in ("linear", "relu", "lrelu", "tanh", "sigmoid")),
    *(act(f"act_{name}", (2, 3, 5, 7), act=name) for name in ("elu", "selu", "softplus", "swish")),
    act("clamp_bites_lrelu", (2, 4, 8, 8), act="lrelu", clamp=0.4),
    act("clamp_bites_swish", (2, 4, 8, 8), act="swish", clamp=0.4),
    act("clamp_bites_tanh", (2, 4, 8, 8), act="tanh", clamp=0.4),
    act("no_bias", (3, 5, 7), bias=False, act="lrelu"),
    act("dense_layer", (5, 48), act="lrelu", gain=0.7),
    act("dense_layer_odd", (3, 37), act="linear", gain=2),
    act("bias_along_the_last_axis", (2, 3, 17), dim=2, act="sigmoid"),
    act("rows_not_whole_vectors", (2, 3, 3, 11), act="lrelu", alpha=0.3),
    act("one_number", (1, 1, 1, 1), act="lrelu"),
    act("batch_of_none", (0, 3, 4, 4), act="lrelu"),
    act("channels_last", (2, 8, 5, 6), "channels_last", act="lrelu", clamp=1),
    act("gaps_and_transposed", (2, 3, 5, 6), "gaps", act="lrelu"),
    # At the end, because a case draws its tensors by its place in the list.
    fir("channels_last_blur", (2, 16, 9, 7), (4, 4), "channels_last", padding=1, gain=4),
    fir("channels_last_not_a_product", (1, 8, 9, 6), (3, 5), "channels_last", padding=2, flip_filter=True),
    lrelu("stylegan3_r_tiles", (1, 1, 69, 59), 12, (12, 12), up=2, down=2, padding=[11, 10, 11, 10], clamp=9),
    lrelu("stylegan3_r_grows_even", (1, 2, 12, 14), 24, (12, 12), up=4, down=2, padding=9, clamp=256),
    lrelu("2d_filter_of_16", (1, 2, 25, 13), 16, (14, 16), up=2, down=2, padding=[16, 15, 15, 13], clamp=256),
    lrelu("odd_up_filter_grows", (1, 1, 9, 9), 23, (9, 11), up=4, down=2, padding=[9, 8, 9, 9], clamp=256),
    lrelu("odd_2d_down_filter", (1, 1, 8, 9), (5, 6), (9, 11), up=2, down=2, padding=9, clamp=256),
    lrelu("17_columns_of_taps_up_1", (1, 1, 10, 24), 3, (3, 17), down=2, padding=[9, 8, 2, 2], clamp=256),
    lrelu("18_columns_of_taps", (1, 1, 9, 13), 4, (2, 18), up=2, down=2, padding=9, clamp=256),
    lrelu("stylegan3_t_tiles", (1, 1, 46, 44), 12, 12, up=2, down=2, padding=[9, 8, 9, 8], clamp=0.9),
    lrelu("up_and_down_four", (1, 1, 12, 20), 32, 31, up=4, down=4, padding=[21, 17, 23, 20], clamp=1),
    lrelu("down_four_clamped", (1, 1, 30, 42), 16, 29, up=2, down=4, padding=[13, 9, 5, 12], clamp=1),
    lrelu("stylegan3_t_grows_even", (1, 2, 14, 36), 24, 12, up=4, down=2, padding=[-6, -9, -6, -9], clamp=9),
]


def _moved(x: torch.Tensor, dtype, device) -> torch.Tensor:
    """Copy a tensor with its strides and its gaps, which `Tensor.to` closes on the way to another device."""
    memory = torch.zeros(x.untyped_storage().nbytes() // x.itemsize, dtype=dtype, device=device)
    return memory.as_strided(x.shape, x.stride(), x.storage_offset()).copy_(x)


def tensors(case: Case, dtype, device="cpu") -> dict[str, Any]:
    """The tensors of a call, drawn from a seed of their own: float32 values in `dtype`."""
    generator = torch.Generator().manual_seed(CASES.index(case))

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    if case.layout == "gaps":
        n, c, h, w = case.shape
        x = draw(n, h, c + 1, w + 3).transpose(1, 2)[:, :c, :, 2 : 2 + w]
    else:
        x = draw(*case.shape)
    if case.layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    made: dict[str, Any] = {"x": _moved(x, dtype, device)}
    if case.op != "upfirdn2d" and case.bias:
        made["b"] = draw(case.shape[case.options.get("dim", 1)]).to(device, dtype)
    names = {"upfirdn2d": ["f"], "filtered_lrelu": ["fu", "fd"], "bias_act": []}[case.op]
    for name, taps in zip(names, (case.fu, case.fd)):
        if taps is None:
            made[name] = None
            continue
        f = draw(*taps) if isinstance(taps, tuple) else draw(taps)
        if (
            f.ndim == 2 and case.id == "stylegan3_r"
        ):  # radial filters are their own mirror images, which a kernel may use
            f = f + f.flip(1)
        if case.op == "filtered_lrelu":  # low-passes, as in networks: sums of their results do not cancel
            f = f.abs() / f.abs().sum()
        if taps == (4, 4):  # as StyleGAN2 has it, a product of two
            f = torch.outer(torch.tensor([1.0, 3, 3, 1]), torch.tensor([1.0, 3, 3, 1])) / 64
        made[name] = f.to(device, torch.promote_types(dtype, torch.float32))
    return made


OPS = {"upfirdn2d": upfirdn2d, "filtered_lrelu": filtered_lrelu, "bias_act": bias_act}


def run(case: Case, made: dict[str, Any], **more: Any) -> torch.Tensor:
    """Call the op."""
    return OPS[case.op](**made, **case.options, **more)


def derivatives(case: Case, made: dict[str, Any], order: int = 2, **more: Any) -> list[torch.Tensor]:
    """The output, its gradients, and the gradients of those, each weighed with numbers of a fixed seed."""
    wanted = [name for name in ("x", "b") if name in made]
    inputs = {**made, **{name: made[name].detach().requires_grad_(True) for name in wanted}}
    y = run(case, inputs, **more)
    found = [y]
    dy = weights(y).requires_grad_(True)
    leaves = [inputs[name] for name in wanted]
    if order > 0:
        first = torch.autograd.grad(y, leaves, dy, create_graph=order > 1)
        found += first
    if order > 1:
        terms = [(g * weights(g)).sum() for g in first if g.requires_grad]
        second = torch.autograd.grad(sum(terms), [dy, *leaves], allow_unused=True)
        found += [torch.zeros_like(t) if g is None else g for g, t in zip(second, [dy, *leaves])]
    return [value.detach() for value in found]


def gradients_by_recorded_bits(case: Case, made: dict[str, Any]) -> list[torch.Tensor]:
    """Exact gradients of a `filtered_lrelu` on CUDA by the bits it records, which are right up to rounding.

    An element of the upsampled image that is zero up to rounding may count as positive or not, and a gradient
    depends on it by the difference of the slopes.
    """
    options = {"up": 1, "down": 1, "padding": 0, "gain": 2**0.5, "slope": 0.2, "flip_filter": False}
    options |= {"clamp": None, **case.options}
    options["padding"] = list(parse_padding(options["padding"]))
    up, down, slope, clamp = (options[name] for name in ("up", "down", "slope", "clamp"))
    spec = _spec(made["x"], made["fu"], made["fd"], **options)
    mask = library.FILTERED_LRELU(made["x"], made["fu"], made["fd"], made.get("b"), *spec, True)[1]
    words = mask.view(torch.int32).unflatten(3, (-1, 2)).unsqueeze(4)
    shifts = torch.arange(32, device=mask.device).reshape(32, 1)
    kept, above = ((words >> shifts) & 1).flatten(3, 4).bool().unbind(4)
    wide = {name: value.detach().double() for name, value in made.items() if value is not None}
    leaves = [wide[name].requires_grad_(True) for name in ("x", "b") if name in wide]
    u = bias_act(*leaves, impl="ref")
    gain, flip = up**2 * options["gain"], options["flip_filter"]
    u = upfirdn2d(u, wide.get("fu"), up, 1, options["padding"], flip, gain, impl="ref")
    width, height = filter_size(wide.get("fd"))
    rows, columns = (spec.out_h - 1) * down + height, (spec.out_w - 1) * down + width
    u, kept, above = (each[:, :, :rows, :columns] for each in (u, kept, above))
    rounding = 8 * torch.finfo(made["x"].dtype).eps * u.detach().abs().max()
    assert (u.abs()[above != (u > 0)] < rounding).all()
    if clamp is not None:
        excess = torch.where(u > 0, u, u * slope).abs() - clamp
        assert (excess.abs()[kept != (excess <= 0)] < rounding).all()
    v = u * torch.where(kept, torch.where(above, 1.0, slope), 0.0)
    y = upfirdn2d(v, wide.get("fd"), 1, down, 0, flip, impl="ref")
    return list(torch.autograd.grad(y, leaves, weights(y)))


def weights(like: torch.Tensor) -> torch.Tensor:
    """Numbers that depend on nothing but the shape; their sums do not cancel."""
    ramp = torch.arange(like.numel(), dtype=torch.float64)
    return ((ramp * 0.7).cos() + 1.5).reshape(like.shape).to(like.device, like.dtype)


def loss(actual: list[torch.Tensor], exact: list[torch.Tensor]) -> list[float]:
    """The largest error of each, in units of the largest value."""
    return [
        float((a.double() - e).abs().max() / e.abs().max().clamp_min(1e-6)) if e.numel() else 0.0
        for a, e in zip(actual, exact)
    ]


def send_sum(pipe: Any, case: Case) -> None:
    """Run a case and send the sum of what comes out: a child process.

    It is here because a spawned child looks for its function by name, and the names of test files begin with
    `tests`, which other packages install, too.
    """
    pipe.send(float(run(case, tensors(case, torch.float32)).sum()))
