"""Create catalog entries from the facts in a file (`finetune.resolve.facts_of`) and what a user adds."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path, PurePosixPath
from typing import Any

from finetune.errors import CheckpointError, ConfigError
from finetune.hub import catalog
from finetune.hub.catalog import Entry, License
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


def new_entry(url: str, facts: dict[str, Any], **given: Any) -> Entry:
    """Return an entry for the file of a URL, or the entry of the catalog completed with these facts.

    given: further fields of an Entry. Raises ConfigError if they do not match the schema, or contradict what
    the catalog states.
    """
    stated_by = f"the file, as it was on {time.strftime('%Y-%m-%d')}"
    known = catalog.find_url(url)
    given = {name: value for name, value in given.items() if value}
    if known is not None:
        entry = _completed(known, {"sha256_from": stated_by, **facts, **given}, set(facts))
    else:
        name = PurePosixPath(catalog.file_name_of(url)).stem
        entry = Entry(
            **{"id": name, "urls": (url,), "sources": (url,), **facts, "sha256_from": stated_by, **given}
        )
    problems = catalog.problems_of_entry(entry.to_json())
    others = [other for other in catalog.entries().values() if known is None or other.id != known.id]
    problems += [problem for problem in catalog.conflicts([*others, entry]) if entry.id in problem]
    if problems:
        raise ConfigError([f"{entry.id}: {problem}." for problem in problems])
    return entry


def _completed(known: Entry, more: dict[str, Any], certain: set[str]) -> Entry:
    """Return an entry whose empty fields are those of `more`, and whose lists are continued.

    certain: fields whose inferred values are replaced. Raises ConfigError for a value that contradicts the
    entry.
    """
    changes: dict[str, Any] = {"size_about": None}
    wrong = []
    for name, value in more.items():
        stated = getattr(known, name)
        if name in ("aliases", "sources"):
            changes[name] = tuple(dict.fromkeys((*stated, *value)))
        elif name == "published":
            trained = stated.get("trained", {})
            wrong += [
                f"{known.id}: {key} is {trained[key]} in the catalog, not {item}."
                for key, item in value["trained"].items()
                if trained.get(key, item) != item
            ]
            changes[name] = {**stated, "trained": {**trained, **value["trained"]}}
        elif name == "sha256_from" or (name == "licence" and _is_same(stated, value)):
            changes[name] = stated or value
        elif stated in (None, value) or (name in certain and name in known.inferred):
            changes[name] = value
        else:
            shown = name.replace("licence", "license")
            wrong.append(f"{known.id}: {shown} is {stated} in the catalog, not {value}.")
    if wrong:
        raise ConfigError(wrong, hint="Omit what the catalog states, or correct the catalog first.")
    inferred = tuple(name for name in known.inferred if name not in certain)
    return dataclasses.replace(known, **changes, inferred=inferred)


def _is_same(stated: License | None, given: License) -> bool:
    return stated is not None and stated.name == given.name and given.page in (None, stated.page)


def write_into(path: Path, entry: Entry) -> None:
    """Add an entry to the catalog at `path`, replacing one with its id; the file is created if missing.

    Raises ConfigError if the file is not a catalog, WriteError if it cannot be written.
    """
    entries = catalog.read_catalog(path) if path.exists() else {}
    content = catalog.to_text((entries | {entry.id: entry}).values())
    with atomic_write(path) as stream:
        stream.write(content.encode())
