"""Downloads that are verified before they get their name."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from finetune.errors import FinetuneError, WeightsMissing

CHUNK = 1 << 20  # bytes
TIMEOUT_SEC = (10, 60)  # to connect, and between two chunks


def is_offline() -> bool:
    """Whether FINETUNE_OFFLINE forbids the network."""
    return os.environ.get("FINETUNE_OFFLINE", "").strip().lower() not in ("", "0", "false", "no")


def fetch(
    url: str,
    dest: Path,
    *,
    sha256: str | None = None,
    sha256_prefix: str | None = None,
    size: int | None = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> Path:
    """Download `url` to `dest`, verified; a file already there is verified and kept.

    sha256, sha256_prefix: hex digest, or its beginning. size: bytes. progress: called with the bytes so far
    and the bytes in all (None if the server does not say). The data goes to `dest` with `.part` added, and
    gets its name only when it is complete and right. Raises WeightsMissing where FINETUNE_OFFLINE is set and
    the file is not there, FinetuneError where the download fails or is not the file expected.
    """
    dest = Path(dest)
    expected = _Expected(sha256, sha256_prefix, size)
    if dest.is_file():
        expected.check(dest, *_identity(dest), "Delete the file to download it again.")
        return dest
    if is_offline():
        raise WeightsMissing(
            f"{dest} is not there, and FINETUNE_OFFLINE forbids downloading it",
            hint=f"Put the file from {url} there, or unset FINETUNE_OFFLINE.",
        )
    part = dest.with_name(dest.name + ".part")
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        digest, num_bytes = _download(url, part, expected.size, progress)
        expected.check(
            url, digest, num_bytes, "The file on the server has changed, or the download was damaged."
        )
        part.replace(dest)
    except OSError as error:
        raise FinetuneError(f"{dest} cannot be written: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
    return dest


class _Expected:
    """What the file must be."""

    def __init__(self, sha256: str | None, sha256_prefix: str | None, size: int | None) -> None:
        self.prefix = (sha256 or sha256_prefix or "").lower()
        self.size = size

    def check(self, what: Any, digest: str, num_bytes: int, hint: str) -> None:
        if self.size is not None and num_bytes != self.size:
            raise FinetuneError(f"{what} has {num_bytes:,} bytes instead of {self.size:,}", hint=hint)
        if not digest.startswith(self.prefix):
            raise FinetuneError(f"{what} has SHA-256 {digest} instead of {self.prefix}", hint=hint)


def _identity(path: Path) -> tuple[str, int]:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
        return digest.hexdigest(), stream.tell()


def _download(
    url: str, part: Path, size: int | None, progress: Callable[[int, int | None], None] | None
) -> tuple[str, int]:
    """Stream `url` into `part`; the SHA-256 and number of the bytes."""
    digest, num_bytes = hashlib.sha256(), 0
    with part.open("wb") as stream:
        for chunk, total in _chunks(url):
            num_bytes += len(chunk)
            if size is not None and num_bytes > size:
                raise FinetuneError(f"{url} sends more than the {size:,} bytes expected")
            stream.write(chunk)
            digest.update(chunk)
            if progress is not None:
                progress(num_bytes, total if total is not None else size)
        stream.flush()
        os.fsync(stream.fileno())
    return digest.hexdigest(), num_bytes


def _chunks(url: str) -> Iterator[tuple[bytes, int | None]]:
    import requests  # not needed to open a file that is here

    hint = f"Check the connection, or download {url} by other means and give the file."
    try:
        with requests.get(url, stream=True, timeout=TIMEOUT_SEC) as response:
            if response.status_code != 200:
                raise FinetuneError(f"{url} answers {response.status_code} {response.reason}", hint=hint)
            length = response.headers.get("Content-Length", "")
            # With a content encoding the length is that of the encoded bytes, and says nothing about ours.
            known = length.isdecimal() and "Content-Encoding" not in response.headers
            total = int(length) if known else None
            received = 0
            for chunk in response.iter_content(CHUNK):
                received += len(chunk)
                yield chunk, total
            if total is not None and received != total:
                raise FinetuneError(f"{url} broke off after {received:,} of {total:,} bytes", hint=hint)
    except requests.RequestException as error:
        raise FinetuneError(f"{url} cannot be downloaded: {error}", hint=hint) from None
