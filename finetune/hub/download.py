"""Download files: verified, resumed, retried, and from another URL if one fails.

A file gets its name only when it is complete and verified. Until then its bytes are in `NAME.part`, which the
next attempt resumes. Two processes that need the same file download it once.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import logging
import os
import random
import re
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from finetune.errors import FinetuneError, WeightsMissing
from finetune.sniff import HEAD, TORCH_SAVE, describe_text
from finetune.version import __version__
from torch_utils.files import lack_of_space, lock, lock_path

OFFLINE = "FINETUNE_OFFLINE"
CHUNK = 1 << 18  # bytes
TIMEOUT_SEC = (10, 60)  # to connect, and between two chunks
RETRYABLE_STATUS = (408, 425, 429, 500, 502, 503, 504)  # transient HTTP errors
ATTEMPTS = 4  # in a row without a new byte
PAUSE_SEC = 1.0  # before the second attempt; doubled each time
MAX_PAUSE_SEC = 120.0  # if a server asks for more, the URL is given up
NO_SPACE = "Free some space, or set FINETUNE_CACHE to a folder on another disk."
WAITING = "Waiting for another process, which downloads the same file."

OnMessage = Callable[[str], None]
Progress = Callable[[int, int | None], None]  # bytes so far, bytes in all

HEADERS = {"Accept-Encoding": "identity", "User-Agent": f"stylegan-finetune/{__version__}"}

log = logging.getLogger("finetune.hub")
sleep = time.sleep


class DownloadFailed(FinetuneError):
    """The file cannot be downloaded from a URL."""


class Retryable(DownloadFailed):
    """Another attempt may succeed, after `wait` seconds if the server states a time."""

    def __init__(self, what: str, *, wait: float | None = None) -> None:
        super().__init__(what)
        self.wait = wait


@dataclass(frozen=True)
class Expected:
    """The expected SHA-256, or its beginning, and size in bytes; None: unknown."""

    sha256: str | None = None
    size: int | None = None

    @property
    def is_certain(self) -> bool:
        """Whether the whole SHA-256 is known, so that no other file can pass."""
        return len(self.sha256 or "") == 64

    def check(self, what: Any, digest: str, num_bytes: int) -> None:
        """Raise DownloadFailed if a file, `what` in the message, is another one."""
        if self.size is not None and num_bytes != self.size:
            raise DownloadFailed(f"{what} has {num_bytes:,} bytes instead of {self.size:,}")
        if self.sha256 and not digest.startswith(self.sha256.lower()):
            raise DownloadFailed(f"{what} has SHA-256 {digest} instead of {self.sha256.lower()}")


@dataclass
class Part:
    """A partial download, with a note of its URL and version."""

    path: Path
    expected: Expected
    version: str | None = None

    @property
    def note(self) -> Path:
        return self.path.with_name(self.path.name + ".json")

    def size(self) -> int:
        return self.path.stat().st_size if self.path.is_file() else 0

    def usable(self, url: str) -> int:
        """Return how many bytes can be kept: those of a known version, or any if the hash will decide."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            origin = json.loads(self.note.read_text(encoding="utf-8"))
            self.version = origin["version"] if origin["url"] == url else None
        have = self.size()
        if have and (self.version or self.expected.is_certain) and have <= (self.expected.size or have):
            return have
        self.discard()
        return 0

    def begin(self, url: str, version: str | None) -> None:
        self.discard()
        self.version = version
        self.note.write_text(json.dumps({"url": url, "version": version}), encoding="utf-8")

    def discard(self) -> None:
        self.version = None
        for path in (self.path, self.note):
            with contextlib.suppress(OSError):
                path.unlink()

    def verify(self, url: str, *, was_resumed: bool) -> None:
        """Compare the complete file with what is expected, and discard it if it is another one."""
        digest, size = identity(self.path)
        try:
            self.expected.check(url, digest, size)
        except DownloadFailed as error:
            self.discard()
            if was_resumed:  # two halves of different files; from the start it may be right
                raise Retryable(f"{error.what}: its parts are of different files", wait=0.0) from None
            error.hint = "The file there has changed, or the download was damaged."
            raise
        with self.path.open("rb") as stream:
            head = stream.read(len(TORCH_SAVE))
            stream.seek(-1, os.SEEK_END)
            is_cut = head[:1] == b"\x80" and head != TORCH_SAVE and stream.read(1) != b"."
        if is_cut and not self.expected.sha256:  # the length that a server states may be wrong
            self.discard()
            raise Retryable(f"{url}: the connection broke after {size:,} bytes, in the middle of a pickle")


def is_offline() -> bool:
    """Return whether FINETUNE_OFFLINE forbids the network."""
    return os.environ.get(OFFLINE, "").strip().lower() not in ("", "0", "false", "no")


def fetch(
    url: str | Sequence[str],
    dest: Path,
    *,
    sha256: str | None = None,
    size: int | None = None,
    progress: Progress | None = None,
    on_message: OnMessage = log.info,
) -> Path:
    """Download a file to `dest` and verify it; a file that is already there is verified and kept.

    url: one URL, or several of the same file, preferred ones first. sha256: hex digest, or its beginning.
    size: bytes. progress: called with the bytes so far and the bytes in all (None: the server does not state
    them). on_message: called with a sentence for each failed attempt. Raises WeightsMissing if
    FINETUNE_OFFLINE is set and the file is missing, FinetuneError if the download fails or is not the file
    expected; `dest` does not exist then.
    """
    dest = Path(dest)
    urls = [url] if isinstance(url, str) else list(url)
    expected = Expected(sha256, size)
    if _is_there(dest, expected):
        return dest
    if is_offline():
        raise WeightsMissing(
            f"{dest} is missing, and FINETUNE_OFFLINE forbids downloading it",
            hint=f"Put the file from {urls[0]} there, or unset FINETUNE_OFFLINE.",
        )
    part = Part(dest.with_name(dest.name + ".part"), expected)
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        with lock(lock_path(dest), on_wait=lambda: on_message(WAITING)):
            if not _is_there(dest, expected):  # else another process has downloaded it meanwhile
                _fetch_from_any(urls, part, progress, on_message)
                part.path.replace(dest)
                part.discard()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise FinetuneError(f"{dest}: cannot be written ({error.strerror or error})") from None
        what = f"No space left in {dest.parent} after {part.size():,} bytes of a download"
        part.discard()
        raise FinetuneError(what, hint=NO_SPACE) from None
    return dest


def stated_size(urls: Sequence[str]) -> int | None:
    """Return the bytes that a server states for a file; None if offline, or if no server states them."""
    if is_offline():
        return None
    import requests

    for url in urls:
        with contextlib.suppress(requests.RequestException, ValueError):
            with requests.head(url, allow_redirects=True, timeout=TIMEOUT_SEC, headers=HEADERS) as response:
                if response.ok and int(response.headers.get("Content-Length", 0)):
                    return int(response.headers["Content-Length"])
    return None


def identity(path: Path) -> tuple[str, int]:
    """Return the SHA-256 and number of bytes of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest(), stream.tell()


def _is_there(dest: Path, expected: Expected) -> bool:
    if not dest.is_file():
        return False
    try:
        expected.check(dest, *identity(dest))
    except DownloadFailed as error:
        raise FinetuneError(error.what, hint="Delete the file to download it again.") from None
    return True


def _fetch_from_any(urls: list[str], part: Part, progress: Progress | None, on_message: OnMessage) -> None:
    failures: list[DownloadFailed] = []
    for url in urls:
        try:
            return _fetch_with_retries(url, part, progress, on_message)
        except DownloadFailed as error:
            failures.append(error)
            if url != urls[-1]:
                on_message(f"{error.what}. Trying another URL.")
    hint = failures[0].hint or f"Check the connection, or download {urls[0]} elsewhere."
    raise FinetuneError(
        "; ".join(failure.what for failure in failures),
        hint=f"{hint} `finetune checkpoints add-file` adds a file that you have.",
    )


def _fetch_with_retries(url: str, part: Part, progress: Progress | None, on_message: OnMessage) -> None:
    failed, most = 0, part.size()
    while True:
        try:
            return transfer(url, part, progress)
        except Retryable as error:
            # An attempt that adds bytes to the file is not a failed one.
            failed, most = (1, part.size()) if part.size() > most else (failed + 1, most)
            pause = PAUSE_SEC * 2 ** (failed - 1) * (1 + random.random() / 4)
            pause = pause if error.wait is None else error.wait
            if pause > MAX_PAUSE_SEC:
                raise DownloadFailed(f"{error.what}, and asks to retry in {pause:,.0f} s") from None
            if failed >= ATTEMPTS:
                raise
            on_message(f"{error.what}. Retrying" + (f" in {pause:.0f} s." if pause >= 1 else "."))
            sleep(pause)


def transfer(url: str, part: Part, progress: Progress | None = None) -> None:
    """Make one attempt to complete `part`, whose bytes are then those expected.

    Raises DownloadFailed or Retryable, after which another attempt can resume `part`; FinetuneError if the
    disk is too small; OSError if the part cannot be written.
    """
    import requests  # not needed to open a file that is here
    import urllib3

    have = part.usable(url)
    headers = HEADERS | ({"Range": f"bytes={have}-"} if have else {})
    headers |= {"If-Range": part.version} if have and part.version else {}
    options: dict[str, Any] = {"stream": True, "timeout": TIMEOUT_SEC, "headers": headers}
    try:
        with requests.Session() as session, session.get(url, **options) as response:
            _check_response(url, response, part.expected)
            start, total = _resume_offset(url, response, part, have)
            if not start or start != total:
                _receive(url, response, part, start, total, progress)
    except requests.TooManyRedirects:
        raise DownloadFailed(f"{url}: too many redirects") from None
    except requests.exceptions.SSLError as error:
        raise DownloadFailed(f"{url}: the certificate is not accepted ({_reason(error)})") from None
    except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema) as error:
        raise DownloadFailed(f"{url}: not a URL to download from ({_reason(error)})") from None
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        raise Retryable(f"{url}: download failed ({_reason(error)})") from None
    part.verify(url, was_resumed=start > 0)


def _check_response(url: str, response: Any, expected: Expected) -> None:
    steps = [step.url for step in (*response.history, response)]
    is_secure = not url.startswith("https:") or all(step.startswith("https:") for step in steps)
    if not is_secure and not expected.is_certain:
        raise DownloadFailed(f"{url}: redirects to {steps[-1]}, which is not encrypted")
    if response.status_code in (200, 206, 416):
        return
    what = f"{url} returned {response.status_code} {response.reason or ''}".rstrip()
    if response.status_code not in RETRYABLE_STATUS:
        raise DownloadFailed(what)
    after, wait = response.headers.get("Retry-After", "").strip(), None  # seconds or a date
    with contextlib.suppress(ValueError, TypeError):
        wait = float(after) if after.isdecimal() else parsedate_to_datetime(after).timestamp() - time.time()
    raise Retryable(what, wait=None if wait is None else max(0.0, wait))


def _resume_offset(url: str, response: Any, part: Part, have: int) -> tuple[int, int | None]:
    """Return where the bytes of a response belong, and the size of the whole file (None: not stated)."""
    if response.status_code == 200:  # the whole file: nothing was asked for, or the server supports no ranges
        length = response.headers.get("Content-Length", "")
        # With a content encoding the length is that of the encoded bytes, and states nothing about ours.
        encoded = response.headers.get("Content-Encoding", "identity") != "identity"
        return 0, int(length) if length.isdecimal() and not encoded else None
    given = response.headers.get("Content-Range", "").strip()
    if response.status_code == 416 and given == f"bytes */{have}":  # it is complete
        return have, have
    match = re.fullmatch(rf"bytes {have}-\d+/(\d+)", given)
    now = _version(response)
    if match is None or response.status_code == 416 or (part.version and now and part.version != now):
        part.discard()
        why = "the file has changed, or the server sent another range than requested"
        raise Retryable(f"{url}: cannot be resumed at byte {have:,} ({why})", wait=0.0)
    return have, int(match[1])


def _version(response: Any) -> str | None:
    """Return what distinguishes versions of a file: a strong ETag, or else the date of the last change."""
    tag = response.headers.get("ETag", "")
    return tag if tag.startswith('"') else response.headers.get("Last-Modified")


def _receive(
    url: str, response: Any, part: Part, start: int, total: int | None, progress: Progress | None
) -> None:
    """Append the body of a response to `part`, whose first `start` bytes are there."""
    import urllib3

    received, size = start, part.expected.size
    # Undecoded if the length is known, so that the last bytes before a break arrive.
    chunks = response.raw.stream(CHUNK, decode_content=total is None)
    first = b"" if start else _first_chunk(url, chunks)
    if None not in (size, total) and total != size:
        part.discard()
        raise DownloadFailed(f"{url} has {total:,} bytes instead of {size:,}")
    if lack := lack_of_space(part.path.parent, (total or size or 0) - start, url):
        raise FinetuneError(lack, hint=NO_SPACE)
    if not start:
        part.begin(url, _version(response))
    with part.path.open("ab") as stream, contextlib.suppress(urllib3.exceptions.ProtocolError):
        for chunk in itertools.chain([first], chunks):
            received += stream.write(chunk)
            if received > (size or received):
                part.discard()
                raise DownloadFailed(f"{url}: more than the {size:,} bytes expected")
            if progress is not None and chunk:
                progress(received, total or size)
        total = total or received  # the response ended as it should
        stream.flush()
        os.fsync(stream.fileno())
    if received != total:
        of = f" of {total:,}" if total else ""
        raise Retryable(f"{url}: the connection broke after {received:,}{of} bytes")


def _first_chunk(url: str, chunks: Iterator[bytes]) -> bytes:
    """Return the first bytes; raise DownloadFailed for text, like the page of a failing server."""
    first = b""
    while len(first) < HEAD and (chunk := next(chunks, b"")):
        first += chunk
    what = describe_text(first[:HEAD]) if first else "an empty file"
    if what is not None:
        raise DownloadFailed(f"{url}: not a network but {what}")
    return first


def _reason(error: BaseException) -> str:
    """Return the message of the innermost OSError, which requests and urllib3 wrap several times."""
    found, inner = str(error), error
    while inner:
        if isinstance(inner, socket.gaierror):
            return "the name of the server is not known (is there a connection?)"
        if isinstance(inner, OSError):
            found = inner.strerror or str(inner)
        inner = inner.__cause__ or inner.__context__  # type: ignore[assignment]
    return found if len(found) <= 200 else found[:199] + "…"
