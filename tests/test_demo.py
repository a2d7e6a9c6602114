"""The demo on a stand-in: it runs whole, measures honestly, says where all is, and fails when it must."""

import dataclasses
import io
import zipfile

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from rich.console import Console

from finetune import load
from finetune.cli import cli
from finetune.config import TrainConfig
from finetune.demo import run as demo
from finetune.errors import FinetuneError, WeightsMissing
from finetune.metrics.evaluate import Distance


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Sixteen images of one dark color: any training at all moves towards them."""
    path = tmp_path_factory.mktemp("images") / "dark.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(16):
            buffer = io.BytesIO()
            Image.fromarray(np.full([32, 32, 3], [20 + i, 10, 30], dtype=np.uint8)).save(buffer, "PNG")
            archive.writestr(f"{i:02}.png", buffer.getvalue())
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory, images, golden_dir):
    """A short demo on a golden checkpoint: its folder, its result, and what it printed."""
    outdir = tmp_path_factory.mktemp("demo") / "out"
    console = Console(file=io.StringIO(), width=100)
    result = demo.run_demo(
        outdir,
        kimg=0.032,
        checkpoint=golden_dir / "stylegan2-32.pkl",
        images=images,
        num_images=16,
        console=console,
    )
    return outdir, result, console.file.getvalue()


def test_demo_writes_grids_run_and_export(finished):
    outdir, result, _ = finished
    sheets = [np.asarray(Image.open(outdir / name)) for name in ("before.png", "after.png")]
    assert [sheet.shape for sheet in sheets] == [(4 * 32, 8 * 32, 3)] * 2
    assert not np.array_equal(*sheets)
    assert result.snapshot.is_relative_to(outdir / "runs")
    exported = load(result.exported)
    assert exported.missing == []
    assert exported.provenance.nimg == 32


def test_demo_measures_before_and_after(finished):
    _, result, _ = finished
    assert set(result.before) == set(result.after) == {"random-fid", "fd-effnet"}
    assert all(result.before[name] != result.after[name] for name in result.before)
    assert result.before["random-fid"].spread > 0


def test_demo_report(finished):
    _, result, text = finished
    options = "weight auto:1, backbone efficientnet-lite0"
    assert f"Fine-tuned for 0.032 kimg with self-distillation: {options}" in text
    assert ("every distance decreased." in text) == result.improved
    for name in ("before.png", "after.png", "fine-tuned.pkl", "ATTRIBUTION.md"):
        assert name in text
    for distance in (*result.before.values(), *result.after.values()):
        assert demo.shown(distance) in text
    assert f"{result.seconds:.0f} seconds in all" in text


@pytest.mark.parametrize(
    ("effnet_after", "improved", "says"),
    [
        (1.0, True, "every distance decreased"),
        (3.0, False, "this run failed"),
        (2.0, False, "this run failed"),
    ],
)
def test_demo_fails_unless_every_distance_drops(
    monkeypatch, tmp_path, finished, effnet_after, improved, says
):
    outdir, result, _ = finished
    before = {"random-fid": Distance(2.0, 0.1), "fd-effnet": Distance(2.0)}
    after = {"random-fid": Distance(1.0, 0.1), "fd-effnet": Distance(effnet_after)}
    changed = dataclasses.replace(result, before=before, after=after)
    assert changed.improved is improved

    lines = []
    config = TrainConfig.read(result.snapshot.parent / "config.json")
    demo.report(changed, config, outdir, 8, lines.append)
    assert says in "\n".join(lines)

    monkeypatch.setattr(demo, "run_demo", lambda *args, **kwargs: changed)
    run = CliRunner().invoke(cli, ["demo", "--outdir", str(tmp_path)])
    assert run.exit_code == (0 if improved else 1)


def test_demo_without_offline_extra(monkeypatch, tmp_path):
    def missing(*args):
        raise WeightsMissing("The weights of EfficientNet-Lite0 are not installed.", hint="Install them.")

    monkeypatch.setattr(demo, "EfficientNetLite0", missing)
    lines = []
    config = demo.recipe(tmp_path, demo.CHECKPOINT, demo.IMAGES, 1.0, 0)
    changed, metrics = demo.available(config, lines.append)
    assert config.sd_backbone == "efficientnet-lite0"
    assert changed == dataclasses.replace(config, sd_backbone="l2")
    assert metrics == ("random-fid",)
    assert "not installed" in lines[0]
    assert "l2" in lines[0]


def test_demo_missing_file(tmp_path):
    with pytest.raises(FinetuneError, match=r"nothing\.pkl: missing"):
        demo.run_demo(tmp_path, checkpoint=tmp_path / "nothing.pkl", console=Console(file=io.StringIO()))


def test_demo_recipe(tmp_path):
    config = demo.recipe(tmp_path, demo.CHECKPOINT, demo.IMAGES, 0.5, 7)
    config.validate()
    assert (config.kimg, config.seed, config.outdir) == (0.5, 7, str(tmp_path / "runs"))


def test_demo_command_options(monkeypatch, tmp_path, finished):
    seen = {}

    def run_demo(outdir, **options):
        seen.update(options, outdir=outdir)
        return dataclasses.replace(finished[1], after=finished[1].before, before=finished[1].before)

    monkeypatch.setattr(demo, "run_demo", run_demo)
    args = ["demo", "--outdir", str(tmp_path), "--kimg", "0.5", "--seed", "3", "--device", "cuda:1"]
    assert CliRunner().invoke(cli, args).exit_code == 1
    assert seen == {"outdir": tmp_path, "kimg": 0.5, "seed": 3, "device": "cuda:1"}


def test_demo_checkpoint_is_small_and_ours():
    assert demo.CHECKPOINT.stat().st_size < 8_000_000
    checkpoint = load(demo.CHECKPOINT)
    assert (checkpoint.best.img_resolution, checkpoint.best.img_channels) == (64, 3)
    assert not {"G", "D", "G_ema"} & set(checkpoint.missing)
    assert checkpoint.provenance.generation == "finetune"


def test_demo_files_are_small_and_licensed():
    sets = [demo.IMAGES, demo.FOLDER / "faces-3d.zip"]
    assert sum(path.stat().st_size for path in sets) < 4_000_000
    text = (demo.FOLDER / "ATTRIBUTION.md").read_text(encoding="utf-8")
    assert all(path.name in text for path in [*sets, demo.CHECKPOINT])
    for path in sets:
        with zipfile.ZipFile(path) as archive:
            assert len([name for name in archive.namelist() if name.endswith(".png")]) >= 200
