"""Feed the pickle reader with damaged and hostile files, and count the outcomes.

Every input is opened with `finetune.load` in a separate process: Python's audit events are watched, so that
nothing in it can execute, import, start or connect unseen; memory is limited to 1 GiB above what the process
needed for the real files; the parent kills it after ten seconds on one input, and starts another behind it.
An input is made from the seed and its number: `python tests/stress/fuzzing.py 4711` opens one alone and
prints everything about it.
"""

from __future__ import annotations

import argparse
import collections
import mmap
import multiprocessing
import multiprocessing.connection
import os
import random
import resource
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when it is run as a program

from stress import pickle_mutations as mutations
from stress.pickle_watch import BAD, GOOD, open_one, prepare, sources_of

ROOT = Path(__file__).resolve().parents[2]
HANG_SEC = 10


def make(number: int, seed: int, sources: dict[str, list[mutations.Source]]) -> tuple[str, bytes]:
    """The input of a number: hand-made ones first, then mutations."""
    made = list(mutations.HOSTILE.items())
    if number < len(made):
        return made[number]
    rng = random.Random(f"{seed}/{number}")
    chance = rng.random()
    if chance < 0.08:  # which take three times as long as their first networks
        return mutations.mutated(sources["whole"], rng)
    which = "cut" if chance < 0.8 else "tiny" if chance < 0.92 else "hostile"
    return mutations.mutated(sources[which], rng)


def work(connection: Any, numbers: range, seed: int, names: list[str] | None) -> None:
    """A worker: says each number before and after it."""
    sources = sources_of(names)
    canary = prepare(sources)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    connection.send(("ready", before))
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        path = Path(folder) / "input.pkl"
        for number in numbers:
            name, data = make(number, seed, sources)
            connection.send(("begin", number))
            started = time.monotonic()
            outcome, said = open_one(path, data, canary)
            sec = time.monotonic() - started
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            connection.send(("end", number, outcome, name, said if outcome in BAD else "", sec, grown))
    connection.send(("done",))


class Counts:
    """What was seen so far."""

    def __init__(self) -> None:
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.ways: collections.Counter[str] = collections.Counter()
        self.bad: list[tuple[int, str, str, str]] = []
        self.slowest, self.grown_kib = (0.0, -1, ""), 0

    def add(self, number: int, outcome: str, name: str, said: str, sec: float, grown: int) -> None:
        self.outcomes[outcome] += 1
        source = name.partition(": ")[0]
        self.ways[
            source if source.startswith(("stylegan", "tiny")) else "made by hand, and changed as well"
        ] += 1
        self.slowest = max(self.slowest, (sec, number, name))
        self.grown_kib = max(self.grown_kib, grown)
        if outcome in BAD:
            self.bad.append((number, outcome, name, said))
            print(f"input {number}, {name}: {outcome}\n{said}", flush=True)


def run(inputs: int, seed: int, processes: int, names: list[str] | None = None) -> Counts:
    """All inputs in workers; one that hangs or dies is counted, and followed by another.

    names: of golden files, all by default.
    """
    counts = Counts()
    context = multiprocessing.get_context("spawn")
    workers: dict[Any, dict[str, Any]] = {}

    def start(numbers: range) -> None:
        if not len(numbers):
            return
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(theirs, numbers, seed, names), daemon=True)
        process.start()
        theirs.close()
        workers[ours] = {"process": process, "numbers": numbers, "at": None, "since": time.monotonic()}

    def lost(connection: Any, outcome: str) -> None:
        worker = workers.pop(connection)
        worker["process"].kill()
        worker["process"].join()
        if worker["at"] is None:
            raise RuntimeError(f"a worker does not start (exit code {worker['process'].exitcode})")
        counts.add(worker["at"], outcome, "?", f"exit code {worker['process'].exitcode}", HANG_SEC, 0)
        start(range(worker["at"] + processes, worker["numbers"].stop, processes))

    for first in range(processes):
        start(range(first, inputs, processes))
    shown = time.monotonic()
    while workers:
        for connection in multiprocessing.connection.wait(list(workers), timeout=0.5):
            worker = workers[connection]
            try:
                message = connection.recv()
            except (EOFError, OSError):
                lost(connection, "crash")
                continue
            worker["since"] = time.monotonic()
            if message[0] == "begin":
                worker["at"] = message[1]
            elif message[0] == "end":
                counts.add(*message[1:])
            elif message[0] == "done":
                workers.pop(connection)["process"].join()
        for connection, worker in list(workers.items()):
            if worker["at"] is not None and time.monotonic() - worker["since"] > HANG_SEC:
                lost(connection, "hang")
        if time.monotonic() - shown > 30:
            shown = time.monotonic()
            print(f"{counts.outcomes.total():,} inputs: {dict(counts.outcomes)}", flush=True)
    return counts


# Led by coverage.

SLOTS = (*GOOD, *BAD)


def coverage(inputs: int, seed: int) -> dict[str, int]:
    """Let atheris search for inputs that reach new code of `finetune.checkpoint`, in a separate process."""
    with tempfile.TemporaryDirectory() as folder:
        corpus, counts = Path(folder) / "corpus", Path(folder) / "counts"
        corpus.mkdir()
        sources = sources_of(["stylegan2-tf-32"])
        for index, each in enumerate([*sources["hostile"], *sources["tiny"]]):
            (corpus / str(index)).write_bytes(each.data)
        counts.write_bytes(bytes(8 * len(SLOTS)))
        words = [sys.executable, __file__, "--guided", str(counts), "--seed", str(seed), str(corpus)]
        words += [f"-runs={inputs}", f"-seed={seed + 1}", f"-timeout={HANG_SEC}", "-max_len=60000"]
        words += [f"-artifact_prefix={folder}/", "-verbosity=0", "-rss_limit_mb=0"]
        code = subprocess.run(words, cwd=ROOT).returncode
        found = dict(zip(SLOTS, struct.unpack(f"<{len(SLOTS)}q", counts.read_bytes())))
        artifacts = [path for path in Path(folder).iterdir() if path.name.startswith(("crash-", "timeout-"))]
        for path in artifacts:
            print(f"{path.name}: {path.read_bytes()[:2000]!r}")
        if code or artifacts:
            found["hang" if any(path.name.startswith("timeout") for path in artifacts) else "crash"] += 1
        found["inputs kept for what they reached"] = len(list(corpus.iterdir()))
    return found


def guided(counts: Path, seed: int, arguments: list[str]) -> None:
    """The process of atheris: never returns."""
    import atheris

    with atheris.instrument_imports(include=["finetune.checkpoint"]):
        import finetune.checkpoint.load  # noqa: F401
    sources = sources_of(["stylegan2-tf-32", "stylegan2-ada-32"])
    canary = prepare(sources)
    with counts.open("r+b") as stream:
        table = mmap.mmap(stream.fileno(), 0)
    path = Path(tempfile.mkdtemp(dir=counts.parent)) / "input.pkl"

    def test(data: bytes) -> None:
        outcome, said = open_one(path, data, canary)
        place = 8 * SLOTS.index(outcome)
        struct.pack_into("<q", table, place, struct.unpack_from("<q", table, place)[0] + 1)
        if outcome in BAD:
            raise AssertionError(f"{outcome}\n{said}")

    def change(data: bytes, max_size: int, number: int) -> bytes:
        rng = random.Random(number)
        parsed = mutations.source("found", bytes(data)) if rng.random() < 0.5 else None
        if parsed is None or not parsed.outer:
            return atheris.Mutate(data, max_size)
        return mutations.mutated([parsed, rng.choice([*sources["hostile"], *sources["tiny"]])], rng)[1][
            :max_size
        ]

    atheris.Setup([sys.argv[0], *arguments], test, custom_mutator=change)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description="Open one input, and print its outcome.")
    parser.add_argument("number", type=int, nargs="?")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guided", type=Path, help=argparse.SUPPRESS)
    options, rest = parser.parse_known_args()
    if options.guided:
        return guided(options.guided, options.seed, rest)
    if options.number is None:
        parser.error("which input? Give its number.")
    sources = sources_of()
    name, data = make(options.number, options.seed, sources)
    with tempfile.TemporaryDirectory() as folder:
        print(name, len(data), *open_one(Path(folder) / "input.pkl", data, prepare(sources)), sep="\n")


if __name__ == "__main__":
    main()
