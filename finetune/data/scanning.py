"""Look at every picture before training and tell everything that is wrong at once."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset

from finetune.data.decode import FITS, num_frames, open_picture, unusual
from finetune.data.image_set import choose
from finetune.data.labels import Labels, has_labels, labels_without_picture, read_labels
from finetune.data.problems import (
    BAD_LABEL,
    DUPLICATE,
    FRAMES,
    NO_PICTURE,
    NOT_SQUARE,
    SAME_NAME,
    TOO_SMALL,
    UNUSUAL,
    WRONG_SIZE,
    Problem,
    Unusable,
    describe,
    hint,
    printable,
)
from finetune.data.sources import LABELS_NAME, Source, open_source
from finetune.data.workers import available_cores, in_order
from finetune.errors import DataError

ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")
GRAY = ("1", "L", "LA", "La", "I", "F", "I;16", "I;16B", "I;16L", "I;16N")


@dataclass(frozen=True)
class Scan:
    """What a look at every picture found.

    `sizes` counts pictures by (width, height) upright, `modes` by Pillow's mode, both without the unreadable
    ones; `class_counts` is the number of pictures of each class (empty without labels, and for vectors);
    `num_ignored` counts files that are no pictures. `problems` is what training refuses, `remarks` (of a
    thorough scan) what it takes, but a person may want to know, picture by picture. `has_labels` says whether
    there are any, used or not.
    """

    path: Path
    num_images: int
    num_ignored: int = 0
    sizes: dict[tuple[int, int], int] = field(default_factory=dict)
    modes: dict[str, int] = field(default_factory=dict)
    num_classes: int = 0
    class_counts: list[int] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    remarks: list[Problem] = field(default_factory=list)
    has_labels: bool = False

    def against(self, channels: int) -> list[str]:
        """What pictures and the `channels` of a network do not share, and the option that changes it."""
        alpha = sum(count for mode, count in self.modes.items() if mode in ALPHA)
        gray = sum(count for mode, count in self.modes.items() if mode in GRAY)
        colours = self.num_images - gray
        notes = []
        if alpha and channels < 4:
            notes.append(
                f"{alpha} pictures are transparent and come onto white: the network has {channels} channels; "
                "--channels 4 changes it."
            )
        if colours and channels == 1:
            notes.append(
                f"{colours} pictures have colours and become gray: the network has 1 channel; --channels 3 "
                "changes it."
            )
        if channels > 1 and gray == self.num_images:
            notes.append(
                f"All pictures are gray and the network has {channels} channels; --channels 1 changes it."
            )
        return notes

    def raise_for_problems(self) -> None:
        """Raise one DataError that names every picture that cannot be used, and says what to do."""
        if self.problems:
            raise DataError(describe(self.path, self.num_images, self.problems), hint=hint(self.problems))


class Look(NamedTuple):
    """What a look at one picture found; the last three only where the look is thorough."""

    width: int
    height: int
    mode: str
    unusual: str | None = None
    num_frames: int = 1
    digest: bytes = b""


def scan(
    path: str | os.PathLike[str],
    *,
    resolution: int | None = None,
    fit: str | None = None,
    use_labels: bool = False,
    num_classes: int | None = None,
    workers: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    thorough: bool = False,
) -> Scan:
    """Decode every picture, in parallel where there are many, and collect all problems.

    `resolution` with no `fit` makes every other size a problem; without a resolution sizes are only counted.
    `limit` and `seed` choose the same pictures as ImageSet. `progress(done, total)` is called after each
    picture. A `thorough` scan collects remarks as well, and labels that cannot be had at all are a problem
    among others. Raises DataError only where there is nothing to look at (no such path, no picture, no labels
    at all).
    """
    if fit is not None and fit not in FITS:
        raise ValueError(f"fit={fit!r} is none of {', '.join(FITS)}")
    source = open_source(path)
    names = choose(source, limit, seed)
    labels, problems = _labels(source, names, num_classes, thorough) if use_labels else (None, [])
    sizes: Counter[tuple[int, int]] = Counter()
    modes: Counter[str] = Counter()
    remarks = _remarks_on_names(source, use_labels) if thorough else []
    first_of: dict[bytes, str] = {}
    cores = available_cores() if workers is None else workers
    looks = in_order(_Looks(source, names, thorough), len(names), cores)
    for done, (name, look) in enumerate(zip(names, looks), start=1):
        if isinstance(look, Unusable):
            problems.append(Problem(name, look.kind, look.detail))
        else:
            size = (look.width, look.height)
            sizes[size] += 1
            modes[look.mode] += 1
            refused = resolution is not None and fit is None and size != (resolution, resolution)
            if refused:
                seen = f"{size[0]}×{size[1]} instead of {resolution}×{resolution}"
                problems.append(Problem(name, WRONG_SIZE, seen))
            if thorough:
                remarks += _remarks(name, look, None if refused else resolution, first_of)
        if progress is not None:
            progress(done, len(names))
    class_counts: list[int] = []
    if labels is not None and labels.values.ndim == 1:
        class_counts = np.bincount(labels.values, minlength=labels.num_classes).tolist()
    return Scan(
        path=source.path,
        num_images=len(names),
        num_ignored=source.num_ignored,
        sizes=dict(sizes.most_common()),
        modes=dict(modes.most_common()),
        num_classes=0 if labels is None else labels.num_classes,
        class_counts=class_counts,
        problems=problems,
        notes=_notes(sizes, resolution, class_counts),
        remarks=remarks,
        has_labels=has_labels(source),
    )


def _labels(
    source: Source, names: list[str], num_classes: int | None, thorough: bool
) -> tuple[Labels | None, list[Problem]]:
    """The labels; a thorough scan goes on where there are none to be had, for what else there is to tell."""
    try:
        return read_labels(source, names, num_classes)
    except DataError as error:
        if not thorough:
            raise
        where = source.labels_name or LABELS_NAME
        what = error.what.removeprefix(f"{source.path}: ").removeprefix(where).lstrip(": ")
        return None, [Problem(where, BAD_LABEL, what)]


def _remarks(name: str, look: Look, resolution: int | None, first_of: dict[bytes, str]) -> list[Problem]:
    """What is allowed of one picture, but worth knowing; `first_of` remembers the pictures seen.

    `resolution` is None where none is known, or the size is a problem already.
    """
    size, remarks = f"{look.width}×{look.height}", []
    if resolution is not None and look.width != look.height:
        remarks.append(Problem(name, NOT_SQUARE, size))
    if resolution is not None and min(look.width, look.height) < resolution:
        remarks.append(Problem(name, TOO_SMALL, size))
    if look.unusual is not None:
        remarks.append(Problem(name, UNUSUAL, look.unusual))
    if look.num_frames > 1:
        remarks.append(Problem(name, FRAMES, f"{look.num_frames} frames"))
    first = first_of.setdefault(look.digest, name)
    if first != name:
        remarks.append(Problem(name, DUPLICATE, f"as {printable(first)}"))
    return remarks


def _remarks_on_names(source: Source, use_labels: bool) -> list[Problem]:
    """Names that collide on some systems or in the zip, and labels of files that are not there."""
    remarks = [Problem(name, SAME_NAME, "is in the zip more than once") for name in source.repeated]
    first_of: dict[str, str] = {}
    for name in source.names:
        key = unicodedata.normalize("NFC", name.replace("\\", "/").casefold())
        first = first_of.setdefault(key, name)
        if first != name:
            remarks.append(Problem(name, SAME_NAME, f"that of {printable(first)}"))
    if use_labels:
        try:
            absent = labels_without_picture(source)
        except DataError:  # told as a problem
            absent = []
        remarks += [Problem(name, NO_PICTURE, "passed over") for name in absent]
    return remarks


def _notes(sizes: Counter[tuple[int, int]], resolution: int | None, class_counts: list[int]) -> list[str]:
    """What is allowed, but worth knowing."""
    notes = []
    if resolution is not None:
        small = sum(count for size, count in sizes.items() if min(size) < resolution)
        if small:
            notes.append(f"{small} pictures are smaller than {resolution} pixels on a side and get enlarged.")
    empty = [str(index) for index, count in enumerate(class_counts) if count == 0]
    if empty:
        shown = ", ".join(empty[:20]) + (", …" if len(empty) > 20 else "")
        notes.append(f"{len(empty)} of {len(class_counts)} classes have no picture: {shown}.")
    return notes


class _Looks(Dataset):
    """Item i is what a look at picture i found, or why it cannot be used."""

    def __init__(self, source: Source, names: list[str], thorough: bool) -> None:
        self.source, self.names, self.thorough = source, names, thorough

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Look | Unusable:
        try:
            data = self.source.read(self.names[index])
            picture = open_picture(data)
        except Unusable as problem:
            return problem
        if not self.thorough:
            return Look(*picture.size, picture.mode)
        # Of the pixels, and so of the same picture in another file format as well.
        digest = hashlib.blake2b(repr((picture.size, picture.mode)).encode(), digest_size=16)
        digest.update((picture.convert("RGBA") if picture.mode in ("P", "PA") else picture).tobytes())
        return Look(*picture.size, picture.mode, unusual(picture, data), num_frames(data), digest.digest())
