"""One attempt to get a file from one address: goes on where another stopped, and looks at what comes."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.client
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from finetune.errors import FinetuneError
from finetune.sniff import HEAD, TORCH_SAVE, describe_text
from finetune.version import __version__

CHUNK = 1 << 18  # bytes
TIMEOUT_SEC = (10, 60)  # to connect, and between two pieces
MAX_REDIRECTS = 10
PASSING = (408, 425, 429, 500, 502, 503, 504)  # statuses that may be another one soon

Progress = Callable[[int, int | None], None]  # bytes so far, bytes in all


class DownloadFailed(FinetuneError):
    """An address does not give the file."""


class TryAgain(DownloadFailed):
    """It may do so soon. `wait`: after so many seconds, as the server says; None: it does not say."""

    def __init__(self, what: str, *, wait: float | None = None) -> None:
        super().__init__(what)
        self.wait = wait


@dataclass(frozen=True)
class Expected:
    """What the file must be: the beginning of its SHA-256, and its bytes; None is not known."""

    sha256: str | None = None
    size: int | None = None

    def check(self, what: Any, digest: str, num_bytes: int) -> None:
        """Raise DownloadFailed where a file, `what` in the message, is another."""
        if self.size is not None and num_bytes != self.size:
            raise DownloadFailed(f"{what} has {num_bytes:,} bytes instead of {self.size:,}")
        if self.sha256 and not digest.startswith(self.sha256.lower()):
            raise DownloadFailed(f"{what} has SHA-256 {digest} instead of {self.sha256.lower()}")


@dataclass
class Part:
    """What has come of a file so far, and a note beside it: from where, and of which version of the file."""

    path: Path
    was_continued: bool = False
    origin: dict[str, Any] = field(default_factory=dict)

    @property
    def note(self) -> Path:
        return self.path.with_name(self.path.name + ".json")

    def size(self) -> int:
        return self.path.stat().st_size if self.path.is_file() else 0

    def usable(self, url: str, expected: Expected) -> int:
        """How many bytes can be kept: those of a version with a name, or any where the hash will tell."""
        with contextlib.suppress(OSError, ValueError):
            self.origin = json.loads(self.note.read_text(encoding="utf-8"))
        have = self.size()
        same = self.origin.get("url") == url and bool(self.origin.get("version"))
        if have and (same or len(expected.sha256 or "") == 64) and have <= (expected.size or have):
            return have
        self.discard()
        return 0

    def begin(self, url: str, version: str | None, total: int | None) -> None:
        self.discard()
        self.origin = {"url": url, "version": version, "total": total}
        self.note.write_text(json.dumps(self.origin), encoding="utf-8")

    def discard(self) -> None:
        self.origin, self.was_continued = {}, False
        for path in (self.path, self.note):
            with contextlib.suppress(OSError):
                path.unlink()


def transfer(url: str, part: Part, expected: Expected, progress: Progress | None = None) -> tuple[str, int]:
    """Bring `part` to its end; the SHA-256 and number of its bytes, which are those expected.

    Raises DownloadFailed, TryAgain among them, after which `part` holds what another attempt can go on with;
    FinetuneError where the disk is full; OSError where the part cannot be written.
    """
    have = part.usable(url, expected)
    with _answer(url, _headers(part, have), expected) as response:
        if response.status_code == 416 and _range(response)[1] == have:
            digest = _digest_of(part.path)
            return _checked(url, part, expected, digest, have)
        start, total = _agree(url, response, part, have)
        pieces = _pieces(response, total)
        first = b"" if start else _first(url, pieces)
        if expected.size is not None and total is not None and total != expected.size:
            part.discard()
            raise DownloadFailed(f"{url} has {total:,} bytes instead of {expected.size:,}")
        _check_space(part.path.parent, (total or expected.size or 0) - start, part)
        digest = _digest_of(part.path) if start else hashlib.sha256()
        if not start:
            part.begin(url, _version(response), total)
        received = start
        with _no_space_explained(part), part.path.open("ab") as stream:
            for piece in _with(first, pieces):
                received += len(piece)
                if expected.size is not None and received > expected.size:
                    part.discard()
                    raise DownloadFailed(f"{url} sends more than the {expected.size:,} bytes expected")
                stream.write(piece)
                digest.update(piece)
                if progress is not None:
                    progress(received, total if total is not None else expected.size)
            stream.flush()
            os.fsync(stream.fileno())
    if total is not None and received != total:
        raise TryAgain(f"{url} broke off after {received:,} of {total:,} bytes")
    if not expected.sha256:
        _check_end(url, part)
    return _checked(url, part, expected, digest, received)


def _headers(part: Part, have: int) -> dict[str, str]:
    headers = {"Accept-Encoding": "identity", "User-Agent": f"stylegan-finetune/{__version__}"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if part.origin.get("version"):
            headers["If-Range"] = part.origin["version"]
    return headers


@contextlib.contextmanager
def _answer(url: str, headers: dict[str, str], expected: Expected) -> Iterator[Any]:
    """The response of a server, redirects followed; what has no use for us raises."""
    import requests  # not needed to open a file that is here
    import urllib3

    try:
        with requests.Session() as session:
            session.max_redirects = MAX_REDIRECTS
            with session.get(url, stream=True, timeout=TIMEOUT_SEC, headers=headers) as response:
                way = [step.url for step in (*response.history, response)]
                if way[0].startswith("https:") and not all(step.startswith("https:") for step in way):
                    if len(expected.sha256 or "") < 64:
                        raise DownloadFailed(f"{url} leads to {way[-1]}, which is not encrypted")
                _check_status(url, response)
                yield response
    except requests.TooManyRedirects:
        raise DownloadFailed(f"{url} redirects in a circle, or more than {MAX_REDIRECTS} times") from None
    except requests.exceptions.SSLError as error:
        raise DownloadFailed(f"{url}: the certificate is not accepted: {_reason(error)}") from None
    except (
        requests.exceptions.InvalidURL,
        requests.exceptions.InvalidSchema,
        requests.exceptions.MissingSchema,
    ) as error:
        raise DownloadFailed(f"{url} is no address to download from: {_reason(error)}") from None
    except requests.exceptions.ConnectTimeout:
        raise TryAgain(f"{url} cannot be reached within {TIMEOUT_SEC[0]:g} s") from None
    except (requests.Timeout, urllib3.exceptions.TimeoutError):
        raise TryAgain(f"{url} has sent nothing for {TIMEOUT_SEC[1]:g} s") from None
    except (requests.RequestException, urllib3.exceptions.HTTPError, ConnectionError) as error:
        raise TryAgain(f"{url} cannot be downloaded: {_reason(error)}") from None


def _check_status(url: str, response: Any) -> None:
    status = response.status_code
    if status in (200, 206, 416):
        return
    what = f"{url} answers {status} {response.reason or ''}".rstrip()
    if status in PASSING:
        raise TryAgain(what, wait=_retry_after(response.headers.get("Retry-After", "")))
    raise DownloadFailed(what)


def _retry_after(text: str) -> float | None:
    """Seconds of a Retry-After header, which holds them or a date."""
    if text.strip().isdecimal():
        return float(text)
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    return None


def _agree(url: str, response: Any, part: Part, have: int) -> tuple[int, int | None]:
    """Where the bytes of a response belong, and how many bytes the whole file has (None: not said)."""
    if response.status_code == 200:  # all of it: nothing was asked for, or the server knows no parts
        length = response.headers.get("Content-Length", "")
        # With a content encoding the length is that of the encoded bytes, and says nothing about ours.
        encoded = response.headers.get("Content-Encoding", "identity") != "identity"
        return 0, int(length) if length.isdecimal() and not encoded else None
    start, total = _range(response)
    before, now = part.origin.get("version"), _version(response)
    changed = bool(before and now and before != now) or part.origin.get("total") not in (None, total)
    if response.status_code == 416 or start != have or total is None or changed:
        part.discard()
        why = "the file has changed since" if changed else "the server sends another part than asked for"
        raise TryAgain(f"{url} cannot be continued at byte {have:,}: {why}", wait=0.0)
    part.was_continued = True
    return have, total


def _range(response: Any) -> tuple[int | None, int | None]:
    match = re.fullmatch(
        r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", response.headers.get("Content-Range", "").strip()
    )
    if match is None:
        return None, None
    return int(match[1]) if match[1] else None, None if match[2] == "*" else int(match[2])


def _version(response: Any) -> str | None:
    """What tells versions of a file apart: a strong ETag, or else the date of the last change."""
    tag = response.headers.get("ETag", "")
    return tag if tag.startswith('"') else response.headers.get("Last-Modified")


def _pieces(response: Any, total: int | None) -> Iterator[bytes]:
    import urllib3

    encoded = response.headers.get("Content-Encoding", "identity") != "identity"
    try:
        yield from response.raw.stream(CHUNK, decode_content=encoded)
    except urllib3.exceptions.ProtocolError as error:
        broke_off = any(isinstance(cause, http.client.IncompleteRead) for cause in error.args)
        if total is None or not broke_off:  # else the caller counts
            raise


def _first(url: str, pieces: Iterator[bytes]) -> bytes:
    """The first bytes; text, as a page of a failing server is, raises."""
    first = b""
    while len(first) < HEAD and (piece := next(pieces, b"")):
        first += piece
    if (what := describe_text(first[:HEAD])) is not None:
        raise DownloadFailed(f"{url} gives no network but {what}")
    return first


def _with(first: bytes, pieces: Iterator[bytes]) -> Iterator[bytes]:
    if first:
        yield first
    yield from pieces


def _check_end(url: str, part: Part) -> None:
    """Where no hash tells whether all is there: a pickle ends with its own full stop, and the length that a
    server states may be wrong.
    """
    with part.path.open("rb") as stream:
        head = stream.read(len(TORCH_SAVE))
        stream.seek(-1, os.SEEK_END)
        if head[:1] == b"\x80" and head != TORCH_SAVE and stream.read(1) != b".":
            size = stream.tell()
            part.discard()
            raise TryAgain(f"{url} broke off after {size:,} bytes, in the middle of a pickle")


def _checked(url: str, part: Part, expected: Expected, digest: Any, num_bytes: int) -> tuple[str, int]:
    try:
        expected.check(url, digest.hexdigest(), num_bytes)
    except DownloadFailed as error:
        was_continued = part.was_continued
        part.discard()
        if was_continued:  # two halves of different files; from the start it may be right
            raise TryAgain(f"{error.what}: its parts do not fit together", wait=0.0) from None
        error.hint = "The file there has changed, or the download was damaged."
        raise
    return digest.hexdigest(), num_bytes


def _digest_of(path: Path) -> Any:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256")


def _check_space(folder: Path, needed: int, part: Part) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise FinetuneError(
            f"No space to download {needed / 1e6:,.0f} MB into {folder}: {free / 1e6:,.0f} MB are free",
            hint="Free some space, or set FINETUNE_CACHE to a folder on another disk.",
        )


@contextlib.contextmanager
def _no_space_explained(part: Part) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        have = part.size()
        part.discard()
        raise FinetuneError(
            f"No space left in {part.path.parent} after {have:,} bytes of a download",
            hint="Free some space, or set FINETUNE_CACHE to a folder on another disk.",
        ) from None


def _reason(error: BaseException) -> str:
    """The innermost words of an error, which libraries wrap several times."""
    found, seen = str(error) or type(error).__name__, set()
    todo: list[Any] = [error]
    while todo:
        inner = todo.pop()
        if not isinstance(inner, BaseException) or id(inner) in seen:
            continue
        seen.add(id(inner))
        if isinstance(inner, socket.gaierror):
            return "the name of the server is not known (is there a connection?)"
        if isinstance(inner, OSError) and inner.strerror and inner.errno is not None:
            found = inner.strerror
        todo += [*inner.args, getattr(inner, "reason", None), inner.__cause__, inner.__context__]
    return found if len(found) <= 200 else found[:199] + "…"
