"""Labels from `dataset.json` (`{"labels": [["00000/img00000000.png", 6], …]}`) or from folders."""

from __future__ import annotations

import json
import posixpath
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from finetune.data.naming import NO_FOLDER, classes_of_folders
from finetune.data.problems import BAD_LABEL, Problem, Unusable
from finetune.data.sources import LABELS_NAME, Source
from finetune.errors import DataError

MISSING = object()
MAX_FLOAT32 = float(np.finfo(np.float32).max)
SHOWN = 5  # classes with another name, in a message
MAX_CLASS_NAMES = 10_000  # checkpoint.load limits the number of values that it reads from an entry


@dataclass(frozen=True)
class Labels:
    """One label an image: `values` is int64 `[n]` (classes) or float32 `[n, num_classes]` (vectors).

    class_names: names of the classes that are used, in their order; empty if they are not known.
    """

    values: np.ndarray
    num_classes: int
    class_names: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """Return 'classes', also for vectors that are all one-hot, or 'vectors'."""
        values = self.values
        if values.ndim == 1 or (np.isin(values, (0, 1)).all() and (values.sum(axis=1) == 1).all()):
            return "classes"
        return "vectors"

    def one_hot(self, picked: np.ndarray | int) -> np.ndarray:
        """Return labels as float32, `[num_classes]` for one, `[n, num_classes]` for n; vectors unchanged."""
        if self.values.ndim == 2:
            return self.values[picked].copy()
        return (self.values[picked, np.newaxis] == np.arange(self.num_classes)).astype(np.float32)


def read_labels(
    source: Source, names: list[str], num_classes: int | None = None, origin: str = "file"
) -> tuple[Labels | None, list[Problem]]:
    """Return the labels of `names`, in that order; if one is wrong, None and every problem.

    `num_classes` is what the network expects; None takes it from the labels (largest class + 1, the length of
    the vectors, or the number of folders). `origin`: one of `finetune.options.LABELS`. Raises DataError if
    there is no usable `dataset.json` at all, or no folders.
    """
    if origin == "folders":
        return _labels_of_folders(source, names, num_classes)
    table, stated = _read_table(source, num_classes)
    entries = _entries_of_images(source, table)
    found = [(name, table.get(entries.get(name, ""), MISSING)) for name in names]
    as_vectors = any(isinstance(value, list) for _, value in found)
    if as_vectors:
        length = num_classes or max(1, *(len(value) for _, value in found if isinstance(value, list)))
        checked = [(name, _wrong_vector(value, length)) for name, value in found]
    else:
        checked = [(name, _wrong_class(value, num_classes)) for name, value in found]
    problems = [Problem(name, BAD_LABEL, wrong) for name, wrong in checked if wrong is not None]
    if problems:
        return None, problems
    if as_vectors:
        return Labels(np.array([value for _, value in found], dtype=np.float32), length), []
    values = np.array([value for _, value in found], dtype=np.int64)
    num_used = int(values.max()) + 1
    return Labels(values, num_classes or num_used, _class_names(stated, num_used)), []


def _labels_of_folders(
    source: Source, names: list[str], num_classes: int | None
) -> tuple[Labels | None, list[Problem]]:
    """Read labels like `read_labels`; classes are those of all images, even if `names` are a part of them."""
    classes, folders = folder_classes(source)
    found = [(name, classes.get(name, MISSING)) for name in names]
    checked = [
        (name, NO_FOLDER if value is MISSING else _wrong_class(value, num_classes)) for name, value in found
    ]
    problems = [Problem(name, BAD_LABEL, wrong) for name, wrong in checked if wrong is not None]
    if problems:
        return None, problems
    values = np.array([value for _, value in found], dtype=np.int64)
    return Labels(values, num_classes or len(folders), _class_names(folders, len(folders))), []


def _class_names(stated: Any, num_used: int) -> tuple[str, ...]:
    """Return the names of the first `num_used` classes, () unless each is a text unlike the others.

    In Unicode form C: macOS stores "é" as two characters, and Linux does not.
    """
    if not isinstance(stated, list) or not all(isinstance(name, str) for name in stated):
        return ()
    names = tuple(dict.fromkeys(unicodedata.normalize("NFC", name) for name in stated[:num_used]))
    return names if len(names) == num_used <= MAX_CLASS_NAMES else ()


def differing_names(checkpoint: Sequence[str], images: Sequence[str]) -> str:
    """Return which classes have another name in the checkpoint, at most SHOWN of them; empty if none has."""
    others = [
        f"class {index} is {now!r}, in the checkpoint {before!r}"
        for index, (before, now) in enumerate(zip(checkpoint, images))
        if before != now
    ]
    more = f"; {len(others) - SHOWN} more differ" if len(others) > SHOWN else ""
    return "; ".join(others[:SHOWN]) + more


def folder_classes(source: Source) -> tuple[dict[str, int], list[str]]:
    """Name -> class, and the folders in the order of classes. Raises DataError without folders."""
    try:
        classes, folders = classes_of_folders(source.names)
    except DataError as error:
        raise DataError(f"{source.path}: {error.what}", hint=error.hint) from None
    if not folders:
        raise DataError(
            f"{source.path}: --labels folders: no image is in a subfolder.",
            hint="Put the images of each class in a folder of their own, or train without labels.",
        )
    return classes, folders


def advise_folders(source: Source) -> str:
    """Return a sentence on how the folders can be classes; empty if there are not several."""
    try:
        several = len(classes_of_folders(source.names)[1]) > 1
    except DataError as error:
        return f"The folders can serve as classes (--labels folders), but: {error.what} {error.hint}"
    return "The folders can serve as classes: use --labels folders." if several else ""


def _entries_of_images(source: Source, table: dict[str, Any]) -> dict[str, str]:
    """Name of an image -> its name in `dataset.json`: the same one, else the only one that means the same.

    Other spellings mean the same if their paths and Unicode forms do (macOS stores "é" as two characters).
    """
    keys = {name: source.label_key(name) for name in source.names}
    found = {name: key for name, key in keys.items() if key in table}
    if len(found) == len(keys):
        return found
    left = table.keys() - set(found.values())
    entries = _by_meaning({entry: entry for entry in left})
    images = _by_meaning({name: key for name, key in keys.items() if name not in found})
    for meaning, names in images.items():
        if len(names) == len(entries.get(meaning, ())) == 1:
            found[names[0]] = entries[meaning][0]
    return found


def _by_meaning(spellings: dict[str, str]) -> dict[str, list[str]]:
    """Return normalized spelling -> the keys of `spellings` that have it."""
    found: dict[str, list[str]] = {}
    for name, spelling in spellings.items():
        meaning = unicodedata.normalize("NFC", posixpath.normpath(spelling).lstrip("/"))
        found.setdefault(meaning, []).append(name)
    return found


def has_labels(source: Source) -> bool:
    """Return whether `dataset.json` is there and does not state that there are no labels."""
    if source.labels_name is None:
        return False
    try:
        content = json.loads(source.read(source.labels_name))
    except (Unusable, ValueError, RecursionError):
        return True  # reading them raises the error
    return not (isinstance(content, dict) and content.get("labels") is None)


def labels_without_image(source: Source) -> list[str]:
    """Return names in `dataset.json` that belong to no image, sorted. Raises DataError like `read_labels`."""
    table, _ = _read_table(source, None)
    return sorted(table.keys() - set(_entries_of_images(source, table).values()))


def _read_table(source: Source, num_classes: int | None) -> tuple[dict[str, Any], Any]:
    """Return image name -> label as the file has it, names with forward slashes, and its entry `classes`."""
    advice = 'Write one like {"labels": [["a.png", 0], ["b.png", 3]]}'
    if num_classes is None:
        advice += ", or train without labels."
    else:
        advice += f": the network has {num_classes} classes, so every image needs one."
    advice = f"{advice} {advise_folders(source)}".rstrip()
    if source.labels_name is None:
        raise DataError(f"{source.path}: {LABELS_NAME} is missing, and labels are needed.", hint=advice)
    where = f"{source.path}: {source.labels_name}"
    try:
        content = json.loads(source.read(source.labels_name))
    except Unusable as problem:
        raise DataError(f"{where}: {problem.detail}.") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({error}).") from None
    pairs = content.get("labels") if isinstance(content, dict) else None
    if pairs is None:
        raise DataError(
            f'{where}: no labels ("labels" is null or missing), and labels are needed.', hint=advice
        )
    if not isinstance(pairs, list):
        raise DataError(f'{where}: "labels" must be a list, not {type(pairs).__name__}.', hint=advice)
    table: dict[str, Any] = {}
    for number, pair in enumerate(pairs):
        if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)):
            raise DataError(
                f"{where}: entry {number} of labels must be [name, label], not {_shown(pair)}.", hint=advice
            )
        name = pair[0].replace("\\", "/")
        if table.setdefault(name, pair[1]) != pair[1]:
            raise DataError(
                f"{where}: {name!r} has two labels, {_shown(table[name])} and {_shown(pair[1])}.",
                hint="Keep one of them.",
            )
    return table, content.get("classes")


def _wrong_class(value: Any, num_classes: int | None) -> str | None:
    """Return what is wrong with one class index, or None."""
    if value is MISSING:
        return f"not in {LABELS_NAME}"
    if isinstance(value, float) and value.is_integer():  # as the official code reads it
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        return f"{_shown(value)} is not a whole number"
    if value < 0:
        return f"{value} is negative"
    if value >= (num_classes or 1 << 20):
        return f"class {value}, but the classes are 0 to {(num_classes or 1 << 20) - 1}"
    return None


def _wrong_vector(value: Any, length: int) -> str | None:
    """Return what is wrong with one label vector, or None."""
    if value is MISSING:
        return f"not in {LABELS_NAME}"
    if not isinstance(value, list):
        return f"{_shown(value)} is no vector, but other labels are"
    if len(value) != length:
        return f"a vector of {len(value)} numbers instead of {length}"
    for number in value:
        is_number = isinstance(number, int | float) and not isinstance(number, bool)
        if not is_number or not abs(number) <= MAX_FLOAT32:  # NaN compares false too
            return f"{_shown(number)} in its vector is no finite number"
    return None


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"
