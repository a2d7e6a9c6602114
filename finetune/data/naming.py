"""Names of images in a prepared zip, and classes by folder."""

from __future__ import annotations

import os
import re
import unicodedata
from pathlib import PurePosixPath

from finetune.errors import DataError

NO_FOLDER = "is in no folder that could be its class"


def target_names(names: list[str], suffix: str) -> dict[str, str]:
    """Name -> its name in the zip: the same sub-folders, another ending, and no two that any system takes for
    one."""
    taken: set[str] = set()
    targets = {}
    for name in names:
        safe = _safe(name)
        stem = safe.removesuffix(PurePosixPath(safe).suffix)
        number = 1
        target = stem + suffix
        while _folded(target) in taken:
            # a.png beside a.jpg becomes a.jpg.tif; if that is taken too, a.jpg-2.tif.
            target = safe + (f"-{number}" if number > 1 else "") + suffix
            number += 1
        taken.add(_folded(target))
        targets[name] = target
    return targets


def classes_of_folders(names: list[str]) -> tuple[dict[str, int], list[str]]:
    """Return classes by folder: name -> class for images in one, and the folders in the order of classes.

    A single folder around everything does not count. Folders are sorted naturally: 2 before 10. Raises
    DataError if the same classes recur in every folder, as in train/cat and test/cat.
    """
    parts = {name: name.replace("\\", "/").split("/")[:-1] for name in names}
    depth = 0
    while len({tuple(folders[: depth + 1]) for folders in parts.values()}) == 1 and all(
        len(folders) > depth + 1 for folders in parts.values()
    ):
        depth += 1
    inside = {name: folders[depth] for name, folders in parts.items() if len(folders) > depth}
    folders = sorted(set(inside.values()), key=_natural)
    _check_splits(folders, [each[depth:] for each in parts.values() if len(each) > depth])
    number = {folder: index for index, folder in enumerate(folders)}
    return {name: number[folder] for name, folder in inside.items()}, folders


def _natural(folder: str) -> tuple:
    """Return a key that sorts the numbers in a name by value; equal ones by spelling."""
    pieces = re.split(r"(\d+)", folder)
    return ([int(piece) if index % 2 else piece for index, piece in enumerate(pieces)], folder)


def _check_splits(folders: list[str], paths: list[list[str]]) -> None:
    """Raise DataError if all folders hold the same sub-folders, which are the classes then."""
    below: dict[str, set[str]] = {folder: set() for folder in folders}
    for path in paths:
        below[path[0]].update(path[1:2])
    fewest = min(below.values(), key=len, default=set())
    if len(folders) > 1 and fewest and all(fewest <= names for names in below.values()):
        shown = ", ".join(sorted(fewest, key=_natural)[:5])
        raise DataError(
            f"The folders {', '.join(folders[:5])} have the same subfolders ({shown}): classes are unclear.",
            hint=f"To use the subfolders as classes, pass one folder as the data set, such as {folders[0]}; "
            "to use all images, move those of each class into one folder.",
        )


def _safe(name: str) -> str:
    """Return a name that can be unpacked anywhere: inside the folder, and valid text."""
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    text = "/".join(parts)
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        raw = os.fsencode(text) if os.name != "nt" else text.encode("utf-8", "surrogatepass")
        return raw.decode("utf-8", "backslashreplace").replace("\\x", "%")


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
