"""Every op against the numbers of the original networks, in float64: values, first and second gradients."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tolerances import OPS_F64, assert_close

from torch_utils.ops.bias_act import bias_act
from torch_utils.ops.conv2d_resample import conv2d_resample
from torch_utils.ops.filtered_lrelu import filtered_lrelu
from torch_utils.ops.upfirdn2d import setup_filter, upfirdn2d

pytestmark = pytest.mark.usefixtures("implementation")

CASES = json.loads((Path(__file__).parents[1] / "golden" / "ops.json").read_text())
OPS = ("upfirdn2d", "bias_act", "filtered_lrelu", "conv2d_resample")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def named(case) -> str:
    return f"{case['op']}-{case['case']}"


def run_upfirdn2d(case, filters, x):
    return upfirdn2d(
        x, filters(case["f"]), case["up"], case["down"], case["padding"], case["flip"], case["gain"]
    )


def run_bias_act(case, filters, x, b):
    options = {key: case[key] for key in ("alpha", "gain", "clamp") if key in case}
    return bias_act(x, b, dim=case["dim"], act=case["act"], **options)


def run_filtered_lrelu(case, filters, x, b):
    options = {key: case[key] for key in ("up", "down", "padding", "gain", "slope", "clamp")}
    return filtered_lrelu(x, filters(case["fu"]), filters(case["fd"]), b, **options)


def run_conv2d_resample(case, filters, x, w):
    options = {key: case[key] for key in ("up", "down", "padding", "groups", "flip_weight")}
    return conv2d_resample(x, w, filters("f4"), **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", [case for case in CASES if case["op"] in OPS], ids=named)
def test_ops_values_and_gradients(golden_ops, case, device):
    arrays = golden_ops[1]
    op, prefix = case["op"], f"{case['op']}/{case['case']}/"
    filter_home = "upfirdn2d" if op == "conv2d_resample" else op

    def tensor(key):
        return torch.from_numpy(arrays[key]).to(device)

    def filters(key):
        return None if key is None else tensor(f"{filter_home}/filter/{key}")

    names = [name for name in ("x", "b", "w") if prefix + name in arrays]
    inputs = [tensor(prefix + name).requires_grad_() for name in names]
    y = globals()[f"run_{op}"](case, filters, *inputs)
    assert_close(y, arrays[prefix + "y"], OPS_F64, "y")

    dy = tensor(prefix + "dy").requires_grad_()
    grads = torch.autograd.grad(y, inputs, dy, create_graph=True)
    for name, grad in zip(names, grads):
        assert_close(grad, arrays[f"{prefix}d{name}"], OPS_F64, f"d{name}")

    if prefix + "v" in arrays:
        product = (grads[0] * tensor(prefix + "v")).sum()
        second = torch.autograd.grad(product, [*inputs, dy], materialize_grads=True)
        for name, grad in zip([*names, "dy"], second):
            if f"{prefix}d2{name}" in arrays:
                assert_close(grad, arrays[f"{prefix}d2{name}"], OPS_F64, f"d2{name}")


@pytest.mark.parametrize("case", [case for case in CASES if case["op"] == "setup_filter"], ids=named)
def test_ops_setup_filter(golden_ops, case):
    options = {key: case[key] for key in ("gain", "normalize", "flip_filter", "separable") if key in case}
    f = setup_filter(case["f"], **options)
    assert f.dtype == torch.float32
    assert_close(f, golden_ops[1][f"setup_filter/{case['case']}/y"], OPS_F64)
