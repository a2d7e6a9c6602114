"""Cache of binaries: one folder per key, written atomically, verified whenever it is read.

A key covers sources, flags and architecture, and for the CPU also compiler and processor, so processes,
versions and machines can share a cache. The key of a CUDA binary lacks the version of the compiler: one that
a driver refuses is replaced (`cuda_build.nvrtc`).
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch_utils.files import VARIABLE, cache_folder, lock

TIME_OUT_SEC = 300.0  # for another process to build; a build takes a small part of it

log = logging.getLogger("torch_utils.ops")


def ops_folder() -> Path:
    """Return the folder of the binaries of the ops."""
    return cache_folder() / "ops"


@contextlib.contextmanager
def build_lock(name: str, timeout_sec: float = TIME_OUT_SEC) -> Iterator[None]:
    """Let one process at a time build `name`.

    After the time-out the build continues without the lock: a binary is published in one step, so two builds
    of one key cost time and nothing else.
    """
    path = ops_folder() / f"{name}.lock"
    waited: list[bool] = []

    def on_wait() -> None:
        waited.append(True)
        log.info("Waiting for another process that is building the ops (lock: %s).", path)

    with lock(path, timeout_sec=timeout_sec, on_wait=on_wait) as held:
        if waited and not held:
            log.warning("Another process has held %s for %.0f s: building without it.", path, timeout_sec)
        yield


def key_of(parts: Iterable[str | bytes]) -> str:
    """Return the name of a folder for everything that a binary depends on."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:32]


def find(key: str, name: str) -> Path | None:
    """Return the file `name` of a key, or None; a file that has changed is removed, with a warning."""
    for folder in (ops_folder(), *_private):
        path = folder / key / name
        try:
            data = path.read_bytes()
            expected = path.with_name(name + ".sha256").read_text().strip()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            log.warning("%s cannot be read (%s) and is built again.", path, error)
            continue
        if hashlib.sha256(data).hexdigest() == expected:
            return path
        log.warning("%s has changed since it was built and is built again.", path)
        _remove(path.parent)
    return None


def publish(key: str, name: str, data: bytes, *, replace: bool = False) -> Path:
    """Store a file for `find`, atomically; in a folder of this process alone if the cache cannot be used.

    An intact file of that key and name stays, unless `replace` is set. Raises OSError if there is no folder
    for temporary files or no space in it.
    """
    try:
        return _publish(ops_folder(), key, name, data, replace)
    except OSError as error:
        if not _private:
            folder = Path(tempfile.mkdtemp(prefix="stylegan-finetune-ops-"))
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            _private.append(folder)
            log.warning(
                "The cache %s cannot be used (%s): builds are not kept. Set %s to another folder.",
                *(ops_folder(), error.strerror or error, VARIABLE),
            )
        return _publish(_private[0], key, name, data, replace)


_private: list[Path] = []  # the folder of this process, once there is one


def _publish(folder: Path, key: str, name: str, data: bytes, replace: bool) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    making = Path(tempfile.mkdtemp(prefix=".making-", dir=folder))
    try:
        for path, content in (
            (making / name, data),
            (making / (name + ".sha256"), hashlib.sha256(data).hexdigest().encode()),
        ):
            with path.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            path.chmod(0o644)  # other users may share the cache
        making.chmod(0o755)
        target = folder / key
        if target.exists() and (replace or find(key, name) is None):
            _remove(target)
        with contextlib.suppress(OSError):  # another process was faster, with the same binary
            making.rename(target)
        path = target / name
        if not path.is_file():
            raise FileNotFoundError(2, "it could not be renamed", str(target))
        path.read_bytes()  # PermissionError for the file of a user with a narrow umask
        return path
    finally:
        shutil.rmtree(making, ignore_errors=True)


def _remove(folder: Path) -> None:
    """Remove a folder atomically, so that no process sees half of it."""
    gone = folder.with_name(f".gone-{os.getpid()}-{folder.name}")
    with contextlib.suppress(OSError):
        folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def size(folder: Path | None = None) -> tuple[int, int]:
    """Return files and bytes in a folder, by default that of the binaries of the ops."""
    folder = folder or ops_folder()
    files = [path for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
    return len(files), sum(path.stat().st_size for path in files)


def clean() -> tuple[int, int]:
    """Empty the cache; return its previous `size`. Raises OSError if that is not allowed."""
    found = size()
    if ops_folder().is_dir():
        shutil.rmtree(ops_folder())
    return found
