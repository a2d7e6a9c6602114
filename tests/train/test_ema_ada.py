"""The average generator and the adaptive augmentation probability, against hand-made numbers."""

import copy

import pytest
import torch

from finetune.train.ada import INTERVAL, AdaController
from finetune.train.ema import ema_decay, update_average


class Tiny(torch.nn.Module):
    def __init__(self, value):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full([3], float(value)))
        self.register_buffer("w_avg", torch.full([2], float(value)))


def test_ema_halves_distance_in_one_half_life():
    average, module = Tiny(0), Tiny(1)
    for _ in range(10):
        update_average(average, module, ema_decay(batch=8, half_life_nimg=80))
    assert torch.allclose(average.weight, torch.full([3], 0.5), atol=1e-6)
    assert torch.equal(average.w_avg, module.w_avg)


def test_ema_of_equal_weights_stays_equal():
    torch.manual_seed(3)
    module = torch.nn.Linear(7, 5)
    average = copy.deepcopy(module)
    for _ in range(50):
        update_average(average, module, 0.9993)
    assert torch.equal(average.weight, module.weight)


def test_ema_rampup_shortens_early_half_life():
    assert ema_decay(32, 10_000) == 0.5 ** (32 / 10_000)
    assert ema_decay(32, 10_000, nimg=1000, rampup=0.05) == 0.5 ** (32 / 50)
    assert ema_decay(32, 10_000, nimg=10**6, rampup=0.05) == 0.5 ** (32 / 10_000)
    assert ema_decay(32, 10_000, nimg=0, rampup=0.05) == 0.0


def test_ada_swing_from_0_to_1():
    ada = AdaController(0.0, target=0.6, swing_kimg=100)
    steps = 100_000 // 32
    for step in range(1, steps + 1):
        ada.observe(torch.tensor(32.0), 32)
        ada.update(step, 32)
    assert ada.p == pytest.approx(1.0, abs=0.002)


@pytest.mark.parametrize(
    "logits, change", [([1.0, 2.0, 3.0, -1.0], -1), ([1.0] * 9 + [-1.0], 1), ([1.0] * 4 + [-1.0], 0)]
)
def test_ada_moves_toward_target_every_fourth_step(logits, change):
    ada = AdaController(0.5, target=0.6, swing_kimg=100)
    for step in range(1, INTERVAL):
        ada.observe(torch.tensor(logits).sign().sum(), len(logits))
        assert ada.update(step, 16) == 0.5
    ada.observe(torch.tensor(logits).sign().sum(), len(logits))
    assert ada.update(INTERVAL, 16) == pytest.approx(0.5 + change * 16 * INTERVAL / 100_000, abs=1e-12)
    assert ada.count == 0


def test_ada_is_bounded_and_fixed_p_is_constant():
    low, high = (
        AdaController(0.0, target=0.6, swing_kimg=0.01),
        AdaController(1.0, target=0.6, swing_kimg=0.01),
    )
    fixed = AdaController(0.3, target=None, swing_kimg=0.01)
    for step in range(1, 9):
        low.observe(torch.tensor(-4.0), 4)
        for ada in (high, fixed):
            ada.observe(torch.tensor(4.0), 4)
        assert (low.update(step, 4), high.update(step, 4), fixed.update(step, 4)) == (0.0, 1.0, 0.3)
