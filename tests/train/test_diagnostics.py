"""What is measured while training: right numbers, in the log and for TensorBoard, without an effect on it."""

import dataclasses
import io
import json
import math
from typing import ClassVar

import pytest
import torch
from rich.console import Console
from tiny_runs import options, quiet, train_steps, weights

import finetune
from finetune.errors import ConfigError, WeightsMissing
from finetune.train import prepare, run, validation
from finetune.train.diagnostics import Diagnostics, Trajectory
from finetune.train.latents import NoiseReplay, draw_latents, map_latents
from finetune.train.stats import Stats

FAMILIES = ["stylegan2", "stylegan3-t"]


def lines_of(result):
    return [json.loads(line) for line in (result.run_dir / "log.jsonl").read_text().splitlines()]


class TestGradients:
    def test_compare_gradients_cosine_and_ratio(self):
        G = torch.nn.ModuleDict({"mapping": torch.nn.Linear(2, 3), "other": torch.nn.Linear(3, 4)})
        img = G["other"](G["mapping"](torch.randn(5, 2)).square())
        a, b = torch.randn_like(img), torch.randn_like(img)
        found = [
            torch.cat([each.flatten() for each in torch.autograd.grad(img, list(G.parameters()), side, True)])
            for side in (a, b)
        ]
        seen = Diagnostics.__new__(Diagnostics)
        seen.compare_gradients(G, img, a, b)
        img.backward(a + b)  # the graph is still there
        assert seen.due is False
        gradients = seen._gradients
        cosine = torch.cosine_similarity(*found, dim=0)
        assert gradients["sd_cosine"] == pytest.approx(float(cosine), rel=1e-5)
        assert gradients["sd_ratio"] == pytest.approx(float(found[1].norm() / found[0].norm()), rel=1e-5)
        mapping = [each[:9] for each in found]
        assert gradients["sd_cosine_of"]["mapping"] == pytest.approx(
            float(torch.cosine_similarity(*mapping, dim=0)), rel=1e-5
        )
        assert gradients["sd_ratio_of"].keys() == {"mapping", "other"}

    def test_trajectory_straight_and_back(self):
        network = torch.nn.Linear(1, 1, bias=False)
        network.weight.data.fill_(1.0)
        way = Trajectory(network)
        first = way.add(torch.tensor([2.0]), 0.5)
        assert first == {"path_per_kimg": 1.0, "straightness": 1.0}
        back = way.add(torch.tensor([1.5]), 0.5)
        assert back["update_cosine"] == pytest.approx(-1)
        assert back["straightness"] == pytest.approx(0.5 / 1.5)

    def test_trajectory_circle_at_its_lags(self):
        """A turn in sixteen ticks: a quarter at lag 4, half at lag 8."""
        network = torch.nn.Linear(2, 1, bias=False)
        network.weight.data.copy_(torch.tensor([[1.0, 0.0]]))
        way = Trajectory(network)
        for tick in range(1, 11):
            angle = torch.tensor(2 * math.pi * tick / 16)
            numbers = way.add(torch.stack([angle.cos(), angle.sin()]), 1.0)
            assert ("update_cosine_lag8" in numbers) == (tick > 8)
        for lag, name in ((1, ""), (2, "_lag2"), (4, "_lag4"), (8, "_lag8")):
            expected = math.cos(2 * math.pi * lag / 16)
            assert numbers[f"update_cosine{name}"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_diagnostics_do_not_change_training(family, images, tmp_path, monkeypatch):
    short = dict(kimg=0.016, tick=0.008, snap=100)
    result = run(options(images, tmp_path, family, **short), console=quiet())
    for index, line in enumerate(lines_of(result)):
        assert -1 <= line["sd_cosine"] <= 1 and line["sd_ratio"] > 0
        blocks = {"mapping", "b4", "b8", "b16"} if family == "stylegan2" else {"mapping", "input"}
        assert blocks <= line["sd_cosine_of"].keys() == line["sd_ratio_of"].keys()
        assert line["weight_distance"] > 0 and "diagnose" in line["sec_per_phase"]
        for name in ("G", "ema"):
            assert line[f"path_per_kimg_{name}"] > 0 and 0 < line[f"straightness_{name}"] <= 1.001
            assert (f"update_cosine_{name}" in line) == (index > 0)

    monkeypatch.setattr(Stats, "due_diagnostics", lambda self, nimg: None)
    again = run(options(images, tmp_path, family, **short), console=quiet())
    assert "sd_cosine" not in lines_of(again)[0]
    other = weights(finetune.load(again.snapshot).G_ema)
    for name, tensor in weights(finetune.load(result.snapshot).G_ema).items():
        assert torch.equal(tensor, other[name]), name


def test_tensorboard_gets_log_numbers(images, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = run(options(images, tmp_path, kimg=0.016, tick=0.008, snap=100), console=quiet())
    board = EventAccumulator(str(result.run_dir)).Reload()
    for line, event in zip(lines_of(result), board.Scalars("loss_G"), strict=True):
        assert event.step == line["nimg"] and event.value == pytest.approx(line["loss_G"], rel=1e-4)
    assert {"sec_per_phase/Gmain", "sd_cosine_of/mapping"} <= set(board.Tags()["scalars"])
    assert [image.step for image in board.Images("samples")] == [0, 8, 16]
    assert board.summary_metadata["_hparams_/session_start_info"]


class TestWeightByRatio:
    def test_auto_weight_reaches_requested_ratio(self, images, tmp_path):
        prepared = prepare(options(images, tmp_path, sd_weight="auto:0.25", sd_interval=1, ema_kimg=0.1))
        train_steps(prepared, 10)
        norms, distillation = prepared.state.sd_norms, prepared.plan.distillation
        weight = float(distillation.auto_weight(norms))
        assert weight > 0
        assert weight * float(norms[1]) == pytest.approx(0.25 * float(norms[0]), rel=1e-5)

    def test_auto_weight_is_stable_for_equal_networks(self, images, tmp_path):
        prepared = prepare(options(images, tmp_path, sd_weight="auto:0.1"))
        distillation = prepared.plan.distillation
        assert float(distillation.auto_weight(torch.tensor([1.0, 0.0]))) == 0
        assert float(distillation.auto_weight(torch.tensor([1.0, 0.5]))) == pytest.approx(0.2)

    @pytest.mark.parametrize("scale, interval", [(1e-6, 1), (1e6, 4)])
    def test_auto_weight_is_scale_free_and_bounded(self, scale, interval, images, tmp_path):
        """Backbones differ by orders of magnitude; averages lag where the distance suddenly grows."""
        settings = dict(sd_weight="auto:0.1", sd_interval=interval)
        prepared = prepare(options(images, tmp_path, **settings))
        state, plan = prepared.state, prepared.plan
        distillation = dataclasses.replace(
            plan.distillation, distance=lambda a, b: scale * (a - b).square().sum(dim=[1, 2, 3])
        )
        draw = draw_latents(state.G, plan.labels(4), 0.0)
        replay = NoiseReplay()
        with torch.no_grad(), replay:
            img = state.G.synthesis(map_latents(state.G, draw), **plan.synthesis)
        adversarial = torch.randn(img.shape, generator=torch.Generator().manual_seed(3))
        norms, wanted = torch.zeros(2), 0.1 * float(adversarial.norm()) * interval

        def pull(distance):
            moved = img + distance * torch.ones_like(img)
            gradient, _ = distillation.image_gradient(
                state.G, moved, draw, replay, plan.synthesis, adversarial, norms
            )
            return float(gradient.norm())

        assert pull(0.0) == 0  # equal networks
        first = pull(2e-3)  # the averages have seen the distance once and the other gradient twice
        assert first == pytest.approx(1.95 * wanted, rel=1e-3)
        for _ in range(150):
            usual = pull(2e-3)
        assert usual == pytest.approx(wanted, rel=1e-3)
        assert pull(1.0) == pytest.approx(4 * wanted, rel=0.01)

    def test_auto_weight_ignores_rounding(self, images, tmp_path):
        """Student and teacher that differ by a thousandth of a gray level: the ratio is not made of that."""
        prepared = prepare(options(images, tmp_path, sd_weight="auto:0.1", sd_interval=1))
        state, plan = prepared.state, prepared.plan
        draw, replay = draw_latents(state.G, plan.labels(4), 0.0), NoiseReplay()
        with torch.no_grad(), replay:
            img = state.G.synthesis(map_latents(state.G, draw), **plan.synthesis)
        adversarial, norms = torch.ones_like(img), torch.zeros(2)
        for _ in range(10):
            gradient, _ = plan.distillation.image_gradient(
                state.G, img + 1e-5, draw, replay, plan.synthesis, adversarial, norms
            )
        assert 0 < float(gradient.norm()) < 0.0011 * float(adversarial.norm())

    @pytest.mark.parametrize("value", ["auto", "auto:", "auto:0", "auto:x", "much", "auto:-1"])
    def test_auto_weight_mistakes(self, value, images, tmp_path):
        with pytest.raises(ConfigError, match=f"--sd-weight {value}: must be a number, or auto:RATIO"):
            prepare(options(images, tmp_path, sd_weight=value))


class TestMeasurements:
    SETTINGS: ClassVar = {"metrics": "random-fid", "metrics_num": 4}

    @pytest.fixture(autouse=True)
    def own_cache(self, tmp_path, monkeypatch):
        monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))

    def test_metrics_are_logged_and_do_not_change_training(self, images, tmp_path, parent):
        console = Console(file=io.StringIO(), width=200)
        result = run(options(images, tmp_path, **self.SETTINGS), console=console)
        lines = lines_of(result)
        assert [line["metrics"]["num"] for line in lines] == [4, 4]
        assert all(line["metrics"]["random-fid"] > 0 for line in lines)
        assert "random-fid@4 " in console.file.getvalue()
        other = weights(finetune.load(parent.snapshot).G_ema)
        for name, tensor in weights(finetune.load(result.snapshot).G_ema).items():
            assert torch.equal(tensor, other[name]), name

    def test_metrics_interval_and_end(self, images, tmp_path):
        config = options(images, tmp_path, kimg=0.016, tick=0.004, snap=3, **self.SETTINGS)
        lines = lines_of(run(config, console=quiet()))
        assert [line["nimg"] for line in lines if "metrics" in line] == [12, 16]

    def test_metrics_failure_is_a_warning(self, images, tmp_path, monkeypatch):
        def fail(*args, **kwargs):
            raise RuntimeError("out of memory")

        monkeypatch.setattr(validation, "Evaluation", fail)
        console = Console(file=io.StringIO(), width=200)
        result = run(options(images, tmp_path, **self.SETTINGS), console=console)
        assert result.nimg == 32 and "metrics" not in lines_of(result)[-1]
        printed = console.file.getvalue()
        assert "Metrics at 0.016 kimg failed, and training continues: out of memory" in printed

    def test_metrics_unknown_names_are_refused(self, images, tmp_path):
        with pytest.raises(ConfigError, match=r"unknown metric \(fiid\)"):
            prepare(options(images, tmp_path, metrics="fiid"))
        with pytest.raises(ConfigError, match="--metrics-num 5: has no effect with --metrics none"):
            prepare(options(images, tmp_path, metrics_num=5))
        config = dataclasses.replace(options(images, tmp_path), metrics="none")
        assert validation.names_of(config) == ()

    def test_metrics_fetch_weights_before_start(self, images, tmp_path, monkeypatch):
        monkeypatch.setenv("FINETUNE_OFFLINE", "1")
        for metric in ("fd-effnet", "random-fid", "ppl-effnet"):
            prepare(options(images, tmp_path, metrics=metric))
        with pytest.raises(WeightsMissing, match="pytorch-fid-inception is not on this machine"):
            prepare(options(images, tmp_path, metrics="random-fid,kid"))
