"""Writes pickles opcode by opcode, hostile ones too, without ever holding the objects that they describe.

`dumps` takes plain values, the stubs of `finetune.checkpoint.unpickle` (so a real file can be read,
changed and written again), `Call` and `Name` for whatever a hostile file may ask for, and `Raw` for opcodes
as they are.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

from finetune.checkpoint.unpickle.storage import MAGIC, PROTOCOL
from finetune.checkpoint.unpickle.stubs import Array, PersistentObject, Tensor, TFNetwork


@dataclass
class Name:
    """A global, by reference."""

    module: str
    name: str


@dataclass
class Call:
    """`function(*args)`, then `state` for BUILD."""

    function: Any
    args: tuple = ()
    state: Any = None


@dataclass
class Raw:
    """Opcodes that leave one value."""

    code: bytes


def call(module: str, name: str, *args: Any) -> Call:
    return Call(Name(module, name), args)


def dumps(value: Any) -> bytes:
    return b"\x80\x04" + emit(value) + b"."


def emit(value: Any) -> bytes:
    if isinstance(value, Raw):
        return value.code
    if isinstance(value, Name):
        return b"c%s\n%s\n" % (value.module.encode(), value.name.encode())
    if isinstance(value, Call):
        state = b"" if value.state is None else emit(value.state) + b"b"
        return emit(value.function) + emit(tuple(value.args)) + b"R" + state
    if value is None:
        return b"N"
    if value is True or value is False:
        return b"\x88" if value else b"\x89"
    if isinstance(value, int):
        raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8a" + bytes([len(raw)]) + raw
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, str):
        raw = value.encode("utf-8", "surrogatepass")
        return b"X" + struct.pack("<I", len(raw)) + raw
    if isinstance(value, bytes):
        return b"B" + struct.pack("<I", len(value)) + value
    if isinstance(value, tuple):
        return b"(" + b"".join(map(emit, value)) + b"t"
    if isinstance(value, list):
        return b"](" + b"".join(map(emit, value)) + b"e"
    if isinstance(value, set):
        return b"\x8f(" + b"".join(map(emit, value)) + b"\x90"
    if isinstance(value, dict):
        return b"}(" + b"".join(emit(key) + emit(item) for key, item in value.items()) + b"u"
    return emit(_as_call(value))


def _as_call(value: Any) -> Call:
    if isinstance(value, PersistentObject):
        return persistent(value.class_name, value.state)
    if isinstance(value, TFNetwork):
        return Call(Name("dnnlib.tflib.network", "Network"), (), value.state)
    if isinstance(value, Array):
        return ndarray(value.value)
    if isinstance(value, Tensor):
        made = tensor(value.array)
        return call("torch._utils", "_rebuild_parameter", made, True, {}) if value.is_parameter else made
    raise TypeError(type(value))


def persistent(class_name: str, state: dict, *, module_src: str = "raise RuntimeError('executed')") -> Call:
    meta = {"type": "class", "version": 6, "module_src": module_src, "class_name": class_name, "state": state}
    return call("torch_utils.persistence", "_reconstruct_persistent_obj", meta)


def ndarray(array: np.ndarray) -> Call:
    dtype = Call(
        Name("numpy", "dtype"), (array.dtype.str[1:], False, True), (3, "<", None, None, None, -1, -1, 0)
    )
    state = (
        1,
        array.shape,
        dtype,
        False,
        np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<")).tobytes(),
    )
    return Call(Name("numpy.core.multiarray", "_reconstruct"), (Name("numpy", "ndarray"), (0,), b"b"), state)


def tensor(array: np.ndarray, *, size=None, stride=None, offset=0) -> Call:
    """A tensor over a storage of its own; size, stride and offset may lie."""
    array = np.asarray(array, order="C")
    size = array.shape if size is None else size
    stride = tuple(s // array.itemsize for s in array.strides) if stride is None else stride
    made = call("torch.storage", "_load_from_bytes", storage(array.reshape(-1)))
    return call("torch._utils", "_rebuild_tensor_v2", made, offset, size, stride, False, {})


def storage(
    array: np.ndarray, *, count: int | None = None, kind: Any = None, raw: bytes | None = None
) -> bytes:
    """What torch.save writes for a storage; count (of the key and of the data), kind and raw data may lie."""
    names = {"f4": "FloatStorage", "f8": "DoubleStorage", "f2": "HalfStorage", "i8": "LongStorage"}
    kind = Name("torch", names[array.dtype.str[1:]]) if kind is None else kind
    count = array.size if count is None else count
    system = {
        "protocol_version": 1001,
        "little_endian": True,
        "type_sizes": {"short": 2, "int": 4, "long": 4},
    }
    key = Raw(emit(("storage", kind, "0", "cpu", count, None)) + b"Q")
    head = b"".join(dumps(part) for part in (MAGIC, PROTOCOL, system, key, ["0"]))
    return head + struct.pack("<q", count) + (array.tobytes() if raw is None else raw)
