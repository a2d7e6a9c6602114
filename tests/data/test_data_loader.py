"""The endless order of items and the batches made of it."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import random
import signal
import zipfile
from itertools import islice

import numpy as np
import pytest
import torch

from finetune.data import ImageSet, InfiniteSampler, build_loader, loader, workers
from finetune.errors import DataError


def take(sampler, n):
    return list(islice(sampler, n))


def test_sampler_every_item_once_per_epoch():
    order = take(InfiniteSampler(7, seed=3), 70)
    epochs = [order[i : i + 7] for i in range(0, 70, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 5, "epochs differ"


def test_sampler_depends_on_seed():
    orders = {seed: tuple(take(InfiniteSampler(50, seed=seed), 50)) for seed in (0, 1, 2**32, 2**40)}
    assert len(set(orders.values())) == 4
    assert tuple(take(InfiniteSampler(50, seed=1), 50)) == orders[1]


def test_sampler_order_is_frozen():
    # A run continues years later: the order may not depend on the versions of the libraries.
    assert take(InfiniteSampler(8, seed=7), 16) == [1, 5, 2, 6, 4, 3, 7, 0, 2, 7, 3, 5, 0, 6, 4, 1]


@pytest.mark.parametrize("replicas", [2, 3])
def test_sampler_replicas_share_one_stream(replicas):
    whole = take(InfiniteSampler(5, seed=1), 30 * replicas)
    for rank in range(replicas):
        part = take(InfiniteSampler(5, rank=rank, num_replicas=replicas, seed=1), 30)
        assert part == whole[rank::replicas]


@pytest.mark.parametrize("position", [0, 1, 6, 7, 8, 100])
def test_sampler_resumes(position):
    whole = take(InfiniteSampler(7, seed=3), 120)
    first = InfiniteSampler(7, seed=3)
    take(first, position)
    second = InfiniteSampler(7, seed=3)
    second.load_state_dict({**first.state_dict(), "shuffle": True})  # as older versions wrote it
    assert take(second, 10) == whole[position : position + 10]


def test_sampler_refuses_state_of_another_order():
    state = InfiniteSampler(7, seed=3).state_dict()
    for other in (InfiniteSampler(8, seed=3), InfiniteSampler(7, seed=4)):
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
def test_loader_batches(eight, two_cores, kind, cache_bytes, num_workers):
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
def test_loader_resumes_after_yielded_batches(eight, two_cores, cache_bytes, num_workers):
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


def test_loader_replicas_get_different_images(eight):
    images = ImageSet(eight(), resolution=8, channels=3)
    parts = [build(images, batch_size=4, rank=rank, num_replicas=2) for rank in (0, 1)]
    seen = torch.cat([next(part)[0] for part in parts])
    assert len({bytes(image.numpy()) for image in seen}) == 8
    assert parts[0].state_dict()["position"] == parts[1].state_dict()["position"] == 8


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_keeps_messages_of_errors(eight, two_cores, num_workers):
    path = eight()
    batches = build(ImageSet(path, resolution=8, channels=3), num_workers, cache_bytes=0)
    for i in range(8):
        (path / f"{'ab'[i // 4]}/{i}.png").write_bytes(b"junk")
    with pytest.raises(DataError) as caught:
        next(batches)
    assert str(caught.value).startswith(str(path)) and "Traceback" not in str(caught.value)
    assert "Neither can 8 replacements" in str(caught.value) and "--resume" in caught.value.hint
    batches.close()


def test_loader_close_ends_workers(eight, two_cores):
    batches = build(ImageSet(eight(), resolution=8, channels=3), 2, cache_bytes=0)
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    batches.close()
    assert multiprocessing.active_children() == []


def test_loader_pickles_for_spawned_workers(eight):
    batches = build(ImageSet(eight(".zip"), resolution=8, channels=3), cache_bytes=0)
    next(batches)
    items, collate = pickle.loads(pickle.dumps((batches._loader.dataset, batches._loader.collate_fn)))
    assert torch.equal(collate([items[2]])[0][0], torch.from_numpy(items[2][0]))


def test_loader_keeps_global_random_state(eight, two_cores):
    images = ImageSet(eight(), resolution=8, channels=3)
    states = [torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()]
    for cache_bytes in (0, 1 << 20):
        next(build(images, cache_bytes=cache_bytes))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1]) and random.getstate() == states[2]


def test_loader_parallel_preload_is_equal(eight, two_cores, monkeypatch):
    monkeypatch.setattr(workers, "PARALLEL_FROM", 1)
    images, alone = (ImageSet(eight(".zip"), resolution=8, channels=3) for _ in range(2))
    assert images.preload(workers=2) and alone.preload()
    assert all(np.array_equal(images[i][0], alone[i][0]) for i in range(8))


@pytest.fixture
def forty(write_set, encode, noise):
    """A folder, or a zip, of forty 8×8 images; image i is gray i everywhere."""

    def write(kind=""):
        files = {f"{i:02}.png": encode(np.full((8, 8), i, np.uint8)) for i in range(40)}
        return write_set(files, f"forty{kind}")

    return write


def lose(path, number, how):
    """Make one image of a folder unreadable."""
    file = path / f"{number:02}.png"
    if how == "deleted":
        file.unlink()
    elif how == "cut short":
        file.write_bytes(file.read_bytes()[:50])
    elif how == "a folder":
        file.unlink()
        file.mkdir()
    else:
        file.unlink()
        file.symlink_to(file)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("how", ["deleted", "cut short", "a folder", "a loop"])
def test_loader_replaces_and_counts_lost_images(forty, two_cores, caplog, num_workers, how):
    path = forty()
    images = ImageSet(path, resolution=8, channels=1)
    batches = build(images, num_workers, cache_bytes=0, batch_size=4)
    lose(path, 7, how)
    with caplog.at_level("WARNING", "finetune.data"):
        seen = [int(value) for _ in range(20) for value in next(batches)[0][:, 0, 0, 0]]
    state = batches.state_dict()
    batches.close()
    order = take(InfiniteSampler(40, seed=1), 80)
    stand_in = seen[order.index(7)]
    assert stand_in != 7 and seen == [stand_in if item == 7 else item for item in order]
    assert batches.unreadable == state["unreadable"] == 2
    assert len(caplog.messages) == 1 and f"{path}: 07.png " in caplog.messages[0]
    assert ("is cut short: damaged" if how == "cut short" else "cannot be read") in caplog.messages[0]

    again = build(
        ImageSet(path, resolution=8, channels=1) if how == "cut short" else images, 0, cache_bytes=0
    )
    again.load_state_dict({**state, "position": 0})
    assert [int(next(again)[0][0, 0, 0, 0]) for _ in range(10)] == seen[:30:3], "the same one stands in"
    assert again.unreadable >= 2


def test_loader_stops_if_too_many_images_are_lost(forty, two_cores):
    path = forty()
    batches = build(ImageSet(path, resolution=8, channels=1), cache_bytes=0, batch_size=4)
    for number in range(4):  # a tenth is allowed
        lose(path, number, "deleted")
    for _ in range(30):
        next(batches)
    assert batches.unreadable == 12
    lose(path, 4, "deleted")
    with pytest.raises(DataError, match=r"5 of 40 images of this epoch .* 10%.*No such file") as caught:
        for _ in range(20):
            next(batches)
    assert "--resume" in caught.value.hint


# A worker that opens the zip only now finds none.
CUT_OFF = r"forty\.zip: \d\d\.png cannot be read: (is damaged inside the zip|the zip cannot be opened)"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_truncated_zip_stops_with_message(forty, two_cores, num_workers):
    path = forty(".zip")
    batches = build(ImageSet(path, resolution=8, channels=1), num_workers, cache_bytes=0, batch_size=4)
    next(batches)
    with open(path, "r+b") as file:
        file.truncate(60)
    with pytest.raises(DataError, match=CUT_OFF):
        for _ in range(20):
            next(batches)
    batches.close()


def test_loader_replaced_zip_is_read_from_open_handle(forty, tmp_path):
    path = forty(".zip")
    images = ImageSet(path, resolution=8, channels=1)
    batches = build(images, cache_bytes=0, batch_size=4)
    first = next(batches)[0]
    other = tmp_path / "other.zip"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("99.png", b"")
    other.replace(path)
    assert [len(next(batches)[0]) for _ in range(10)] == [4] * 10 and batches.unreadable == 0
    opened_later = build(pickle.loads(pickle.dumps(images)), cache_bytes=0, batch_size=4)
    with pytest.raises(DataError, match="is no longer in the zip"):
        next(opened_later)
    assert first.shape == (4, 1, 8, 8)


def test_loader_loss_limit_is_shared_by_ranks(forty):
    path = forty()
    batches = build(
        ImageSet(path, resolution=8, channels=1), batch_size=4, rank=1, num_replicas=2, cache_bytes=0
    )
    # A tenth of an epoch is four items, of which two fall to each of two processes.
    for number in take(InfiniteSampler(40, seed=1), 8):
        lose(path, number, "deleted")
    with pytest.raises(DataError, match=r"4 of 40 images of this epoch"):
        next(batches)


def dying(numbers, *, after):
    """A `start` whose workers die after so many items, again and again; and how often it was called."""
    starts = []

    def start():
        starts.append(len(numbers))
        for _ in range(after):
            yield len(numbers)
        raise RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")

    return start, starts


def test_loader_restarts_dead_workers(caplog):
    done = []
    start, starts = dying(done, after=1)
    items = workers.restart_dead_workers(start)
    with caplog.at_level("WARNING", "finetune.data"):
        for _ in range(5):
            done.append(next(items))
    assert done == [0, 1, 2, 3, 4] and starts == [0, 1, 2, 3, 4]
    assert all("(DataLoader worker (pid(s) 7) exited unexpectedly)" in text for text in caplog.messages)


def test_loader_gives_up_on_workers_that_die_at_once(caplog):
    start, starts = dying([], after=0)
    with pytest.raises(DataError, match=r"died 4 times in a row .*pid\(s\) 7") as caught:
        next(workers.restart_dead_workers(start))
    assert "--workers 0" in caught.value.hint and len(starts) == 4


def test_loader_error_inside_worker_is_raised():
    def start():
        raise ConnectionError("Caught ConnectionError in DataLoader worker process 0.")
        yield

    with pytest.raises(ConnectionError):
        next(workers.restart_dead_workers(start))


def test_loader_keeps_signal_handlers(eight, two_cores):
    before = signal.getsignal(signal.SIGCHLD)
    batches = build(ImageSet(eight(), resolution=8, channels=3), 2, cache_bytes=0)
    next(batches)
    assert signal.getsignal(signal.SIGCHLD) is before
    for process in multiprocessing.active_children():
        os.kill(process.pid, signal.SIGINT)  # as Ctrl-C does
    assert [len(next(batches)[0]) for _ in range(8)] == [3] * 8
    batches.close()


@pytest.mark.slow  # torch looks for dead workers every five seconds
def test_loader_killed_worker_changes_no_batch(forty, two_cores):
    images = ImageSet(forty(), resolution=8, channels=1)
    expected = build(images, cache_bytes=0, batch_size=4)
    batches = build(images, 2, cache_bytes=0, batch_size=4)
    for number in range(12):
        assert torch.equal(next(batches)[0], next(expected)[0])
        if number in (2, 6):
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    batches.close()
    assert multiprocessing.active_children() == []


@pytest.mark.gpu
def test_loader_pins_batches_for_cuda(eight):
    pixels, labels = next(build(ImageSet(eight(), resolution=8, channels=3, use_labels=True), device="cuda"))
    assert pixels.is_pinned() and labels.is_pinned()
