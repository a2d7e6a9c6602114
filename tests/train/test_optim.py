"""Learning rates: lazy regularization, warm-up, rollbacks."""

import pytest
import torch
from tiny_runs import options, train_steps

from finetune.recipes import WARMUP_STEPS
from finetune.train import prepare
from finetune.train.optim import LearningRate, load_adam, set_learning_rate


def test_warmup_is_linear(images, tmp_path):
    plan = prepare(options(images, tmp_path, lr_warmup_kimg=0.016)).plan  # batch 4: over 4 steps
    assert [plan.rate_D.warmup(nimg) for nimg in (0, 4, 8, 12, 16, 400)] == [0.25, 0.5, 0.75, 1, 1, 1]
    none = prepare(options(images, tmp_path, lr_warmup_kimg=0)).plan
    assert none.rate_G.warmup(0) == none.rate_D.warmup(0) == 1


def test_warmup_of_waiting_generator_starts_later(images, tmp_path, parent):
    changes = dict(resume=str(parent.snapshot), new_d=True, d_warmup_kimg=0.008, lr_warmup_kimg=0.016)
    plan = prepare(options(images, tmp_path, **changes)).plan
    assert [plan.rate_D.warmup(nimg) for nimg in (0, 8, 12)] == [0.25, 0.75, 1]
    assert [plan.rate_G.warmup(nimg) for nimg in (8, 16, 20)] == [0.25, 0.75, 1]


@pytest.mark.parametrize("family", ["stylegan2", "stylegan3-t"])
def test_warmup_scales_first_step(family, images, tmp_path):
    """Adam's first step is the rate times the sign of the gradient, so that it shows the rate."""
    largest = {}
    for kimg in (0.0, 0.016):
        # Plain, no path length and no R1: one step of Adam each.
        prepared = prepare(options(images, tmp_path, family, lr_warmup_kimg=kimg, sd_weight=0, aug="noaug"))
        state = prepared.state
        before = {name: [p.clone() for p in getattr(state, name).parameters()] for name in ("G", "D")}
        plan = prepared.plan
        object.__setattr__(plan, "path_interval", None)
        object.__setattr__(plan, "gamma", 0.0)
        train_steps(prepared, 1, plan)
        for name, values in before.items():
            moves = [
                (new - old).abs().max()
                for old, new in zip(values, getattr(state, name).parameters(), strict=True)
            ]
            largest[name, kimg] = float(max(moves))
    for name, rate in (("G", prepared.config.glr), ("D", prepared.config.dlr)):
        full = getattr(plan, f"rate_{name}").full()
        assert full <= rate
        assert largest[name, 0.0] == pytest.approx(full, rel=0.01)
        assert largest[name, 0.016] == pytest.approx(full / 4, rel=0.01)


def test_lazy_regularization_scales_rate_and_betas():
    never, lazy = (LearningRate(0.002, 0.0, interval, batch=4) for interval in (None, 16))
    assert (never.full(), never.betas) == (0.002, (0.0, 0.99))
    assert lazy.full() == pytest.approx(0.002 * 16 / 17)
    assert lazy.betas == (0.0, pytest.approx(0.99 ** (16 / 17)))


def test_rate_depends_on_nimg_and_rollbacks():
    rate = LearningRate(0.003, 0.5, None, batch=4, warmup_nimg=16)
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    for nimg, rollbacks, expected in ((0, 0, 0.00075), (12, 0, 0.003), (400, 2, 0.00075)):
        set_learning_rate(optimizer, rate, nimg, rollbacks)
        group = optimizer.param_groups[0]
        assert (group["lr"], group["betas"]) == (pytest.approx(expected), (0.5, 0.99))


@pytest.mark.parametrize(
    "changes, value",
    [
        ({"recipe": "improve"}, 0.4),
        ({"recipe": "few-shot", "batch": 8}, 0.8),
        ({"recipe": "adapt", "kimg": 0.3}, 0.1),
        ({"recipe": "custom"}, 0.0),
        ({"recipe": "adapt", "lr_warmup_kimg": 0.2}, 0.2),
    ],
)
def test_warmup_default(changes, value, images, tmp_path, parent):
    assert WARMUP_STEPS == 100
    settings = {"resume": str(parent.snapshot), "kimg": 10.0, "batch": 4, **changes}
    prepared = prepare(options(images, tmp_path, **settings))
    assert prepared.config.lr_warmup_kimg == value == prepared.plan.rate_G.warmup_nimg / 1000
    assert any(reason.name == "lr_warmup_kimg" for reason in prepared.reasons)


def test_warmup_none_from_scratch(images, tmp_path):
    assert prepare(options(images, tmp_path)).config.lr_warmup_kimg == 0


def test_load_adam_takes_moments_from_another_device():
    """A state that CUDA has saved has a learning rate on the device, and flags that a CPU does not know."""
    source = torch.optim.Adam([torch.nn.Parameter(torch.ones(3))], lr=0.1)
    source.param_groups[0]["params"][0].grad = torch.ones(3)
    source.step()
    saved = source.state_dict()
    saved["param_groups"][0] |= {"lr": torch.tensor(0.1), "fused": True, "capturable": True}
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(3))], lr=0.2)
    load_adam(optimizer, saved)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["fused"], group["capturable"]) == (0.2, None, False)
    assert torch.equal(optimizer.state_dict()["state"][0]["exp_avg"], saved["state"][0]["exp_avg"])
    two = torch.optim.Adam([torch.nn.Parameter(torch.ones(3)) for _ in range(2)], lr=0.2)
    with pytest.raises(ValueError):
        load_adam(two, saved)
