"""Read an untrusted file: a pickle, or a file of `torch.save`, distinguished by its first bytes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.checkpoint.unpickle.globals import loads
from finetune.checkpoint.unpickle.torch_save import loads_torch_save
from finetune.errors import CheckpointError, PickleRefused
from finetune.sniff import is_torch_save, named_as_text, refuse_other_formats

MAX_FILE = 16 << 30  # bytes


@dataclass(frozen=True, slots=True)
class PickleFile:
    """The content of a pickle, as stubs, and the identity of the file."""

    root: Any
    sha256: str
    size: int


def read_pickle(path: Path) -> PickleFile:
    """Read a pickle or a file of torch.save without executing anything in it.

    Raises CheckpointError if the file is missing or not a pickle (with its probable type),
    PickleRefused if it is damaged, refers to a name that acts, or grows beyond its size.
    """
    data = _read(path)
    refuse_other_formats(path, data)
    try:
        root = loads_torch_save(data) if is_torch_save(data) else loads(data)
    except PickleRefused as error:
        raise named_as_text(data, error) from None
    return PickleFile(root=root, sha256=hashlib.sha256(data).hexdigest(), size=len(data))


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_FILE:
            raise CheckpointError(f"{path} is too large for a checkpoint ({path.stat().st_size:,} bytes)")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error})") from None
