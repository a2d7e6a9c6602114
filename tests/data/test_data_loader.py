"""The endless order of items and the batches made of it."""

from __future__ import annotations

import multiprocessing
import pickle
import random
from itertools import islice

import numpy as np
import pytest
import torch

from finetune.data import ImageSet, InfiniteSampler, build_loader, loader, workers
from finetune.errors import DataError


def take(sampler, n):
    return list(islice(sampler, n))


def test_every_item_exactly_once_an_epoch():
    order = take(InfiniteSampler(7, seed=3), 70)
    epochs = [order[i : i + 7] for i in range(0, 70, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 5, "epochs differ"


def test_the_seed_decides():
    orders = {seed: tuple(take(InfiniteSampler(50, seed=seed), 50)) for seed in (0, 1, 2**32, 2**40)}
    assert len(set(orders.values())) == 4
    assert tuple(take(InfiniteSampler(50, seed=1), 50)) == orders[1]
    assert take(InfiniteSampler(3, shuffle=False), 7) == [0, 1, 2, 0, 1, 2, 0]


def test_the_order_is_fixed_for_all_time():
    # A run continues years later: the order may not depend on the versions of the libraries.
    assert take(InfiniteSampler(8, seed=7), 16) == [1, 5, 2, 6, 4, 3, 7, 0, 2, 7, 3, 5, 0, 6, 4, 1]


@pytest.mark.parametrize("replicas", [2, 3])
def test_replicas_share_one_stream(replicas):
    whole = take(InfiniteSampler(5, seed=1), 30 * replicas)
    for rank in range(replicas):
        part = take(InfiniteSampler(5, rank=rank, num_replicas=replicas, seed=1), 30)
        assert part == whole[rank::replicas]


@pytest.mark.parametrize("position", [0, 1, 6, 7, 8, 100])
def test_sampler_goes_on_where_it_was(position):
    whole = take(InfiniteSampler(7, seed=3), 120)
    first = InfiniteSampler(7, seed=3)
    take(first, position)
    second = InfiniteSampler(7, seed=3)
    second.load_state_dict(first.state_dict())
    assert take(second, 10) == whole[position : position + 10]


def test_state_of_another_order_is_refused():
    state = InfiniteSampler(7, seed=3).state_dict()
    for other in (
        InfiniteSampler(8, seed=3),
        InfiniteSampler(7, seed=4),
        InfiniteSampler(7, seed=3, shuffle=False),
    ):
        with pytest.raises(ValueError, match="this sampler has"):
            other.load_state_dict(state)
    for wrong in ({"num_items": 0}, {"num_items": 5, "rank": 2, "num_replicas": 2}):
        with pytest.raises(ValueError):
            InfiniteSampler(**wrong)


@pytest.fixture
def two_cores(monkeypatch):
    monkeypatch.setattr(loader, "available_cores", lambda: 2)
    monkeypatch.setattr(workers, "available_cores", lambda: 2)


def build(images, num_workers=0, **options):
    return build_loader(
        images, **{"batch_size": 3, "workers": num_workers, "seed": 1, "device": "cpu", **options}
    )


@pytest.mark.parametrize("cache_bytes, num_workers", [(0, 0), (0, 2), (1 << 20, 2)])
@pytest.mark.parametrize("kind", ["", ".zip"])
def test_batches(eight, two_cores, kind, cache_bytes, num_workers):
    images = ImageSet(eight(kind), resolution=8, channels=3, use_labels=True, mirror=True)
    batches = build(images, num_workers, cache_bytes=cache_bytes)
    order = InfiniteSampler(16, seed=1)
    try:
        for pixels, labels in islice(batches, 12):  # more than two epochs
            assert pixels.shape == (3, 3, 8, 8) and pixels.dtype == torch.uint8
            assert labels.shape == (3, 3) and labels.dtype == torch.float32
            for k, index in enumerate(take(order, 3)):
                expected, label = images[index]
                assert np.array_equal(pixels[k], expected) and np.array_equal(labels[k], label)
    finally:
        batches.close()


@pytest.mark.parametrize("cache_bytes, num_workers", [(0, 0), (0, 2), (1 << 20, 0)])
def test_loader_goes_on_after_what_was_handed_out(eight, two_cores, cache_bytes, num_workers):
    images = ImageSet(eight(), resolution=8, channels=1)
    first = build(images, num_workers, cache_bytes=cache_bytes)
    whole = [next(first)[0] for _ in range(4)]
    state = first.state_dict()
    whole += [next(first)[0] for _ in range(3)]
    first.close()
    following = next(first)[0]  # after closing, the order goes on too
    first.close()
    second = build(images, cache_bytes=cache_bytes)
    second.load_state_dict(state)
    assert state["position"] == 12
    for expected in (*whole[4:], following):
        assert torch.equal(next(second)[0], expected)


def test_replicas_get_different_pictures(eight):
    images = ImageSet(eight(), resolution=8, channels=3)
    parts = [build(images, batch_size=4, rank=rank, num_replicas=2) for rank in (0, 1)]
    seen = torch.cat([next(part)[0] for part in parts])
    assert len({bytes(picture.numpy()) for picture in seen}) == 8
    assert parts[0].state_dict()["position"] == parts[1].state_dict()["position"] == 8


@pytest.mark.parametrize("num_workers", [0, 2])
def test_problems_keep_their_own_words(eight, two_cores, num_workers):
    path = eight()
    batches = build(ImageSet(path, resolution=8, channels=3), num_workers, cache_bytes=0)
    for i in range(8):
        (path / f"{'ab'[i // 4]}/{i}.png").write_bytes(b"junk")
    with pytest.raises(DataError) as caught:
        next(batches)
    assert str(caught.value).startswith(str(path)) and "Traceback" not in str(caught.value)
    assert "changed since" in caught.value.hint
    batches.close()


def test_workers_end_with_the_loader(eight, two_cores):
    batches = build(ImageSet(eight(), resolution=8, channels=3), 2, cache_bytes=0)
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    batches.close()
    assert multiprocessing.active_children() == []


def test_what_a_spawned_worker_needs_can_be_pickled(eight):
    batches = build(ImageSet(eight(".zip"), resolution=8, channels=3), cache_bytes=0)
    next(batches)
    items, collate = pickle.loads(pickle.dumps((batches._loader.dataset, batches._loader.collate_fn)))
    assert torch.equal(collate([items[2]])[0][0], torch.from_numpy(items[2][0]))


def test_the_global_random_state_is_left_alone(eight, two_cores):
    images = ImageSet(eight(), resolution=8, channels=3)
    states = [torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()]
    for cache_bytes in (0, 1 << 20):
        next(build(images, cache_bytes=cache_bytes))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1]) and random.getstate() == states[2]


def test_large_sets_are_preloaded_in_parallel_and_the_same(eight, two_cores, monkeypatch):
    monkeypatch.setattr(workers, "PARALLEL_FROM", 1)
    images, alone = (ImageSet(eight(".zip"), resolution=8, channels=3) for _ in range(2))
    assert images.preload(workers=2) and alone.preload()
    assert all(np.array_equal(images[i][0], alone[i][0]) for i in range(8))


@pytest.mark.gpu
def test_batches_for_cuda_are_pinned(eight):
    pixels, labels = next(build(ImageSet(eight(), resolution=8, channels=3, use_labels=True), device="cuda"))
    assert pixels.is_pinned() and labels.is_pinned()
