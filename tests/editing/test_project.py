from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import finetune
from finetune.cli import cli
from finetune.demo.run import CHECKPOINT as BUNDLED
from finetune.editing.latents import load_ws
from finetune.editing.project import Projector, downsample, schedule
from finetune.errors import TrainingError
from finetune.metrics.perceptual import build_distance
from finetune.models import stylegan2, stylegan3
from finetune.sampling import generate, label_from_class, z_from_seeds

SIZE = {"z_dim": 8, "c_dim": 0, "w_dim": 8, "img_resolution": 16, "img_channels": 3}


def tiny(family):
    if family == "stylegan2":
        G = stylegan2.Generator(**SIZE, channel_base=128, channel_max=8)
    else:
        G = stylegan3.Generator(**SIZE, channel_base=128, channel_max=8, num_layers=4, margin_size=2)
    return G.eval().requires_grad_(False)


def sample(G, seed):
    """An image of G, float."""
    ws = G.mapping(z_from_seeds([seed], G.z_dim), label_from_class(G, None))
    return G.synthesis(ws, noise_mode="const"), ws[0]


@pytest.mark.parametrize("family", ["stylegan2", "stylegan3-t"])
def test_project_finds_an_own_sample_and_repeats(family):
    G = tiny(family)
    target, _ = sample(G, 3)
    projector = Projector(G, build_distance("l2", 3, torch.device("cpu")))
    start = projector.result(G, projector.mean.expand(G.num_ws, -1), target)
    found = projector.result(G, projector.project(target, 25, "w"), target)
    plus = projector.result(G, projector.project(target, 25, "w+"), target)
    assert found.rmse < 0.5 * start.rmse and found.distance < 0.25 * start.distance
    assert plus.rmse < found.rmse
    assert torch.equal(found.ws[0], found.ws[-1]) and not torch.equal(plus.ws[0], plus.ws[-1])
    assert torch.equal(projector.project(target, 2), projector.project(target, 2))


def test_project_tunes_a_copy():
    G = tiny("stylegan2")
    before = {name: tensor.clone() for name, tensor in G.state_dict().items()}
    target = torch.rand(1, 3, 16, 16) * 2 - 1
    projector = Projector(G, build_distance("l2", 3, torch.device("cpu")))
    ws = projector.project(target, 5, "w")
    tuned = projector.tune([target], [ws], 30)
    assert projector.result(tuned, ws, target).rmse < projector.result(G, ws, target).rmse
    assert all(torch.equal(tensor, before[name]) for name, tensor in G.state_dict().items())
    for name, tensor in tuned.mapping.state_dict().items():
        assert torch.equal(tensor, before[f"mapping.{name}"])


def test_project_refuses_a_distance_that_is_not_finite():
    G = tiny("stylegan2")
    projector = Projector(G, lambda a, b: (a - b).mean(dim=[1, 2, 3]) * float("nan"))
    with pytest.raises(TrainingError, match="not finite"):
        projector.project(torch.zeros(1, 3, 16, 16), 1)


def test_project_schedule_and_reduction():
    assert schedule(0.5) == 1 and schedule(0) < 0.05 and schedule(0.999) < 0.01
    assert downsample(torch.zeros(1, 3, 1024, 512)).shape == (1, 3, 256, 128)
    assert downsample(torch.zeros(1, 3, 64, 64)).shape == (1, 3, 64, 64)


@pytest.fixture
def run(tmp_path):
    def invoke(*args, code=0):
        words = ["project", "--network", str(BUNDLED), "--outdir", str(tmp_path / "out"), "--backbone", "l2"]
        result = CliRunner().invoke(cli, [*words, *args], catch_exceptions=False)
        assert result.exit_code == code, result.output
        return result, tmp_path / "out"

    return invoke


def test_project_command(run, tmp_path):
    G = finetune.load(BUNDLED).G_ema
    ((_, image),) = generate(G, [1])
    Image.fromarray(image).resize((96, 64)).save(tmp_path / "face1.png")
    Image.new("RGB", (96, 64), "white").save(tmp_path / "face2.png")  # all values are in 0 to 1
    images = [str(tmp_path / f"face{seed}.png") for seed in (1, 2)]
    result, outdir = run(*images, "--steps", "2", "--tune", "1")
    names = "face1.npz face1.png face2.npz face2.png projections.json projections.png tuned.pkl"
    assert sorted(path.name for path in outdir.iterdir()) == names.split()
    facts = json.loads((outdir / "projections.json").read_text())
    assert facts["space"] == "w+" and facts["images"]["face2"]["tuned"]["rmse"] > 0
    assert "face2, tuned: distance" in result.output
    with Image.open(outdir / "projections.png") as sheet:
        assert sheet.size == (3 * 64, 2 * 64)
    tuned = finetune.load(outdir / "tuned.pkl")
    assert tuned.missing == ["G", "D"] and tuned.provenance.parent["source"] == BUNDLED.name
    load_ws(outdir / "face1.npz", G)
    words = ["generate", "--network", str(outdir / "tuned.pkl"), "--w", str(outdir / "face1.npz")]
    CliRunner().invoke(cli, [*words, "--outdir", str(tmp_path)], catch_exceptions=False)
    with Image.open(tmp_path / "w0000.png") as again, Image.open(outdir / "face1.png") as image:
        np.testing.assert_array_equal(np.asarray(again), np.asarray(image))


def test_project_errors(run, tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    for name in ("b", "a"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (64, 64)).save(tmp_path / name / "x.png")
    for images, message in (
        (["a.png"], "a.png: cannot be read (is no image of a kind that can be read). Use another image."),
        (["a/x.png", "b/x.png"], "two outputs would be named x. Rename an image"),
        (["absent.png"], "does not exist"),
    ):
        result, outdir = run(*(str(tmp_path / image) for image in images), code=2)
        assert message in result.output and not outdir.exists()
    image = tmp_path / "b" / "x.png"
    before = image.read_bytes()
    result, _ = run(str(image), "--outdir", str(image.parent), code=2)
    assert "x.png would replace an image. Use another folder" in result.output
    assert image.read_bytes() == before and len(list(image.parent.iterdir())) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "backbone", "steps", "rmse"),
    [(BUNDLED, "efficientnet-lite0", 400, 2.0), ("stylegan3-t-32.pkl", "l2", 200, 5.0)],
)
def test_project_finds_own_samples(golden_dir, path, backbone, steps, rmse):
    """The root mean square error is below `rmse` of 255 after `steps` in W, and as many in W+."""
    G = finetune.load(golden_dir / path).G_ema
    projector = Projector(G, build_distance(backbone, 3, torch.device("cpu")))
    for seed in (0, 3):
        target, _ = sample(G, seed)
        found = [projector.project(target, steps, space) for space in ("w", "w+")]
        assert max(projector.result(G, ws, target).rmse for ws in found) < rmse


def test_directions_command(tmp_path):
    words = ["--network", str(BUNDLED), "--outdir", str(tmp_path)]
    result = CliRunner().invoke(cli, ["directions", *words, "--num", "2"], catch_exceptions=False)
    assert result.exit_code == 0 and "pc2" in result.output
    with Image.open(tmp_path / "directions.png") as sheet:
        assert sheet.size == (7 * 64, 2 * 64)
        edited = np.asarray(sheet)[64:, 5 * 64 : 6 * 64]
    options = ["--seeds", "0", "--edit", "pc2=2", "--directions", str(tmp_path / "directions.npz")]
    CliRunner().invoke(cli, ["generate", *words, *options], catch_exceptions=False)
    with Image.open(tmp_path / "seed0000.png") as image:
        np.testing.assert_array_equal(np.asarray(image), edited)
    result = CliRunner().invoke(cli, ["directions", *words, "--num", "99", "--force"])
    assert result.exit_code == 2 and "99 directions of w cannot be computed" in result.output


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["stylegan2", "stylegan3-t"])
def test_project_on_a_gpu_finds_what_the_cpu_finds(family):
    G = tiny(family)
    target, _ = sample(G, 3)
    found = []
    for device in (torch.device("cpu"), torch.device("cuda")):
        projector = Projector(copy.deepcopy(G).to(device), build_distance("l2", 3, device))
        ws = projector.project(target.to(device), 25)
        found.append(projector.result(projector.G, ws, target.to(device)))
    assert found[1].rmse < 2 * found[0].rmse + 1
    assert np.abs(found[0].image.astype(int) - found[1].image).mean() < 10
