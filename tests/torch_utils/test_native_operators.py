"""The native ops are ordinary operators to torch: opcheck, compile, autocast, copies, processes."""

from __future__ import annotations

import copy
import io
import multiprocessing

import pytest
import torch
from op_cases import CASES, run, send_sum, tensors

from finetune.models import stylegan2
from torch_utils.ops.filtered_lrelu import filtered_lrelu
from torch_utils.ops.native import dispatch, specs

BY_ID = {(case.op, case.id): case for case in CASES}
T = BY_ID["filtered_lrelu", "stylegan3_t"]
UP = BY_ID["upfirdn2d", "stylegan2_up"]
ACT = BY_ID["bias_act", "clamp_bites_tanh"]
OPS = pytest.mark.parametrize("case", [T, UP, ACT], ids=lambda case: case.op)


def registered_calls():
    """Each registered op with tensors and numbers it takes."""
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    b, f = torch.randn(3, requires_grad=True), torch.rand(4)
    ops = torch.ops.stylegan_ops
    fir = specs.Upfirdn2dSpec(2, 2, 1, 1, 2, 2, 16, 16, False, 4.0)
    act = specs.BiasActSpec(1, "sigmoid", 0.2, 1.5, -1.0)
    layer = specs.FilteredLreluSpec(2, 2, 3, 3, 8, 8, False, 4.0, 0.2, 0.7)
    mask = ops.filtered_lrelu(x, f, f, b, *layer, True)[1].detach()
    y = ops.bias_act(x, b, *act).detach()
    dy = torch.randn_like(y, requires_grad=True)
    s, c = torch.randn(2, 3, 1, 1, requires_grad=True), torch.randn(2, 1, 8, 8, requires_grad=True)
    return {
        "upfirdn2d": (x, f, *fir),
        "bias_act": (x, b, *act),
        "bias_act_grad": (dy, x, b, y, *act, True),
        "fma": (x, s, c),
        "fma_grad": (dy, x, s, True, True),
        "unit_distance": (x, dy, b.detach()),
        "unit_distance_grad": (c.detach()[:, 0], x.detach(), dy.detach(), b.detach()),
        "bias_act_grad2": (dy.detach(), dy.detach(), x.detach(), b.detach(), y, *act),
        "filtered_lrelu": (x, f, f, b, *layer, True),
        "filtered_lrelu_gate": (x, mask, f, f, *layer.gate(f), True),
    }


OPERATORS = [
    *("upfirdn2d", "bias_act", "bias_act_grad", "bias_act_grad2"),
    *("filtered_lrelu", "filtered_lrelu_gate"),
    *("fma", "fma_grad"),
    *("unit_distance", "unit_distance_grad"),
]


@pytest.mark.filterwarnings("ignore")  # of torch's own making
@pytest.mark.parametrize("name", OPERATORS)
def test_native_opcheck(name):
    op = getattr(torch.ops.stylegan_ops, name).default
    torch.library.opcheck(op, registered_calls()[name])


def test_native_opcheck_covers_every_operator():
    prefix = f"{dispatch.NAMESPACE}::"
    defined = {name.removeprefix(prefix) for name in torch._C._dispatch_get_all_op_names() if prefix in name}
    assert defined == set(OPERATORS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_native_compiled_generator_and_discriminator_are_the_networks():
    torch._dynamo.reset()
    sizes = dict(channel_base=64, channel_max=8)
    G = stylegan2.Generator(8, 0, 8, 8, 3, **sizes).eval()
    D = stylegan2.Discriminator(0, 8, 3, **sizes).eval()
    z = torch.randn(2, 8)

    def loss(G, D):
        img = G(z, None, noise_mode="const")
        value = D(img, None).sum()
        grads = torch.autograd.grad(value, list(G.synthesis.parameters()), allow_unused=True)
        return [img, value, *(g for g in grads if g is not None)]

    expected = loss(G, D)
    actual = loss(torch.compile(G, backend="aot_eager"), torch.compile(D, backend="aot_eager"))
    torch._dynamo.reset()
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@OPS
def test_native_one_graph_holds_each_op(case):
    """No break: torch.compile sees an operator, not a call into a library."""
    torch._dynamo.reset()
    made = tensors(case, torch.float32)
    compiled = torch.compile(lambda made: run(case, made), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(made), run(case, made))
    torch._dynamo.reset()


@OPS
def test_native_fake_tensors_have_the_right_sizes(case):
    from torch._subclasses import FakeTensorMode

    made = tensors(case, torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {key: value if value is None else mode.from_tensor(value) for key, value in made.items()}
        y = run(case, fake)
    expected = run(case, made)
    assert (y.shape, y.dtype, y.stride()) == (expected.shape, expected.dtype, expected.stride())


@OPS
def test_native_autocast_changes_what_it_changes_for_plain_torch(case):
    made = tensors(case, torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            native, plain = run(case, made), run(case, made, impl="ref")
        assert native.dtype == torch.float32
        torch.testing.assert_close(native.float(), plain.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.filterwarnings("ignore")  # torch announces the end of its TorchScript
def test_native_what_is_traced_for_others_has_no_operator_of_ours():
    made = tensors(T, torch.float32)
    traced = torch.jit.trace(
        lambda x: filtered_lrelu(**{**made, "x": x}, **T.options), made["x"], check_trace=False
    )
    assert "stylegan_ops" not in str(traced.graph)
    torch.testing.assert_close(traced(made["x"]), run(T, made))


def test_native_networks_copy_and_pickle_after_the_ops_ran():
    G = stylegan2.Generator(8, 0, 8, 8, 3, channel_base=64, channel_max=8).eval()
    z = torch.randn(1, 8)
    img = G(z, None, noise_mode="const")
    assert torch.equal(copy.deepcopy(G)(z, None, noise_mode="const"), img)
    torch.save(G.state_dict(), io.BytesIO())
    y = run(T, tensors(T, torch.float32)).requires_grad_(True)
    copy.deepcopy(y.detach())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_native_other_processes(method):
    """No gradients in them: torch's autograd does not survive a fork."""
    expected = float(run(T, tensors(T, torch.float32)).sum())
    context = multiprocessing.get_context(method)
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=send_sum, args=(there, T))
    process.start()
    there.close()  # the child has the only other end: if it dies, there is nothing to wait for
    try:
        assert here.poll(120), "the child hangs"
        found = here.recv()
    except EOFError:
        process.join()
        pytest.fail(f"the child ended with exit code {process.exitcode}")
    finally:
        process.kill()
        process.join()
    assert found == pytest.approx(expected, rel=1e-6)


def test_native_checkpointed_step_and_a_second_backward():
    """Saved tensors survive what autograd offers: retain_graph, checkpointing, hooks on saved tensors."""
    from torch.utils.checkpoint import checkpoint

    made = tensors(T, torch.float32)
    x = made["x"].clone().requires_grad_(True)
    y = filtered_lrelu(**{**made, "x": x}, **T.options)
    first = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], first)
    again = checkpoint(lambda x: filtered_lrelu(**{**made, "x": x}, **T.options), x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(again.sum(), x)[0], first)
