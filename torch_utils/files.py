"""The cache folder, the lock between processes, the check of free space and the atomic write."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import os
import secrets
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

VARIABLE = "FINETUNE_CACHE"
POLL_SEC = 0.05


def cache_folder() -> Path:
    """Return the folder of all caches: $FINETUNE_CACHE, else the one that the platform prescribes."""
    if chosen := os.environ.get(VARIABLE, "").strip():
        return expand_home(chosen)
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "stylegan-finetune"


def expand_home(path: str | os.PathLike) -> Path:
    """Return a path with `~` or `~user` expanded; unchanged if there is no such user."""
    return Path(os.path.expanduser(path))


def lock_path(path: Path) -> Path:
    """Return the lock file for writers of `path`: in the cache folder, since lock files are never deleted."""
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
    return cache_folder() / "locks" / f"{name}.lock"


@contextlib.contextmanager
def lock(
    path: Path, *, timeout_sec: float = -1, on_wait: Callable[[], None] = lambda: None
) -> Iterator[bool]:
    """Hold a lock file against other processes and threads; yield whether it is held.

    The system releases the lock of a process that ends, however it ends. The file itself stays: deleting it
    would let two processes hold locks of the same name. timeout_sec: -1 waits without limit. on_wait: called
    once if another process holds the lock. A folder that cannot be written or locked gives no lock, no error.
    """
    import filelock  # not needed until something is built or downloaded

    guard = filelock.FileLock(path)
    held = False
    with contextlib.suppress(OSError, NotImplementedError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            guard.acquire(timeout=0)
            held = True
        except filelock.Timeout:
            on_wait()
            with contextlib.suppress(filelock.Timeout):
                guard.acquire(timeout=timeout_sec, poll_interval=POLL_SEC)
                held = True
    try:
        yield held
    finally:
        if held:
            guard.release()


def this_process() -> dict[str, Any]:
    """Return what identifies this process among those that share a disk."""
    return {"host": socket.gethostname(), "pid_namespace": _pid_namespace(), "pid": os.getpid()}


def _pid_namespace() -> str:
    """Return in which namespace this process has its id: containers may share a host name. '' if unknown."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def has_ended(owner: dict[str, Any]) -> bool:
    """Return whether the owner is a process of this machine and container that no longer exists."""
    ours = this_process()
    if os.name == "nt" or any(owner.get(name) != ours[name] for name in ("host", "pid_namespace")):
        return False  # on Windows, os.kill would end it
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return True
    except (OSError, KeyError, TypeError, OverflowError):
        return False
    return False


def lack_of_space(folder: Path, needed: int, what: str) -> str | None:
    """Return the message that `needed` bytes for `what` do not fit on the disk of `folder`; None if they do.

    Callers add what to do about it.
    """
    free = shutil.disk_usage(folder).free
    if needed <= free:
        return None
    sizes = f"{math.ceil(needed / 2**20):,} MiB needed, {math.floor(free / 2**20):,} MiB free"
    return f"Not enough space in {folder} for {what}: {sizes}."


class WriteError(OSError):
    """A file cannot be written; the message contains the reason, the path and what is there now."""

    def __init__(self, what: str, hint: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.what}\n{self.hint}" if self.hint else self.what


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Yield a binary file that replaces `path` when the block ends, and is deleted if the block fails.

    The bytes go to a temporary file in the same folder, reach the disk (fsync), and are renamed over `path`.
    If that is interrupted, by a full disk or Ctrl-C, a file that was at `path` before is unchanged. Raises
    WriteError for every OSError.
    """
    target = Path(os.path.realpath(path))  # through a link, so that the link itself stays one
    if target.is_dir():
        raise WriteError(f"{path} is a folder.", hint="Pass the name of a file in it.")
    # Cut, since a longer name than that of the target may be too long for the file system.
    temporary = target.with_name(f".{target.name[:32]}.{secrets.token_hex(4)}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        replace(temporary, target)
    except OSError as error:
        raise _explain(error, Path(path), existed=target.exists()) from error
    finally:
        # After a successful rename there is nothing left under this name.
        with contextlib.suppress(OSError):
            temporary.unlink()


def replace(source: Path, target: Path) -> None:
    """Rename `source` over `target`; the rename survives a power cut if the system can ensure that."""
    os.replace(source, target)
    if os.name == "nt":  # which cannot open folders
        return
    handle = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # some network file systems refuse fsync on folders; the file itself is safe
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def _explain(error: OSError, path: Path, *, existed: bool) -> WriteError:
    kept = "The previous file is untouched." if existed else "Nothing was left there."
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        hint = "Free some space, or write to another disk."
        return WriteError(f"No space left to write {path}. {kept}", hint=hint)
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        hint = "Choose another folder."
        return WriteError(f"Not allowed to write {path} ({error.strerror}). {kept}", hint=hint)
    if isinstance(error, FileExistsError | NotADirectoryError):
        hint = "Choose another folder."
        return WriteError(f"Could not write {path}: part of its path is a file. {kept}", hint=hint)
    return WriteError(f"Could not write {path}: {error.strerror or error}. {kept}")
