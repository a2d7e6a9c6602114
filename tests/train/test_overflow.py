"""Gradients that overflow in float16: the weights stay, the step is counted, the run goes on."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from tiny_runs import CPU, moved, options, weights

from finetune.train import loop
from finetune.train.run import prepare
from finetune.train.watch import Watch


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_gradient_that_overflows_moves_no_weight(pictures, tmp_path, bad):
    prepared = prepare(options(pictures, tmp_path))
    state, seen = prepared.state, []
    watch = Watch(CPU, 10**9, lambda state, numbers: seen.append(numbers))
    img = torch.randint(0, 256, [4, 3, 16, 16], dtype=torch.uint8)
    batches = itertools.repeat((img, torch.zeros(4, 0)))

    def train(steps):
        plan = dataclasses.replace(prepared.plan, skip_overflow=True, total_nimg=state.nimg + 4 * steps)
        loop.train(state, plan, batches, watch)

    train(2)
    weight = state.D.b4.out.weight.requires_grad_(True)  # which the loop switches on and off
    spoil = weight.register_hook(lambda gradient: gradient * bad)
    before = {"G": weights(state.G), "D": weights(state.D)}
    train(1)
    spoil.remove()
    assert not moved(before["D"], state.D) and moved(before["G"], state.G)
    train(1)
    assert moved(before["D"], state.D)
    assert all(bool(tensor.isfinite().all()) for tensor in state.D.state_dict().values())
    watch.tick(state)
    # Dmain ran in each of four steps, Dreg in the first.
    assert seen[0]["overflow_D"] == pytest.approx(1 / 5) and seen[0]["overflow_G"] == 0


def test_float16_layers_alone_may_overflow(pictures, tmp_path):
    assert not prepare(options(pictures, tmp_path)).plan.skip_overflow


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["auto", "fp32"])
def test_float16_layers_may_overflow_on_cuda(precision, pictures, tmp_path):
    prepared = prepare(options(pictures, tmp_path, device="cuda", precision=precision))
    assert prepared.plan.skip_overflow == (precision == "auto")
