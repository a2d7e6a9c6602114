"""Read the storage of a tensor as written by `torch.save`: five small pickles, and bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from finetune.checkpoint.unpickle.machine import Machine
from finetune.checkpoint.unpickle.stubs import Storage, World, check_extents, damaged, expect
from finetune.checkpoint.unpickle.values import Blob, Budget, Global, Record

# torch storage -> (torch dtype, numpy dtype of the same bytes); numpy has no bfloat16.
STORAGES = {
    "torch.FloatStorage": ("float32", "<f4"),
    "torch.DoubleStorage": ("float64", "<f8"),
    "torch.HalfStorage": ("float16", "<f2"),
    "torch.BFloat16Storage": ("bfloat16", "<u2"),
    "torch.LongStorage": ("int64", "<i8"),
    "torch.IntStorage": ("int32", "<i4"),
    "torch.ShortStorage": ("int16", "<i2"),
    "torch.CharStorage": ("int8", "|i1"),
    "torch.ByteStorage": ("uint8", "|u1"),
    "torch.BoolStorage": ("bool", "|u1"),
}
# Those that no network has -> bytes per element.
UNUSED_STORAGES = {
    "torch.storage.UntypedStorage": 1,  # of uint16, uint32, uint64 and float8
    "torch.ComplexFloatStorage": 8,
    "torch.ComplexDoubleStorage": 16,
    "torch.QInt8Storage": 1,
    "torch.QUInt8Storage": 1,
    "torch.QInt32Storage": 4,
}
STORAGE_NAMES = frozenset({*STORAGES, *UNUSED_STORAGES})


@dataclass(slots=True, frozen=True, eq=False)
class StorageKey:
    """The persistent id of a storage, which no other opcode can create: class, name, number of elements."""

    storage: str
    name: str
    count: int

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return UNUSED_STORAGES.get(self.storage) or np.dtype(STORAGES[self.storage][1]).itemsize

    def view(self, raw: memoryview, offset: int) -> Storage | Record:
        """Return the elements, `raw`; an inert record if no network has this class."""
        if self.storage in UNUSED_STORAGES:
            return Record(self.storage, offset)
        dtype, code = STORAGES[self.storage]
        return Storage(np.frombuffer(raw, code) if self.count else np.empty(0, code), dtype)


class StorageWorld(World):
    """The globals of one tensor storage: the names of the storage classes, and one persistent id."""

    def find(self, name: Global) -> Global:
        return name if name.name in STORAGE_NAMES else super().find(name)

    def persistent(self, key: Any, offset: int) -> StorageKey:
        return storage_key(key, offset)


def storage_key(key: Any, offset: int) -> StorageKey:
    """Return a persistent id as torch makes it for a storage; any other is refused."""
    is_storage = type(key) is tuple and len(key) in (5, 6) and key[0] == "storage" and type(key[1]) is Global
    is_known = is_storage and type(key[2]) is str and key[1].name in STORAGE_NAMES
    expect(is_known, "a tensor storage of unknown kind", offset)
    expect(len(key) == 5 or key[5] is None, "a tensor storage that is a part of another", offset)
    check_extents((key[4],), offset)
    return StorageKey(key[1].name, key[2], key[4])


MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of torch's file format before 1.6, which storages still use


def check_header(machine: Machine, what: str, offset: int) -> None:
    """Read the three pickles that `torch.save` writes first; `what` has them, for messages."""
    magic, protocol, system = (machine.run() for _ in range(3))
    expect(type(magic) is int and magic == MAGIC, f"{what} of unknown format", offset)
    expect(type(protocol) is int and protocol == PROTOCOL, f"{what} of unknown protocol", offset)
    is_little = type(system) is dict and system.get("little_endian") is True
    expect(is_little, f"{what} that is not little-endian", offset)


def read_storage(blob: Blob, budget: Budget) -> Storage | Record:
    """Read what `torch.save` wrote for one storage: five pickles, the number of elements, the elements."""
    base = blob.offset or 0
    machine = Machine(blob.view, StorageWorld(), budget, base=base)
    if bytes(blob.view[:4]) == b"PK\x03\x04":
        damaged("a tensor storage in zip form", base)
    check_header(machine, "a tensor storage", base)
    key, keys = machine.run(), machine.run()
    is_key = type(key) is StorageKey and type(keys) is list and len(keys) == 1 and type(keys[0]) is str
    expect(is_key and key.name == keys[0], "a tensor storage without its own key", base)
    raw, count = blob.view[machine.position :], key.count
    if len(raw) != 8 + count * key.itemsize or int.from_bytes(raw[:8], "little") != count:
        damaged(
            f"a tensor storage of {count:,} elements has {max(len(raw) - 8, 0):,} bytes",
            base + machine.position,
        )
    return key.view(raw[8:], base)
