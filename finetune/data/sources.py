"""Sources of images: a folder with subfolders, or a zip. A source lists names and reads bytes."""

from __future__ import annotations

import contextlib
import lzma
import os
import posixpath
import stat
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from finetune.data.problems import UNREADABLE, Unusable
from finetune.errors import DataError

IMAGE_SUFFIXES = frozenset(
    (
        ".png .apng .jpg .jpeg .jpe .jfif .webp .bmp .dib .tif .tiff .gif .ppm .pgm .pbm .pnm .tga .avif .jp2"
    ).split()
)
LABELS_NAME = "dataset.json"
MAX_FILE_BYTES = 1 << 30  # of one image or label file, unpacked: a zip may promise any size
SUFFIX_HINTS = {
    ".zip": "Pass the zip file itself.",
    ".tfrecords": "TFRecords have to be unpacked into images first.",
    ".mdb": "An LMDB has to be unpacked into images first.",
    ".heic": "Convert HEIC images to JPEG first.",
    ".heif": "Convert HEIF images to JPEG first.",
}


class Source:
    """The images under one path.

    `names` are those of the images, with forward slashes, sorted by code point; `ignored` counts other files
    by suffix; `repeated` are names that a zip has more than once (the last one counts). Raises DataError if
    the path holds no image.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        listed = Counter(name for name in self._files() if not is_hidden(name))
        files = sorted(listed)
        self.repeated = sorted(name for name, count in listed.items() if count > 1)
        self.names = [name for name in files if posixpath.splitext(name)[1].lower() in IMAGE_SUFFIXES]
        if not self.names:
            raise _no_images(path, files)
        self.labels_name = self._find_labels(set(files))
        self.ignored = _count_suffixes(set(files) - {*self.names, self.labels_name})

    def _files(self) -> Iterator[str]:
        raise NotImplementedError

    def read(self, name: str) -> bytes:
        """Return the bytes of one file. Raises Unusable if it cannot be read."""
        raise NotImplementedError

    def checksum(self, name: str) -> tuple[int, int]:
        """Return size in bytes and CRC-32 of one file: equal for a folder and for a zip made of it.

        Raises Unusable if it cannot be read.
        """
        raise NotImplementedError

    def stamp(self, name: str) -> tuple[int, int]:
        """Return two numbers that change with the file, without reading it; (-1, -1) if it is gone."""
        raise NotImplementedError

    def label_key(self, name: str) -> str:
        """Return the name of an image in `dataset.json`: relative to the folder that holds that file."""
        assert self.labels_name is not None
        return name.replace("\\", "/")[len(self.labels_name) - len(LABELS_NAME) :]

    def _find_labels(self, files: set[str]) -> str | None:
        """Return `dataset.json` at the top, or in the one folder around all images (zips often have one)."""
        by_path = {name.replace("\\", "/"): name for name in files}
        # Names are sorted: a folder that holds the first and the last of them holds them all.
        first, last = (name.replace("\\", "/").split("/")[:-1] for name in (self.names[0], self.names[-1]))
        depth = 0
        while (found := by_path.get("/".join([*first[:depth], LABELS_NAME]))) is None:
            if first[depth : depth + 1] != last[depth : depth + 1] or depth == len(first):
                break
            depth += 1
        return found


class FolderSource(Source):
    """All images in a folder and its subfolders; links are followed, each folder is visited once."""

    def _files(self) -> Iterator[str]:
        seen = set()
        for folder, subfolders, names in os.walk(self.path, followlinks=True, onerror=_raise_unlistable):
            real = os.path.realpath(folder)
            if real in seen:
                subfolders.clear()
                continue
            seen.add(real)
            subfolders[:] = sorted(name for name in subfolders if not is_hidden(name))
            # Strings: with pathlib, listing 70,000 files takes seconds.
            inside = os.path.relpath(folder, self.path).replace(os.sep, "/")
            yield from names if inside == "." else (f"{inside}/{name}" for name in names)

    def read(self, name: str) -> bytes:
        with self._open(name) as file:
            if os.fstat(file.fileno()).st_size > MAX_FILE_BYTES:
                raise Unusable(UNREADABLE, f"is larger than {MAX_FILE_BYTES >> 20} MiB")
            return file.read()

    def checksum(self, name: str) -> tuple[int, int]:
        size = crc = 0
        with self._open(name) as file:
            while block := file.read(1 << 20):
                crc = zlib.crc32(block, crc)
                size += len(block)
        return size, crc

    @contextlib.contextmanager
    def _open(self, name: str) -> Iterator[BinaryIO]:
        """Open a regular file; another one and every OSError are Unusable."""
        path = self.path / name
        try:
            if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would block
                raise Unusable(UNREADABLE, "not a regular file")
            with open(path, "rb") as file:
                yield file
        except OSError as error:
            raise Unusable(UNREADABLE, error.strerror or str(error)) from None

    def stamp(self, name: str) -> tuple[int, int]:
        try:
            status = os.stat(os.path.join(self.path, name))
        except OSError:
            return -1, -1
        return status.st_size, status.st_mtime_ns


class ZipSource(Source):
    """All images in a zip; every process opens it for itself, so that workers share no file position."""

    def __init__(self, path: Path) -> None:
        self._handle: tuple[int, zipfile.ZipFile] | None = None
        super().__init__(path)

    @property
    def archive(self) -> zipfile.ZipFile:
        """The open zip of this process."""
        if self._handle is None or self._handle[0] != os.getpid():
            try:
                self._handle = (os.getpid(), zipfile.ZipFile(self.path))
            except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError) as error:
                raise DataError(f"{self.path}: the zip cannot be opened ({error}).") from None
        return self._handle[1]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_handle": None}

    def _files(self) -> Iterator[str]:
        return (entry.filename for entry in self.archive.infolist() if not entry.is_dir())

    def read(self, name: str) -> bytes:
        try:
            archive = self.archive
            entry = archive.getinfo(name)
        except DataError as error:  # it was whole when it was first opened
            raise Unusable(UNREADABLE, error.what.removeprefix(f"{self.path}: ").rstrip(".")) from None
        except KeyError:
            raise Unusable(UNREADABLE, "is no longer in the zip") from None
        if entry.file_size > MAX_FILE_BYTES:
            raise Unusable(UNREADABLE, f"is larger than {MAX_FILE_BYTES >> 20} MiB when unpacked")
        try:
            return archive.read(entry)
        except RuntimeError:  # the one sign zipfile gives; NotImplementedError below is its subclass
            raise Unusable(UNREADABLE, "is encrypted, or packed by a method unknown to Python") from None
        except (zipfile.BadZipFile, OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
            raise Unusable(UNREADABLE, f"is damaged inside the zip ({error})") from None

    def checksum(self, name: str) -> tuple[int, int]:
        entry = self.archive.getinfo(name)
        return entry.file_size, entry.CRC

    def stamp(self, name: str) -> tuple[int, int]:
        return self.checksum(name)


def open_source(path: str | os.PathLike[str]) -> Source:
    """Open a folder or a zip. Raises DataError if it is neither, or holds no image."""
    path = Path(path)
    if path.is_dir():
        return FolderSource(path)
    if not path.exists():
        raise DataError(f"{path}: no such folder or zip.", hint="Check the path.")
    if zipfile.is_zipfile(path):
        return ZipSource(path)
    with open(path, "rb") as file:
        if file.read(4) == b"PK\x03\x04":
            raise DataError(
                f"{path}: the zip is truncated (its central directory is missing).",
                hint="Copy or download it again.",
            )
    raise DataError(
        f"{path}: neither a folder nor a zip file.", hint="Pass a folder of images, or a zip of them."
    )


def is_hidden(name: str) -> bool:
    """Return whether a file is a leftover of the operating system: `.name`, or anything in `__MACOSX`."""
    path = "/" + name.replace("\\", "/")
    return "/." in path or "/__MACOSX/" in f"{path}/"


def _raise_unlistable(error: OSError) -> None:
    raise DataError(f"{error.filename}: the folder cannot be listed ({error.strerror}).") from None


def _count_suffixes(names: Iterable[str]) -> Counter[str]:
    return Counter(PurePosixPath(name.lower()).suffix or "no ending" for name in names)


def _no_images(path: Path, files: list[str]) -> DataError:
    counts = _count_suffixes(files)
    seen = ", ".join(f"{count} × {suffix}" for suffix, count in counts.most_common(5))
    advice = [text for suffix, text in SUFFIX_HINTS.items() if suffix in counts]
    return DataError(
        f"{path}: no image found ({f'only {seen}' if seen else 'it is empty'}).",
        hint=" ".join(
            advice or ["Images are recognized by suffix: .png, .jpg, .webp, .bmp, .tif, .gif and others."]
        ),
    )
