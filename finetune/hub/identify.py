"""Identify the public checkpoint that a file is, and with it its license and published settings."""

from __future__ import annotations

import dataclasses

from finetune.hub import catalog, store
from finetune.hub.catalog import Entry
from finetune.recipes import Published

BY_NAME = "(recognised by the file name alone)"  # the remark on a licence that may be another's


def entry_of_hash(sha256: str) -> Entry | None:
    """The entry that a file is of: by a hash in the catalogue, or as one that was fetched by that name."""
    for entry in catalog.catalogue().values():
        if entry.sha256 == sha256:
            return entry
    record = store.record_of_hash(sha256)
    return catalog.catalogue().get(record.id) if record and record.id else None


def entries_of_name(file_name: str, size: int, resolution: int | None = None) -> list[Entry]:
    """The entries whose file has this name; size: bytes. Those of a known size or hash are others."""
    return [
        entry
        for entry in catalog.catalogue().values()
        if entry.file_name == file_name
        and resolution in (None, entry.resolution)
        and entry.size in (None, size)
        and entry.sha256 is None
    ]


def find_licence(*, sha256: str, file_name: str, size: int, resolution: int) -> str | None:
    """The licence of a public checkpoint, recognised by its hash or, with a remark, by name and resolution.

    Several entries of one name count only where they state the same licence. None where it is not known.
    """
    entry = entry_of_hash(sha256)
    if entry is not None and entry.licence is not None:
        return str(entry.licence)
    record = store.record_of_hash(sha256)
    if entry is not None or record is not None:
        return record.licence if record else None
    licences = {str(entry.licence) for entry in entries_of_name(file_name, size, resolution)}
    if len(licences) != 1 or "None" in licences:
        return None
    return f"{licences.pop()} {BY_NAME}"


def published(entry: Entry) -> Published | None:
    """What is published about the training of a checkpoint, as recipes take it; None where nothing is."""

    def settings(which: str) -> tuple[float, int] | None:
        values = entry.published.get(which, {})
        return (values["gamma"], values["batch"]) if "gamma" in values and "batch" in values else None

    own = entry.published.get("trained", {})
    found = Published(
        entry.id,
        trained=settings("trained"),
        finetune=settings("finetune"),
        glr=own.get("glr", own.get("lr")),
        dlr=own.get("dlr", own.get("lr")),
        target=own.get("target"),
    )
    if "published" in entry.inferred:
        found = dataclasses.replace(found, name=f"{entry.id}, concluded from the name of its configuration")
    return found if found.trained or found.finetune else None
