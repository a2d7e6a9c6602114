"""The images as a torch data set."""

from __future__ import annotations

import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.data import ImageSet, workers
from finetune.errors import DataError


@pytest.mark.parametrize("kind", ["", ".zip"])
def test_image_set_items_in_order_of_names(eight, noise, kind):
    images = ImageSet(eight(kind), resolution=8, channels=3)
    assert len(images) == 8 and images.names == [f"{'ab'[i // 4]}/{i}.png" for i in range(8)]
    assert (images.name, images.resolution, images.channels, images.num_classes) == ("eight", 8, 3, 0)
    for i in range(8):
        pixels, label = images[i]
        assert np.array_equal(pixels, noise(8, 8, 3, seed=i).transpose(2, 0, 1)) and label.shape == (0,)
    assert np.array_equal(images[-1][0], images[7][0])
    with pytest.raises(IndexError):
        images[8]


def test_image_set_mirror_appends_flipped_items(eight):
    plain, mirrored = (
        ImageSet(eight(), resolution=8, channels=3, mirror=m, use_labels=True) for m in (False, True)
    )
    assert len(mirrored) == 16
    for i in range(8):
        assert np.array_equal(mirrored[i][0], plain[i][0])
        assert np.array_equal(mirrored[8 + i][0], plain[i][0][:, :, ::-1])
        assert np.array_equal(mirrored[8 + i][1], plain[i][1])
    torch.from_numpy(mirrored[8][0])  # no negative strides


@pytest.mark.parametrize("preload", [False, True])
def test_image_set_items_are_writable(eight, preload):
    images = ImageSet(eight(), resolution=8, channels=3, mirror=True)
    if preload:
        assert images.preload()
    for index in (0, 8):
        before = images[index][0].copy()
        images[index][0][:] = 0
        assert np.array_equal(images[index][0], before)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_image_set_channels_follow_network(eight, channels):
    images = ImageSet(eight(), resolution=4, channels=channels, fit="crop")
    assert images[0][0].shape == (channels, 4, 4)


def test_image_set_refuses_impossible_channels_and_fits(eight):
    with pytest.raises(DataError, match="2 image channels"):
        ImageSet(eight(), resolution=8, channels=2)
    with pytest.raises(ValueError, match="squash"):
        ImageSet(eight(), resolution=8, channels=3, fit="squash")


def test_image_set_unchecked_problem_names_file(eight):
    path = eight()
    images = ImageSet(path, resolution=4, channels=3)
    with pytest.raises(DataError, match=r"a/0.png has another size: 8×8"):
        images[0]
    (path / "a/1.png").write_bytes(b"junk")
    with pytest.raises(DataError, match=r"a/1.png cannot be read"):
        images[1]


@pytest.mark.parametrize("kind", ["", ".zip"])
def test_image_set_pickles(eight, kind):
    images = ImageSet(eight(kind), resolution=8, channels=3, use_labels=True)
    images.preload()
    data = pickle.dumps(images)
    again = pickle.loads(data)
    assert len(data) < 3000, "the preloaded pixels or an open file are pickled as well"
    for i in (0, 7):
        assert all(np.array_equal(a, b) for a, b in zip(again[i], images[i]))
    assert again.content_hash() == images.content_hash()


def test_image_set_preload_reads_each_image_once(eight, monkeypatch):
    path = eight()
    images = ImageSet(path, resolution=8, channels=3, mirror=True)
    before = [images[i][0] for i in range(16)]
    assert not images.preload(8 * 3 * 8 * 8 - 1) and images.preload(8 * 3 * 8 * 8)
    shutil.rmtree(path)
    assert all(np.array_equal(images[i][0], before[i]) for i in range(16)) and images.preload(0)


def test_image_set_preload_reports_unreadable(eight):
    path = eight()
    (path / "a/2.png").write_bytes(b"junk")
    with pytest.raises(DataError, match=r"a/2\.png"):
        ImageSet(path, resolution=8, channels=3).preload()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_image_set_batches_name_the_remedy(eight, monkeypatch, num_workers):
    monkeypatch.setattr(workers, "PARALLEL_FROM", 1)
    images = ImageSet(eight(), resolution=4, channels=3)
    with pytest.raises(DataError, match=r"a/0\.png has another size") as caught:
        list(images.batches(torch.arange(4).split(2), workers=num_workers))
    assert "--fit crop" in caught.value.hint


def test_image_set_content_hash_covers_all_settings(eight, encode):
    def digest(path=None, **options):
        return ImageSet(path or eight(), **{"resolution": 8, "channels": 3, **options}).content_hash()

    base = digest()
    assert base == digest() == digest(eight(".zip")), "equal content, equal hash"
    others = [
        digest(channels=1),
        digest(mirror=True),
        digest(resolution=4),
        digest(fit="crop"),
        digest(use_labels=True),
        digest(use_labels=True, num_classes=4),
    ]
    path = eight()
    image = Image.open(path / "b/5.png").copy()
    image.putpixel((0, 0), (1, 2, 3))
    (path / "b/5.png").write_bytes(encode(image))
    others.append(digest(path))
    (path / "b/5.png").rename(path / "b/9.png")
    others.append(digest(path))
    assert len({base, *others}) == 1 + len(others)
    images = ImageSet(path, resolution=8, channels=3)
    (path / "b/9.png").unlink()
    with pytest.raises(DataError, match=r"b/9\.png"):
        images.content_hash()
