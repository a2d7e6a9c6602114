"""Keep downloaded networks in one folder, each with a record of its origin, hash and license.

The record keeps the hash of the first download. Later downloads must match it, even after deletion.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePosixPath

from finetune.errors import CheckpointError, FinetuneError, WeightsMissing
from finetune.hub import catalog, download
from finetune.hub.catalog import Entry
from finetune.hub.download import Expected, OnMessage, Progress
from torch_utils.files import WriteError, atomic_write, cache_folder

log = logging.getLogger("finetune.hub")


@dataclass(frozen=True)
class Record:
    """The record of a file. `id`: its entry in the catalog, None if it has none.

    size: bytes. modified_ns: mtime of the file when it was last hashed. since: date of the first download.
    """

    id: str | None
    url: str | None
    sha256: str
    size: int
    modified_ns: int
    since: str
    licence: str | None = None


def folder() -> Path:
    """Return the folder of downloaded networks: `checkpoints` in the cache folder (FINETUNE_CACHE)."""
    return cache_folder() / "checkpoints"


def place_of(entry: Entry) -> Path:
    """Return the path of the file of an entry, whether it exists or not."""
    suffix = PurePosixPath(entry.file_name).suffix
    return folder() / (entry.id if entry.id.endswith(suffix) else entry.id + suffix)


def place_of_url(url: str) -> Path:
    """Return the path of the file of a URL that is not in the catalog, whether it exists or not."""
    name = re.sub(r"[^\w.-]", "_", catalog.file_name_of(url))[-80:].lstrip(".")
    return folder() / f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name or 'network'}"


def note_of(path: Path) -> Path:
    """Return the path of the record of a file."""
    return path.with_name(path.name + ".json")


def record_of(path: Path) -> Record | None:
    """Return the record of a file, None if it has no readable one."""
    try:
        values = json.loads(note_of(path).read_text(encoding="utf-8"))
        return Record(**{field.name: values[field.name] for field in fields(Record)})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def records() -> Iterator[tuple[Path, Record]]:
    """Yield every recorded file, also deleted ones."""
    for note in sorted(folder().glob("*.json")):
        path = note.with_name(note.name.removesuffix(".json"))
        if (record := record_of(path)) is not None:
            yield path, record


def record_of_hash(sha256: str) -> Record | None:
    """Return the record of a file with this SHA-256, None if there is none."""
    return next((record for _, record in records() if record.sha256 == sha256), None)


def is_kept(path: Path) -> bool:
    """Return whether a file exists with the size and mtime of its record."""
    record = record_of(path)
    if record is None or not path.is_file():
        return False
    status = path.stat()
    return (status.st_size, status.st_mtime_ns) == (record.size, record.modified_ns)


def fetch_entry(entry: Entry, *, on_message: OnMessage = log.info, progress: Progress | None = None) -> Path:
    """Return the file of an entry, downloaded if missing. Raises what `download.fetch` raises."""
    return _get(place_of(entry), entry.urls, entry, on_message, progress)


def fetch_url(url: str, *, on_message: OnMessage = log.info, progress: Progress | None = None) -> Path:
    """Return the file of a URL, downloaded if missing; a URL of the catalog is treated as its entry."""
    entry = catalog.find_url(url)
    if entry is not None:
        return fetch_entry(entry, on_message=on_message, progress=progress)
    return _get(place_of_url(url), (url,), None, on_message, progress)


def _get(
    path: Path, urls: tuple[str, ...], entry: Entry | None, on_message: OnMessage, progress: Progress | None
) -> Path:
    if is_kept(path):
        return path
    name = entry.id if entry else urls[0]
    if not path.is_file():
        if download.is_offline():
            raise WeightsMissing(
                f"{name} is not on this machine, and {download.OFFLINE} or --offline forbids downloading it",
                hint=f"Download {urls[0]} elsewhere and pass the file to `finetune checkpoints add-file`.",
            )
        on_message(f"Fetching {name} into {folder()}")
        on_message(license_line(entry))
    expected = expected_of(path, entry)
    try:
        download.fetch(
            urls, path, sha256=expected.sha256, size=expected.size, progress=progress, on_message=on_message
        )
    except FinetuneError as error:
        if expected.sha256 and (entry is None or entry.sha256 is None) and "instead of" in error.what:
            error.hint = (
                f"The hash is that of the first download, on {_since(path)}. If the new file is right, "
                f"delete {note_of(path)} and the file."
            )
        raise
    _record(path, entry, urls[0])
    return path


def license_line(entry: Entry | None) -> str:
    """Return what is printed about the license when a file is first downloaded."""
    if entry is None or entry.licence is None:
        return "License: not stated in the catalog; see the page of the publisher."
    remark = f" ({entry.licence.remark})" if entry.licence.remark else ""
    return f"License: {entry.licence}{remark}"


def expected_of(path: Path, entry: Entry | None) -> Expected:
    """Return the hash and size that a file must have: of the catalog, or else of the first download."""
    record = record_of(path)
    sha256 = entry.sha256 if entry else None
    size = entry.size if entry else None
    if sha256 is None and record is not None:
        sha256, size = record.sha256, size or record.size
    return Expected(sha256, size)


def _since(path: Path) -> str:
    record = record_of(path)
    return record.since if record else "an earlier day"


def _record(path: Path, entry: Entry | None, url: str | None, license: str | None = None) -> None:
    digest, size = download.identity(path)
    before = record_of(path)
    if license is None and before is not None and before.sha256 == digest:
        license = before.licence
    if license is None and entry is not None and entry.licence is not None:
        license = str(entry.licence)
    record = Record(
        id=entry.id if entry else None,
        url=url,
        sha256=digest,
        size=size,
        modified_ns=path.stat().st_mtime_ns,
        since=before.since if before else time.strftime("%Y-%m-%d"),
        licence=license,
    )
    # In a folder that can only be read, the file is hashed every time.
    with contextlib.suppress(WriteError), atomic_write(note_of(path)) as stream:
        stream.write(json.dumps(asdict(record), indent=1).encode())


def add_file(path: Path, entry: Entry, *, license: str | None = None) -> Path:
    """Copy a file obtained by other means into the folder as that of an entry, and return its new path.

    Raises CheckpointError if it is not the file of that entry, WriteError if it cannot be copied.
    """
    dest = place_of(entry)
    expected = expected_of(dest, entry)
    digest, size = download.identity(path)
    try:
        expected.check(path, digest, size)
    except FinetuneError as error:
        raise CheckpointError(f"{error.what}, so it is not {entry.id}") from None
    if not (dest.exists() and dest.samefile(path)):
        with path.open("rb") as source, atomic_write(dest) as stream:
            shutil.copyfileobj(source, stream)
    _record(dest, entry, None, license)
    return dest


@dataclass(frozen=True)
class Verdict:
    """The result of `verify` for one file: `state` is ok, changed or missing."""

    path: Path
    name: str
    state: str
    why: str


def verify(path: Path) -> Verdict:
    """Hash a file of the folder again and compare it with the catalog and its record."""
    record = record_of(path)
    entry = catalog.entries().get(record.id) if record and record.id else None
    entry = entry or next((each for each in catalog.entries().values() if place_of(each) == path), None)
    name = entry.id if entry else (record.url if record and record.url else path.name)
    if not path.is_file():
        return Verdict(path, name, "missing", "not on this machine")
    expected = expected_of(path, entry)
    try:
        expected.check("the file", *download.identity(path))
    except FinetuneError as error:
        return Verdict(path, name, "changed", error.what)
    if expected.sha256 is None:
        return Verdict(path, name, "ok", "no hash is published, and none was recorded before")
    origin = "of the catalog" if entry and entry.sha256 else f"of the first download, on {_since(path)}"
    return Verdict(path, name, "ok", f"hash {origin}")


def kept_files() -> list[Path]:
    """Return the complete files of the folder, without their records."""
    other = (".json", ".part", ".lock", ".tmp")
    return sorted(path for path in folder().glob("*") if path.is_file() and not path.name.endswith(other))
