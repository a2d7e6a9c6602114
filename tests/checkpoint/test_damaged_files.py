"""Real files, damaged at random: each loads or is refused, within bounds of memory and without hanging."""

from __future__ import annotations

import contextlib
import pickletools
import random
import signal
import sys
import tracemalloc

import pytest

import finetune
from finetune.checkpoint.unpickle.globals import loads
from finetune.errors import CheckpointMismatch, PickleRefused

NAMES = ("stylegan2-ada-32", "stylegan2-tf-32", "stylegan3-t-32")
NUM_SAMPLES = 50  # a file
HANG_SEC = 30  # only a guard: a file takes some 20 ms


@contextlib.contextmanager
def guard():
    """Fail where the block hangs, instead of hanging with it."""

    def stop(*_):
        raise AssertionError(f"took more than {HANG_SEC} s")

    if sys.platform == "win32":
        yield
        return
    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(HANG_SEC)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


@pytest.fixture(scope="module")
def real_files(golden_dir):
    """Name -> (bytes, positions of the opcodes and of the first bytes of their arguments)."""
    files = {}
    for name in NAMES:
        data = (golden_dir / f"{name}.pkl").read_bytes()
        ends = [position for _, _, position in pickletools.genops(data)]
        spans = zip(ends, [*ends[1:], len(data)])
        files[name] = data, [i for start, end in spans for i in range(start, min(end, start + 200))]
    return files


def damage(data: bytes, places: list[int], rng: random.Random) -> bytes:
    """Up to four bits flipped, bytes replaced, removed or repeated; mostly in the opcodes, which do harm."""
    damaged = bytearray(data)
    way = rng.choice(["bits", "bits", "bytes", "remove", "repeat", "zeros"])
    for _ in range(rng.randint(1, 4)):
        at = rng.choice(places) if rng.random() < 0.9 else rng.randrange(len(data))
        at = min(at, len(damaged) - 1)
        if way == "bits":
            damaged[at] ^= 1 << rng.randrange(8)
        elif way == "bytes":
            damaged[at] = rng.randrange(256)
        elif way == "remove":
            del damaged[at : at + rng.randint(1, 20)]
        elif way == "repeat":
            damaged[at:at] = damaged[at : at + rng.randint(1, 50)]
        else:
            damaged[at : at + 8] = bytes(len(damaged[at : at + 8]))
    return bytes(damaged)


@pytest.mark.parametrize("name", NAMES)
def test_load_random_damage(name, real_files, tmp_path):
    data, places = real_files[name]
    rng = random.Random(f"damage to {name}")
    path = tmp_path / "damaged.pkl"
    outcomes = {"loaded": 0, "refused": 0, "mismatch": 0}
    for sample in range(NUM_SAMPLES):
        path.write_bytes(damage(data, places, rng))
        with guard():
            try:
                finetune.load(path)
            except PickleRefused as error:
                outcomes["refused"] += 1
                assert 0 <= error.offset <= path.stat().st_size, sample
            except CheckpointMismatch as error:
                outcomes["mismatch"] += 1
                assert error.differences, sample
            else:
                outcomes["loaded"] += 1
    assert outcomes["refused"] > NUM_SAMPLES / 2, outcomes


@pytest.mark.parametrize("name", NAMES)
def test_load_truncation(name, real_files, tmp_path):
    data, places = real_files[name]
    rng = random.Random(f"truncation of {name}")
    for end in [1, 2, 11, len(data) - 1, *rng.sample(places, 30)]:
        with guard(), pytest.raises(PickleRefused) as refusal:
            loads(data[:end])
        assert refusal.value.offset <= end and refusal.value.blocked is None


def test_load_damaged_file_memory(real_files):
    """Reading, whatever the damage, stays near the size of the file."""
    rng = random.Random("memory")
    for data, places in real_files.values():
        for _ in range(4):
            damaged = damage(data, places, rng)
            tracemalloc.start()
            with guard(), contextlib.suppress(PickleRefused):
                loads(damaged)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 2 * len(data) + (64 << 20)
