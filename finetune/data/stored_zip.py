"""An append-only uncompressed zip, so that an interrupted one can be resumed.

Python's zipfile writes the same, but cannot continue a file that has no directory yet. No dates and no
permissions of files go in: equal content gives equal bytes. Source: APPNOTE.TXT 6.3.10, sections 4.3 to 4.5.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

LOCAL = struct.Struct("<4s5H3L2H")
CENTRAL = struct.Struct("<4s6H3L5H2L")
END_64 = struct.Struct("<4sQ2H2L4Q")
LOCATOR_64 = struct.Struct("<4sLQL")
END = struct.Struct("<4s4H2LH")
OFFSET_64 = struct.Struct("<2HQ")
UTF8_NAMES = 1 << 11
DATE = 1 << 5 | 1  # 1 January 1980, the first there is
UNIX_FILE = (3 << 8 | 20, 0o100644 << 16)  # "made by", attributes
MAX_16, MAX_32 = 0xFFFF, 0xFFFFFFFF  # from here on, numbers stand in the records of zip64


class Entry(NamedTuple):
    """One file in a zip, and where it begins."""

    name: str
    crc: int
    size: int
    offset: int

    @property
    def end(self) -> int:
        """Where the next one begins."""
        return self.offset + LOCAL.size + len(self.name.encode()) + self.size


class StoredZip:
    """Appends files to `stream`, which may hold `entries` already and ends after the last of them."""

    def __init__(self, stream: BinaryIO, entries: list[Entry] | None = None) -> None:
        self.stream, self.entries = stream, list(entries or ())
        self.offset = self.entries[-1].end if self.entries else 0

    def add(self, name: str, data: bytes) -> None:
        """Append one file, of less than 4 GiB."""
        entry = Entry(name, zlib.crc32(data), len(data), self.offset)
        self.stream.write(_local(entry) + data)
        self.entries.append(entry)
        self.offset = entry.end

    def finish(self) -> None:
        """Append the directory: now it is a zip."""
        start = self.offset
        for entry in self.entries:
            self.stream.write(_central(entry))
            self.offset += len(_central(entry))
        count, size = len(self.entries), self.offset - start
        if count >= MAX_16 or start >= MAX_32 or size >= MAX_32:
            end = END_64.pack(b"PK\x06\x06", END_64.size - 12, 45, 45, 0, 0, count, count, size, start)
            self.stream.write(end + LOCATOR_64.pack(b"PK\x06\x07", 0, self.offset, 1))
        shown = min(count, MAX_16)
        self.stream.write(
            END.pack(b"PK\x05\x06", 0, 0, shown, shown, min(size, MAX_32), min(start, MAX_32), 0)
        )


def whole_entries(stream: BinaryIO) -> Iterator[Entry]:
    """Yield the entries of a file that StoredZip wrote, up to the first that is cut or fails its checksum."""
    offset = 0
    while True:
        stream.seek(offset)
        header = stream.read(LOCAL.size)
        if len(header) < LOCAL.size:
            return
        (mark, _, _, _, _, _, crc, size, _, name_length, _) = LOCAL.unpack(header)
        raw_name, data = stream.read(name_length), stream.read(size if mark == b"PK\x03\x04" else 0)
        if mark != b"PK\x03\x04" or len(data) < size or zlib.crc32(data) != crc:
            return
        try:
            entry = Entry(raw_name.decode(), crc, size, offset)
        except UnicodeDecodeError:
            return
        if _local(entry) != header + raw_name:
            return
        yield entry
        offset = entry.end


def _local(entry: Entry) -> bytes:
    name = entry.name.encode()
    fixed = (20, UTF8_NAMES, 0, 0, DATE, entry.crc, entry.size, entry.size, len(name), 0)
    return LOCAL.pack(b"PK\x03\x04", *fixed) + name


def _central(entry: Entry) -> bytes:
    name, extra, offset, needs = entry.name.encode(), b"", entry.offset, 20
    if offset >= MAX_32:
        extra, offset, needs = OFFSET_64.pack(1, 8, offset), MAX_32, 45
    made_by, attributes = UNIX_FILE
    fixed = (made_by, needs, UTF8_NAMES, 0, 0, DATE, entry.crc, entry.size, entry.size)
    return (
        CENTRAL.pack(b"PK\x01\x02", *fixed, len(name), len(extra), 0, 0, 0, attributes, offset) + name + extra
    )
