"""The catalogue of public checkpoints, `checkpoints.json`: what is publicly stated about each, and nothing
else.
"""

from __future__ import annotations

import functools
import json
import sysconfig
from pathlib import Path, PurePosixPath
from typing import Any

NAME = "checkpoints.json"


@functools.cache
def catalogue() -> dict[str, dict[str, Any]]:
    """Entries by id: url, sha256, size, architecture, format, resolution, dataset, licence; unknown values
    are None.

    Empty where the file is not installed.
    """
    places = (
        Path(__file__).resolve().parents[2] / NAME,
        Path(sysconfig.get_path("data")) / "share" / "stylegan-finetune" / NAME,
    )
    for place in places:
        if place.is_file():
            return json.loads(place.read_text(encoding="utf-8"))
    return {}


def find_licence(*, sha256: str, file_name: str, size: int, resolution: int) -> str | None:
    """The licence of a public checkpoint, recognised by its hash or, with a remark, by its name and
    resolution.

    Several entries of one name count only where they state the same licence. None where it is not known.
    """
    by_hash = [entry for entry in catalogue().values() if entry["sha256"] == sha256]
    if by_hash:
        return by_hash[0]["licence"]
    by_name = [
        entry
        for entry in catalogue().values()
        if PurePosixPath(entry["url"].partition("?")[0]).name == file_name
        and entry["resolution"] == resolution
        and entry["size"] in (None, size)
        and entry["sha256"] is None  # a known hash that differs is another file
    ]
    licences = {entry["licence"] for entry in by_name}
    if len(licences) != 1 or None in licences:
        return None
    return f"{licences.pop()} (recognised by the file name alone)"
