"""Feed the pickle reader with damaged and hostile files, and count what becomes of each.

    scripts/fuzz --inputs 100000 --coverage-inputs 200000 --out benchmarks/results/fuzz_pickles_<...>.md

Every input is opened with `finetune.load` in a process of its own kind: Python's audit events are watched, so
that nothing in it can execute, import, start or connect unseen; memory is limited to 1 GiB above what the
process needed for the real files; a parent kills it after ten seconds on one input, and goes on behind it.
An input is made from the seed and its number (`--only 4711` opens one alone and says all about it). Then
atheris, where it is installed, looks for inputs that reach further, led by what of `finetune.checkpoint` ran.
Exits with 1 where anything but loading and the refusals of `finetune.errors` was seen.
"""

from __future__ import annotations

import argparse
import collections
import importlib.util
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

import pickle_mutations as mutations
from pickle_watch import BAD, GOOD, open_one, prepare, sources_of

ROOT = Path(__file__).resolve().parents[1]
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


def coverage(inputs: int, seed: int) -> dict[str, int] | None:
    """Let atheris look for inputs, in a process of its own; None where it is not installed."""
    if importlib.util.find_spec("atheris") is None:
        print("atheris is not installed (pip install atheris): no inputs led by coverage.")
        return None
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
        import finetune.checkpoint.opening  # noqa: F401
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


def report(options: argparse.Namespace, counts: Counts, found: dict[str, int] | None, sec: float) -> None:
    """The tables, on the console and, where asked for, in a file."""
    import torch
    from measuring import machine, table, write_report

    rows = [[name, f"{counts.outcomes[name]:,}", f"{found[name]:,}" if found else "-"] for name in SLOTS]
    total = sum(found[name] for name in SLOTS) if found else 0
    rows.append(["inputs in all", f"{counts.outcomes.total():,}", f"{total:,}" if found else "-"])
    facts = [
        ["most memory above that of the real files", f"{counts.grown_kib / 1024:.0f} MiB"],
        ["slowest input", f"{counts.slowest[0]:.2f} s (number {counts.slowest[1]}, {counts.slowest[2]})"],
    ]
    if found:
        facts.append(["inputs that atheris kept", f"{found['inputs kept for what they reached']:,}"])
    by_source = [[name, f"{count:,}"] for name, count in counts.ways.most_common()]
    texts = [
        table(["outcome", "mutated and made by hand", "led by coverage"], rows),
        table(["", ""], facts),
        table(["made from", "inputs"], by_source),
    ]
    print("\n\n".join(texts))
    if options.out:
        settings = {
            name: str(value) for name, value in vars(options).items() if name not in ("out", "guided")
        }
        record = {
            "machine": machine(torch.device("cpu")),
            "settings": settings,
            "sec": round(sec),
            "bad": counts.bad,
        }
        title = "Fuzzing the pickle reader"
        write_report(options.out, title, f"scripts/fuzz {' '.join(sys.argv[1:])}", texts, record)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--coverage-inputs", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--only", type=int, metavar="NUMBER", help="open one input, and say all about it")
    parser.add_argument("--out", type=Path, help="write what was seen to this Markdown file")
    parser.add_argument("--guided", type=Path, help=argparse.SUPPRESS)
    options, rest = parser.parse_known_args()
    if options.guided:
        return guided(options.guided, options.seed, rest)
    if rest:
        parser.error(f"unknown: {' '.join(rest)}")
    if options.only is not None:
        sources = sources_of()
        name, data = make(options.only, options.seed, sources)
        with tempfile.TemporaryDirectory() as folder:
            print(name, len(data), *open_one(Path(folder) / "input.pkl", data, prepare(sources)), sep="\n")
        return None
    started = time.monotonic()
    counts = run(options.inputs, options.seed, options.processes)
    found = coverage(options.coverage_inputs, options.seed) if options.coverage_inputs else None
    report(options, counts, found, time.monotonic() - started)
    bad = sum(counts.outcomes[name] + (found[name] if found else 0) for name in BAD)
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
