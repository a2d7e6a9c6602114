"""One process at a time, for each file that is being fetched."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from torch_utils.ops.native.building.lock import owner_of, try_lock

POLL_SEC = 0.1


@contextlib.contextmanager
def one_at_a_time(path: Path, tell: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock file `path`, which is gone afterwards; `tell` hears for whom this process waits.

    The system lets go of the lock of a process that ends, however it ends, so nothing stale is ever waited
    for. Folders that cannot be written or locked give no lock and no error.
    """
    handle = _wait(path, tell)
    if handle is None:
        yield
        return
    try:
        yield
    finally:
        if os.name == "nt":  # where an open file cannot be removed
            os.close(handle)
        with contextlib.suppress(OSError):
            path.unlink()
        if os.name != "nt":
            os.close(handle)


def _wait(path: Path, tell: Callable[[str], None]) -> int | None:
    told = False
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:
            return None
        try:
            held = try_lock(handle)
        except OSError:  # a file system without locks
            os.close(handle)
            return None
        if held and _is_at(handle, path):
            _sign(handle)
            return handle
        os.close(handle)  # of somebody else, or of a file that the one before has removed
        if not held:
            if not told:
                tell(f"Waiting for {owner_of(path)}, which fetches the same file.")
                told = True
            time.sleep(POLL_SEC)


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except OSError:
        return False


def _sign(handle: int) -> None:
    owner = {"pid": os.getpid(), "host": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    with contextlib.suppress(OSError):
        os.truncate(handle, 0)
        os.lseek(handle, 0, os.SEEK_SET)
        os.write(handle, json.dumps(owner).encode())
