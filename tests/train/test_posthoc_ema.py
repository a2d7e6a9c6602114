"""Post-hoc EMA: profiles, and a reconstructed average against one that the run kept."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from click.testing import CliRunner
from tiny_runs import options, quiet

import finetune
from finetune.cli import cli, ema
from finetune.errors import CheckpointError
from finetune.train import posthoc_ema
from finetune.train.ema import POWERS, ema_decay, num_updates, power_decay
from finetune.train.posthoc_ema import SavedAverages, averages_beside, ema_profile, fit, saved_averages
from finetune.train.run_dir import RunDir
from finetune.train.train import run


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    """A run of 40 steps with five snapshots, and a half-life of 5 % of it."""
    settings = dict(kimg=0.16, tick=0.032, ema_kimg=0.008, aug="noaug", sd_weight=0, lr_warmup_kimg=0)
    place = tmp_path_factory.mktemp("posthoc")
    start = run(options(images, place, kimg=0.004, tick=0.004, aug="noaug", sd_weight=0), console=quiet())
    return run(options(images, place, resume=str(start.snapshot), **settings), console=quiet())


def test_power_average_weights_are_a_power_of_time():
    average, exponent = 0.0, 3.0
    for update in range(1, 11):
        average = average * power_decay(update, exponent) + update * (1 - power_decay(update, exponent))
    weights = [(k / 10) ** 4 - ((k - 1) / 10) ** 4 for k in range(1, 11)]
    assert average == pytest.approx(sum(k * weight for k, weight in enumerate(weights, 1)))


def test_num_updates_leaves_out_the_warm_up_of_a_new_d():
    assert [num_updates(nimg, 4, 10.0) for nimg in (0, 12, 16, 20)] == [0, 0, 1, 2]


@pytest.mark.parametrize("scratch", ["", "stylegan2"])
def test_ema_profile_is_that_of_the_decays(finished, scratch):
    config = dataclasses.replace(finished.config, scratch=scratch, d_warmup_kimg=0.0)
    profile = ema_profile(config, 0.02, 50)
    weight, expected = 1.0, []
    for k in range(50, 0, -1):
        expected.append(weight)
        weight *= ema_decay(4, 20.0, nimg=4 * k, rampup=0.05 if scratch else None)
    torch.testing.assert_close(profile, torch.tensor([weight, *expected[::-1]], dtype=torch.float64))


def test_posthoc_ema_agrees_with_the_average_of_the_run(finished):
    saved, config = saved_averages(finished.snapshot), finished.config
    assert [each.updates for each in saved] == [8, 16, 24, 32, 40]
    checkpoint = finetune.load(finished.snapshot)
    network, error = posthoc_ema.reconstruct(config, saved, config.ema_kimg, checkpoint.G_ema)
    assert error < 2e-3
    difference = posthoc_ema.relative_difference(network, checkpoint.G_ema)
    moved = posthoc_ema.relative_difference(checkpoint.G, checkpoint.G_ema)
    assert difference < 1e-3 and difference < 0.02 * moved
    buffers = zip(network.buffers(), checkpoint.G_ema.buffers(), strict=True)
    assert all(torch.equal(a, b) for a, b in buffers)


def test_grid_holds_what_the_averages_can_give(finished):
    saved = saved_averages(finished.snapshot)
    tried = posthoc_ema.grid(finished.config, saved)
    assert finished.config.ema_kimg in tried and tried == sorted(tried)
    assert 0.016 in tried and 0.0016 not in tried  # 10 % and 1 % of the run
    assert fit(finished.config, saved, 0.0016)[1] > posthoc_ema.MAX_ERROR


def test_fit_of_a_long_run_is_quick_and_close(finished):
    config = dataclasses.replace(finished.config, batch=32)
    saved = [SavedAverages(None, 20_000 * i, 640_000 * i) for i in range(1, 21)]
    weights, error = fit(config, saved, 0.05 * 12_800)
    assert len(weights) == 20 * len(POWERS) and error < 1e-3
    assert float(weights.sum()) == pytest.approx(1, abs=1e-6)


def test_saved_averages_of_an_earlier_snapshot(finished):
    earlier = sorted(finished.run_dir.glob("network-snapshot-*.pkl"))[2]
    assert [each.updates for each in saved_averages(earlier)] == [8, 16, 24]


def test_saved_averages_missing_and_damaged(finished, tmp_path):
    snapshot = tmp_path / finished.snapshot.name
    with pytest.raises(CheckpointError, match=r"has no averages of G(?s:.*)runs of earlier versions"):
        saved_averages(snapshot)
    with pytest.raises(
        CheckpointError, match=r"has no averages(?s:.*)-000000\.032\.pkl, .*000000\.160\.pkl\."
    ):
        saved_averages(finished.run_dir / "network-best.pkl")
    averages_beside(snapshot).write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="not the averages of a snapshot"):
        saved_averages(snapshot)


def test_averages_are_deleted_with_their_snapshot(tmp_path, monkeypatch):
    folder = object.__new__(RunDir)
    folder.path, folder.written = tmp_path, {f"network-snapshot-00000{i}.pkl": i for i in (1, 2)}
    for name in folder.written:
        averages_beside(tmp_path / name).touch()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", Mock(side_effect=PermissionError("in use")))
        folder.keep_newest(1)
    assert len(list(tmp_path.iterdir())) == 2
    folder.keep_newest(1)  # tries again
    assert [path.name for path in tmp_path.iterdir()] == ["averages-000002.safetensors"]


def call(*words):
    return CliRunner().invoke(cli, ["ema", *map(str, words), "--device", "cpu"])


def test_ema_command_writes_the_best(finished, tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(ema, "best_of", lambda rows, name: 2)
    words = ("--metric", "random-fid", "--num", 8, "--half-lives", "0.008,0.016")
    result = call(finished.run_dir, *words)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["as", "0.008", "0.016"]
    assert "Check: the half-life as trained is reconstructed with a difference of " in result.output
    written = finetune.load(finished.run_dir / "network-ema.pkl")
    assert written.provenance.training["ema_kimg"] == 0.016 and written.D is not None
    saved = saved_averages(finished.snapshot)
    expected, _ = posthoc_ema.reconstruct(finished.config, saved, 0.016, written.G_ema)
    assert posthoc_ema.relative_difference(written.G_ema, expected) < 1e-6
    monkeypatch.setattr(ema, "best_of", lambda rows, name: 0)
    again = call(finished.run_dir, *words, "--force")
    assert "No half-life is better than that of the run (0.008 kimg)" in again.output


@pytest.mark.parametrize(
    "words, message",
    [
        (("--half-lives", "1,x"), "--half-lives 1,x: must be positive numbers of kimg"),
        (("--half-lives", "0"), "must be positive numbers"),
        (("--metric", "fd"), "unknown metric"),
    ],
)
def test_ema_command_mistakes(finished, words, message):
    result = call(finished.run_dir, *words)
    assert result.exit_code == 2 and message in result.output.replace("\n", " "), result.output


def test_ema_curve_and_best():
    rows = [ema.Row("as trained", 2.5, 3.0, 0.1, 0.0), ema.Row("1", 1.0, 2.0, 0.0, 1e-3)]
    rows.append(ema.Row("5", 5.0, 4.0, 0.1, 1e-3))
    assert ema.best_of(rows, "fid") == 1 and ema.best_of(rows, "prc-effnet") == 2
    bars = [line.split("  ")[-1] for line in ema.curve(rows, "fid")[1:]]
    assert [len(bar.strip()) for bar in bars] == [12, 1, 24]
