"""What surgery leaves trains, is reported, and is refused where its option is missing."""

import dataclasses

import pytest
import torch
from tiny_runs import moved, options, quiet, train_steps, weights

import finetune
from finetune.checkpoint.surgery import TargetShape, operate
from finetune.errors import ConfigError
from finetune.export.stylegan_pickle import save_stylegan_pickle
from finetune.train import prepare, run
from finetune.train.prepare import show


def resume(golden_dir, name, **changes):
    return {"resume": str(golden_dir / f"{name}.pkl"), "fit": "stretch", "sd_weight": 0.1, **changes}


@pytest.mark.parametrize(
    "name, changes, num_labels, words",
    [
        ("stylegan2-32", {"channels": 1}, 0, "channels 3 → 1"),
        ("stylegan2-32", {"resolution": 64}, 0, "pixels 32 → 64"),
        ("stylegan2-ada-32", {"resolution": 16}, 0, "pixels 32 → 16"),
        ("stylegan2-32", {"cond": True}, 3, "classes 0 → 3"),
        ("stylegan2-64-cond", {"cond": False}, 0, "classes 5 → 0"),
        ("stylegan2-64-cond", {"classes": "extend"}, 7, "classes 5 → 7"),
        ("stylegan2-64-cond", {"classes": "keep"}, 3, "classes 5 → 3"),
        ("stylegan2-ada-32", {"channels": 4}, 0, "channels 3 → 4"),
        ("stylegan3-t-32", {"channels": 4, "new_d": True, "aug": "noaug"}, 0, "D, new discriminator"),
    ],
)
def test_train_after_surgery(name, changes, num_labels, words, golden_dir, images, tmp_path):
    data = str(images(16, num_labels)) if num_labels else str(images(16))
    config = options(images, tmp_path, kimg=0.008, **{"data": data, **resume(golden_dir, name, **changes)})
    console = quiet()
    prepared = prepare(config)
    show(prepared, console)
    assert words in console.file.getvalue()
    if changes.get("new_d"):
        prepared = dataclasses.replace(prepared, plan=dataclasses.replace(prepared.plan, d_warmup_nimg=0))
    before = {key: weights(getattr(prepared.state, key)) for key in ("G", "D", "G_ema")}
    train_steps(prepared, 1)
    for key, values in before.items():
        assert moved(values, getattr(prepared.state, key)), key
    G = prepared.state.G_ema
    img = G(torch.randn(2, G.z_dim), torch.eye(max(G.c_dim, 2))[:2, : G.c_dim], noise_mode="const")
    assert img.shape == (2, G.img_channels, G.img_resolution, G.img_resolution) and img.isfinite().all()


def test_new_d_warms_up_alone(images, tmp_path, parent):
    prepared = prepare(
        options(images, tmp_path, resume=str(parent.snapshot), new_d=True, d_warmup_kimg=0.008, aug="noaug")
    )
    assert {reason.name for reason in prepared.reasons} >= {"new_d", "d_warmup_kimg"}
    before = {key: weights(getattr(prepared.state, key)) for key in ("G", "D", "G_ema")}
    state = train_steps(prepared, 2)  # 8 images: the warm-up
    buffers = {name for name, _ in state.G.named_buffers()}
    assert moved(before["G"], state.G) <= buffers and not moved(before["G_ema"], state.G_ema)
    assert "b16.conv0.weight" in moved(before["D"], state.D)
    state.nimg = 8
    train_steps(prepared, 3)
    assert moved(before["G"], state.G) - buffers and moved(before["G_ema"], state.G_ema)


def test_generator_alone_requires_new_d(golden_dir, images, tmp_path):
    checkpoint = finetune.load(golden_dir / "stylegan2-32.pkl")
    alone = tmp_path / "alone.pkl"
    save_stylegan_pickle(alone, G=None, D=None, G_ema=checkpoint.G_ema)
    config = options(images, tmp_path, resume=str(alone), fit="stretch")
    with pytest.raises(ConfigError, match=r"(?s)no discriminator D.*--new-d"):
        prepare(config)
    assert prepare(dataclasses.replace(config, new_d=True)).state.D.img_resolution == 32


def test_snapshot_after_surgery_is_a_checkpoint(golden_dir, images, tmp_path):
    changes = resume(golden_dir, "stylegan2-64-cond", cond=False, resolution=32, channels=1)
    result = run(options(images, tmp_path, kimg=0.008, **changes), console=quiet())
    G = finetune.load(result.snapshot).G_ema
    assert (G.c_dim, G.img_resolution, G.img_channels) == (0, 32, 1)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"classes": "keep"}, "--classes keep: the checkpoint has no classes. Use --cond"),
        ({"classes": "fresh", "cond": False}, "no effect with --no-cond"),
        ({"new_d": True, "freezed": 2}, "--freezed 2: would freeze random layers with --new-d"),
    ],
)
def test_surgery_refuses_contradictions(changes, words, golden_dir, images, tmp_path):
    with pytest.raises(ConfigError, match=words):
        prepare(options(images, tmp_path, **resume(golden_dir, "stylegan2-32", **changes)))


def test_surgery_equal_for_g_and_g_ema(golden_dir):
    checkpoint = finetune.load(golden_dir / "stylegan2-32.pkl")
    after, _ = operate(checkpoint, TargetShape(resolution=64))
    assert torch.equal(after.G.synthesis.b64.conv0.weight, after.G_ema.synthesis.b64.conv0.weight)
