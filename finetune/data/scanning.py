"""Look at every picture before training and tell everything that is wrong at once."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from finetune.data.decode import FITS, open_picture
from finetune.data.image_set import choose
from finetune.data.labels import read_labels
from finetune.data.problems import WRONG_SIZE, Problem, Unusable, describe, hint
from finetune.data.sources import Source, open_source
from finetune.data.workers import available_cores, in_order
from finetune.errors import DataError


@dataclass(frozen=True)
class Scan:
    """What a look at every picture found.

    `sizes` counts pictures by (width, height) upright, `modes` by Pillow's mode, both without the unreadable
    ones; `class_counts` is the number of pictures of each class (empty without labels, and for vectors);
    `num_ignored` counts files that are no pictures.
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

    def raise_for_problems(self) -> None:
        """Raise one DataError that names every picture that cannot be used, and says what to do."""
        if self.problems:
            raise DataError(describe(self.path, self.num_images, self.problems), hint=hint(self.problems))


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
) -> Scan:
    """Decode every picture, in parallel where there are many, and collect all problems.

    `resolution` with no `fit` makes every other size a problem; without a resolution sizes are only counted.
    `limit` and `seed` choose the same pictures as ImageSet. `progress(done, total)` is called after each
    picture. Raises DataError only where there is nothing to look at (no such path, no picture, no labels at
    all).
    """
    if fit is not None and fit not in FITS:
        raise ValueError(f"fit={fit!r} is none of {', '.join(FITS)}")
    source = open_source(path)
    names = choose(source, limit, seed)
    labels, problems = read_labels(source, names, num_classes) if use_labels else (None, [])
    sizes: Counter[tuple[int, int]] = Counter()
    modes: Counter[str] = Counter()
    looks = in_order(_Looks(source, names), len(names), available_cores() if workers is None else workers)
    for done, (name, look) in enumerate(zip(names, looks), start=1):
        if isinstance(look, Unusable):
            problems.append(Problem(name, look.kind, look.detail))
        else:
            sizes[look[:2]] += 1
            modes[look[2]] += 1
            if resolution is not None and fit is None and look[:2] != (resolution, resolution):
                problems.append(
                    Problem(name, WRONG_SIZE, f"{look[0]}×{look[1]} instead of {resolution}×{resolution}")
                )
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
    )


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
    """Item i is what a look at picture i found: (width, height, mode), or why it cannot be used."""

    def __init__(self, source: Source, names: list[str]) -> None:
        self.source, self.names = source, names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[int, int, str] | Unusable:
        try:
            picture = open_picture(self.source.read(self.names[index]))
        except Unusable as problem:
            return problem
        return *picture.size, picture.mode
