"""Cache of image scans in the cache folder: one SQLite file per folder or zip.

An image counts as unchanged if its size and its time stamp are (in a zip: its size and CRC). What could not
be read is not kept. Without a usable cache every image is decoded again.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
import sqlite3
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import PIL
from PIL import Image

from finetune.data.image_info import ImageInfo, InspectedImages
from finetune.data.problems import Unusable
from finetune.data.sources import Source
from finetune.data.workers import in_order
from torch_utils.files import cache_folder

VERSION = 1  # of the table
WORTH_SEC = 1.0  # a set that takes less is not kept; new facts are written this often
COLUMNS = ", ".join(ImageInfo._fields)

log = logging.getLogger("finetune.data")

Stamp = tuple[int, int]


def inspect_all(
    source: Source, names: Sequence[str], workers: int, *, fresh: bool = False
) -> Iterator[tuple[ImageInfo | Unusable, bool]]:
    """Yield (facts, whether they came from the cache) for each name, in order; decode what is new or changed.

    fresh: decode everything, and replace what the cache has.
    """
    stamps = [source.stamp(name) for name in names]  # before reading: a change while reading is noticed later
    with contextlib.closing(ScanCache(source)) as cache:
        kept = {} if fresh else cache.stamps()
        known = [kept.get(_key(name)) == stamp for name, stamp in zip(names, stamps)]
        del kept
        changed = InspectedImages(source, [name for name, is_known in zip(names, known) if not is_known])
        infos = in_order(changed, len(changed), workers)
        for name, stamp, is_known in zip(names, stamps, known):
            if is_known and (kept_info := cache.get(name, stamp)) is not None:
                yield kept_info, True
                continue
            info: ImageInfo | Unusable = InspectedImages(source, [name])[0] if is_known else next(infos)
            if isinstance(info, ImageInfo):
                cache.put(name, stamp, info)
            yield info, False
        if not changed.names:
            return
        cache.keep_only(source.names)


class ScanCache:
    """The table of one set. Every failure of SQLite is logged and turns the cache off."""

    def __init__(self, source: Source) -> None:
        self.path = path_of(source)
        self._connection: sqlite3.Connection | None = None
        self._is_off = False
        self._pending: list[tuple] = []
        self._written = time.monotonic()
        if self.path.is_file():
            self._open()

    def stamps(self) -> dict[bytes, Stamp]:
        """Return the stamps of all images, by key."""
        with self._off_if_it_fails():
            if self._connection is not None:
                rows = self._connection.execute("SELECT name, size, time FROM looks")
                return {name: (size, when) for name, size, when in rows}
        return {}

    def get(self, name: str, stamp: Stamp) -> ImageInfo | None:
        """Return the cached facts about an image that has not changed since."""
        with self._off_if_it_fails():
            if self._connection is not None:
                query = f"SELECT {COLUMNS} FROM looks WHERE name = ? AND size = ? AND time = ?"
                row = self._connection.execute(query, (_key(name), *stamp)).fetchone()
                return None if row is None else ImageInfo(*row)
        return None

    def put(self, name: str, stamp: Stamp, info: ImageInfo) -> None:
        """Keep facts; written from time to time, so that an interrupted scan is not lost."""
        self._pending.append((_key(name), *stamp, *info))
        if time.monotonic() - self._written > WORTH_SEC:
            self._write()

    def keep_only(self, names: Sequence[str]) -> None:
        """Drop images that are no longer in the set."""
        with self._off_if_it_fails():
            if self._connection is not None:
                there = {_key(name) for name in names}
                rows = self._connection.execute("SELECT name FROM looks").fetchall()
                gone = [row for row in rows if row[0] not in there]
                self._connection.executemany("DELETE FROM looks WHERE name = ?", gone)

    def close(self) -> None:
        """Write what is left, unless all of it took too little time to be worth a file."""
        if self._connection is not None:
            self._write()
        if self._connection is not None:
            self._connection.close()

    def _write(self) -> None:
        if self._connection is None and not self._is_off:
            self._open()
        with self._off_if_it_fails():
            if self._connection is not None:
                places = ", ".join("?" * (3 + len(ImageInfo._fields)))
                self._connection.executemany(f"INSERT OR REPLACE INTO looks VALUES ({places})", self._pending)
                self._connection.commit()
        self._pending.clear()
        self._written = time.monotonic()

    def _open(self) -> None:
        with self._off_if_it_fails():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = _connect(self.path)

    @contextlib.contextmanager
    def _off_if_it_fails(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            log.info("%s cannot be used (%s): all images are decoded.", self.path, error)
            if self._connection is not None:
                self._connection.close()
            self._connection, self._is_off = None, True
            # Operational errors: locked, or not to be written; others: damaged.
            if isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError):
                self.path.unlink(missing_ok=True)
                self._is_off = False


def path_of(source: Source) -> Path:
    """Return the cache file of a data set, keyed by its path."""
    place = str(source.path.resolve())
    digest = hashlib.sha256(place.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    name = re.sub(r"[^\w.-]", "_", source.path.resolve().name)[:40]
    return cache_folder() / "scans" / f"{name}-{digest}.sqlite"


def _connect(path: Path) -> sqlite3.Connection:
    """Open the table, and empty one that other versions filled: they may decode otherwise."""
    decoder = repr((VERSION, PIL.__version__, Image.MAX_IMAGE_PIXELS))
    connection = sqlite3.connect(path, timeout=5.0)
    try:
        connection.execute("CREATE TABLE IF NOT EXISTS decoder (description TEXT)")
        if connection.execute("SELECT description FROM decoder").fetchall() != [(decoder,)]:
            connection.execute("DROP TABLE IF EXISTS looks")
            connection.execute("DELETE FROM decoder")
            connection.execute("INSERT INTO decoder VALUES (?)", (decoder,))
            connection.execute(
                f"CREATE TABLE looks (name BLOB PRIMARY KEY, size, time, {COLUMNS}) WITHOUT ROWID"
            )
            connection.commit()
    except BaseException:
        connection.close()
        raise
    return connection


def _key(name: str) -> bytes:
    return name.encode("utf-8", "surrogatepass")  # names need not be text
