"""A slice of scripts/fuzz: damaged and hostile files are opened or refused, and do nothing else."""

from __future__ import annotations

import importlib
import random
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def modules():
    sys.path.insert(0, str(FOLDER))
    try:
        yield {
            name: importlib.import_module(name)
            for name in ("fuzz_pickles", "pickle_mutations", "pickle_watch")
        }
    finally:
        sys.path.remove(str(FOLDER))


def test_a_slice_of_it(modules):
    """In a process of its own, with its memory limited and a canary for whatever may be executed."""
    by_hand = len(modules["pickle_mutations"].HOSTILE)
    counts = modules["fuzz_pickles"].run(by_hand + 40, seed=1, processes=1, names=["stylegan3-r-32"])
    assert counts.bad == [] and counts.outcomes.total() == by_hand + 40
    assert counts.outcomes["refused, damaged"] > 50 and counts.outcomes["refused, asks for a name"] > 20
    assert counts.outcomes["loaded"] > 0
    assert counts.grown_kib < 100 << 10


def test_an_input_is_made_of_its_number_alone(modules, golden_dir):
    mutations = modules["pickle_mutations"]
    sources = [mutations.source("tf", (golden_dir / "stylegan2-tf-32.pkl").read_bytes()[:20_000])]
    made = [[mutations.mutated(sources, random.Random(number)) for number in range(30)] for _ in range(2)]
    assert made[0] == made[1] and len({data for _, data in made[0]}) > 25
    assert all(data != sources[0].data for _, data in made[0])


def test_a_canary_hears_what_pythons_own_unpickler_would_do(modules):
    """Of this process only the names are asked: its audit hook could never be taken off again."""
    forbidden = modules["pickle_watch"].FORBIDDEN
    for event in (
        "os.system",
        "subprocess.Popen",
        "exec",
        "compile",
        "import",
        "socket.connect",
        "pickle.find_class",
    ):
        assert event.startswith(forbidden), event
    for event in ("open", "os.scandir", "sys._getframe"):
        assert not event.startswith(forbidden), event
