"""Measuring: averages per tick, seconds per phase, and the stop at a loss that is not finite."""

import os
import signal
import types

import pytest
import torch

from finetune.errors import TrainingError
from finetune.train.watch import PhaseClock, Watch

CPU = torch.device("cpu")


def state(nimg=0, step=0):
    return types.SimpleNamespace(nimg=nimg, step=step)


def test_a_tick_hands_out_averages_and_starts_anew():
    seen = []
    watch = Watch(CPU, 100, lambda state, numbers: seen.append((state.nimg, numbers)))
    watch.record("Gmain", loss_G=torch.tensor([1.0, 2.0]))
    watch.end_of_step(state(50))
    watch.record("Gmain", loss_G=torch.tensor([6.0]))
    watch.end_of_step(state(100))
    watch.record("Gmain", loss_G=torch.tensor([5.0]))
    watch.end_of_step(state(250))
    assert [nimg for nimg, _ in seen] == [100, 250]
    assert [numbers["loss_G"] for _, numbers in seen] == [3.0, 5.0]
    assert all(numbers["img_per_sec"] > 0 for _, numbers in seen)
    watch.end_of_step(state(299))
    watch.end_of_step(state(300))
    assert len(seen) == 3


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_phase_and_time(bad):
    watch = Watch(CPU, 1000, lambda state, numbers: None)
    watch.record("Dreg", r1_penalty=torch.tensor([1.0, bad]))
    with pytest.raises(TrainingError, match=r"r1_penalty became (nan|inf) in Dreg at 1\.5 kimg"):
        watch.end_of_step(state(1500))


@pytest.mark.parametrize("value, finite", [(1.0, True), (float("nan"), False), (float("inf"), False)])
def test_what_is_not_finite_is_seen_without_acting_on_it(value, finite):
    watch = Watch(CPU, 1000, lambda state, numbers: None)
    assert watch.is_finite()
    watch.record("Gmain", loss_G=torch.tensor([2.0]))
    watch.record("Dreg", r1_penalty=torch.tensor([1.0, value]))
    assert watch.is_finite() is finite


def test_inner_phases_are_not_counted_twice(monkeypatch):
    times = iter([0.0, 1.0, 4.0, 10.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    clock = PhaseClock(CPU)
    with clock.phase("Gmain"), clock.phase("Gdistill"):
        pass
    assert clock.read() == {"Gdistill": 3.0, "Gmain": 7.0}
    assert clock.read() == {}


def test_the_first_signal_asks_and_the_second_insists():
    watch = Watch(CPU, 1000, lambda state, numbers: None)
    before = signal.getsignal(signal.SIGINT)
    with watch.stop_on_signals():
        os.kill(os.getpid(), signal.SIGINT)
        assert watch.heard == signal.SIGINT and watch.stop_signal is None
        assert watch.is_told_to_stop(state(4)) and watch.stop_signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
