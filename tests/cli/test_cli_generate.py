from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import finetune
from finetune.cli import cli
from finetune.export.stylegan_pickle import save_stylegan_pickle


@pytest.fixture
def run(golden_dir, tmp_path):
    """Call with the arguments after `generate --network … --outdir …`."""

    def invoke(*args, code=0, network="stylegan2-32"):
        outdir = tmp_path / "out"
        arguments = [
            "generate",
            "--network",
            str(golden_dir / f"{network}.pkl"),
            "--outdir",
            str(outdir),
            *args,
        ]
        result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
        assert result.exit_code == code, result.output
        return result, outdir

    return invoke


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def test_generate_one_image_per_seed(run, golden_network):
    result, outdir = run("--seeds", "0-1,42", "--trunc", "0.7")
    assert sorted(path.name for path in outdir.iterdir()) == ["seed0000.png", "seed0001.png", "seed0042.png"]
    assert "3 images" in result.output and "seed0000.png" in result.output
    first = pixels(outdir / "seed0042.png")
    assert first.shape == (32, 32, 3)
    assert run("--seeds", "42", "--trunc", "0.7")[0].output == f"1 image: {outdir / 'seed0042.png'}\n"
    np.testing.assert_array_equal(pixels(outdir / "seed0042.png"), first)
    run("--seeds", "42", "--trunc", "0.7", "--trunc-cutoff", "1")
    assert not np.array_equal(pixels(outdir / "seed0042.png"), first)


def test_generate_grid(run):
    result, outdir = run("--seeds", "0-4", "--grid", "3x2")
    sheet = pixels(outdir / "grid.png")
    assert sheet.shape == (64, 96, 3)
    np.testing.assert_array_equal(sheet[32:, 32:64], pixels(outdir / "seed0004.png"))
    assert not sheet[32:, 64:].any()
    assert "grid.png" in result.output


def test_generate_grid_too_small(run):
    result, outdir = run("--seeds", "0-4", "--grid", "2x2", code=2)
    assert "--grid 2x2 has 4 places, for 5 images" in result.output
    assert not outdir.exists()


def test_generate_classes(run):
    _, outdir = run("--seeds", "0", "--class", "1", network="stylegan2-64-cond")
    one = pixels(outdir / "seed0000.png")
    run("--seeds", "0", "--class", "2", network="stylegan2-64-cond")
    assert not np.array_equal(pixels(outdir / "seed0000.png"), one)


def test_generate_several_classes(run):
    result, outdir = run("--seeds", "0-1", "--class", "0-1,4", network="stylegan2-64-cond")
    names = [f"seed{seed:04d}-class{index}.png" for index in (0, 1, 4) for seed in (0, 1)]
    assert sorted(path.name for path in outdir.iterdir()) == sorted(["grid.png", *names])
    assert "6 images" in result.output
    sheet = pixels(outdir / "grid.png")
    np.testing.assert_array_equal(sheet[:64, 128:], pixels(outdir / "seed0000-class4.png"))
    run("--seeds", "0", "--class", "4", network="stylegan2-64-cond")
    np.testing.assert_array_equal(pixels(outdir / "seed0000.png"), sheet[:64, 128:])


@pytest.fixture
def of_kind(golden_dir, tmp_path):
    """Call with the kind of labels: the arguments of `generate` for a network whose file states it."""

    def write(kind):
        G = finetune.load(golden_dir / "stylegan2-64-cond.pkl").G_ema
        path = tmp_path / f"{kind}.pkl"
        save_stylegan_pickle(path, G=None, D=None, G_ema=G, training_set_kwargs={"labels": kind})
        return ["generate", "--network", str(path), "--seeds", "0", "--outdir", str(tmp_path / "out")]

    return write


def test_generate_label_vector(of_kind, run, tmp_path):
    result = CliRunner().invoke(cli, [*of_kind("vectors"), "--label", "0,1,0,0,0"])
    assert result.exit_code == 0, result.output
    vector = pixels(tmp_path / "out/seed0000.png")
    _, outdir = run("--seeds", "0", "--class", "1", network="stylegan2-64-cond")
    np.testing.assert_array_equal(pixels(outdir / "seed0000.png"), vector)
    _, outdir = run("--seeds", "0", "--label", "-0.5,0,0,2,0", network="stylegan2-64-cond")
    assert not np.array_equal(pixels(outdir / "seed0000.png"), vector)


def test_directions_and_projections_with_label_vectors(of_kind, tmp_path):
    network, label = of_kind("vectors")[1:3], ["--label", "0,1,2,0,0"]

    def call(*words, code=0):
        result = CliRunner().invoke(cli, [*words, *network, "--outdir", str(tmp_path / "out")])
        assert result.exit_code == code, result.output
        return result.output

    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    project = ["project", str(tmp_path / "red.png"), "--steps", "1", "--space", "w", "--backbone", "l2"]
    for words in (["directions"], project):
        assert "Use --label 0,0,0,0,0" in call(*words, code=2)
    assert "--class: the labels of this network are vectors" in call("directions", "--class", "0", code=2)
    call("directions", "--num", "1", *label)
    call(*project, *label)
    call("generate", "--seeds", "0", "--edit", "pc1=3", *label)
    sheet = pixels(tmp_path / "out" / "directions.png")
    np.testing.assert_array_equal(pixels(tmp_path / "out" / "seed0000.png"), sheet[:, -64:])
    saved = ["--w", str(tmp_path / "out" / "red.npz"), "--edit", "pc1=1"]
    assert "depend on the label. Use --directions" in call("generate", *saved, code=2)


@pytest.mark.parametrize(
    ("kind", "args", "message"),
    [
        ("vectors", ["--class", "0"], "--class: the labels of this network are vectors of 5 numbers. Use"),
        ("vectors", [], "the labels of this network are vectors of 5 numbers. Use --label 0,0,0,0,0"),
        ("vectors", ["--label", "1,180"], "--label 1,180: 2 numbers, but this network takes vectors of 5"),
        ("classes", ["--label", "0,1,0,0,0"], "the labels of this network are 5 classes. Use --class"),
        (None, ["--label", "1,x"], "'1,x' is not a list of finite numbers"),
        (None, ["--label", "1,nan"], "'1,nan' is not a list of finite numbers"),
        (None, ["--label", "1", "--class", "0"], "Use one of the two"),
        (None, ["--class", "1,7"], "--class 7: must be 0 to 4"),
    ],
)
def test_generate_label_errors(of_kind, tmp_path, kind, args, message):
    result = CliRunner().invoke(cli, [*of_kind(kind), *args])
    assert result.exit_code == 2 and message in result.output, result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("network", "args", "line"),
    [
        ("stylegan3-t-32", ["--noise-mode", "random"], "--noise-mode random has no effect: this network"),
        ("stylegan3-t-32", ["--noise-mode", "none"], "--noise-mode none has no effect"),
        ("stylegan2-32", ["--trunc-cutoff", "2"], "--trunc-cutoff 2 has no effect without --trunc"),
        ("stylegan2-32", ["--trunc", "0.5", "--trunc-cutoff", "0"], "--trunc has no effect with"),
        ("stylegan2-32", ["--trunc", "0.5", "--trunc-cutoff", "8"], "this network has 8 rows of ws"),
        ("stylegan2-32", ["--trunc", "0.5", "--trunc-cutoff", "7", "--noise-mode", "none"], ""),
    ],
)
def test_generate_options_without_effect(run, network, args, line):
    result, _ = run("--seeds", "0", *args, network=network)
    assert line in result.stderr and bool(line) == ("no effect" in result.stderr)


@pytest.mark.parametrize(
    ("network", "args", "message"),
    [
        ("stylegan2-64-cond", [], "this network has 5 classes. Choose one from 0 to 4"),
        ("stylegan2-64-cond", ["--class", "9"], "--class 9: must be 0 to 4"),
        ("stylegan2-32", ["--class", "0"], "this network has no classes"),
        ("absent", [], "does not exist"),
        ("stylegan2-32", ["--device", "cuda:99"], "--device cuda:99"),
        ("stylegan2-32", ["--noise-mode", "loud"], "--noise-mode"),
        ("stylegan2-32", ["--grid", "0x3"], "--grid"),
        ("stylegan2-32", ["--trunc", "nan"], "'nan' is not a list of finite numbers"),
    ],
)
def test_generate_errors(run, network, args, message):
    result, outdir = run("--seeds", "0", *args, network=network, code=2)
    assert message in result.output
    assert "Traceback" not in result.output
    assert not outdir.exists()


def test_generate_variations(run):
    _, outdir = run("--seeds", "0-1", "--trunc", "0.5,1", "--edit", "pc1=-1,0,1")
    names = [f"seed000{i}-trunc{psi}-pc1={x}.png" for i in (0, 1) for psi in ("0.5", "1") for x in (-1, 0, 1)]
    assert sorted(path.name for path in outdir.iterdir()) == sorted([*names, "grid.png"])
    sheet = pixels(outdir / "grid.png")
    assert sheet.shape == (64, 192, 3)
    np.testing.assert_array_equal(sheet[32:, 160:], pixels(outdir / names[-1]))
    edited = [pixels(outdir / name) for name in names]
    run("--seeds", "1")
    np.testing.assert_array_equal(pixels(outdir / "seed0001.png"), edited[-2])
    run("--seeds", "1", "--edit", "pc1=1@2-3")
    assert not np.array_equal(pixels(outdir / "seed0001.png"), edited[-1])
    assert not np.array_equal(pixels(outdir / "seed0001.png"), edited[-2])


def test_generate_mixing(run):
    _, outdir = run("--seeds", "0-1", "--mix", "5,6", "--mix-layers", "0-3")
    sheet = pixels(outdir / "grid.png")
    assert sheet.shape == (96, 96, 3) and not sheet[:32, :32].any()
    run("--seeds", "5")
    np.testing.assert_array_equal(sheet[:32, 32:64], pixels(outdir / "seed0005.png"))
    result, _ = run("--seeds", "0", "--mix", "5", "--mix-layers", "0-99", code=2)
    assert "layers '0-99': not rows of ws. Write them like 0-3, from 0 to" in result.output


def test_generate_saved_w(run, tmp_path):
    file = tmp_path / "w.npz"
    result, outdir = run("--seeds", "0,9", "--trunc", "0.6", "--save-w", str(file))
    assert f"w of all images: {file}" in result.output
    run("--w", str(file))
    np.testing.assert_array_equal(pixels(outdir / "w0001.png"), pixels(outdir / "seed0009.png"))
    result, _ = run("--w", str(file), "--seeds", "1", code=2)
    assert "Use either --seeds or --w" in result.output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "Use either --seeds or --w"),
        (["--seeds", "0", "--edit", "pc1"], "'pc1' is not an edit. Write it like pc1=2.0"),
        (["--seeds", "0", "--edit", "pc1=much"], "'much' is not a list of finite numbers"),
        (["--seeds", "0", "--edit", "smile=1"], "--edit smile: not a principal direction"),
        (["--seeds", "0", "--directions", "d.npz"], "--directions has no effect without --edit"),
        (["--seeds", "0", "--mix-layers", "0-3"], "--mix-layers has no effect without --mix"),
        (["--seeds", "0", "--trunc", "11"], "11 is outside -10 to 10"),
        (["--w", "absent.npz"], "absent.npz does not exist"),
    ],
)
def test_generate_latent_errors(run, args, message):
    result, outdir = run(*args, code=2)
    assert message in result.output and not outdir.exists()


def test_generate_noise_modes(run):
    _, outdir = run("--seeds", "0")
    images = {}
    for mode in ("const", "random", "none"):
        run("--seeds", "0", "--noise-mode", mode)
        images[mode] = pixels(outdir / "seed0000.png")
    for one, other in (("const", "random"), ("const", "none"), ("random", "none")):
        assert not np.array_equal(images[one], images[other]), (one, other)
    assert not np.array_equal(images["const"], images["none"])
    run("--seeds", "1,0", "--noise-mode", "random")
    np.testing.assert_array_equal(pixels(outdir / "seed0000.png"), images["random"])


def test_generate_from_run_folder_and_without_g_ema(golden_dir, tmp_path):
    checkpoint = dataclasses.replace(finetune.load(golden_dir / "stylegan2-32.pkl"), G_ema=None)
    run_dir = tmp_path / "00000-run"
    save_stylegan_pickle(run_dir / "network-snapshot-000010.pkl", G=checkpoint.G, D=checkpoint.D, G_ema=None)
    save_stylegan_pickle(run_dir / "network-snapshot-000002.pkl", G=None, D=checkpoint.D, G_ema=None)
    arguments = ["generate", "--network", str(run_dir), "--seeds", "0", "--outdir", str(tmp_path / "out")]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    assert "has no G_ema; the images come from G" in result.output

    arguments[2] = str(run_dir / "network-snapshot-000002.pkl")
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 2 and "has no generator, only D" in result.output


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (4, "RGBA")])
def test_generate_gray_and_rgba(tmp_path, channels, mode):
    from finetune.models.stylegan2 import Generator

    G = Generator(8, 0, 8, 16, channels, channel_base=128, channel_max=8)
    save_stylegan_pickle(tmp_path / "net.pkl", G=None, D=None, G_ema=G)
    arguments = [
        "generate",
        "--network",
        str(tmp_path / "net.pkl"),
        "--seeds",
        "0-1",
        "--outdir",
        str(tmp_path),
    ]
    result = CliRunner().invoke(cli, [*arguments, "--grid", "2x1"])
    assert result.exit_code == 0, result.output
    for name, size in (("seed0001.png", (16, 16)), ("grid.png", (32, 16))):
        with Image.open(tmp_path / name) as image:
            assert (image.mode, image.size) == (mode, size)


@pytest.mark.parametrize(
    "network, seeds, ops, builds_later",
    [
        ("stylegan2-32.pkl", "0-3", "auto", True),
        ("stylegan2-32.pkl", "0-9999", "auto", False),  # takes longer than the build
        ("stylegan3-t-32.pkl", "0", "auto", True),
        ("stylegan3-r-32.pkl", "0-31", "auto", False),
        ("stylegan2-32.pkl", "0", "ref", False),  # would not use the kernels
    ],
)
def test_generate_short_job_skips_build(golden_dir, tmp_path, monkeypatch, network, seeds, ops, builds_later):
    from torch_utils import custom_ops

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    asked = []
    monkeypatch.setenv("FINETUNE_OPS", ops)
    monkeypatch.setattr(custom_ops, "build_for_next_start", lambda: asked.append(1))
    monkeypatch.setattr("finetune.sampling.synthesize", interrupt)
    words = ["generate", "--network", str(golden_dir / network), "--seeds", seeds, "--outdir", str(tmp_path)]
    result = CliRunner().invoke(cli, [*words, "--device", "cpu"])
    assert result.exit_code == 130, result.output
    assert bool(asked) == builds_later
