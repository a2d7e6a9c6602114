"""What pictures are called in a prepared zip, and which classes their folders stand for."""

from __future__ import annotations

import os
import unicodedata
from pathlib import PurePosixPath

from finetune.data.problems import BAD_LABEL, Problem


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
            # a.png beside a.jpg becomes a.jpg.tif; where that is taken too, a.jpg-2.tif.
            target = safe + (f"-{number}" if number > 1 else "") + suffix
            number += 1
        taken.add(_folded(target))
        targets[name] = target
    return targets


def classes_of_folders(names: list[str]) -> tuple[dict[str, int], list[str], list[Problem]]:
    """Classes by folder: name -> class, the folders in the order of classes, and pictures that are in none.

    Where one folder is around everything, those inside it count.
    """
    parts = {name: name.replace("\\", "/").split("/")[:-1] for name in names}
    depth = 0
    while len({tuple(folders[: depth + 1]) for folders in parts.values()}) == 1 and all(
        len(folders) > depth + 1 for folders in parts.values()
    ):
        depth += 1
    inside = {name: folders[depth] for name, folders in parts.items() if len(folders) > depth}
    folders = sorted(set(inside.values()))
    number = {folder: index for index, folder in enumerate(folders)}
    outside = [
        Problem(name, BAD_LABEL, "is in no folder that could be its class")
        for name in names
        if name not in inside
    ]
    return {name: number[folder] for name, folder in inside.items()}, folders, outside


def _safe(name: str) -> str:
    """A name that can be unpacked anywhere: no way out of the folder, no bytes that are no text."""
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
