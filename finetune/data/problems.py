"""Problems of images and labels, and one message that lists them all."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.errors import DataError

MAX_LOW_BITS = 12  # of 16; values that never take more are those of a 10- or 12-bit device
SHOWN_PER_KIND = 100  # names listed for one kind; a set of 70,000 wrong files should not fill the terminal

UNREADABLE = "cannot be read"
CUT_SHORT = "is cut short"
TOO_LARGE = "has too many pixels"
NO_RULE = "has pixel values without a rule"
WRONG_SIZE = "has another size"
BAD_LABEL = "has no usable label"
LOW_RANGE = "has 16 bits a channel of which the upper ones are never used"
# Problems that training refuses, and their names in JSON.
REFUSED = {
    UNREADABLE: "unreadable",
    CUT_SHORT: "truncated",
    TOO_LARGE: "too-many-pixels",
    NO_RULE: "no-rule",
    WRONG_SIZE: "wrong-size",
    BAD_LABEL: "bad-label",
    LOW_RANGE: "low-range",
}
OTHER_ASPECT = "has another aspect ratio"
TOO_LONG = "differs in aspect ratio by more than a factor of 2"
TOO_SMALL = "is smaller, and is enlarged"
BLACK = "is nearly black"
UNIFORM = "has nearly one color everywhere"
UNUSUAL = "is stored in an unusual way"
FRAMES = "has several frames, of which the first counts"
DUPLICATE = "shows the same as another one"
NO_IMAGE = "has a label, but is not there"
SAME_NAME = "file name is not unique on every file system"
# Problems that training accepts, with a remark.
REMARKS = {
    OTHER_ASPECT: "other-aspect",
    TOO_LONG: "too-long",
    TOO_SMALL: "too-small",
    BLACK: "black",
    UNIFORM: "uniform",
    UNUSUAL: "unusual-mode",
    FRAMES: "several-frames",
    DUPLICATE: "duplicate",
    NO_IMAGE: "label-without-image",
    SAME_NAME: "name-collision",
}
KINDS = (*REFUSED, *REMARKS)
# Listed by value, not by name: few values, many images.
COUNTED = (WRONG_SIZE, LOW_RANGE, OTHER_ASPECT, TOO_LONG, TOO_SMALL, UNUSUAL, FRAMES)

HINTS = {
    UNREADABLE: "Repair or remove the files that cannot be read.",
    CUT_SHORT: "Copy or download truncated files again, or remove them.",
    TOO_LARGE: "Reduce images with too many pixels: they could be decompression bombs.",
    NO_RULE: "Save such images with 8 or 16 bits a channel.",
    WRONG_SIZE: "Choose how images are resized: --fit crop (centered part), --fit pad (white margins) "
    "or --fit stretch.",
    BAD_LABEL: "Every image needs a label: an entry in dataset.json or, with --labels folders, a folder of "
    "its class.",
    LOW_RANGE: "Such images would be nearly black. Rescale them, and train on the result: "
    "finetune dataset prepare {path} OUT.zip {option}",
}


@dataclass(frozen=True)
class Problem:
    """One image that cannot be used: its name inside the set, one of KINDS, and the value seen.

    option: of `dataset prepare`, which makes it usable.
    """

    name: str
    kind: str
    detail: str
    option: str = ""


class Unusable(Exception):  # a finding, not a failure
    """An image cannot be used; the caller adds its name. `kind` is one of KINDS."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(kind, detail)
        self.kind = kind
        self.detail = detail


def low_range(peaks: dict[str, int]) -> list[Problem]:
    """Return a problem for each 16-bit image if the values of all take 12 bits or fewer.

    peaks: name -> highest value.
    """
    highest = max(peaks.values(), default=0)
    bits = max(8, highest.bit_length() + highest.bit_length() % 2)
    if highest == 0 or bits > MAX_LOW_BITS:
        return []
    detail = f"no value above {(1 << bits) - 1} ({bits} bits)"
    return [Problem(name, LOW_RANGE, detail, f"--bits {bits}") for name in peaks]


def refusal(path: Path, num_images: int, problems: Sequence[Problem], more: str = "") -> DataError:
    """Return an error that lists all problems: a count for each kind, then names; wrong sizes by size."""
    num_bad = len({problem.name for problem in problems})
    first = f"{path}: {num_bad} of {num_images} images cannot be used."
    return DataError("\n".join([first, *listed(problems)]), hint=hint(problems, path) + more)


def listed(problems: Iterable[Problem], shown: int | None = SHOWN_PER_KIND) -> list[str]:
    """Return lines with a count for each kind and, below, `shown` names (None: all)."""
    problems, lines = list(problems), []
    for kind in KINDS:
        found = [problem for problem in problems if problem.kind == kind]
        if not found:
            continue
        lines.append(f"  {kind}: {len(found)}")
        if kind in COUNTED:
            lines += _by_detail(found, shown)
            continue
        lines += [f"    {escaped(problem.name)}: {problem.detail}" for problem in found[:shown]]
        if shown is not None and len(found) > shown:
            lines.append(f"    … and {len(found) - shown} more")
    return lines


def hint(problems: Iterable[Problem], path: Path) -> str:
    """Return what to do about these problems of the set at `path`, one line for each kind that occurs."""
    options = {problem.kind: problem.option for problem in problems}
    return "\n".join(
        text.format(path=shlex.quote(str(path)), option=options[kind])
        for kind, text in HINTS.items()
        if kind in options
    )


def escaped(name: str) -> str:
    r"""Return the name with characters that are not printable written as escapes, like `\n` and `\x1b`."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in name)


def _by_detail(found: list[Problem], shown: int | None) -> list[str]:
    """Return a line for each value seen, with its count, and three names (all of them with `shown` None)."""
    by_detail: dict[str, list[str]] = {}
    for problem in found:
        by_detail.setdefault(problem.detail, []).append(escaped(problem.name))
    lines = []
    for detail, names in sorted(by_detail.items(), key=lambda item: -len(item[1]))[:shown]:
        examples = names if shown is None else names[:3]
        lines.append(
            f"    {detail}: {len(names)} ({', '.join(examples)}{', …' if len(names) > len(examples) else ''})"
        )
    if shown is not None and len(by_detail) > shown:
        lines.append(f"    … and {len(by_detail) - shown} others")
    return lines
