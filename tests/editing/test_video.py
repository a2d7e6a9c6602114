from __future__ import annotations

import builtins
import copy

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image, ImageSequence

import finetune
from finetune.cli import cli
from finetune.demo.run import CHECKPOINT as BUNDLED
from finetune.editing.interpolate import Interpolation
from finetune.editing.latents import LatentTable, columns
from finetune.editing.video import check_kind, full_grid, morph_frames, render, walk, walk_frames
from finetune.errors import ConfigError
from finetune.sampling import generate, label_from_class


@pytest.fixture(scope="module")
def G(golden_dir):  # noqa: N802
    return finetune.load(golden_dir / "stylegan2-32.pkl").G_ema


@pytest.fixture(scope="module")
def B(G):  # noqa: N802
    """A descendant of G."""
    other = copy.deepcopy(G)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    return other


def table_of(G, seeds, **variations):
    return LatentTable(G, seeds, columns(G, [("", label_from_class(G, None))], **variations))


def frames_of(frames, grid=(1, 1)):
    return [np.asarray(image) for image in render(frames, grid)]


def images_of(G, seeds, **options):
    return [image for _, image in generate(G, seeds, **options)]


def test_walk_passes_through_its_keys_and_closes():
    keys = list(torch.randn(5, 2, 3))
    points = list(walk(keys, 4, loop=True))
    assert len(points) == 20
    for point, key in zip(points[::4], keys):
        assert torch.equal(point, key)
    fine = list(walk(keys, 400, loop=True))  # position and direction are continuous where the loop closes
    before, after = fine[0] - fine[-1], fine[1] - fine[0]
    assert torch.allclose(before, after, rtol=0.05, atol=1e-4)


def test_walk_between_two_keys_is_straight():
    a, b = torch.zeros(2), torch.ones(2)
    assert torch.allclose(torch.stack(list(walk([a, b], 4, loop=False)))[:, 0], torch.linspace(0, 1, 5))


def test_frames_of_a_walk_equal_generate(G):
    count, frames = walk_frames(table_of(G, [4, 7, 9]), 2, loop=True)
    images = frames_of(frames)
    assert count == len(images) == 6
    for image, expected in zip(images[::2], images_of(G, [4, 7, 9]), strict=True):
        np.testing.assert_array_equal(image, expected)


def test_frames_of_cells_equal_generate(G):
    count, frames = walk_frames(table_of(G, [1, 2, 3, 4]), 3, loop=False, cells=2)
    images = frames_of(frames, (2, 1))
    assert count == len(images) == 4
    np.testing.assert_array_equal(images[-1], np.concatenate(images_of(G, [2, 4]), axis=1))


def test_frames_of_a_sweep_equal_generate(G):
    count, frames = walk_frames(table_of(G, [1, 2], psis=[0.0, 1.0]), 4, loop=False)
    images = frames_of(frames, (2, 1))
    assert count == len(images) == 5
    for image, psi in ((images[0], 0), (images[2], 0.5), (images[4], 1)):
        expected = np.concatenate(images_of(G, [1, 2], truncation_psi=psi), axis=1)
        assert np.abs(image.astype(int) - expected).max() <= (1 if psi == 0.5 else 0)


@pytest.mark.parametrize("loop", [True, False])
def test_frames_of_a_morph_equal_generate(G, B, loop):
    count, frames = morph_frames(table_of(G, [5, 6]), B, 4, loop=loop)
    images = frames_of(frames, (2, 1))
    assert count == len(images) == (8 if loop else 5)
    np.testing.assert_array_equal(images[0], np.concatenate(images_of(G, [5, 6]), axis=1))
    np.testing.assert_array_equal(images[4], np.concatenate(images_of(B, [5, 6]), axis=1))
    half = Interpolation(G, B).set(0.5)
    difference = np.abs(images[2].astype(int) - np.concatenate(images_of(half, [5, 6]), axis=1))
    assert difference.max() <= 1


def test_video_needs_something_to_move_between(G, B):
    with pytest.raises(ConfigError, match="nothing to interpolate between"):
        walk_frames(table_of(G, [1]), 4, loop=True)
    with pytest.raises(ConfigError, match=r"(?s)3 seeds cannot be divided among 2 cells.*multiple of 2"):
        walk_frames(table_of(G, [1, 2, 3]), 4, loop=True, cells=2)
    with pytest.raises(ConfigError, match="one value each in a morph"):
        morph_frames(table_of(G, [1], psis=[0.5, 1]), B, 4, loop=True)


def test_video_names(monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match=r"no video suffix. Use \.mp4, \.gif"):
        check_kind(tmp_path / "a.avi", 30)
    with pytest.raises(ConfigError, match="GIF has at most 50"):
        check_kind(tmp_path / "a.gif", 60)
    real = builtins.__import__

    def without_av(name, *args, **kwargs):
        if name == "av":
            raise ImportError
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_av)
    with pytest.raises(ConfigError, match="mp4 needs PyAV, which is not installed"):
        check_kind(tmp_path / "a.mp4", 30)
    check_kind(tmp_path / "a.gif", 30)


@pytest.fixture(scope="module")
def smooth():
    """A trained network: compression changes its images little."""
    return finetune.load(BUNDLED).G_ema


@pytest.fixture
def run(golden_dir):
    def invoke(*args, code=0, network=None):
        path = golden_dir / f"{network}.pkl" if network else BUNDLED
        words = ["video", "--network", str(path), *args]
        result = CliRunner().invoke(cli, words, catch_exceptions=False)
        assert result.exit_code == code, result.output
        return result

    return invoke


@pytest.mark.parametrize("kind", ["gif", "webp"])
def test_video_written_by_pillow(run, smooth, tmp_path, kind):
    out = tmp_path / f"walk.{kind}"
    result = run("--seeds", "0-2", "--steps", "2", "--fps", "30", "--out", str(out))
    assert f"6 frames, 0.2 seconds: {out}" in result.output
    with Image.open(out) as video:
        assert video.n_frames == 6 and video.info.get("loop") == 0
        frames, delays = [], []
        for frame in ImageSequence.Iterator(video):
            frames.append(np.asarray(frame.convert("RGB")).astype(int))
            delays.append(frame.info["duration"])
    assert sum(delays) == 200 and max(delays) <= min(delays) + 10
    for frame, expected in zip(frames[::2], images_of(smooth, [0, 1, 2]), strict=True):
        assert np.abs(frame - expected).mean() < 8


def test_video_written_by_pyav(run, smooth, tmp_path):
    av = pytest.importorskip("av", reason="needs PyAV (the extra `video`)")
    out = tmp_path / "sweep.mp4"
    run("--seeds", "0-3", "--trunc", "0,1", "--steps", "3", "--fps", "10", "--out", str(out))
    with av.open(str(out)) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == 10
        frames = [frame.to_ndarray(format="rgb24").astype(int) for frame in container.decode(stream)]
    assert len(frames) == 6 and frames[0].shape == (128, 128, 3)
    top = np.concatenate(images_of(smooth, [0, 1]), axis=1)
    assert np.abs(frames[3][:64] - top).mean() < 8


def test_video_written_as_folder(run, smooth, tmp_path):
    out = tmp_path / "v1.5"  # a folder, since it is there
    out.mkdir()
    run("--seeds", "3,4", "--steps", "2", "--no-loop", "--out", str(out))
    files = sorted(out.iterdir())
    assert [path.name for path in files] == ["frame00000.png", "frame00001.png", "frame00002.png"]
    with Image.open(files[-1]) as image:
        np.testing.assert_array_equal(np.asarray(image), images_of(smooth, [4])[0])
    for name in ("frame_notes.png", "frame7.png", "frame1².png"):  # of another program
        (out / name).touch()
    run("--seeds", "3,4", "--steps", "1", "--no-loop", "--out", str(out), "--force")
    left = sorted(path.name for path in out.iterdir())
    assert left == ["frame00000.png", "frame00001.png", "frame1².png", "frame7.png", "frame_notes.png"]


def test_video_of_classes(run, tmp_path):
    out = tmp_path / "classes.webp"
    run("--seeds", "0", "--class", "0-4", "--steps", "1", "--out", str(out), network="stylegan2-64-cond")
    with Image.open(out) as video:
        assert video.n_frames == 5


def test_video_errors_leave_nothing(run, golden_dir, tmp_path):
    out = tmp_path / "x.gif"
    other = str(golden_dir / "stylegan2-64-cond.pkl")
    for words, message in (
        (["--seeds", "0"], "nothing to interpolate between"),
        (["--seeds", "0", "--class", "0", "--to", other], "no classes"),
        (["--seeds", "0", "--to", other], "the networks differ in"),
        (["--seeds", "0-4", "--trunc", "0,1", "--grid", "2x2"], "--grid 2x2 has 4 places, for 5 seeds"),
    ):
        assert message in run(*words, "--out", str(out), code=2).output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("count", "grid"), [(1, (1, 1)), (2, (2, 1)), (4, (2, 2)), (7, (3, 3)), (8, (4, 2)), (13, (4, 4))]
)
def test_grid_without_empty_places(count, grid):
    assert full_grid(count) == grid


@pytest.mark.gpu
def test_frames_on_a_gpu_are_those_of_the_cpu(G, B):
    found = []
    for device in ("cpu", "cuda"):
        first, second = (copy.deepcopy(network).to(device) for network in (G, B))
        _, walk_of = walk_frames(table_of(first, [1, 2], psis=[0.5, 1]), 2, loop=True)
        _, morph_of = morph_frames(table_of(first, [1, 2]), second, 2, loop=True)
        found.append(np.stack(frames_of(walk_of, (2, 1)) + frames_of(morph_of, (2, 1))).astype(int))
    assert np.abs(found[0] - found[1]).max() <= 4
