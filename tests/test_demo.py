"""The demo on a stand-in: it runs whole, measures, says where all is, and fails when it must."""

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
from finetune.metrics.evaluate import MetricValue


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


def test_demo_writes_comparison_runs_and_export(finished):
    outdir, result, _ = finished
    assert result.comparison == outdir / "comparison.png"
    page = np.asarray(Image.open(result.comparison))
    width, height = 4 * 32, 8 * 32
    assert page.shape[1:] == (3 * width + 2 * 16, 3)
    start, plain, distilled = (page[-height:, x : x + width] for x in (0, width + 16, 2 * (width + 16)))
    assert not np.array_equal(start, plain)
    assert not np.array_equal(plain, distilled)
    assert page[:-height].min() < 100 < page[:-height].mean()  # dark text on white
    runs = sorted((outdir / "runs").iterdir())
    configs = [TrainConfig.read(run / "config.json") for run in runs]
    assert [config.sd_weight.value for config in configs] == [0, 1]
    assert {config.device for config in configs} == {"cpu"}  # --device of the demo, by default
    assert result.snapshot.parent == runs[1]
    exported = load(result.exported)
    assert exported.missing == []
    assert exported.provenance.nimg == 32


def test_demo_measures_all_networks(finished):
    _, result, _ = finished
    assert list(result.distances) == ["start", "plain", "self-distillation"]
    for name in ("random-fid", "fd-effnet"):
        assert len({found[name].value for found in result.distances.values()}) == 3
    assert result.distances["start"]["random-fid"].spread > 0


def test_demo_report(finished):
    _, result, text = finished
    options = "weight auto:1, backbone efficientnet-lite0"
    assert f"Fine-tuned for 0.032 kimg without and with self-distillation ({options}" in text
    assert ("every distance decreased." in text) == result.improved
    for name in ("comparison.png", "fine-tuned.pkl", "ATTRIBUTION.md"):
        assert name in text
    for found in result.distances.values():
        assert all(demo.shown(distance) in text for distance in found.values())
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
    _, result, _ = finished
    start = {"random-fid": MetricValue(2.0, 0.1), "fd-effnet": MetricValue(2.0)}
    end = {"random-fid": MetricValue(1.0, 0.1), "fd-effnet": MetricValue(effnet_after)}
    distances = {demo.START: start, demo.PLAIN: start, demo.DISTILLED: end}
    changed = dataclasses.replace(result, distances=distances)
    assert changed.improved is improved

    lines = []
    config = TrainConfig.read(result.snapshot.parent / "config.json")
    demo.report(changed, config, 8, lines.append)
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
        start = finished[1].distances[demo.START]
        return dataclasses.replace(finished[1], distances=dict.fromkeys(finished[1].distances, start))

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
