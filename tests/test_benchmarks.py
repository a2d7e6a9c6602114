"""The benchmarks' yardstick computes what the ops compute, and their counts of work are right."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

from torch_utils.ops import bias_act, filtered_lrelu, upfirdn2d

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def modules():
    sys.path.insert(0, str(FOLDER))
    try:
        yield {name: importlib.import_module(name) for name in ("naive", "bench_ops")}
    finally:
        sys.path.remove(str(FOLDER))


CASES = (
    ("upfirdn2d", dict(up=2, padding=[2, 1, 2, 1], gain=4), (4, 4), None),
    ("upfirdn2d", dict(down=2, padding=[-1, 2, 3, -2], flip_filter=True), 6, None),
    ("filtered_lrelu", dict(up=2, down=2, padding=[9, 8, 9, 8], clamp=0.9), 12, (12, 12)),
    ("filtered_lrelu", dict(up=4, down=2, padding=[-3, -2, -3, -2], slope=0.1), 24, 12),
    ("bias_act", dict(act="lrelu", clamp=0.5), None, None),
    ("bias_act", dict(act="swish"), None, None),
)


@pytest.mark.parametrize(("op", "options", "fu", "fd"), CASES)
def test_the_yardstick_is_right_in_value_and_gradient(modules, op, options, fu, fd):
    case = modules["bench_ops"].Case(op, "", (2, 3, 14, 14), options, fu, fd)
    settings = type("Settings", (), dict(channels_last=False, device="cpu", dtype=torch.float64))
    made = modules["bench_ops"].tensors(case, settings, torch.Generator().manual_seed(0))
    made["x"].requires_grad_(True)
    made = {name: value for name, value in made.items() if value is not None}
    ours = {"bias_act": bias_act.bias_act, "upfirdn2d": upfirdn2d.upfirdn2d}
    ours["filtered_lrelu"] = filtered_lrelu.filtered_lrelu
    want = ours[op](**made, **options, impl="ref")
    got = getattr(modules["naive"], op)(**made, **options)
    torch.testing.assert_close(got, want)
    dy = torch.randn(want.shape, dtype=want.dtype, generator=torch.Generator().manual_seed(1))
    (want,) = torch.autograd.grad(want, made["x"], dy)
    (got,) = torch.autograd.grad(got, made["x"], dy)
    torch.testing.assert_close(got, want)


def test_the_work_counted_is_the_work_that_cannot_be_left_out(modules):
    bench = modules["bench_ops"]
    # 4 of the 16 taps meet a pixel when every second one is a zero.
    up = bench.fir("", (1, 1, 8, 8), up=2, padding=[2, 1, 2, 1])
    assert bench.work(up, torch.Size([1, 1, 16, 16]), 4) == ((64 + 256) * 4, 2 * 256 * 4)
    # 8 rows of 18 columns, 18 x 18 of the grid, 18 x 8 back, 8 x 8 outputs; 2 and 4 taps meet a pixel.
    both = bench.lrelu("", (1, 1, 8, 8), 2, 2, 0, fu=4, fd=4)
    grid = 18
    macs = 8 * grid * 2 + grid * grid * 2 + grid * grid + grid * 8 * 4 + 8 * 8 * 4
    assert bench.work(both, torch.Size([1, 1, 8, 8]), 4) == ((64 + 64) * 4, 2 * macs)


def test_inside_the_block_the_networks_call_the_yardstick(modules):
    naive, x = modules["naive"], torch.ones(1, 1, 4, 4)
    f = upfirdn2d.setup_filter([1, 3, 3, 1])
    before = upfirdn2d.upfirdn2d
    with naive.instead_of_ours():
        assert upfirdn2d.upfirdn2d is naive.upfirdn2d
        got = upfirdn2d.upsample2d(x, f)
    assert upfirdn2d.upfirdn2d is before
    torch.testing.assert_close(got, upfirdn2d.upsample2d(x, f))
