"""The largest micro-batch that fits into memory, found by trial."""

from __future__ import annotations

import io
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny_runs import options, train_steps

from finetune.train import memory, steps
from finetune.train.prepare import prepare


@pytest.fixture
def limit(monkeypatch):
    """Let R1 run out of memory with more than a number of images; the sizes that were tried are returned."""
    tried, real = [], steps.r1_step

    def set_limit(largest):
        def r1_step(state, plan, reals, stats):
            tried.append(plan.batch_gpu)
            if plan.batch_gpu > largest:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            real(state, plan, reals, stats)

        monkeypatch.setattr(steps, "r1_step", r1_step)
        return tried

    return set_limit


def content(state):
    stream = io.BytesIO()
    torch.save([state.state_dict(), state.augment_pipe.state_dict()], stream)
    return stream.getvalue()


@pytest.mark.parametrize(
    "family, largest, found", [("stylegan2", 8, 8), ("stylegan2", 0, 1), ("stylegan3-t", 5, 4)]
)
def test_largest_micro_batch_leaves_the_state_alone(family, largest, found, images, tmp_path, limit):
    changes = {"sd_backbone": "l2", "sd_weight": "auto:1", "aug": "ada"}
    prepared = prepare(options(images, tmp_path, family, batch=8, **changes))
    state = prepared.state
    before = content(state)
    limit(largest)
    assert memory.largest_micro_batch([1, 2, 4, 8], state, prepared.plan) == found
    assert content(state) == before
    parameters = [*state.G.parameters(), *state.D.parameters()]
    assert all(each.grad is None and not each.requires_grad for each in parameters)


def test_largest_micro_batch_fits_on_every_rank(images, tmp_path, limit):
    tried = limit(8)
    prepared = prepare(options(images, tmp_path, batch=8))
    smaller = SimpleNamespace(all_reduce_max=lambda value, what: value or "--batch-gpu 8" in what)
    plan = replace(prepared.plan, group=smaller)
    assert memory.largest_micro_batch([1, 2, 4, 8], prepared.state, plan) == 4
    assert tried == [8, 4]


def test_trial_trains_like_the_same_micro_batch_given(images, tmp_path, limit, monkeypatch):
    limit(2)
    given = prepare(options(images, tmp_path, batch_gpu=2))
    monkeypatch.setattr(memory, "can_run_out", lambda device: True)
    found = prepare(options(images, tmp_path, batch_gpu="auto"))
    assert found.config == given.config == prepare(options(images, tmp_path)).config
    assert any(each.name == "batch_gpu" and each.why.endswith("by trial") for each in found.reasons)
    one, two = (train_steps(each, 2).networks() for each in (given, found))
    for name, network in one.items():
        tensors = two[name].state_dict()
        assert all(torch.equal(tensors[key], tensor) for key, tensor in network.state_dict().items())
