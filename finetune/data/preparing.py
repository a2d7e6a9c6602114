"""Resize a set of images into an uncompressed zip, the fastest form for training."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import PIL
from PIL import Image
from torch.utils.data import Dataset

from finetune.data.decode import fit_to_size, height_and_width, highest_deep_value, open_image, to_channels
from finetune.data.labels import folder_classes, has_labels, read_labels
from finetune.data.naming import NO_FOLDER, target_names
from finetune.data.problems import BAD_LABEL, WRONG_SIZE, Problem, Unusable, low_range, refusal
from finetune.data.sources import LABELS_NAME, Source, open_source
from finetune.data.stored_zip import Entry, StoredZip, whole_entries
from finetune.data.workers import available_cores, in_order
from finetune.errors import ConfigError, DataError
from torch_utils.files import lack_of_space, lock, lock_path, replace

FORMAT = 2  # of the journal
# Measured by benchmarks/bench_load.py: without compression, decoding is a copy.
ENCODINGS: dict[str, dict[str, Any]] = {
    "tiff": {"format": "TIFF"},
    "png": {"format": "PNG", "compress_level": 1},
}
SUFFIXES = {"tiff": ".tif", "png": ".png"}
ROOM_FOR_HEADERS = 1024  # bytes an image, in the file and twice in the zip


@dataclass(frozen=True)
class Settings:
    """Everything that determines the bytes of an image."""

    size: tuple[int, int]  # height and width
    channels: int
    fit: str | None
    encoding: str
    bits: int = 16
    pillow: str = PIL.__version__
    format: int = FORMAT


@dataclass(frozen=True)
class PreparedSet:
    """The result of `prepare`: path, counts (also of earlier calls), and the images left out.

    num_deep: images of 16 bits a channel.
    """

    path: Path
    settings: Settings
    num_images: int
    num_found_done: int
    num_bytes: int
    classes: list[str]
    left_out: list[Problem]
    has_labels: bool
    num_deep: int


def prepare(
    src: str | os.PathLike[str],
    dest: str | os.PathLike[str],
    *,
    resolution: int | tuple[int, int] | None = None,
    fit: str | None = None,
    channels: int = 3,
    labels: str | None = None,
    encoding: str = "tiff",
    bits: int = 16,
    skip_bad: bool = False,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PreparedSet:
    """Decode, fit and store every image of `src` in the zip `dest`, with its labels.

    resolution: the side of squares, or (height, width); None means that of the first image. fit: None means
    `crop` if a resolution is given. bits: how many of 16 the values of 16-bit images take; a set that
    never takes more than 12 is refused otherwise. labels: those of dataset.json (`file`), classes from
    `folders`, or `none` (None: those of the file, if there are any). What is done is kept beside `dest`, and
    a further call continues with it if neither settings nor images have changed; the zip comes to the same
    bytes. Raises ConfigError and DataError; with `skip_bad` images that cannot be used are left out, except
    16-bit images that would be nearly black.
    """
    source, path = open_source(src), Path(dest)
    _check_destination(source, path)
    if resolution is None:
        resolution = _first_resolution(source, fit)
    elif fit is None:
        fit = "crop"
    settings = Settings(height_and_width(resolution), channels, fit, encoding, bits)
    names, values, classes, problems = _plan_labels(source, labels)
    targets = target_names(names, SUFFIXES[encoding])
    with _explained(path), _only_one(path), Draft(path, settings) as draft:
        num_done = draft.resume(source, names, targets)
        num_found = len(draft.zip.entries)
        _check_space(path, len(names) - num_done, settings)
        cores = available_cores() if workers is None else workers
        rest = names[num_done:]
        encoded = in_order(_Encoded(source, rest, settings), len(rest), cores)
        for done, (name, image) in enumerate(zip(rest, encoded), start=num_done + 1):
            draft.add(name, source.stamp(name), targets[name], image)
            if progress is not None:
                progress(done, len(names))
        problems += draft.problems
        _raise_for_problems(source, draft, problems, skip_bad)
        written = [name for name in names if name not in draft.bad]
        table = None if values is None else [[targets[name], values[name]] for name in written]
        num_bytes = draft.publish({"labels": table} | ({"classes": classes} if classes else {}))
    return PreparedSet(
        path,
        settings,
        len(written),
        num_found,
        num_bytes,
        classes,
        problems,
        has_labels=table is not None,
        num_deep=len(draft.peaks),
    )


class Draft:
    """The unfinished zip, and a journal with a line for each processed image.

    A line is `[name, stamp, target]`, followed by the highest value of a 16-bit image (null for others), or
    by kind and detail if the image cannot be used and is not in the zip. A line is written after its image,
    so that either may be cut off anywhere.
    """

    def __init__(self, path: Path, settings: Settings) -> None:
        self.path, self.settings = path, settings
        self.zip_path = path.with_name(f".{path.name}.partial")
        self.journal_path = path.with_name(f".{path.name}.partial.jsonl")
        self.problems: list[Problem] = []
        self.bad: set[str] = set()
        self.peaks: dict[str, int] = {}

    def __enter__(self) -> Draft:
        for place in (self.zip_path, self.journal_path):
            place.touch()
        self.stream: BinaryIO = open(self.zip_path, "r+b")
        self.journal: BinaryIO = open(self.journal_path, "r+b")
        self.zip = StoredZip(self.stream)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stream.close()
        self.journal.close()

    def resume(self, source: Source, names: list[str], targets: dict[str, str]) -> int:
        """Keep the finished images of an earlier call, drop the rest, and return their number."""
        head = _line(asdict(self.settings))
        kept, entries, done = 0, [], 0  # kept: bytes of the journal
        if self.journal.readline() == head:
            kept = len(head)
            found = whole_entries(self.stream)
            for name in names:
                line = self.journal.readline()
                start = [name, list(source.stamp(name)), targets[name]]
                entry = self._same(line, start, found)
                if entry is None:
                    break
                if isinstance(entry, Problem):
                    self._refuse(entry)
                else:
                    entries.append(entry)
                kept += len(line)
                done += 1
        self.zip = StoredZip(self.stream, entries)
        self.stream.seek(self.zip.offset)
        self.stream.truncate()
        self.journal.seek(kept)
        self.journal.truncate()
        if not kept:
            self.journal.write(head)
            self.journal.flush()
        return done

    def _same(self, line: bytes, start: list, found: Iterator[Entry]) -> Entry | Problem | None:
        """Return the entry or problem of a journal line, if image and zip have not changed since."""
        try:
            values = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            values = None
        if not isinstance(values, list) or values[:3] != start or len(values) not in (4, 5):
            return None
        if len(values) == 5:
            return Problem(start[0], *values[3:])
        entry = next(found, None)
        if entry is None or entry.name != start[2]:
            return None
        self._note_peak(start[0], values[3])
        return entry

    def add(self, name: str, stamp: tuple[int, int], target: str, image: Encoded | Unusable) -> None:
        """Append an image, or note that it cannot be used."""
        line: list[Any] = [name, stamp, target]
        if isinstance(image, Unusable):
            self._refuse(Problem(name, image.kind, image.detail))
            line += [image.kind, image.detail]
        else:
            self.zip.add(target, image.data)
            self.stream.flush()
            self._note_peak(name, image.peak)
            line.append(image.peak)
        self.journal.write(_line(line))
        self.journal.flush()

    def keep_or_delete(self) -> str:
        """Return a sentence on what is kept for the next call; files without an image are deleted."""
        if self.zip.entries:
            return f"The {len(self.zip.entries)} others are kept for the next call, in {self.zip_path}."
        for place in (self.zip_path, self.journal_path):
            place.unlink()
        return ""

    def _note_peak(self, name: str, peak: int | None) -> None:
        if peak is not None:
            self.peaks[name] = peak

    def _refuse(self, problem: Problem) -> None:
        self.problems.append(problem)
        self.bad.add(problem.name)

    def publish(self, labels: dict[str, Any]) -> int:
        """Add the labels and the directory, make the file last, and give it its name; its size in bytes."""
        self.zip.add(LABELS_NAME, json.dumps(labels, ensure_ascii=False).encode("utf-8", "backslashreplace"))
        self.zip.finish()
        self.stream.flush()
        os.fsync(self.stream.fileno())
        num_bytes = self.stream.tell()
        self.stream.close()  # what is open cannot be renamed on Windows
        replace(self.zip_path, self.path)
        self.journal.close()
        self.journal_path.unlink()
        return num_bytes


def _line(values: Any) -> bytes:
    """Return a line of the journal; names that are not valid text are kept as escapes."""
    return json.dumps(values).encode("ascii") + b"\n"


class Encoded(NamedTuple):
    """An image brought to size, as a file; `peak`: its highest value if it had 16 bits a channel."""

    data: bytes
    peak: int | None


class _Encoded(Dataset):
    """Item i is image i, decoded, fitted and encoded again, or why it cannot be."""

    def __init__(self, source: Source, names: list[str], settings: Settings) -> None:
        self.source, self.names, self.settings = source, names, settings

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Encoded | Unusable:
        settings = self.settings
        try:
            original = open_image(self.source.read(self.names[index]), settings.bits)
            peak = highest_deep_value(original)
            image = to_channels(original, settings.channels, settings.bits)
            image = fit_to_size(image, settings.size, settings.fit)
        except Unusable as problem:
            if problem.kind == WRONG_SIZE:
                problem.detail += f" instead of {settings.size[1]}×{settings.size[0]}"
            return problem
        stream = io.BytesIO()
        plain = Image.frombytes(image.mode, image.size, image.tobytes())  # without what belongs to the file
        plain.save(stream, **ENCODINGS[settings.encoding])
        return Encoded(stream.getvalue(), peak)


def _check_destination(source: Source, path: Path) -> None:
    if path.suffix.lower() != ".zip":
        raise ConfigError(f"{path}: not the name of a zip. Use a name that ends in .zip.")
    if path.is_dir():
        raise ConfigError(f"{path}: this is a folder. Pass the name of a zip to write.")
    if path.exists() and path.samefile(source.path):
        raise ConfigError(f"{path}: this is the input. Choose another name.")


def _first_resolution(source: Source, fit: str | None) -> int:
    """Return the side of the first readable image, used if no size was given."""
    if fit is not None:
        raise ConfigError(f"--fit {fit}: the size is unknown. Set it with --resolution.")
    for name in source.names:
        with contextlib.suppress(Unusable):
            width, height = open_image(source.read(name)).size
            if width == height:
                return width
            raise ConfigError(
                f"{source.path}: the first image is {width}×{height}, not square.",
                hint="Set a size with --resolution (256, or width x height like 512x1024); --fit determines "
                "how images are brought to it (default: crop).",
            )
    raise DataError(f"{source.path}: none of the {len(source.names)} images can be read.")


def _plan_labels(
    source: Source, labels: str | None
) -> tuple[list[str], dict[str, Any] | None, list[str], list[Problem]]:
    """Return the images to write, their labels, the names of classes, and the images without a label."""
    names: list[str] = list(source.names)
    if labels is None:
        labels = "file" if has_labels(source) else "none"
    if labels == "none":
        return names, None, [], []
    if labels == "folders":
        number, folders = folder_classes(source)
        problems = [Problem(name, BAD_LABEL, NO_FOLDER) for name in names if name not in number]
        return list(number), dict(number), folders, problems
    found, problems = read_labels(source, names)
    if problems:
        bad = {problem.name for problem in problems}
        names = [name for name in names if name not in bad]
        if not names:
            raise refusal(source.path, len(source.names), problems)
        found, _ = read_labels(source, names)
    assert found is not None, "what is left has labels"
    table = dict(zip(names, found.values.tolist(), strict=True))
    return names, table, list(found.class_names), problems


def _raise_for_problems(source: Source, draft: Draft, problems: list[Problem], skip_bad: bool) -> None:
    """Raise DataError if 16-bit images are nearly black, or if some cannot be used and are not left out."""
    if draft.settings.bits == 16 and (too_dark := low_range(draft.peaks)):
        exception = "\n--skip-bad does not leave out such 16-bit images." if skip_bad or problems else ""
        raise refusal(source.path, len(source.names), [*problems, *too_dark], exception)
    if problems and not (skip_bad and draft.zip.entries):
        ways_out = "" if skip_bad else f"\nOr leave them out: --skip-bad. {draft.keep_or_delete()}"
        raise refusal(source.path, len(source.names), problems, ways_out)


def _check_space(path: Path, num_images: int, settings: Settings) -> None:
    needed = num_images * (settings.channels * math.prod(settings.size) + ROOM_FOR_HEADERS)
    if lack := lack_of_space(path.parent, needed, path.name):
        raise DataError(
            lack,
            hint="Free some space, or write to another disk. Finished images are kept for the next call.",
        )


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn an OSError of writing into a DataError."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written ({error.strerror or error}).",
            hint="Finished images are kept; run the same command to resume.",
        ) from error


@contextlib.contextmanager
def _only_one(path: Path) -> Iterator[None]:
    """Hold the lock of `path`, or raise DataError if another process holds it."""
    busy: list[bool] = []
    with lock(lock_path(path), timeout_sec=0, on_wait=lambda: busy.append(True)) as held:
        if busy and not held:
            raise DataError(f"{path}: another process is preparing it. Wait until it has finished.")
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
