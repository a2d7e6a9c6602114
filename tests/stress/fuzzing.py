"""Feed the pickle reader with damaged and hostile files, and count the outcomes.

Every input is opened with `finetune.load` in a separate process: Python's audit events are watched, so that
nothing in it can execute, import, start or connect unseen; memory is limited to 1 GiB above what the process
needed for the real files; it ends after ten seconds of processor time on one input, and another starts behind
it. An input is made from the seed and its number: `python tests/stress/fuzzing.py 4711` opens one alone and
prints everything about it.

    python tests/stress/fuzzing.py --inputs 126000 --coverage-inputs 100000 --out FILE.md

opens many and writes the table. Counts are kept in FILE.partial: the same command continues an ended run.
"""

from __future__ import annotations

import argparse
import collections
import json
import mmap
import multiprocessing
import multiprocessing.connection
import os
import random
import resource
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when it is run as a program

from stress import pickle_mutations as mutations
from stress.pickle_watch import BAD, GOOD, HANG_SEC, open_one, prepare, sources_of

ROOT = Path(__file__).resolve().parents[2]
WAIT_SEC = 600  # on one input, of any time
CHUNK, COVERAGE_CHUNK = 2_000, 10_000  # inputs between two notes of the counts


def make(number: int, seed: int, sources: dict[str, list[mutations.Source]]) -> tuple[str, bytes]:
    """The input of a number: hand-made ones first, then mutations."""
    made = list(mutations.HOSTILE.items())
    if number < len(made):
        return made[number]
    rng = random.Random(f"{seed}/{number}")
    chance = rng.random()
    if chance < 0.08:  # which take three times as long as their first networks
        return mutations.mutated(sources["whole"], rng)
    which = "cut" if chance < 0.65 else "tiny" if chance < 0.92 else "hostile"
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
            started = time.process_time()
            outcome, said = open_one(path, data, canary)
            sec = time.process_time() - started
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            connection.send(("end", number, outcome, name, said if outcome in BAD else "", sec, grown))
    connection.send(("done",))


SOURCES = ("stylegan", "rosinality", "tiny")


class Counts:
    """What was seen so far."""

    def __init__(self) -> None:
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.ways: collections.Counter[str] = collections.Counter()
        self.bad: list[tuple[int, str, str, str]] = []
        self.slowest, self.grown_kib = (0.0, -1, ""), 0

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.outcomes, self.ways = collections.Counter(state["outcomes"]), collections.Counter(state["ways"])
        self.bad = [tuple(item) for item in state["bad"]]  # type: ignore[misc]
        self.slowest, self.grown_kib = tuple(state["slowest"]), state["grown_kib"]

    def add(self, number: int, outcome: str, name: str, said: str, sec: float, grown: int) -> None:
        self.outcomes[outcome] += 1
        source = name.partition(": ")[0]
        self.ways[source if source.startswith(SOURCES) else "made by hand, and changed as well"] += 1
        self.slowest = max(self.slowest, (sec, number, name))
        self.grown_kib = max(self.grown_kib, grown)
        if outcome in BAD:
            self.bad.append((number, outcome, name, said))
            print(f"input {number}, {name}: {outcome}\n{said}", flush=True)


def run(
    inputs: int,
    seed: int,
    processes: int,
    names: list[str] | None = None,
    *,
    first: int = 0,
    counts: Counts | None = None,
) -> Counts:
    """All inputs from `first` in workers; one that hangs or dies is counted, and followed by another.

    names: of golden files, all by default.
    """
    counts = Counts() if counts is None else counts
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
        if worker["process"].exitcode == -signal.SIGPROF:
            outcome = "hang"
        if worker["at"] is None:
            raise RuntimeError(f"a worker does not start (exit code {worker['process'].exitcode})")
        counts.add(worker["at"], outcome, "?", f"exit code {worker['process'].exitcode}", HANG_SEC, 0)
        start(range(worker["at"] + processes, worker["numbers"].stop, processes))

    for number in range(first, first + processes):
        start(range(number, inputs, processes))
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
            if worker["at"] is not None and time.monotonic() - worker["since"] > WAIT_SEC:
                lost(connection, "hang")
        if time.monotonic() - shown > 30:
            shown = time.monotonic()
            print(f"{counts.outcomes.total():,} inputs: {dict(counts.outcomes)}", flush=True)
    return counts


# Led by coverage.

SLOTS = (*GOOD, *BAD)
KEPT = "inputs kept for what they reached"


def coverage(inputs: int, seed: int, kept: Path | None = None) -> dict[str, int]:
    """Let atheris search for inputs that reach new code of `finetune.checkpoint`, in a separate process.

    kept: folder of inputs that earlier calls found; it is filled.
    """
    with tempfile.TemporaryDirectory() as folder:
        corpus, counts = kept or Path(folder) / "corpus", Path(folder) / "counts"
        corpus.mkdir(parents=True, exist_ok=True)
        sources = sources_of(["stylegan2-tf-32"])
        for index, each in enumerate([*sources["hostile"], *sources["tiny"]]):
            (corpus / str(index)).write_bytes(each.file(each.data))
        counts.write_bytes(bytes(8 * len(SLOTS)))
        words = [sys.executable, __file__, "--guided", str(counts), str(seed), str(corpus)]
        words += [f"-runs={inputs}", f"-seed={seed + 1}", f"-timeout={WAIT_SEC}", "-max_len=60000"]
        words += [f"-artifact_prefix={folder}/", "-verbosity=0", "-rss_limit_mb=0"]
        code = subprocess.run(words, cwd=ROOT).returncode
        found = dict(zip(SLOTS, struct.unpack(f"<{len(SLOTS)}q", counts.read_bytes())))
        artifacts = [path for path in Path(folder).iterdir() if path.name.startswith(("crash-", "timeout-"))]
        if code == -signal.SIGPROF:
            artifacts = list(Path(folder).glob("*/input.pkl"))
        for path in artifacts:
            print(f"{path.name}: {path.read_bytes()[:2000]!r}")
        if code and not any(found.values()):
            raise RuntimeError(f"atheris does not start (exit code {code})")
        if code or artifacts:
            is_hang = code == -signal.SIGPROF or any(path.name.startswith("timeout") for path in artifacts)
            found["hang" if is_hang else "crash"] += 1
        found[KEPT] = len(list(corpus.iterdir()))
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


# Measured.


def measure(options: argparse.Namespace) -> bool:
    """Open many inputs and write the table; return whether all outcomes are good."""
    folder = options.out.with_suffix(".partial")
    folder.mkdir(parents=True, exist_ok=True)
    notes = folder / "counts.json"
    counts, guided_counts, sec = Counts(), collections.Counter[str](), 0.0
    if notes.is_file():
        state = json.loads(notes.read_text())
        counts.load_state_dict(state["counts"])
        guided_counts, sec = collections.Counter(state["guided"]), state["sec"]
    started = time.monotonic() - sec

    def note() -> None:
        state = {"counts": counts.state_dict(), "guided": guided_counts, "sec": time.monotonic() - started}
        notes.with_suffix(".new").write_text(json.dumps(state))
        notes.with_suffix(".new").replace(notes)

    while (first := counts.outcomes.total()) < options.inputs:
        stop = min(first + CHUNK, options.inputs)
        run(stop, options.seed, options.processes, first=first, counts=counts)
        note()
    while (first := sum(guided_counts[name] for name in SLOTS)) < options.coverage_inputs:
        if any(guided_counts[name] for name in BAD):  # atheris ends at the first
            break
        found = coverage(min(COVERAGE_CHUNK, options.coverage_inputs - first), first, folder / "corpus")
        kept = found.pop(KEPT)
        guided_counts.update(found)
        guided_counts[KEPT] = kept
        note()
    options.out.write_text(as_page(options, counts, guided_counts, time.monotonic() - started))
    shutil.rmtree(folder)
    return not any(counts.outcomes[name] + guided_counts[name] for name in BAD)


def as_page(
    options: argparse.Namespace, counts: Counts, guided_counts: collections.Counter[str], sec: float
) -> str:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import torch
    from measuring import machine, table

    facts = machine(torch.device("cpu"))
    versions = f"Python {facts['python']}, torch {facts['torch']}, finetune {facts['finetune']}"
    columns = [counts.outcomes, guided_counts]
    rows = [[name, *(f"{column[name]:,}" for column in columns)] for name in SLOTS]
    rows += [["inputs in all", *(f"{sum(column[name] for name in SLOTS):,}" for column in columns)]]
    slowest, number, name = counts.slowest
    figures = [
        ["most memory above that of the real files", f"{counts.grown_kib / 1024:.0f} MiB"],
        ["slowest input, processor time", f"{slowest:.2f} s (number {number}, {name})"],
        ["inputs that atheris kept", guided_counts[KEPT]],
    ]
    parts = [
        "# Fuzzing the pickle reader",
        f"`python {shlex.join([os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]])}`",
        f"{facts['device']} ({facts['instructions']}); {versions}; seed {options.seed}; {facts['date']}. "
        f"It took {sec:,.0f} s.",
        table(["outcome", "mutated and made by hand", "led by coverage"], rows),
        table(["", ""], figures),
        table(["made from", "inputs"], [[name, f"{num:,}"] for name, num in counts.ways.most_common()]),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    if sys.argv[1:2] == ["--guided"]:  # started by `coverage`
        return guided(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
    parser = argparse.ArgumentParser(description="Open one input and print its outcome, or many.")
    parser.add_argument("number", type=int, nargs="?", help="of the one input")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--inputs", type=int, default=0, help="made by hand and mutated, for --out")
    parser.add_argument("--coverage-inputs", type=int, default=0, help="led by coverage (needs atheris)")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", type=Path, help="table of the outcomes of many (.md)")
    options = parser.parse_args()
    if options.out:
        sys.exit(0 if measure(options) else 1)
    if options.number is None:
        parser.error("Give the number of an input, or --out.")
    sources = sources_of()
    name, data = make(options.number, options.seed, sources)
    with tempfile.TemporaryDirectory() as folder:
        print(name, len(data), *open_one(Path(folder) / "input.pkl", data, prepare(sources)), sep="\n")


if __name__ == "__main__":
    main()
