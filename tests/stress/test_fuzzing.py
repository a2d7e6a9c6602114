"""Damaged and hostile files are opened or refused, and do nothing else.

A small number of inputs belongs to the normal tests. `pytest -m stress` opens STRESS_INPUTS (100,000), about
25 ms each on one core, and as many led by coverage if atheris is installed.
"""

from __future__ import annotations

import os
import random

import pytest
from stress import fuzzing, pickle_mutations, pickle_watch

INPUTS = int(os.environ.get("STRESS_INPUTS", "100000"))
PROCESSES = os.cpu_count() or 1


def test_fuzz_load_short():
    """In a separate process, with its memory limited and a canary for whatever may be executed."""
    by_hand = len(pickle_mutations.HOSTILE)
    counts = fuzzing.run(by_hand + 40, seed=1, processes=1, names=["stylegan3-r-32"])
    assert counts.bad == [] and counts.outcomes.total() == by_hand + 40
    assert counts.outcomes["refused, damaged"] > 50 and counts.outcomes["refused, asks for a name"] > 20
    assert counts.outcomes["loaded"] > 0
    assert counts.grown_kib < 100 << 10


@pytest.mark.stress
def test_fuzz_load_all():
    counts = fuzzing.run(INPUTS, seed=0, processes=PROCESSES)
    print(dict(counts.outcomes), dict(counts.ways), f"slowest {counts.slowest}", f"{counts.grown_kib} KiB")
    assert counts.bad == [] and counts.outcomes.total() == INPUTS


@pytest.mark.stress
def test_fuzz_load_coverage_guided():
    pytest.importorskip("atheris", reason="atheris is not installed (pip install atheris)")
    found = fuzzing.coverage(INPUTS, seed=0)
    print(found)
    assert {name: found[name] for name in pickle_watch.BAD if found[name]} == {}
    assert sum(found[name] for name in pickle_watch.GOOD) > INPUTS / 2


def test_fuzz_input_depends_on_its_number_only(golden_dir):
    data = (golden_dir / "stylegan2-tf-32.pkl").read_bytes()[:20_000]
    sources = [pickle_mutations.source("tf", data)]
    mutated = pickle_mutations.mutated
    made = [[mutated(sources, random.Random(number)) for number in range(30)] for _ in range(2)]
    assert made[0] == made[1] and len({data for _, data in made[0]}) > 25
    assert all(data != sources[0].data for _, data in made[0])


def test_fuzz_canary_detects_execution():
    """Only the names are compared: an audit hook of this process could never be removed again."""
    forbidden = pickle_watch.FORBIDDEN
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
