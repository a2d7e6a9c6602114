"""What can be wrong with a picture or a label, and how all of it is told at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

SHOWN_PER_KIND = 100  # names listed for one kind; a set of 70,000 wrong files should not fill the terminal

UNREADABLE = "cannot be read"
TOO_LARGE = "has too many pixels"
NO_RULE = "has pixel values without a rule"
WRONG_SIZE = "has another size"
BAD_LABEL = "has no usable label"
KINDS = (UNREADABLE, TOO_LARGE, NO_RULE, WRONG_SIZE, BAD_LABEL)

HINTS = {
    UNREADABLE: "Repair or remove the files that cannot be read.",
    TOO_LARGE: "Make pictures with too many pixels smaller: they could be decompression bombs.",
    NO_RULE: "Save such pictures with 8 or 16 bits a channel.",
    WRONG_SIZE: "Say how pictures are brought to size: --fit crop (centre square), --fit pad (white margins) "
    "or --fit stretch.",
    BAD_LABEL: "Correct dataset.json: every picture needs a label in it.",
}


@dataclass(frozen=True)
class Problem:
    """One picture that cannot be used: its name inside the set, one of KINDS, and the value seen."""

    name: str
    kind: str
    detail: str


class Unusable(Exception):  # a finding, not a failure
    """A picture cannot be used; the caller knows its name. `kind` is one of KINDS."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(kind, detail)
        self.kind = kind
        self.detail = detail


def describe(path: Path, num_images: int, problems: Iterable[Problem]) -> str:
    """All problems as text: a count for each kind, then the names; wrong sizes are counted by size."""
    problems = list(problems)
    num_bad = len({problem.name for problem in problems})
    lines = [f"{path}: {num_bad} of {num_images} pictures cannot be used."]
    for kind in KINDS:
        found = [problem for problem in problems if problem.kind == kind]
        if not found:
            continue
        lines.append(f"  {kind}: {len(found)}")
        if kind == WRONG_SIZE:
            lines += _sizes(found)
            continue
        lines += [f"    {printable(problem.name)}: {problem.detail}" for problem in found[:SHOWN_PER_KIND]]
        if len(found) > SHOWN_PER_KIND:
            lines.append(f"    … and {len(found) - SHOWN_PER_KIND} more")
    return "\n".join(lines)


def hint(problems: Iterable[Problem]) -> str:
    """What to do about these problems, one line for each kind that occurs."""
    present = {problem.kind for problem in problems}
    return "\n".join(HINTS[kind] for kind in KINDS if kind in present)


def printable(name: str) -> str:
    """The name with whatever no terminal can print written as escapes."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def _sizes(found: list[Problem]) -> list[str]:
    lines = []
    for size, count in Counter(problem.detail for problem in found).most_common(SHOWN_PER_KIND):
        examples = [printable(problem.name) for problem in found if problem.detail == size][:3]
        lines.append(f"    {size}: {count} ({', '.join(examples)}{', …' if count > 3 else ''})")
    num_sizes = len({problem.detail for problem in found})
    if num_sizes > SHOWN_PER_KIND:
        lines.append(f"    … and {num_sizes - SHOWN_PER_KIND} other sizes")
    return lines
