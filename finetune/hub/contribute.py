"""Create catalog entries from the facts in a file (`finetune.resolve.facts_of`) and what a user adds."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path, PurePosixPath
from typing import Any

from finetune.errors import CheckpointError, ConfigError
from finetune.hub import catalog
from finetune.hub.catalog import Entry
from torch_utils.files import atomic_write


def check_fits(path: Path, entry: Entry, facts: dict[str, Any]) -> None:
    """Raise CheckpointError if the facts found in the file at `path` are not those of the entry."""
    wrong = [
        f"its {name} is {facts[name]} instead of {stated}"
        for name in ("architecture", "resolution", "classes")
        if (stated := getattr(entry, name)) is not None
        and facts[name] != stated
        and name not in entry.inferred
    ]
    if wrong:
        raise CheckpointError(f"{path} is not {entry.id}: {', '.join(wrong)}")


def new_entry(url: str, facts: dict[str, Any], **said: Any) -> Entry:
    """Return an entry for the file of a URL, or the entry of the catalog completed with these facts.

    said: further fields of an Entry. Raises ConfigError if they do not match the schema.
    """
    stated_by = f"the file, as it was on {time.strftime('%Y-%m-%d')}"
    known = catalog.find_url(url)
    said = {name: value for name, value in said.items() if value}
    if known is not None:
        inferred = tuple(name for name in known.inferred if name not in facts)
        source = known.sha256_from if known.sha256 else stated_by
        entry = dataclasses.replace(known, **facts, inferred=inferred, sha256_from=source, size_about=None)
        entry = dataclasses.replace(entry, **{k: v for k, v in said.items() if k != "id"})
    else:
        name = PurePosixPath(catalog.file_name_of(url)).stem
        entry = Entry(
            **{"id": name, "urls": (url,), "sources": (url,), **facts, "sha256_from": stated_by, **said}
        )
    problems = catalog.problems_of_entry(entry.to_json())
    others = [other for other in catalog.entries().values() if known is None or other.id != known.id]
    problems += [problem for problem in catalog.conflicts([*others, entry]) if entry.id in problem]
    if problems:
        raise ConfigError([f"{entry.id}: {problem}." for problem in problems])
    return entry


def write_into(path: Path, entry: Entry) -> None:
    """Add an entry to the catalog at `path`, replacing one with its id; the file is created if missing.

    Raises ConfigError if the file is not a catalog, WriteError if it cannot be written.
    """
    entries = catalog.read_catalog(path) if path.exists() else {}
    content = catalog.to_text((entries | {entry.id: entry}).values())
    with atomic_write(path) as stream:
        stream.write(content.encode())
