"""Gradients that overflow in float16: the weights stay, the step is counted, the run goes on."""

from __future__ import annotations

import dataclasses
import itertools
from unittest.mock import Mock

import pytest
import torch
from tiny_runs import moved, options, train_alone, weights

from finetune.train import prepare


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_overflow_skips_update(images, tmp_path, bad):
    prepared = prepare(options(images, tmp_path))
    state, before, is_spoilt = prepared.state, {}, [False]
    img = torch.randint(0, 256, [4, 3, 16, 16], dtype=torch.uint8)
    weight = state.D.b4.out.weight.requires_grad_(True)  # which the loop switches on and off
    weight.register_hook(lambda gradient: gradient * bad if is_spoilt[0] else gradient)

    def after_step(state):
        if state.step == 3:
            assert not moved(before["D"], state.D) and moved(before["G"], state.G)
        if state.step == 4:
            assert moved(before["D"], state.D)
        before.update({"G": weights(state.G), "D": weights(state.D)})
        is_spoilt[0] = state.step == 2

    display = Mock(step=after_step)
    plan = dataclasses.replace(prepared.plan, skip_overflow=True, total_nimg=4 * 4)
    train_alone(state, plan, itertools.repeat((img, torch.zeros(4, 0))), display)
    assert all(bool(tensor.isfinite().all()) for tensor in state.D.state_dict().values())
    (_, numbers), _ = display.tick.call_args
    # Dmain ran in each of four steps, Dreg in the first.
    assert numbers["overflow_D"] == pytest.approx(1 / 5) and numbers["overflow_G"] == 0


def test_overflow_only_expected_in_float16(images, tmp_path):
    assert not prepare(options(images, tmp_path)).plan.skip_overflow


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["auto", "fp32"])
def test_overflow_expected_on_cuda(precision, images, tmp_path):
    prepared = prepare(options(images, tmp_path, device="cuda", precision=precision))
    assert prepared.plan.skip_overflow == (precision == "auto")
