"""One build at a time for each key. The system lets go of the lock of a process that ends, however it ends.

Waiting has a limit, and then the build goes on without the lock: what is published appears all at once, so
two builds of one key cost time and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger("torch_utils.ops")

TIME_OUT = 300.0  # seconds; a build takes a small part of it


@contextlib.contextmanager
def build_lock(path: Path, time_out: float = TIME_OUT, poll: float = 0.05) -> Iterator[bool]:
    """Hold the lock file `path`; yields whether it is held. `time_out`, `poll`: seconds.

    Folders that cannot be written or locked give no lock and no error.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:
        yield False
        return
    try:
        held = _wait(handle, path, time_out, poll)
        if held:
            owner = {"pid": os.getpid(), "host": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
            with contextlib.suppress(OSError):
                os.ftruncate(handle, 0)
                os.pwrite(handle, json.dumps(owner).encode(), 0) if hasattr(os, "pwrite") else None
        yield held
    finally:
        os.close(handle)  # which lets go of it


def _wait(handle: int, path: Path, time_out: float, poll: float) -> bool:
    end = time.monotonic() + time_out
    told = False
    while True:
        try:
            if try_lock(handle):
                return True
        except OSError as error:  # a file system without locks
            log.info("%s cannot be locked (%s)", path, error)
            return False
        if not told:
            log.info("Waiting for %s, which builds the ops.", owner_of(path))
            told = True
        if time.monotonic() > end:
            log.warning(
                "%s has held %s for more than %.0f s: building without it.", owner_of(path), path, time_out
            )
            return False
        time.sleep(poll)


def owner_of(path: Path) -> str:
    """Who holds, or held, a lock, in words."""
    try:
        owner = json.loads(path.read_text())
        return f"process {owner['pid']} on {owner['host']} (since {owner['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def try_lock(handle: int) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        try:
            # A byte far behind the owner's name, which stays readable.
            os.lseek(handle, 1 << 20, os.SEEK_SET)
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
            return True
        except PermissionError:
            return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
