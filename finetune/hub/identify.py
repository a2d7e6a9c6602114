"""Identify the public checkpoint that a file is, and with it its license and published settings."""

from __future__ import annotations

from finetune.hub import catalog, store
from finetune.hub.catalog import Entry
from finetune.recipes import Published

# A remark on a license that may be another file's; files of earlier versions spell its first word otherwise.
BY_NAME = "by the file name alone)"


def entry_of_hash(sha256: str) -> Entry | None:
    """Return the entry with this hash, in the catalog or in the record of a download; None if unknown."""
    for entry in catalog.entries().values():
        if entry.sha256 == sha256:
            return entry
    record = store.record_of_hash(sha256)
    return catalog.entries().get(record.id) if record and record.id else None


def entries_of_name(file_name: str, size: int, resolution: int | None = None) -> list[Entry]:
    """Return the entries with this file name that neither their size (bytes) nor a hash distinguishes."""
    return [
        entry
        for entry in catalog.entries().values()
        if entry.file_name == file_name
        and resolution in (None, entry.resolution)
        and entry.size in (None, size)
        and entry.sha256 is None
    ]


def find_license(*, sha256: str, file_name: str | None, size: int, resolution: int) -> str | None:
    """Return the license of a public checkpoint, found by hash or, with a remark, by name and resolution.

    file_name: None to search by hash alone. Returns None if the license is unknown, or if entries with this
    file name state different ones.
    """
    entry = entry_of_hash(sha256)
    if entry is not None and entry.licence is not None:
        return str(entry.licence)
    record = store.record_of_hash(sha256)
    if entry is not None or record is not None:
        return record.licence if record else None
    if file_name is None:
        return None
    licenses = {str(entry.licence) for entry in entries_of_name(file_name, size, resolution)}
    if len(licenses) != 1 or "None" in licenses:
        return None
    return f"{licenses.pop()} (recognized {BY_NAME}"


def published(entry: Entry) -> Published | None:
    """Return the published training settings of a checkpoint, None if there are none."""

    def settings(which: str) -> tuple[float, int] | None:
        values = entry.published.get(which, {})
        return (values["gamma"], values["batch"]) if "gamma" in values and "batch" in values else None

    own = entry.published.get("trained", {})
    inferred = ", inferred from the name of its configuration" if "published" in entry.inferred else ""
    found = Published(
        entry.id + inferred,
        trained=settings("trained"),
        finetune=settings("finetune"),
        glr=own.get("glr", own.get("lr")),
        dlr=own.get("dlr", own.get("lr")),
        target=own.get("target"),
    )
    return found if found.trained or found.finetune else None
