"""Statistics of a tick, its schedule, values that are not finite, and the signals that stop a run."""

import os
import signal
import types

import pytest
import torch

from finetune.distributed import SINGLE
from finetune.train.signals import StopSignal
from finetune.train.stats import PhaseClock, Stats

CPU = torch.device("cpu")


def state(nimg=0, step=0):
    return types.SimpleNamespace(nimg=nimg, step=step)


def test_stats_read_returns_averages_and_restarts():
    stats = Stats(CPU, 100)
    stats.record(loss_G=torch.tensor([1.0, 2.0]))
    assert not stats.passed(100, 50)
    stats.record(loss_G=torch.tensor([6.0]))
    assert stats.passed(100, 100)
    numbers = stats.read(state(100))
    assert numbers["loss_G"] == 3.0 and numbers["img_per_sec"] > 0
    stats.record(loss_G=torch.tensor([5.0]))
    assert stats.read(state(250))["loss_G"] == 5.0
    assert not stats.passed(100, 299) and stats.passed(100, 300) and stats.passed(260, 299)


def test_stats_schedule_survives_resume():
    """Ticks of 16 images, snapshots every 32, batches of 12; resumed from a state saved by the clock."""

    def ticks(stats, begin):
        found = []
        for nimg in range(begin + 12, 120, 12):
            if stats.passed(16, nimg):
                found.append((nimg, stats.passed(32, nimg)))
                stats.read(state(nimg))
        return found

    whole = ticks(Stats(CPU, 16), 0)
    assert whole == [(24, False), (36, True), (48, False), (72, True), (84, False), (96, True)]
    first = Stats(CPU, 16)
    first.read(state(48))
    again = Stats(CPU, 16)
    again.load_state_dict(first.state_dict())
    assert ticks(again, 60) == [each for each in whole if each[0] > 60]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_stats_non_finite_loss_names_phase(bad):
    stats = Stats(CPU)
    with stats.phase("Dreg"):
        stats.record(r1_penalty=torch.tensor([1.0, bad]))
    (alarm,) = stats.find_not_finite(1, at_tick=False)
    assert alarm.is_divergence and alarm.what == f"r1_penalty became {bad} in Dreg"
    assert stats.find_not_finite(1, at_tick=False) == []


@pytest.mark.parametrize("value, finite", [(1.0, True), (float("nan"), False), (float("inf"), False)])
def test_stats_is_finite(value, finite):
    stats = Stats(CPU)
    assert stats.is_finite()
    stats.record(loss_G=torch.tensor([2.0]))
    stats.record(r1_penalty=torch.tensor([1.0, value]))
    assert stats.is_finite() is finite


def test_phase_clock_excludes_inner_phases(monkeypatch):
    times = iter([0.0, 1.0, 4.0, 10.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    clock = PhaseClock(CPU)
    with clock.phase("Gmain"), clock.phase("Gdistill"):
        pass
    assert clock.read() == {"Gdistill": 3.0, "Gmain": 7.0}
    assert clock.read() == {}


def test_stop_signal_second_raises():
    before = signal.getsignal(signal.SIGINT)
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == signal.SIGINT and stop.number is None
        assert stop.requested(SINGLE, 4) and stop.number == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
