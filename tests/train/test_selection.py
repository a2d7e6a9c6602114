"""The best snapshot of a run, the report that training has passed it, and the recommendation at the end."""

from __future__ import annotations

import pytest
import torch

from finetune.metrics.frechet import FeatureStatistics, frechet_error
from finetune.train.selection import follow, is_better, is_clearly_worse, measurement, recommend
from finetune.train.state import RunCounters


def found(value, nimg=0, metric="random-fid", error=0.1):
    return measurement({"num": 8, metric: value, f"{metric}_error": error, "sec": 1.0}, nimg)


def counters_after(*values, error=0.1):
    """What a run has counted after measurements at 1000, 2000, … images, and the alarms."""
    counters, alarms = RunCounters(), []
    for index, value in enumerate(values):
        each = found(value, 1000 * (index + 1), error=error)
        if is_better(each, counters.best):
            counters.best, counters.last, counters.worse = each, each, 0
        else:
            alarms += follow(counters, each)
    return counters, alarms


def test_is_better_follows_direction_of_metric():
    assert is_better(found(2.0), found(3.0)) and not is_better(found(3.0), found(3.0))
    assert is_better(found(0.4, metric="recall-effnet"), found(0.3, metric="recall-effnet"))
    assert is_better(found(9.0), {}) and is_better(found(9.0), found(1.0, metric="fid"))


def test_is_clearly_worse_needs_two_standard_errors_of_difference():
    assert is_clearly_worse(found(1.29), found(1.0)) and not is_clearly_worse(found(1.28), found(1.0))
    assert is_clearly_worse(found(0.1, metric="precision"), found(0.4, metric="precision"))
    assert not is_clearly_worse(found(0.1, metric="recall", error=0), found(0.2, metric="recall", error=0))


def test_passing_the_best_is_reported():
    _, alarms = counters_after(2.0, 1.0, 1.5, 1.5, 1.1, 1.5, 1.5)
    assert alarms == []
    counters, (alarm,) = counters_after(2.0, 1.0, 1.5, 1.5, 1.5, 1.6)
    assert alarm.kind == "past-best" and not alarm.is_divergence and counters.worse == 4
    assert "random-fid 1.5 ± 0.1 at 5 kimg: clearly worse than the best, random-fid 1 ± 0.1" in alarm.what
    _, alarms = counters_after(2.0, 1.0, 1.5, 1.5, 1.5, 0.9, 1.5, 1.5, 1.5)
    assert len(alarms) == 2


@pytest.mark.parametrize(
    "values, name, nimg, why",
    [
        ((), "last.pkl", 2000, "no metric was measured"),
        ((2.0, 1.0), "last.pkl", 2000, "the best snapshot: random-fid 1 ± 0.1 at 2 kimg"),
        ((1.0, 1.1), "last.pkl", 2000, "not clearly worse than the best"),
        ((1.0, 1.5), "network-best.pkl", 1000, "The last one is clearly worse: random-fid 1.5 ± 0.1"),
        ((1.0,), "last.pkl", 2000, "it was not measured, random-fid 1 ± 0.1 at 1 kimg was best"),
    ],
)
def test_recommend(values, name, nimg, why, tmp_path):
    (tmp_path / "network-best.pkl").touch()
    counters, _ = counters_after(*values)
    recommended = recommend(counters, tmp_path / "last.pkl", 2000)
    assert (recommended.path.name, recommended.nimg) == (name, nimg) and why in recommended.why


def test_without_standard_error_nothing_is_reported_and_the_best_is_recommended(tmp_path):
    (tmp_path / "network-best.pkl").touch()
    counters, alarms = counters_after(1.0, 1.5, 1.5, 1.5, error=0)
    recommended = recommend(counters, tmp_path / "last.pkl", 4000)
    assert alarms == [] and (recommended.path.name, recommended.nimg) == ("network-best.pkl", 1000)
    assert "The last one is worse: random-fid 1.5 at 4 kimg" in recommended.why


def test_recommend_without_the_file_of_the_best(tmp_path):
    counters, _ = counters_after(1.0, 1.5)
    recommended = recommend(counters, tmp_path / "last.pkl", 2000)
    assert recommended.path.name == "last.pkl" and "network-best.pkl is missing" in recommended.why


def test_frechet_error_is_deviation_of_repeated_measurements():
    torch.manual_seed(0)
    real = FeatureStatistics()
    real.add(torch.randn(2000, 8))
    samples = [1.3 * torch.randn(400, 8) + 0.3 for _ in range(60)]
    values, errors = [], []
    for sample in samples:
        statistics = FeatureStatistics()
        statistics.add(sample)
        values.append(statistics.distance(real))
        errors.append(frechet_error([sample], [real]))
    ratio = float(torch.tensor(errors).square().mean().sqrt() / torch.tensor(values).std())
    assert 0.8 < ratio < 1.25
    assert frechet_error([samples[0]] * 2, [real] * 2) == pytest.approx(errors[0])
    assert frechet_error([samples[0][:2]], [real]) == 0
