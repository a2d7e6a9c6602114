"""Downloads that get their name only when they are complete and right.

Failed attempts are repeated, with pauses that grow or that the server asks for; then other addresses are
tried. What has come stays in `NAME.part` for the next time. Two processes fetch a file once.
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from finetune.errors import FinetuneError, WeightsMissing
from finetune.hub.transfer import (
    CHUNK,
    DownloadFailed,
    Expected,
    Part,
    Progress,
    TryAgain,
    transfer,
)
from torch_utils.files import lock, lock_path

__all__ = ["CHUNK", "OFFLINE", "fetch", "is_offline"]

OFFLINE = "FINETUNE_OFFLINE"
ATTEMPTS = 4  # in a row that bring nothing new
PAUSE_SEC = 1.0  # before the second attempt; then it doubles
LONGEST_PAUSE_SEC = 120.0  # a server that asks for more is given up

WAITING = "Waiting for another process, which fetches the same file."

Tell = Callable[[str], None]

log = logging.getLogger("finetune.hub")
sleep = time.sleep


def is_offline() -> bool:
    """Whether FINETUNE_OFFLINE forbids the network."""
    return os.environ.get(OFFLINE, "").strip().lower() not in ("", "0", "false", "no")


def fetch(
    url: str | Sequence[str],
    dest: Path,
    *,
    sha256: str | None = None,
    sha256_prefix: str | None = None,
    size: int | None = None,
    progress: Progress | None = None,
    tell: Tell = log.info,
) -> Path:
    """Download a file to `dest`, verified; a file already there is verified and kept.

    url: an address, or several of the same file, the best one first. sha256, sha256_prefix: hex digest, or
    its beginning. size: bytes. progress: called with the bytes so far and the bytes in all (None if the
    server does not say). tell: hears of attempts that failed, a sentence each. Raises WeightsMissing where
    FINETUNE_OFFLINE is set and the file is not there, FinetuneError where the download fails or is not the
    file expected; nothing stands at `dest` then.
    """
    dest = Path(dest)
    urls = [url] if isinstance(url, str) else list(url)
    expected = Expected((sha256 or sha256_prefix or "").lower() or None, size)
    if _is_there(dest, expected):
        return dest
    if is_offline():
        raise WeightsMissing(
            f"{dest} is not there, and FINETUNE_OFFLINE forbids downloading it",
            hint=f"Put the file from {urls[0]} there, or unset FINETUNE_OFFLINE.",
        )
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        with lock(lock_path(dest), on_wait=lambda: tell(WAITING)):
            if not _is_there(dest, expected):  # else another process has fetched it meanwhile
                part = Part(dest.with_name(dest.name + ".part"))
                _from_any(urls, part, expected, progress, tell)
                part.path.replace(dest)
                part.discard()
    except OSError as error:
        raise FinetuneError(f"{dest} cannot be written: {error.strerror or error}") from None
    return dest


def _is_there(dest: Path, expected: Expected) -> bool:
    if not dest.is_file():
        return False
    try:
        expected.check(dest, *identity(dest))
    except DownloadFailed as error:
        raise FinetuneError(error.what, hint="Delete the file to download it again.") from None
    return True


def identity(path: Path) -> tuple[str, int]:
    """The SHA-256 and number of bytes of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest(), stream.tell()


def _from_any(urls: list[str], part: Part, expected: Expected, progress: Progress | None, tell: Tell) -> None:
    failures: list[DownloadFailed] = []
    for url in urls:
        try:
            return _patiently(url, part, expected, progress, tell)
        except DownloadFailed as error:
            failures.append(error)
            if url != urls[-1]:
                tell(f"{error.what}. Trying another address.")
    hint = failures[0].hint or f"Check the connection, or get {urls[0]} by other means."
    raise FinetuneError(
        "; ".join(failure.what for failure in failures),
        hint=f"{hint} `finetune checkpoints add-file` takes a file that you have.",
    )


def _patiently(url: str, part: Part, expected: Expected, progress: Progress | None, tell: Tell) -> None:
    """Repeat what may work the next time. Raises DownloadFailed with the last reason."""
    failed, most = 0, part.size()
    while True:
        try:
            transfer(url, part, expected, progress)
            return
        except TryAgain as error:
            # An attempt that brings the file further is no failure.
            failed, most = (1, part.size()) if part.size() > most else (failed + 1, most)
            pause = PAUSE_SEC * 2 ** (failed - 1) * (1 + random.random() / 4)
            pause = pause if error.wait is None else error.wait
            if pause > LONGEST_PAUSE_SEC:
                raise DownloadFailed(f"{error.what}, and asks to come back in {pause:,.0f} s") from None
            if failed >= ATTEMPTS:
                raise
            tell(f"{error.what}. Trying again" + (f" in {pause:.0f} s." if pause >= 1 else "."))
            sleep(pause)
