"""Scan every image before training and report all problems at once."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from finetune.data.decode import height_and_width
from finetune.data.image_info import ImageInfo
from finetune.data.labels import Labels, advise_folders, has_labels, labels_without_image, read_labels
from finetune.data.problems import (
    BAD_LABEL,
    BLACK,
    DUPLICATE,
    FRAMES,
    NO_IMAGE,
    OTHER_ASPECT,
    SAME_NAME,
    TOO_LONG,
    TOO_SMALL,
    UNIFORM,
    UNUSUAL,
    WRONG_SIZE,
    Problem,
    Unusable,
    escaped,
    low_range,
    refusal,
)
from finetune.data.scan_cache import inspect_all
from finetune.data.sources import LABELS_NAME, Source, open_source
from finetune.data.workers import available_cores
from finetune.errors import DataError
from finetune.options import FITS

HOW_FITTED = {
    "crop": "center-cropped and resized to",
    "pad": "resized, with white margins, to",
    "stretch": "stretched to",
}
GRAY = ("1", "L", "LA", "La", "I", "F", "I;16", "I;16B", "I;16L", "I;16N")


@dataclass(frozen=True)
class Scan:
    """The result of a scan.

    `sizes` counts images by (width, height) upright, `modes` by Pillow's mode, both without the unreadable
    ones; `class_counts` is the number of images of each class (empty without labels, and for vectors);
    `ignored` counts files that are no images by suffix, `num_transparent` images with alpha or a transparent
    color. `problems` is what training refuses, `remarks` (of a thorough scan) what it accepts with a
    remark, image by image. `has_labels`: whether there are labels, used or not; `num_known` counts images
    that had not changed since the last scan.
    """

    path: Path
    num_images: int
    ignored: dict[str, int] = field(default_factory=dict)
    num_transparent: int = 0
    sizes: dict[tuple[int, int], int] = field(default_factory=dict)
    modes: dict[str, int] = field(default_factory=dict)
    num_classes: int = 0
    class_counts: list[int] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    remarks: list[Problem] = field(default_factory=list)
    has_labels: bool = False
    num_known: int = field(default=0, compare=False)

    def against(self, channels: int) -> list[str]:
        """Describe mismatches between images and the `channels` of a network, with the option to use."""
        gray = sum(count for mode, count in self.modes.items() if mode in GRAY)
        colors = self.num_images - gray
        notes = []
        if self.num_transparent and channels < 4:
            notes.append(
                f"{counted(self.num_transparent, 'transparent image')} will be put on white: the network has "
                f"{counted(channels, 'channel')}. Use --channels 4 to keep alpha."
            )
        if colors and channels == 1:
            notes.append(
                f"{counted(colors, 'color image')} will become gray: the network has 1 channel. Use "
                "--channels 3 to keep colors."
            )
        if channels > 1 and gray == self.num_images:
            notes.append(
                f"All images are gray and the network has {channels} channels. --channels 1 makes it gray."
            )
        return notes

    @property
    def num_ignored(self) -> int:
        """Number of files that are no images."""
        return sum(self.ignored.values())

    def overview(self) -> dict[str, str]:
        """Describe the images in words, by subject, for the page of a run."""
        sizes = {f"{width}×{height}": count for (width, height), count in self.sizes.items()}
        overview = {
            "data set": self.path.name,
            "images": str(self.num_images),
            "sizes": tally(sizes),
            "stored as": tally(self.modes),
        }
        if self.class_counts:
            counts = {f"class {index}": count for index, count in enumerate(self.class_counts)}
            overview["classes"] = f"{len(counts)}: {tally(counts)}"
        if self.ignored:
            overview["other files"] = f"{self.num_ignored}, not used"
        return overview

    def raise_for_problems(self) -> None:
        """Raise one DataError that lists every image that cannot be used, with a hint."""
        if self.problems:
            raise refusal(self.path, self.num_images, self.problems)


def enlargement(size: tuple[int, int], wanted: tuple[int, int], fit: str | None) -> float:
    """Return the factor by which an image of (width, height) is resized to `wanted`, the larger of two."""
    scales = (wanted[0] / size[0], wanted[1] / size[1])
    return min(scales) if fit == "pad" else max(scales)


def counted(number: int, noun: str) -> str:
    """Return the number with its noun, such as `1 image` and `2 images`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def tally(counts: dict[str, int], shown: int = 12) -> str:
    """Return counts as text, `RGB: 200, L: 13`; those after the first `shown` are only counted."""
    parts = [f"{name}: {count}" for name, count in list(counts.items())[:shown]]
    return ", ".join(parts) + (f", and {len(counts) - shown} more" if len(counts) > shown else "")


def scan(
    path: str | os.PathLike[str],
    *,
    resolution: int | tuple[int, int] | None = None,
    fit: str | None = None,
    use_labels: bool = False,
    labels_from: str = "file",
    num_classes: int | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    thorough: bool = False,
    fresh: bool = False,
) -> Scan:
    """Look at every image, in parallel if there are many, and collect all problems.

    Images that have not changed since the last time are not decoded again, unless `fresh`.
    `resolution` (the side, or height and width) with no `fit` makes every other size a problem; without a
    resolution sizes are only counted. `progress(done, total)` is called after each image that was decoded,
    and at the end. A `thorough` scan lists remarks as well, and labels that cannot be had at all are a
    problem among others. Raises DataError only if there is nothing to look at (no such path, no image, no
    labels at all).
    """
    if fit is not None and fit not in FITS:
        raise ValueError(f"fit={fit!r} is none of {', '.join(FITS)}")
    source = open_source(path)
    names = source.names
    labels, problems = None, list[Problem]()
    if use_labels:
        labels, problems = _labels(source, names, num_classes, labels_from, thorough)
    findings = Findings(None if resolution is None else height_and_width(resolution), fit, problems)
    infos = inspect_all(source, names, available_cores() if workers is None else workers, fresh=fresh)
    for done, (name, (info, is_known)) in enumerate(zip(names, infos, strict=True), start=1):
        findings.add(name, info)
        findings.num_known += is_known
        if progress is not None and (not is_known or done == len(names)):
            progress(done, len(names))
    findings.check_ranges()
    class_counts = _class_counts(labels)
    notes = [*findings.notes(listed=thorough), *_notes_on_classes(class_counts)]
    if thorough and not use_labels and not has_labels(source) and (advice := advise_folders(source)):
        notes.append(advice)
    return Scan(
        path=source.path,
        num_images=len(names),
        ignored=dict(source.ignored.most_common()),
        num_transparent=findings.num_transparent,
        num_known=findings.num_known,
        sizes=dict(findings.sizes.most_common()),
        modes=dict(findings.modes.most_common()),
        num_classes=0 if labels is None else labels.num_classes,
        class_counts=class_counts,
        problems=findings.problems,
        notes=notes,
        remarks=_remarks_on_names(source, use_labels and labels_from == "file") + findings.remarks
        if thorough
        else [],
        has_labels=has_labels(source),
    )


class Findings:
    """Collects what is found in all images."""

    def __init__(self, size: tuple[int, int] | None, fit: str | None, problems: list[Problem]) -> None:
        self.wanted = None if size is None else (size[1], size[0])  # width and height, as Pillow has them
        self.fit, self.problems = fit, problems
        self.sizes: Counter[tuple[int, int]] = Counter()
        self.modes: Counter[str] = Counter()
        self.remarks: list[Problem] = []
        self.num_known = self.num_transparent = 0
        self.peaks: dict[str, int] = {}
        self._first_of: dict[bytes, str] = {}

    def add(self, name: str, info: ImageInfo | Unusable) -> None:
        if isinstance(info, Unusable):
            self.problems.append(Problem(name, info.kind, info.detail))
            return
        size = (info.width, info.height)
        self.sizes[size] += 1
        self.modes[info.mode] += 1
        self.num_transparent += "transparency" in (info.unusual or "")
        if info.peak is not None:
            self.peaks[name] = info.peak
        wanted = self.wanted
        if wanted is not None and self.fit is None and size != wanted:
            seen = f"{_times(size)} instead of {_times(wanted)}"
            self.problems.append(Problem(name, WRONG_SIZE, seen))
            wanted = None  # reported as a problem, so not as a remark
        self.remarks += self._remarks(name, info, wanted)

    def _remarks(self, name: str, info: ImageInfo, wanted: tuple[int, int] | None) -> list[Problem]:
        """Return remarks on one image: accepted, but worth a look."""
        size, remarks = (info.width, info.height), []
        if wanted is not None and not _has_shape(size, wanted):
            remarks.append(Problem(name, TOO_LONG if _is_long(size, wanted) else OTHER_ASPECT, _times(size)))
        if wanted is not None and self._enlargement(size) > 1:
            remarks.append(Problem(name, TOO_SMALL, _times(size)))
        if info.unusual is not None:
            remarks.append(Problem(name, UNUSUAL, info.unusual))
        if info.num_frames > 1:
            remarks.append(Problem(name, FRAMES, f"{info.num_frames} frames"))
        if info.tone is not None:
            remarks.append(Problem(name, BLACK if info.tone == "black" else UNIFORM, _times(size)))
        first = self._first_of.setdefault(info.digest, name)
        if first != name:
            remarks.append(Problem(name, DUPLICATE, f"as {escaped(first)}"))
        return remarks

    def _enlargement(self, size: tuple[int, int]) -> float:
        assert self.wanted is not None
        return enlargement(size, self.wanted, self.fit)

    def check_ranges(self) -> None:
        """Make it a problem if no 16-bit image has a value above 12 bits: all would be nearly black."""
        self.problems += low_range(self.peaks)

    def notes(self, *, listed: bool) -> list[str]:
        """Return notes on the set, one line each; `listed`: remarks are listed by name anyway."""
        counts = Counter(remark.kind for remark in self.remarks)
        notes = []
        if self.wanted is not None and self.fit is not None:
            others = {size: count for size, count in self.sizes.items() if size != self.wanted}
            if others:
                num_others, how = sum(others.values()), HOW_FITTED[self.fit]
                also = ", ".join(f"--fit {fit}" for fit in FITS if fit != self.fit)
                size = _times(self.wanted)
                others_are = f"{counted(num_others, 'image')} of another size will be {how} {size}"
                notes.append(f"{others_are}. Alternatives: {also}.")
            much = sum(n for size, n in others.items() if self._enlargement(size) > 2)
            if much:
                notes.append(f"{counted(much, 'image')} will be enlarged more than 2× and look blurred.")
        kinds = {TOO_LONG: "differing in aspect ratio by more than a factor of 2", BLACK: "nearly black"}
        kinds |= {UNIFORM: "of nearly one color", DUPLICATE: "equal to another one"}
        found = [f"{counts[kind]} {words}" for kind, words in kinds.items() if counts[kind]]
        if found and not listed:
            notes.append(f"Check these: {', '.join(found)}. `finetune dataset check` lists their names.")
        return notes


def _labels(
    source: Source, names: list[str], num_classes: int | None, labels_from: str, thorough: bool
) -> tuple[Labels | None, list[Problem]]:
    """Return the labels; a thorough scan continues without them, to report everything else."""
    try:
        return read_labels(source, names, num_classes, labels_from)
    except DataError as error:
        if not thorough:
            raise
        where = "folders" if labels_from == "folders" else source.labels_name or LABELS_NAME
        what = error.what.removeprefix(f"{source.path}: ").removeprefix(where).lstrip(": ")
        return None, [Problem(where, BAD_LABEL, f"{what} {error.hint or ''}".rstrip())]


def _class_counts(labels: Labels | None) -> list[int]:
    """Return the number of images of each class; empty without labels, and for vectors."""
    if labels is None or labels.values.ndim > 1:
        return []
    return np.bincount(labels.values, minlength=labels.num_classes).tolist()


def _times(size: tuple[int, int]) -> str:
    return f"{size[0]}×{size[1]}"


def _has_shape(size: tuple[int, int], wanted: tuple[int, int]) -> bool:
    return size[0] * wanted[1] == size[1] * wanted[0]


def _is_long(size: tuple[int, int], wanted: tuple[int, int]) -> bool:
    """Return whether cropping to the target shape leaves less than half of an image."""
    ratio = (size[0] * wanted[1]) / (size[1] * wanted[0])
    return max(ratio, 1 / ratio) > 2


def _remarks_on_names(source: Source, use_labels: bool) -> list[Problem]:
    """Return names that collide on some systems or in the zip, and labels of files that do not exist."""
    remarks = [Problem(name, SAME_NAME, "is in the zip more than once") for name in source.repeated]
    first_of: dict[str, str] = {}
    for name in source.names:
        key = unicodedata.normalize("NFC", name.replace("\\", "/").casefold())
        first = first_of.setdefault(key, name)
        if first != name:
            remarks.append(Problem(name, SAME_NAME, f"that of {escaped(first)}"))
    if use_labels:
        try:
            absent = labels_without_image(source)
        except DataError:  # reported as a problem
            absent = []
        remarks += [Problem(name, NO_IMAGE, "ignored") for name in absent]
    return remarks


def _notes_on_classes(class_counts: list[int]) -> list[str]:
    empty = [str(index) for index, count in enumerate(class_counts) if count == 0]
    if not empty:
        return []
    shown = ", ".join(empty[:20]) + (", …" if len(empty) > 20 else "")
    return [f"{len(empty)} of {len(class_counts)} classes have no image: {shown}."]
