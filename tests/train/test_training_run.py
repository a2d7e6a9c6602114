"""Whole runs on tiny networks: what they leave behind, what moves, and what they refuse."""

import dataclasses
import io
import json
import os
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from tiny_runs import after_each_line, after_each_step, moved, options, quiet, read, train_steps, weights

import finetune
from finetune.config import TrainConfig
from finetune.errors import ConfigError, DataError, TrainingError, WeightsMissing
from finetune.metrics.perceptual import mean_squared
from finetune.options import PRECISIONS, DistillWeight
from finetune.sampling import to_uint8, z_from_seeds
from finetune.train import prepare, run, steps
from finetune.train.build import build_plan
from finetune.train.run_dir import RunDir, make_run_dir
from finetune.train.stats import Stats

FAMILIES = ["stylegan2", "stylegan3-t", "stylegan3-r"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["stylegan2", "stylegan3-r"])
def finished(request, images, tmp_path_factory):
    """Return the family and the result of a short run with fixed augmentation."""
    config = options(images, tmp_path_factory.mktemp("finished"), request.param, aug="fixed", p=0.5)
    return request.param, run(config, console=quiet())


def test_run_writes_all_files(finished):
    family, result = finished
    names = {path.name for path in result.run_dir.iterdir()}
    (events,) = [name for name in names if name.startswith("events.out.tfevents")]
    names.remove(events)
    stems = ("000000.016", "000000.032")
    assert names == {
        "config.json",
        "about.json",
        "log.jsonl",
        "reals.png",
        "fakes-init.png",
        "preview",
        "report.html",
    } | {
        name
        for stem in stems
        for name in (
            f"fakes{stem}.png",
            f"network-snapshot-{stem}.pkl",
            f"averages-{stem}.safetensors",
            f"training-state-{stem}.pt",
        )
    }
    assert result.run_dir.name == f"00000-discs16-0-{family}-16"
    assert TrainConfig.read(result.run_dir / "config.json") == result.config
    sizes = {read(result.run_dir / name).shape for name in names if name.endswith(".png")}
    assert sizes == {(16, 12 * 16, 3)}


def test_run_logs_every_tick(finished):
    family, result = finished
    lines = [json.loads(line) for line in (result.run_dir / "log.jsonl").read_text().splitlines()]
    assert [line["nimg"] for line in lines] == [16, 32]
    for line in lines:
        assert line["p"] == 0.5 and line["img_per_sec"] > 0
        measured = {"loss_G", "loss_D", "loss_sd", "score_fake", "score_real", "sign_real", "sign_fake"}
        assert measured | ({"path_length"} if family == "stylegan2" else set()) <= line.keys()
        assert all(np.isfinite(value) for value in line.values() if isinstance(value, float))
        assert {"Gmain", "Gdistill", "Dmain", "data"} <= line["sec_per_phase"].keys()
    assert "r1_penalty" in lines[0] and "r1_penalty" not in lines[1]


def test_run_snapshot_is_a_checkpoint(finished):
    family, result = finished
    checkpoint = finetune.load(result.snapshot)
    assert checkpoint.missing == [] and checkpoint.family == family
    assert checkpoint.provenance.nimg == 32 == result.nimg
    assert checkpoint.provenance.training["sd_weight"] == 0.5
    assert "/" not in checkpoint.provenance.training["data"]
    img = checkpoint.G_ema(z_from_seeds([0], 8), torch.zeros(1, 0), noise_mode="const")
    sheet = read(result.run_dir / "fakes000000.032.png")
    np.testing.assert_allclose(to_uint8(img)[0].astype(int), sheet[:16, :16].astype(int), atol=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_run_updates_networks_and_ema(family, images, tmp_path):
    prepared = prepare(options(images, tmp_path, family, ema_kimg=0.004))
    state = prepared.state
    before = {name: weights(getattr(state, name)) for name in ("G", "D", "G_ema")}
    train_steps(prepared, 2)
    for name in ("G", "D"):
        network = getattr(state, name)
        still = {key for key, _ in network.named_parameters()} - moved(before[name], network)
        assert not still, f"{name} stood still in {still}"
    for (key, mean), value in zip(state.G_ema.named_parameters(), state.G.parameters()):
        start_, now, average = before["G_ema"][key], value.detach(), mean.detach()
        assert (average - now).norm() < (start_ - now).norm(), key
        assert not torch.equal(average, now), key
    for (key, mean), value in zip(state.G_ema.named_buffers(), state.G.buffers()):
        assert torch.equal(mean, value), key
    averages = [key for key in moved(before["G"], state.G) if key.endswith(("w_avg", "magnitude_ema"))]
    assert len(averages) == (1 if family == "stylegan2" else 1 + 15)


@pytest.mark.parametrize("family, weight", [("stylegan2", 0.0), ("stylegan2", 1e-35), ("stylegan3-t", 1e-35)])
def test_sd_weight_zero_is_plain_recipe(family, weight, images, tmp_path):
    """A distillation that pulls with no (or vanishing) force changes no weight: it draws no random number."""
    plain = prepare(options(images, tmp_path, family, sd_weight=0.0, aug="fixed", p=0.3))
    plain = dataclasses.replace(plain, plan=dataclasses.replace(plain.plan, distillation=None))
    distilled = prepare(options(images, tmp_path, family, sd_augment=True, aug="fixed", p=0.3))
    config = dataclasses.replace(distilled.config, sd_weight=DistillWeight(weight))
    arguments = config, distilled.facts, mean_squared, distilled.plan.labels, CPU
    plan = build_plan(*arguments)
    assert plan.distillation is not None
    train_steps(plain, 2)
    train_steps(distilled, 2, plan)
    for name in ("G", "D", "G_ema"):
        expected = weights(getattr(plain.state, name))
        assert moved(expected, getattr(distilled.state, name)) == set()


def test_distance_is_logged_in_plain_runs(images, tmp_path):
    changes = dict(sd_weight=0, sd_interval=1, sd_backbone=None, kimg=0.016, tick=0.008, snap=100)
    result = run(options(images, tmp_path, glr=0.05, lr_warmup_kimg=0, **changes), console=quiet())
    lines = [json.loads(line) for line in (result.run_dir / "log.jsonl").read_text().splitlines()]
    assert result.config.sd_backbone == "ms-ssim" and all("loss_sd" in line for line in lines)
    assert lines[-1]["loss_sd"] > 1e-6  # far above rounding, of which the first values consist
    assert "sd_weight" not in lines[-1] and "sd_cosine" not in lines[-1]


def test_sd_weight_changes_result(images, tmp_path):
    plain = train_steps(prepare(options(images, tmp_path, sd_weight=0.0)), 3)
    distilled = train_steps(prepare(options(images, tmp_path, sd_weight=10.0)), 3)
    assert moved(weights(plain.G), distilled.G)


def test_run_is_deterministic(images, tmp_path):
    asked = options(images, tmp_path, seed=7, kimg=0.012)
    first, second = (run(asked, console=quiet()) for _ in range(2))
    assert (first.run_dir.name[:5], second.run_dir.name[:5]) == ("00000", "00001")
    a, b = finetune.load(first.snapshot), finetune.load(second.snapshot)
    for name in ("G", "D", "G_ema"):
        assert moved(weights(getattr(a, name)), getattr(b, name)) == set()


def test_resume_weights_only_prints_note(images, tmp_path, parent):
    checkpoint = finetune.load(parent.snapshot)
    console = quiet()
    config = options(
        images,
        tmp_path,
        resume=str(parent.snapshot),
        freezed=2,
        aug="noaug",
        mirror=True,
        sd_teacher="initial",
        kimg=0.008,
    )
    prepared = prepare(config)
    for name in ("G", "D", "G_ema"):
        assert moved(weights(getattr(checkpoint, name)), getattr(prepared.state, name)) == set()
    result = run(config, console=console)
    text = console.file.getvalue()
    assert "Loaded weights only" in text and "24 images" not in text and "12 images" in text
    assert "--gamma" in text and "user-specified" in text
    child = finetune.load(result.snapshot)
    changed = moved(weights(checkpoint.D), child.D)
    frozen = {"b16.fromrgb.weight", "b16.fromrgb.bias", "b16.conv0.weight", "b16.conv0.bias"}
    assert not changed & frozen and "b16.conv1.weight" in changed
    assert child.provenance.parent["sha256"] == checkpoint.provenance.sha256
    assert child.augment_pipe is None


def test_prepare_notes_name_options(images, tmp_path, parent):
    snapshot = str(parent.snapshot)
    assert prepare(options(images, tmp_path, resume=snapshot)).notes == []
    labeled = options(images, tmp_path, resume=snapshot, data=str(images(16, 3)))
    (note,) = prepare(labeled).notes
    assert "labels of the images are not used" in note and "--cond" in note
    assert prepare(dataclasses.replace(labeled, cond=False)).notes == []
    gray = str(run(options(images, tmp_path, channels=1, kimg=0.004), console=quiet()).snapshot)
    assert "12 color images will become gray" in prepare(options(images, tmp_path, resume=gray)).notes[0]


def test_freezed_layers_thaw(images, tmp_path, parent):
    changes = dict(resume=str(parent.snapshot), freezed=3, kimg=0.004)
    frozen = run(options(images, tmp_path, **changes), console=quiet())
    prepared = prepare(options(images, tmp_path, resume=str(frozen.snapshot), freezed=0))
    before = weights(prepared.state.D)
    train_steps(prepared, 1)
    assert "b16.fromrgb.weight" in moved(before, prepared.state.D)


def test_teacher_initial_is_constant(images, tmp_path, parent):
    prepared = prepare(options(images, tmp_path, resume=str(parent.snapshot), sd_teacher="initial"))
    teacher = prepared.state.teacher
    before = weights(teacher)
    train_steps(prepared, 3)
    assert moved(before, teacher) == set() and moved(before, prepared.state.G_ema)


def test_teacher_with_own_half_life(images, tmp_path):
    state = prepare(options(images, tmp_path)).state
    assert state.teacher is state.G_ema
    prepared = prepare(options(images, tmp_path, ema_kimg=0.01, sd_teacher_kimg=1.0))
    state = train_steps(prepared, 3, dataclasses.replace(prepared.plan, ema_rampup=None))
    gaps = [
        sum(float((p - q).norm()) for p, q in zip(average.parameters(), state.G.parameters()))
        for average in (state.teacher, state.G_ema)
    ]
    assert gaps[0] > gaps[1] > 0


@pytest.mark.parametrize("name", ["stylegan2-ada-32", "stylegan2-tf-32", "stylegan3-t-32", "stylegan3-r-32"])
def test_run_public_checkpoints(name, golden_dir, images, tmp_path):
    changes = {"data": str(images(32)), "resume": str(golden_dir / f"{name}.pkl"), "fit": "stretch"}
    c_dim = finetune.load(golden_dir / f"{name}.pkl").best.c_dim
    if c_dim:
        changes["data"] = str(images(32, c_dim))
    prepared = prepare(options(images, tmp_path, kimg=0.004, batch=2, **changes))
    before = {key: weights(getattr(prepared.state, key)) for key in ("G", "D", "G_ema")}
    train_steps(prepared, 2)
    for key, values in before.items():
        assert moved(values, getattr(prepared.state, key)), key


def test_run_conditional(images, tmp_path):
    config = options(images, tmp_path, data=str(images(16, 3)), cond=True, kimg=0.004)
    result = run(config, console=quiet())
    G = finetune.load(result.snapshot).G_ema
    assert G.c_dim == 3
    ways_out = "(?s)3 classes.*--classes.*--no-cond"
    with pytest.raises(DataError, match=ways_out):
        prepare(options(images, tmp_path, resume=str(result.snapshot)))  # images without labels
    with pytest.raises(DataError, match=ways_out):
        prepare(options(images, tmp_path, resume=str(result.snapshot), data=str(images(16, 4))))


@pytest.mark.parametrize("parts", [1, 4])
def test_micro_batches_accumulate_batch_gradient(parts, images, tmp_path):
    prepared = prepare(options(images, tmp_path, sd_weight=0.0, aug="noaug"))
    plan = dataclasses.replace(prepared.plan, batch_gpu=4 // parts, gamma=2.0)
    critic = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 1), torch.nn.Softplus())
    critic = critic.requires_grad_(False)
    state = dataclasses.replace(
        prepared.state, D=_Critic(critic), opt_D=torch.optim.SGD(critic.parameters(), lr=1.0)
    )
    img, c = torch.randn(4, 3, 16, 16), torch.zeros(4, 0)
    reals = list(zip(img.split(plan.batch_gpu), c.split(plan.batch_gpu)))

    reference = {name: value.clone().requires_grad_() for name, value in critic.named_parameters()}
    x = img.clone().requires_grad_()
    logits = torch.func.functional_call(critic, reference, x)
    (gradient,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
    loss = 2.0 / 2 * 16 * gradient.square().sum([1, 2, 3]).mean()
    expected = torch.autograd.grad(loss, list(reference.values()))

    before = [value.clone() for value in critic.parameters()]
    steps.r1_step(state, plan, reals, Stats(CPU))
    for old, new, grad in zip(before, critic.parameters(), expected):
        torch.testing.assert_close(old - new, grad, rtol=1e-3, atol=1e-6)


class _Critic(torch.nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, img, c, force_fp32=False):
        return self.layers(img)


def test_display_bar_on_terminal(images, tmp_path):
    console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system=None)
    run(options(images, tmp_path), console=console)
    bar, numbers = console.file.getvalue().split("0.03/0.032 kimg")[-1].splitlines()[:2]
    assert "100%" in bar
    assert all(words in numbers for words in ("img/s", "0:00 left", "GiB", "G ", "D ", "SD ", "p 0.0"))


def test_run_sigint_saves(images, tmp_path, monkeypatch):
    after_each_line(monkeypatch, lambda state, numbers: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        run(options(images, tmp_path, kimg=10, snap=100), console=quiet())
    (snapshot,) = (tmp_path / "runs").glob("*/network-snapshot-*.pkl")
    assert finetune.load(snapshot).provenance.nimg == 16


def test_stopped_run_saves_without_metrics(images, tmp_path, monkeypatch):
    after_each_step(monkeypatch, lambda state: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setattr("finetune.train.validation.Validation.measure", lambda self, state: 1 / 0)
    result = run(options(images, tmp_path, kimg=10, tick=0.001, snap=1), console=quiet())
    assert result.snapshot.is_file() and result.nimg < 1000


def test_run_divergence_keeps_snapshot(images, tmp_path, monkeypatch):
    config = options(images, tmp_path, kimg=1, tick=0.008, snap=1, glr=1e-4, dlr=1e-4)

    def poison(state):
        if state.nimg >= 20:
            next(iter(state.G.parameters())).fill_(float("nan"))

    after_each_step(monkeypatch, poison)

    with pytest.raises(TrainingError, match=r"loss_G became nan in Gmain at 0\.0\d+ kimg"):
        run(config, console=quiet())
    snapshots = sorted((tmp_path / "runs").glob("*/network-snapshot-*.pkl"))
    assert len(snapshots) == 2
    for network in (finetune.load(snapshots[-1]).G, finetune.load(snapshots[-1]).G_ema):
        assert all(torch.isfinite(tensor).all() for tensor in network.state_dict().values())


def test_write_snapshot_refuses_non_finite_weights(images, tmp_path, monkeypatch):
    def poison(state, numbers):
        state.G_ema.mapping.fc0.weight.fill_(float("inf"))

    after_each_line(monkeypatch, poison)

    config = options(images, tmp_path, kimg=0.016, tick=0.016, sd_weight=0.0)
    with pytest.raises(TrainingError, match="G_ema has non-finite weights"):
        run(config, console=quiet())
    assert not list((tmp_path / "runs").glob("*/network-snapshot-*.pkl"))


def test_resume_folder_without_state(images, tmp_path, parent, finished_dir):
    for path in finished_dir.glob("training-state-*"):
        path.unlink()
    with pytest.raises(ConfigError, match=parent.snapshot.name):
        prepare(options(images, tmp_path, resume=str(finished_dir)))


def test_resume_requires_discriminator(images, tmp_path):
    from finetune.export.stylegan_pickle import save_stylegan_pickle

    prepared = prepare(options(images, tmp_path))
    path = tmp_path / "generator.pkl"
    save_stylegan_pickle(path, G=None, D=None, G_ema=prepared.state.G_ema, provenance={})
    with pytest.raises(ConfigError, match="the file has G_ema, but no discriminator"):
        prepare(options(images, tmp_path, resume=str(path)))


def test_resume_missing_generator_uses_other(images, tmp_path):
    from finetune.export.stylegan_pickle import save_stylegan_pickle

    state = prepare(options(images, tmp_path)).state
    path = tmp_path / "pair.pkl"
    save_stylegan_pickle(path, G=None, D=state.D, G_ema=state.G_ema, provenance={})
    console = quiet()
    config = options(images, tmp_path, resume=str(path), kimg=0.004)
    assert moved(weights(state.G_ema), prepare(config).state.G) == set()
    run(config, console=console)
    assert "has no G" in console.file.getvalue()


@pytest.mark.parametrize(
    "changes, error, words",
    [
        ({"precision": "fp16"}, ConfigError, "--precision fp16: needs CUDA"),
        ({"precision": "tf32"}, ConfigError, "--precision tf32: needs CUDA"),
        ({"sd_backbone": "lpips-vgg"}, WeightsMissing, "vgg16-397923af.pth"),
        ({"data": "nowhere"}, DataError, "nowhere"),
        ({"labels": "folders"}, DataError, "no image is in a subfolder"),
        ({"kimg": -1.0}, ConfigError, "--kimg"),
        ({"device": "tpu"}, ConfigError, "--device"),
        ({"batch": 6, "batch_gpu": 6}, ConfigError, "--batch-gpu 6: .* groups of 4. Use a multiple of 4"),
    ],
)
def test_prepare_writes_nothing_on_error(changes, error, words, images, tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_OFFLINE", "1")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(error, match=words):
        run(options(images, tmp_path, **changes), console=quiet())
    assert not (tmp_path / "runs").exists()


def test_prepare_refuses_too_many_frozen_layers(images, tmp_path, parent):
    with pytest.raises(ConfigError, match="--freezed 99: this discriminator has 7 layers"):
        prepare(options(images, tmp_path, resume=str(parent.snapshot), freezed=99))


def test_micro_batches_fit_groups(images, tmp_path):
    prepared = prepare(options(images, tmp_path, batch=6))
    assert prepared.plan.batch_gpu == 3
    train_steps(prepared, 1)


def test_prepare_uses_groups_of_checkpoint(golden_dir, images, tmp_path):
    resume = str(golden_dir / "stylegan2-32.pkl")
    D = finetune.load(resume).D
    config = options(images, tmp_path, resume=resume, data=str(images(32, D.c_dim)))
    assert prepare(config).facts.group_size == D.b4.mbstd.group_size


def test_prepare_checks_outdir(images, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    for outdir in ("file", "file/runs"):
        with pytest.raises(ConfigError, match="file is a file"):
            prepare(options(images, tmp_path, outdir=str(tmp_path / outdir)))
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(ConfigError, match=f"{tmp_path} is not writable"):
        prepare(options(images, tmp_path))


def test_prepare_checks_free_space(images, tmp_path, monkeypatch):
    config = options(images, tmp_path)
    state = prepare(config).state
    networks = (state.G, state.D, state.G_ema, *state.power_averages.values())
    tensors = [tensor for network in networks for tensor in network.state_dict().values()]
    needed = 2 * sum(tensor.nbytes for tensor in tensors)  # at 16 and 32 images
    for free, fits, keep in ((needed, True, 0), (needed - 1, False, 0), (needed, True, 1)):
        config = dataclasses.replace(config, keep=keep, kimg=0.032 if not keep else 1)
        usage = SimpleNamespace(free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, usage=usage: usage)
        if fits:
            prepare(config)
            continue
        with pytest.raises(ConfigError, match=r"larger --snap.* --keep"):
            prepare(config)


def test_prepare_notes_fitted_images(images, tmp_path):
    console = quiet()
    run(options(images, tmp_path, resolution=32, kimg=0.004), console=console)
    assert (
        "12 images of another size will be center-cropped and resized to 32×32. " in console.file.getvalue()
    )
    prepared = prepare(options(images, tmp_path, resolution=64, fit="stretch"))
    assert prepared.notes[1] == "12 images will be enlarged more than 2× and look blurred."


def test_resume_folder_without_snapshots(images, tmp_path):
    with pytest.raises(ConfigError, match="this folder has no snapshots"):
        prepare(options(images, tmp_path, resume=str(tmp_path)))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_run_on_cuda(family, precision, images, tmp_path):
    result = run(options(images, tmp_path, family, device="cuda", precision=precision), console=quiet())
    assert finetune.load(result.snapshot).missing == []


def test_make_run_dir_ignores_dates(tmp_path):
    for name in ("20240101-old", "00003-faces", "0007-short"):
        (tmp_path / name).mkdir()
    assert make_run_dir(tmp_path, "new").name == "00004-new"


def test_drop_later_lines_skips_damaged_ones(tmp_path):
    folder = object.__new__(RunDir)
    folder.path = tmp_path
    (tmp_path / "log.jsonl").write_bytes(b'{"nimg": 1}\n\xff\n{"nimg": 3}\n{"nimg": 4}\n{"nimg": 3')
    folder.drop_later_lines(3)
    assert (tmp_path / "log.jsonl").read_text() == '{"nimg": 1}\n{"nimg": 3}\n'


def test_write_snapshot_never_overwrites_other(images, tmp_path):
    prepared = prepare(options(images, tmp_path, kimg=100, tick=1, snap=1))
    folder = RunDir(
        tmp_path, prepared.config, prepared.image_set, source=None, chunk=4, device=torch.device("cpu")
    )
    for nimg in (1000, 1004, 1004, 1000):
        prepared.state.nimg = nimg
        folder.write_snapshot(prepared.state)
    names = sorted(path.name for path in tmp_path.glob("network-snapshot-*.pkl"))
    assert names == ["network-snapshot-000001.004.pkl", "network-snapshot-000001.pkl"]
