"""Read an untrusted file: a pickle, or a file of `torch.save`, distinguished by its first bytes."""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetune.checkpoint.unpickle.globals import loads
from finetune.checkpoint.unpickle.torch_save import loads_torch_save
from finetune.errors import CheckpointError, PickleRefused
from finetune.sniff import is_torch_save, named_as_text, refuse_other_formats

MAX_FILE = 16 << 30  # bytes
CHUNK = 16 << 20  # bytes that are read, or given back, at a time


@dataclass(slots=True)
class PickleFile:
    """The content of a pickle, as stubs, and the identity of the file.

    memory: the bytes of the file, of which the arrays in `root` are views. given_back: those at its beginning
    that are zero again.
    """

    root: Any
    sha256: str
    size: int
    memory: mmap.mmap
    given_back: int = 0

    def give_back(self, address: int) -> None:
        """Return the memory below an address to the system; views of it must not be read any more."""
        end = address - np.frombuffer(self.memory, np.uint8).ctypes.data
        if self.given_back + CHUNK <= end <= self.size and hasattr(mmap, "MADV_DONTNEED"):
            end -= end % CHUNK
            self.memory.madvise(mmap.MADV_DONTNEED, self.given_back, end - self.given_back)
            self.given_back = end


def read_pickle(path: Path) -> PickleFile:
    """Read a pickle or a file of torch.save without executing anything in it.

    Raises CheckpointError if the file is missing or not a pickle (with its probable type),
    PickleRefused if it is damaged, refers to a global that can run code or access files, or grows beyond
    its size.
    """
    digest, hashing = hashlib.sha256(), ThreadPoolExecutor(1)
    try:
        memory = _read(path, lambda part: hashing.submit(digest.update, part))
        try:
            root = loads_torch_save(memory) if is_torch_save(memory) else loads(memory)
        except PickleRefused as error:
            raise named_as_text(memory, error) from None
        hashing.shutdown()
        return PickleFile(root=root, sha256=digest.hexdigest(), size=len(memory), memory=memory)
    finally:
        hashing.shutdown(cancel_futures=True)


def _read(path: Path, each_part: Callable[[memoryview], Any]) -> mmap.mmap:
    """Return the bytes of a file in memory of their own; call `each_part` with each part that was read."""
    # Private: the system takes pages of shared memory back only as a whole.
    private: Any = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    try:
        with path.open("rb", buffering=0) as stream:
            size = os.fstat(stream.fileno()).st_size
            if size > MAX_FILE:
                raise CheckpointError(f"{path} is too large for a checkpoint ({size:,} bytes)")
            if size == 0:
                raise CheckpointError(f"{path} is empty", hint="Download or copy it again.")
            refuse_other_formats(path, stream)  # before all of it is read
            stream.seek(0)
            memory, position = mmap.mmap(-1, size, **private), 0
            while count := stream.readinto(memoryview(memory)[position : position + CHUNK]):
                each_part(memoryview(memory)[position : position + count])
                position += count
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error})") from None
    if position < size:
        raise CheckpointError(f"{path} was cut to {position:,} bytes while it was read")
    return memory
