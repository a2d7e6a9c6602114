"""Lock of a run folder: only one process, on any machine, writes into it."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune.errors import ConfigError, TrainingError
from torch_utils.files import has_ended, lock, lock_path, this_process

NAME = "run.lock"
HEARTBEAT_SEC = 30.0
STALE_SEC = 300.0  # without a heartbeat


@contextlib.contextmanager
def own(run_dir: Path) -> Iterator[None]:
    """Hold the lock file of a run folder: host, pid and start time, with its modification time as heartbeat.

    A lock without a heartbeat for STALE_SEC, or of a process of this machine and container that has ended, is
    replaced. Raises ConfigError if another process has it.
    """
    path = run_dir / NAME
    with lock(lock_path(path)):  # processes of this machine that find the same stale lock take turns
        check_free(run_dir)
        path.unlink(missing_ok=True)
        with open(path, "x", encoding="utf-8") as file:
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            json.dump({**this_process(), "started": now}, file)
    ended = threading.Event()
    heartbeat = threading.Thread(target=_beat, args=(path, ended), daemon=True)
    heartbeat.start()
    try:
        yield
    finally:
        ended.set()
        heartbeat.join()
        if _is_ours(_read(path)):
            with contextlib.suppress(OSError):  # of a disk that has become read-only
                path.unlink(missing_ok=True)


def check_free(run_dir: Path) -> None:
    """Raise ConfigError if another process trains in a run folder."""
    path = run_dir / NAME
    held = _holder(path)
    if held is None or _is_ours(held[0]):
        return
    owner, age = held
    raise ConfigError(
        f"--resume {run_dir}: this run is being trained by process {owner.get('pid', 'unknown')} on "
        f"{owner.get('host', 'an unknown host')} (since {owner.get('started', 'an unknown time')}, last "
        f"heartbeat {max(age, 0):.0f} s ago). Stop that process first.",
        hint=f"If it no longer exists, its lock expires in {STALE_SEC - age:.0f} s; or delete {path}.",
    )


def is_held(run_dir: Path) -> bool:
    """Return whether a process, possibly this one, trains in a run folder."""
    return _holder(run_dir / NAME) is not None


def confirm(run_dir: Path) -> None:
    """Raise TrainingError if another process has taken the run over, because this one slept for too long."""
    owner = _read(run_dir / NAME)
    if owner is not None and not _is_ours(owner):
        raise TrainingError(
            f"{run_dir}: process {owner.get('pid')} on {owner.get('host')} has taken over this run, after no "
            f"heartbeat of this process for {STALE_SEC / 60:g} minutes. Nothing more is saved here."
        )


def _holder(path: Path) -> tuple[dict[str, Any], float] | None:
    """Return the owner of a lock and the age of its heartbeat, None without one or if it has expired."""
    owner = _read(path)
    if owner is None or has_ended(owner):
        return None
    try:
        age = _age_sec(path)
    except FileNotFoundError:  # released meanwhile
        return None
    return (owner, age) if age <= STALE_SEC else None


def _is_ours(owner: dict[str, Any] | None) -> bool:
    return owner is not None and this_process().items() <= owner.items()


def _age_sec(path: Path) -> float:
    """Return the time since the last heartbeat, by the clock of the file system, which all machines share.

    By that of this machine in a folder that it cannot write.
    """
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent) as probe:
            now = os.stat(probe.name).st_mtime
    except OSError:
        now = time.time()
    return now - path.stat().st_mtime


def _read(path: Path) -> dict[str, Any] | None:
    """Return what a lock file states, `{}` if it is not readable (being written), None without one."""
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _beat(path: Path, ended: threading.Event) -> None:
    while not ended.wait(HEARTBEAT_SEC):
        if _is_ours(_read(path)):
            with contextlib.suppress(OSError):
                os.utime(path)
