"""Run folders: which checkpoint a folder stands for."""

from __future__ import annotations

import re
from pathlib import Path

from finetune.errors import CheckpointError

SNAPSHOT = re.compile(r"network-snapshot-(\d+(?:\.\d+)?)\.pkl")


def newest_snapshot(run_dir: Path) -> Path:
    """The snapshot of a run folder with the most images seen. Raises CheckpointError where there is none."""
    found = [
        (float(match[1]), path) for path in run_dir.iterdir() if (match := SNAPSHOT.fullmatch(path.name))
    ]
    if not found:
        raise CheckpointError(
            f"{run_dir} holds no network-snapshot-*.pkl",
            hint="Give a checkpoint file, or the folder of a run that has written a snapshot.",
        )
    return max(found)[1]


def resolve_network(path: str | Path) -> Path:
    """The checkpoint file that `path` means: itself, or the newest snapshot where it is a run folder."""
    path = Path(path).expanduser()
    if path.is_dir():
        path = newest_snapshot(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist", hint="Give a checkpoint file or a run folder.")
    if not path.is_file():  # a pipe or a device may have no end
        raise CheckpointError(f"{path} is not a file", hint="Save what it gives as a file first.")
    return path
