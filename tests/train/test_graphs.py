"""CUDA graphs: a replay computes what the function computes."""

from __future__ import annotations

import dataclasses
import json
import logging

import pytest
import torch
from tiny_runs import options, quiet, train_steps, weights

from finetune.resolve import load
from finetune.train.graphs import Graphs
from finetune.train.prepare import prepare
from finetune.train.train import run

CUDA = torch.device("cuda")


def test_graphs_call_functions_directly_without_cuda():
    graphs = Graphs(torch.device("cpu"), enabled=True)
    assert not graphs.enabled
    with graphs.stream():
        results = [graphs.run("double", lambda x: 2 * x, x=torch.tensor(value)) for value in (1, 2, 3)]
    assert results == [2, 4, 6]


@pytest.mark.gpu
def test_graphs_replay_with_new_inputs_and_new_random_numbers():
    graphs, parameter = Graphs(CUDA, enabled=True), torch.ones(4, device=CUDA, requires_grad=True)

    def noisy(x):
        y = (x * parameter.square() + torch.randn_like(x)).sum()
        y.backward()
        return y.detach()

    parameter.grad = torch.zeros_like(parameter)
    expected, replayed = [], []
    for function in (lambda **inputs: graphs.run("noisy", noisy, **inputs), noisy):
        results = replayed if not replayed else expected
        for step in range(4):
            parameter.grad.zero_()
            torch.manual_seed(step)
            x = torch.full([4], float(step), device=CUDA)
            with graphs.stream():
                results.append((float(function(x=x)), parameter.grad.tolist()))
    assert graphs.enabled and len(graphs._graphs) == 1
    assert replayed == expected


@pytest.mark.gpu
def test_graphs_turn_off_where_a_function_waits_for_the_device(caplog):
    graphs, x = Graphs(CUDA, enabled=True), torch.ones(2, device=CUDA)
    with caplog.at_level(logging.WARNING), graphs.stream():
        results = [graphs.run("item", lambda x: x.sum().item(), x=x) for _ in range(3)]
        torch.manual_seed(0)
        torch.randn(2, device=CUDA)  # the generator works after a capture that failed
    assert results == [2, 2, 2]
    assert not graphs.enabled and "CUDA graphs are off" in caplog.text


@pytest.mark.gpu
def test_graphs_capture_again_after_a_rollback():
    graphs, x = Graphs(CUDA, enabled=True), torch.ones(2, device=CUDA)
    for _ in range(2):
        with graphs.stream():
            results = [graphs.run("double", lambda x: 2 * x, x=x).tolist() for _ in range(3)]
        assert results == [[2, 2]] * 3 and graphs.enabled and len(graphs._graphs) == 1
        graphs.clear()


class Replay:
    """Does what a graph does, without one: runs its function on the inputs and gradients of the capture."""

    def __init__(self, function, static, parameters):
        self.function, self.static, self.result = function, static, None
        self.gradients = [(each, each.grad) for each in parameters]

    def replay(self):
        others = [each.grad for each, _ in self.gradients]
        for each, gradient in self.gradients:
            each.grad = gradient
        self.result = self.function(**self.static)
        for (each, _), gradient in zip(self.gradients, others, strict=True):
            each.grad = gradient

    def clone(self):
        return self.result


class Replays(Graphs):
    """Replays of the parts of a step that trains `parameters`."""

    def __init__(self):
        super().__init__()
        self.enabled, self.num_replays, self.parameters = True, 0, []

    def run(self, key, function, **inputs):
        result = super().run(key, function, **inputs)
        self.num_replays += key in self._graphs
        return result

    def _capture(self, key, function, inputs):
        static = {name: value.clone() for name, value in inputs.items()}
        graph = Replay(function, static, self.parameters)
        self._graphs[key] = graph, static, graph
        return True


@pytest.mark.parametrize(
    "changes",
    [
        dict(batch_gpu=2, aug="fixed", p=0.5, augpipe="color", sd_weight="auto:1", sd_interval=2),
        dict(family="stylegan3-t", aug="noaug", sd_augment=True, sd_teacher_kimg=0.01),
        dict(aug="noaug", sd_weight=0, sd_interval=2),
    ],
    ids=["stylegan2", "stylegan3-t", "measured only"],
)
def test_steps_made_for_graphs_compute_the_same(images, tmp_path, changes):
    """Static inputs, kept gradients and averages on the device change no bit."""
    states = []
    for graphs in (Graphs(), replays := Replays()):
        prepared = prepare(options(images, tmp_path, **changes))
        replays.parameters = [*prepared.state.G.parameters(), *prepared.state.D.parameters()]
        states.append(train_steps(prepared, 6, dataclasses.replace(prepared.plan, graphs=graphs)))
    assert replays.num_replays >= 20
    for name in ("G", "D", "G_ema", "teacher"):
        plain, replayed = (getattr(state, name).state_dict() for state in states)
        assert all(torch.equal(plain[key], replayed[key]) for key in plain)
    assert torch.equal(states[0].sd_norms, states[1].sd_norms)


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["stylegan2", "stylegan3-t", "stylegan3-r"])
def test_graphs_give_losses_of_plain_steps(images, tmp_path, family, caplog):
    """Rounding grows step by step, so that the losses of a few steps are compared."""
    changes = dict(family=family, device="cuda", aug="fixed", p=0.3, sd_weight="auto:1", kimg=0.08)
    changes |= dict(sd_augment=True, resolution=32, data=str(images(32)))
    logs = []
    for graphs in ("off", "auto"):
        result = run(options(images, tmp_path, graphs=graphs, **changes), console=quiet())
        lines = (result.run_dir / "log.jsonl").read_text().splitlines()
        logs.append([json.loads(line) for line in lines])
    assert "CUDA graphs are off" not in caplog.text
    for plain, graphed in zip(*logs, strict=True):
        for name in ("loss_G", "loss_D", "score_real", "loss_sd"):
            if name in plain:
                assert graphed[name] == pytest.approx(plain[name], rel=0.05, abs=0.01)


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["stylegan2", "stylegan3-t", "stylegan3-r"])
def test_graphs_change_no_bit_of_deterministic_runs(images, tmp_path, family):
    """With several micro-batches; without geometric augmentation, which graphs pad by more."""
    changes = dict(family=family, device="cuda", deterministic=True, batch_gpu=2, kimg=0.064)
    changes |= dict(aug="fixed", p=0.5, augpipe="color", sd_weight="auto:1", sd_augment=True)
    networks = []
    for graphs in ("off", "auto"):
        result = run(options(images, tmp_path, graphs=graphs, **changes), console=quiet())
        networks.append(weights(load(result.snapshot).G_ema))
    assert all(torch.equal(value, networks[1][name]) for name, value in networks[0].items())
