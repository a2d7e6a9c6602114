"""bias_act beyond the golden cases: gradients, clamp, dtypes, layouts, edges, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from tolerances import OPS_F64, assert_close

from torch_utils.ops.bias_act import activation_funcs, bias_act

pytestmark = pytest.mark.usefixtures("implementation")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def plain(x, b, act, gain, clamp=None, alpha=0.2):
    """The definition in separate steps."""
    x = x + b[:, None, None]
    x = torch.nn.functional.leaky_relu(x, alpha) if act == "lrelu" else activation_funcs[act].func(x, alpha)
    x = x * gain
    return x if clamp is None else x.clamp(-clamp, clamp)


@pytest.mark.parametrize("act", list(activation_funcs))
@pytest.mark.parametrize("clamp", [None, 0.7])
def test_bias_act_first_and_second_gradients(act, clamp):
    x = torch.randn(2, 2, 1, 2, dtype=torch.float64, requires_grad=True)
    b = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def op(x, b):
        return bias_act(x, b, act=act, gain=1.3, clamp=clamp)

    assert torch.autograd.gradcheck(op, (x, b))
    assert torch.autograd.gradgradcheck(op, (x, b))


@pytest.mark.parametrize("alpha", [-0.3, 0.0, 1.0])
def test_bias_act_every_slope_has_gradients(alpha):
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: bias_act(x, act="lrelu", alpha=alpha), x)
    expected = torch.where(x > 0, x, x * alpha) * math.sqrt(2)
    assert_close(bias_act(x, act="lrelu", alpha=alpha), expected, OPS_F64)


def test_bias_act_default_gains():
    gains = {name: spec.def_gain for name, spec in activation_funcs.items()}
    root = math.sqrt(2)
    assert gains == {
        **dict.fromkeys(["linear", "tanh", "sigmoid", "elu", "selu", "softplus"], 1),
        **dict.fromkeys(["relu", "lrelu", "swish"], root),
    }
    assert activation_funcs["lrelu"].def_alpha == 0.2
    assert_close(bias_act(torch.tensor([[-5.0, 5.0]]), act="lrelu"), [[-root, 5 * root]], OPS_F64)


@pytest.mark.parametrize("act", ["linear", "lrelu", "swish"])
@pytest.mark.parametrize("gain", [-1.5, 0.0, 1.0, 2.0])
def test_bias_act_every_gain_is_the_definition(act, gain):
    x, b = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    assert_close(bias_act(x, b, act=act, gain=gain, clamp=1.1), plain(x, b, act, gain, 1.1), OPS_F64)


@pytest.mark.parametrize("act", ["linear", "relu", "lrelu", "tanh"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_bias_act_keeps_inputs(act, with_bias):
    x, b = torch.randn(2, 3, 4, 4), torch.randn(3)
    before = x.clone(), b.clone()
    bias_act(x, b if with_bias else None, act=act, gain=1, clamp=0.5)
    assert torch.equal(x, before[0]) and torch.equal(b, before[1])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_bias_act_gradient_is_zero_where_clamped(layout):
    x = torch.tensor([-3.0, -0.4, 0.4, 3.0]).reshape(1, 4, 1, 1).expand(1, 4, 2, 2)
    x = x.contiguous(memory_format=layout).requires_grad_()
    for clamp, expected in ((1.0, [0, 0.5, 1, 0]), (0.45, [0, 0.5, 1, 0]), (4.0, [0.5, 0.5, 1, 1])):
        y = bias_act(x, act="lrelu", alpha=0.5, gain=1, clamp=clamp)
        assert y.abs().max() <= clamp
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert dx[0, :, 0, 0].tolist() == expected


def test_bias_act_clamp_keeps_nan():
    x = torch.tensor([[1.0, float("nan")]], requires_grad=True)
    assert bias_act(x, clamp=256).isnan().tolist() == [[False, True]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("act", list(activation_funcs))
def test_bias_act_low_precision_error_at_most_twice_torch(dtype, device, act):
    x, b = torch.randn(4, 3, 16, 16, device=device).to(dtype), torch.randn(3, device=device).to(dtype)
    gain = activation_funcs[act].def_gain
    exact = plain(x.double(), b.double(), act, gain, 2.5)
    y = bias_act(x, b, act=act, clamp=2.5)
    assert y.dtype == dtype
    loss = (plain(x, b, act, gain, 2.5).double() - exact).abs().max()
    assert (y.double() - exact).abs().max() <= 2 * loss


def test_bias_act_layouts_and_dimensions():
    x, b = torch.randn(2, 5, 6, 4), torch.randn(5)
    expected = bias_act(x, b, act="lrelu")
    last = bias_act(x.contiguous(memory_format=torch.channels_last), b, act="lrelu")
    assert torch.equal(last, expected)
    assert last.is_contiguous(memory_format=torch.channels_last)
    for dim in (3, -1):
        assert torch.equal(
            bias_act(x.permute(0, 2, 3, 1), b, dim=dim, act="lrelu"), expected.permute(0, 2, 3, 1)
        )
    assert torch.equal(bias_act(x[:, :, ::2], b, act="lrelu"), expected[:, :, ::2])


def test_bias_act_empty_batches_keep_their_gradients():
    x, b = torch.zeros(0, 3, 4, 4, requires_grad=True), torch.zeros(3, requires_grad=True)
    y = bias_act(x, b, act="lrelu", clamp=1)
    dx, db = torch.autograd.grad(y.sum(), [x, b])
    assert dx.shape == x.shape and db.tolist() == [0, 0, 0]


def test_bias_act_float32_bias_follows_half_pixels():
    y = bias_act(torch.ones(1, 2, dtype=torch.float16), torch.ones(2))
    assert y.dtype == torch.float16 and y.tolist() == [[2, 2]]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (dict(x=3.0), TypeError, "float"),
        (dict(x=torch.zeros(2, 3, dtype=torch.long)), ValueError, "int64"),
        (dict(b=[1, 2, 3]), TypeError, "list"),
        (dict(b=torch.zeros(2)), ValueError, r"\[3\]"),
        (dict(b=torch.zeros(3), dim=2), ValueError, "dim 2"),
        (dict(act="gelu"), ValueError, "gelu"),
        (dict(clamp=-1), ValueError, "clamp"),
        (dict(impl="gpu"), ValueError, "gpu"),
        (dict(impl="cuda"), RuntimeError, "cuda"),
    ],
)
def test_bias_act_refusals_name_the_problem(arguments, error, words):
    with pytest.raises(error, match=words):
        bias_act(**{"x": torch.zeros(2, 3), **arguments})
