"""Training runs on tiny networks, for the tests that need one."""

from __future__ import annotations

import dataclasses
import io
from unittest.mock import Mock

import numpy as np
import torch
from PIL import Image
from rich.console import Console

from finetune.options import TrainOptions
from finetune.train.divergence import DivergenceMonitor
from finetune.train.progress import Display
from finetune.train.signals import StopSignal
from finetune.train.state import RunCounters
from finetune.train.stats import Stats
from finetune.train.train import Run, train


def options(images, tmp_path, family="stylegan2", **changes):
    tiny = {"resolution": 16, "cbase": 128, "cmax": 8, "z_dim": 8, "map_depth": 2}
    if changes.get("resume"):
        tiny, family = {}, None
    short = {"kimg": 0.032, "batch": 4, "tick": 0.016, "snap": 1, "device": "cpu", "workers": 0}
    short["metrics"] = "none"
    distil = {"sd_backbone": "l2", "sd_weight": 0.5}
    settings = {"data": str(images(16)), "outdir": str(tmp_path / "runs"), "scratch": family}
    return TrainOptions(**(settings | tiny | short | distil | changes))


def quiet():
    return Console(file=io.StringIO(), width=100)


def read(path):
    with Image.open(path) as image:
        return np.asarray(image)


def weights(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def moved(before, network):
    return {name for name, tensor in network.state_dict().items() if not torch.equal(before[name], tensor)}


def train_steps(prepared, num_steps, plan=None):
    """The loop alone, without a run folder."""
    plan = dataclasses.replace(plan or prepared.plan, total_nimg=num_steps * prepared.plan.batch)
    torch.manual_seed(1)
    generator = torch.Generator().manual_seed(2)
    shape = [plan.batch, prepared.facts.channels, *prepared.image_set.size]
    labels = prepared.image_set.random_labels(plan.batch)

    def batches():
        while True:
            yield torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator), labels

    train_alone(prepared.state, plan, batches())
    return prepared.state


def train_alone(state, plan, batches, display=None):
    """The loop with nothing around it: no run folder, no metrics, no saves."""
    stats = Stats(plan.device, plan.tick_nimg)
    train(
        Run(
            config=Mock(on_divergence="stop"),
            state=state,
            plan=plan,
            counters=RunCounters(),
            batches=batches,
            stats=stats,
            monitor=DivergenceMonitor(),
            validation=Mock(measure=Mock(return_value=None)),
            checkpointer=Mock(count_unreadable=Mock(return_value=0)),
            run_dir=Mock(),
            page=Mock(),
            display=display or Mock(),
            stop=StopSignal(),
        )
    )


def after_each_step(monkeypatch, call):
    """Let runs call `call(state)` after each step: the progress bar is the last to look at it."""
    original = Display.step

    def step(self, state):
        original(self, state)
        call(state)

    monkeypatch.setattr(Display, "step", step)


def after_each_line(monkeypatch, call):
    """Let runs call `call(state, numbers)` after each line of the log."""
    original = Display.tick

    def tick(self, state, numbers):
        original(self, state, numbers)
        call(state, numbers)

    monkeypatch.setattr(Display, "tick", tick)
