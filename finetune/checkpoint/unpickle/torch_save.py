"""Read files of `torch.save`, zip and legacy, with the unpickler of checkpoints: nothing is executed.

A zip file holds `NAME/data.pkl`, whose persistent ids name the members `NAME/data/KEY`: the bytes of one
storage each. torch does not compress them, so a compressed member is refused, and tensors are views of the
file: what a file can make of its size is bounded as for pickles. A legacy file (before torch 1.6) is five
pickles, of which the fourth is the content, and then a count and the bytes of each storage.
"""

from __future__ import annotations

import mmap
import re
import zipfile
from collections.abc import Mapping
from typing import Any

from finetune.checkpoint.unpickle.globals import CheckpointWorld
from finetune.checkpoint.unpickle.machine import Machine
from finetune.checkpoint.unpickle.storage import STORAGE_NAMES, StorageKey, check_header, storage_key
from finetune.checkpoint.unpickle.stubs import World, damaged, expect
from finetune.checkpoint.unpickle.values import Budget, Global, Record
from finetune.sniff import ZIP

MAX_MEMBERS = 20_000  # of a zip file; a training file with both optimizers has about 1,500
LOCAL_HEADER = 30  # bytes of a member's header, before its name and extra field
CONTENT = re.compile(r"[^/]*/data\.pkl")


class ArchiveWorld(CheckpointWorld):
    """The globals of StyleGAN checkpoints; `storages` are those of the file by key."""

    def __init__(self, budget: Budget, storages: Mapping[str, memoryview]) -> None:
        super().__init__(budget)
        self.storages = storages

    def persistent(self, key: Any, offset: int) -> Any:
        if is_module_source(key):
            return key[1]
        key = storage_key(key, offset)
        raw = self.storages.get(key.name)
        if raw is None:
            damaged(f"tensor storage {key.name[:20]!r} is not in the file", offset)
        if len(raw) != key.count * key.itemsize:
            damaged(f"a tensor storage of {key.count:,} elements has {len(raw):,} bytes", offset)
        return key.view(raw, offset)


class KeysWorld(World):
    """Collects the storages that a pickle names, and ignores everything else."""

    def __init__(self) -> None:
        self.keys: dict[str, StorageKey] = {}

    def find(self, name: Global) -> Global | Record:
        return name if name.name in STORAGE_NAMES else Record(name.name, name.offset)

    def call(self, function: Any, args: tuple, offset: int, keywords: dict | None = None) -> Record:
        return Record("", offset)

    def set_state(self, target: Any, state: Any, offset: int) -> None:
        pass

    def persistent(self, key: Any, offset: int) -> Record:
        if not is_module_source(key):
            key = storage_key(key, offset)
            self.keys.setdefault(key.name, key)
        return Record("", offset)


def is_module_source(key: Any) -> bool:
    """Return whether a persistent id is a class with its source text (legacy files), which is not used."""
    return type(key) is tuple and len(key) == 4 and key[0] == "module" and type(key[1]) in (Global, Record)


def loads_torch_save(data: mmap.mmap) -> Any:
    """Return the stubs that a file of `torch.save` describes, views of `data`. Raises PickleRefused."""
    return _loads_zip(data) if data[: len(ZIP)] == ZIP else _loads_legacy(memoryview(data).toreadonly())


def _loads_zip(data: mmap.mmap) -> Any:
    members = _members(data)
    content = next((name for name in members if CONTENT.fullmatch(name)), None)
    if content is None:
        damaged("a file of torch.save without data.pkl", 0)
    folder = content.removesuffix("data.pkl")
    if bytes(members.get(f"{folder}byteorder", (0, b"little"))[1]) != b"little":
        damaged("a file of torch.save that is not little-endian", 0)
    prefix = f"{folder}data/"
    storages = {
        name.removeprefix(prefix): raw for name, (_, raw) in members.items() if name.startswith(prefix)
    }
    offset, raw = members[content]
    budget = Budget.for_file(len(data))
    machine = Machine(raw, ArchiveWorld(budget, storages), budget, base=offset)
    root = machine.run()
    expect(machine.position == len(raw), "bytes after the end of data.pkl", offset + machine.position)
    return root


def _members(data: mmap.mmap) -> dict[str, tuple[int, memoryview]]:
    """Return the members of a zip file by name: position in the file, and a view of their bytes."""
    view = memoryview(data).toreadonly()
    found = {}
    try:
        infos = zipfile.ZipFile(data).infolist()  # type: ignore[call-overload]  # can seek and read
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, OverflowError):
        damaged("a zip archive that is damaged or cut off", 0)
    expect(len(infos) <= MAX_MEMBERS, f"a zip archive of {len(infos):,} members", 0)
    for info in infos:
        start = info.header_offset
        stored = info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size
        plain = stored and not info.flag_bits & 1
        expect(plain, "a compressed or encrypted member of the zip archive, which torch never writes", start)
        header = view[start : start + LOCAL_HEADER]
        whole = len(header) == LOCAL_HEADER and bytes(header[:4]) == ZIP
        expect(whole, "a member of the zip archive without a header", start)
        start += LOCAL_HEADER + sum(int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
        expect(start + info.file_size <= len(data), "a member that reaches beyond the file", start)
        expect(info.filename not in found, "two members with the same name", start)
        found[info.filename] = (start, view[start : start + info.file_size])
    return found


def _loads_legacy(view: memoryview) -> Any:
    keys = KeysWorld()
    budget = Budget.for_file(len(view))
    machine = Machine(view, keys, budget)
    check_header(machine, "a file of torch.save", 0)
    start = machine.position
    machine.run()  # for the keys of its storages, whose bytes follow
    order = machine.run()
    is_order = type(order) is list and all(type(key) is str for key in order)
    expect(is_order and sorted(order) == sorted(keys.keys), "a file of torch.save without its keys", start)
    storages, position = {}, machine.position
    for name in order:
        count = int.from_bytes(view[position : position + 8], "little")
        end = position + 8 + count * keys.keys[name].itemsize
        expect(end <= len(view), "a tensor storage reaches beyond the file; it may be cut off", position)
        storages[name] = view[position + 8 : end]
        position = end
    expect(position == len(view), "bytes after the last tensor storage", position)
    budget = Budget.for_file(len(view))
    machine = Machine(view, ArchiveWorld(budget, storages), budget)
    machine.position = start
    return machine.run()
