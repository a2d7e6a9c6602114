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


def test_largest_micro_batch_is_one_that_cudnn_has_memory_for(images, tmp_path, monkeypatch):
    """Without memory for a workspace, cuDNN's error is none of those of the allocator."""

    def r1_step(state, plan, reals, stats):
        if plan.batch_gpu > 2:
            raise RuntimeError("FIND was unable to find an engine to execute this computation")

    monkeypatch.setattr(steps, "r1_step", r1_step)
    prepared = prepare(options(images, tmp_path, batch=8))
    assert memory.largest_micro_batch([1, 2, 4, 8], prepared.state, prepared.plan) == 2


@pytest.mark.parametrize("graphs, expected", [(True, 1000 + 3500), (False, 1000 + 7000)])
def test_limit_of_trial_leaves_room_for_graphs(graphs, expected, monkeypatch):
    """Of 11,000 bytes, of which networks take 1,000: a tenth is left free, and what Adam will take."""
    limits = []
    cuda = dict(mem_get_info=(9000, 20000), memory_allocated=1000, memory_reserved=2000)
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, lambda index, value=value: value)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda part, _: limits.append(part))
    layer = torch.nn.Linear(237, 1, bias=False)
    state = SimpleNamespace(G=layer, D=torch.nn.Identity())
    plan = SimpleNamespace(device=torch.device("cuda"), graphs=SimpleNamespace(enabled=graphs))
    with memory._limited_memory(state, plan):
        assert limits[0] * 20000 == pytest.approx(expected, abs=10)
    assert limits[1:] == [1.0]


@pytest.mark.parametrize(
    "changes, words",
    [(dict(batch_gpu=2), "--batch-gpu 1"), ({}, "--graphs off"), (dict(graphs="off"), "--sd-weight 0")],
)
def test_out_of_memory_names_the_option_to_change(images, tmp_path, changes, words):
    prepared = prepare(options(images, tmp_path, **{"batch_gpu": 1, **changes}))
    error = memory.out_of_memory(torch.OutOfMemoryError("none"), prepared.config, prepared.facts, "run")
    assert words in error.hint


@pytest.mark.parametrize("gib, found", [(80.0, 16), (16.0, 4)])
def test_smaller_micro_batch_is_half_or_what_fits(gib, found, images, tmp_path):
    prepared = prepare(options(images, tmp_path, batch=32))
    facts = replace(prepared.facts, gpu_memory_gib=gib, resolution=1024)
    assert memory.smaller_micro_batch(replace(prepared.config, batch_gpu=32), facts) == found


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
