"""Represent the names in checkpoints by inert stubs, and any other by a record of name and arguments.

Nothing of the file is imported, called or executed: `machine` reads the opcodes, and `CheckpointWorld` below
returns plain data for every global. Arrays and tensors are read-only views of the bytes of the file, checked
against what the file really holds. Nested storages (`torch.storage._load_from_bytes`) go through the same
machine (`storage`). `PickleRefused` has the refused global and its position.
"""

from __future__ import annotations

import math
import mmap
import re
from typing import Any

import numpy as np

from finetune.checkpoint.unpickle.machine import Machine
from finetune.checkpoint.unpickle.names import DATA_TYPES, acts
from finetune.checkpoint.unpickle.storage import STORAGE_NAMES, read_storage
from finetune.checkpoint.unpickle.stubs import (
    Array,
    Dtype,
    PersistentObject,
    PlainObject,
    Storage,
    Tensor,
    TFNetwork,
    World,
    block,
    block_acting,
    check_extents,
    damaged,
    expect,
    printable,
)
from finetune.checkpoint.unpickle.values import Blob, Budget, Global, Record, as_key, is_key, kind
from finetune.errors import PickleRefused

META_VERSION = 6  # of `_reconstruct_persistent_obj`

EASY_DICT = ("dnnlib.util.EasyDict", "dnnlib.EasyDict")
TF_NETWORK = "dnnlib.tflib.network.Network"
PERSISTENT = "torch_utils.persistence._reconstruct_persistent_obj"
CORES = ("core", "_core")  # of numpy 1 and 2
NUMPY = tuple(f"numpy.{core}.multiarray." for core in CORES)
TENSOR_TYPES = ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer")
DILL = ("_dill", "dill")

# Mentioned by real files as arguments of other calls, and never called themselves.
ONLY_NAMED = {"numpy.ndarray", *TENSOR_TYPES, *STORAGE_NAMES}


def loads(data: bytes | mmap.mmap) -> Any:
    """Return the stubs that the pickle in `data` describes; they keep `data` alive. Raises PickleRefused."""
    budget = Budget.for_file(len(data))
    machine = Machine(memoryview(data).toreadonly(), CheckpointWorld(budget), budget)
    root = machine.run()
    if machine.position != len(data):
        left = len(data) - machine.position
        raise PickleRefused(
            f"the pickle ends at byte {machine.position} and {left:,} more bytes follow",
            offset=machine.position,
        )
    return root


class CheckpointWorld(World):
    """The globals of StyleGAN checkpoints."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.is_dill = False  # whether a name of dill was seen

    def find(self, name: Global) -> Global | Record:
        self.is_dill = self.is_dill or name.module.startswith("dill.")
        if name.name in CALLS or name.name in ONLY_NAMED:
            return name
        if acts(name):
            block_acting(name.name, name.offset, self.is_dill)
        return Record(printable(name.name), name.offset)

    def call(self, function: Any, args: tuple, offset: int, keywords: dict | None = None) -> Any:
        if type(function) is Record:
            return Record(function.name, function.offset, args, keywords)
        if type(function) is not Global:
            damaged(f"it calls {kind(function)}", offset)
        stub = CALLS.get(function.name)
        if stub is None:
            block(function.name, function.offset, "is called")
        expect(not keywords, f"{function.name} is called with keywords", offset)
        return stub(self, args, offset)

    def set_state(self, target: Any, state: Any, offset: int) -> None:
        if type(target) is TFNetwork and type(state) is dict:
            target.state = state
        elif type(target) is Dtype:
            target.value = _byte_order(target.value, state, offset)
        elif type(target) is Array:
            target.value = _array(state, offset)
        elif type(target) is Record:
            target.state = state
        elif type(target) not in (dict, PlainObject):  # attributes of dicts carry nothing that is needed
            super().set_state(target, state, offset)

    # The stubs of functions and classes; each takes the arguments that the file gives.

    def _persistent_object(self, args: tuple, offset: int) -> PersistentObject:
        meta = args[0] if len(args) == 1 else None
        if type(meta) is not dict or meta.get("type") != "class" or type(meta.get("state")) is not dict:
            damaged("a network object without a class and a state", offset)
        name, version = meta.get("class_name"), meta.get("version")
        if type(name) is not str or not name.isidentifier() or len(name) > 100:
            damaged("a network object whose class has no name", offset)
        if type(version) is not int or version != META_VERSION:
            damaged(f"a network object of another version than {META_VERSION}", offset)
        return PersistentObject(name, meta["state"], offset)

    def _tf_network(self, args: tuple, offset: int) -> TFNetwork:
        expect(args == (), "a network object made with arguments", offset)
        return TFNetwork(offset)

    def _mapping(self, args: tuple, offset: int) -> dict:
        if args == ():
            return {}
        items = args[0]
        if len(args) == 1 and type(items) is list:
            self.budget.step(len(items), offset)
            if all(type(item) in (list, tuple) and len(item) == 2 and is_key(item[0]) for item in items):
                return {as_key(key, self.budget, offset): item for key, item in items}
        damaged("a dict made of something other than names and values", offset)

    def _set(self, args: tuple, offset: int) -> set:
        items = args[0] if args else []
        expect(len(args) <= 1 and type(items) is list, "a set made of something other than a list", offset)
        self.budget.step(len(items), offset)
        expect(all(map(is_key, items)), "a set of something other than texts and numbers", offset)
        return {as_key(item, self.budget, offset) for item in items}

    def _object(self, args: tuple, offset: int) -> PlainObject:
        expect(args == (), "an object made with arguments", offset)
        return PlainObject()

    def _reconstructor(self, args: tuple, offset: int) -> Any:
        """Handle `copyreg._reconstructor(cls, base, state)`, for the known classes and their bases only."""
        is_class = len(args) == 3 and all(type(arg) in (Global, Record) for arg in args[:2])
        expect(is_class, "copyreg without classes", offset)
        cls, base, state = args
        if type(cls) is Record:
            return Record(cls.name, cls.offset, args)
        if cls.name in EASY_DICT and base.name == "builtins.dict" and type(state) is dict:
            return state  # protocols 0 and 1
        if base.name != "builtins.object" or state is not None:
            block(base.name, offset, "is the base in copyreg._reconstructor")
        if cls.name not in (TF_NETWORK, "builtins.object", *EASY_DICT):
            block(cls.name, offset, "is made by copyreg._reconstructor")
        return self.call(cls, (), offset)

    def _encode(self, args: tuple, offset: int) -> Blob:
        """Handle `_codecs.encode(text, 'latin1')`, the form of bytes in protocol 2."""
        expect(len(args) == 2 and all(type(arg) is str for arg in args), "bytes not made of text", offset)
        if args[1].lower() not in ("latin1", "latin-1"):
            block(f"_codecs.encode with codec {printable(args[1])}", offset)
        self.budget.copy(len(args[0]), offset)
        try:
            return Blob(memoryview(args[0].encode("latin-1")), None)
        except UnicodeEncodeError:
            damaged("bytes above 255", offset)

    def _dtype(self, args: tuple, offset: int) -> Dtype:
        code: Any = args[0] if args and len(args) <= 3 else None
        expect(type(code) is str, "a numpy dtype without a code", offset)
        if not re.fullmatch(r"[<|=]?(f[248]|[iu][1248]|b1|c8|c16|[SU][1-9][0-9]{0,5}|[mM]8)", code):
            block(f"numpy.dtype {printable(code)}", offset)  # object arrays above all
        code = re.sub("[mM]", "i", code)  # dates, as counts of an unknown unit
        return Dtype(np.dtype(code).newbyteorder("<"))

    def _new_array(self, args: tuple, offset: int) -> Array | Record:
        if args and type(args[0]) is Record:
            return Record(args[0].name, args[0].offset, args)
        is_ndarray = bool(args) and type(args[0]) is Global and args[0].name == "numpy.ndarray"
        expect(is_ndarray, "a numpy array of another class than ndarray", offset)
        return Array()

    def _scalar(self, args: tuple, offset: int) -> Any:
        dtype: Any
        raw: Any
        dtype, raw = args if len(args) == 2 else (None, None)
        expect(type(dtype) is Dtype and type(raw) is Blob, "a numpy number without bytes", offset)
        expect(len(raw) == dtype.value.itemsize, "a numpy number of the wrong size", offset)
        return np.frombuffer(raw.view, dtype.value)[0].item()

    def _storage(self, args: tuple, offset: int) -> Storage | Record:
        blob: Any = args[0] if len(args) == 1 else None
        expect(type(blob) is Blob, "a tensor storage without bytes", offset)
        try:
            return read_storage(blob, self.budget)
        except PickleRefused as error:
            if blob.offset is not None:
                raise
            # The bytes were spelled as text: positions in them are not positions in the file.
            what = f"in the tensor storage at byte {offset}: {error.what}"
            raise PickleRefused(what, offset=offset, blocked=error.blocked) from None

    def _tensor(self, args: tuple, offset: int) -> Tensor | Record:
        if args and type(args[0]) is Record:
            return Record(args[0].name, args[0].offset, args)
        expect(len(args) in (6, 7) and type(args[0]) is Storage, "a tensor without a storage", offset)
        storage, start, size, stride = args[:4]
        check_extents((start,), offset)
        check_extents(size, offset)
        check_extents(stride, offset)
        expect(len(size) == len(stride), "a tensor with more strides than axes", offset)
        num_elements, available = math.prod(size), len(storage.array)
        last = start + sum((extent - 1) * step for extent, step in zip(size, stride))
        if num_elements > available or (num_elements > 0 and last >= available):
            damaged(f"a tensor reaches beyond its storage of {available:,} elements", offset)
        base = storage.array[start:] if num_elements else storage.array[:0]
        strides = [step * base.itemsize for step in stride] if num_elements else None
        try:
            view = np.ndarray(size, base.dtype, base, strides=strides)
        except (ValueError, TypeError):
            damaged("a tensor of impossible shape", offset)
        return Tensor(view, storage.dtype, offset)

    def _parameter(self, args: tuple, offset: int) -> Tensor | Record:
        if args and type(args[0]) is Record:
            return Record(args[0].name, args[0].offset, args)
        expect(len(args) in (2, 3) and type(args[0]) is Tensor, "a parameter without a tensor", offset)
        return Tensor(args[0].array, args[0].dtype, offset, is_parameter=True)

    def _parameter_with_state(self, args: tuple, offset: int) -> Tensor | Record:
        expect(len(args) == 4, "a parameter without attributes", offset)
        return self._parameter(args[:3], offset)

    def _tensor_of_type(self, args: tuple, offset: int) -> Tensor | Record:
        """Handle `torch._tensor._rebuild_from_type_v2`: tensors with attributes."""
        good = len(args) == 4 and type(args[2]) is tuple and type(args[1]) in (Global, Record)
        is_function = good and type(args[0]) in (Global, Record)
        expect(is_function, "a tensor of a class without arguments", offset)
        tensor = self.call(args[0], args[2], offset)
        if type(tensor) is Record:
            return tensor
        expect(type(tensor) is Tensor, "a tensor of a class without a tensor", offset)
        return tensor if type(args[1]) is Global else Record(args[1].name, args[1].offset, args)

    def _frombuffer(self, args: tuple, offset: int) -> Array:
        """Handle `numpy.core.numeric._frombuffer(bytes, dtype, shape, order, axes)`: arrays in protocol 5."""
        expect(len(args) in (4, 5) and args[3] in ("C", "F", "K"), "a numpy array without a buffer", offset)
        raw, dtype, shape, order = args[:4]
        axes = args[4] if len(args) == 5 else None
        value = _array((1, shape, dtype, order == "F", raw), offset)
        if order == "K" and axes is not None:
            good = type(axes) in (tuple, list) and all(type(axis) is int for axis in axes)
            expect(good and sorted(axes) == list(range(value.ndim)), "a numpy array of unknown axes", offset)
            value = value.transpose(axes)
        return Array(value)

    def _dill_array(self, args: tuple, offset: int) -> Any:
        """Handle `dill._dill._create_array(function, args, state, attributes)`."""
        expect(len(args) in (3, 4) and type(args[1]) is tuple, "an array of dill without a state", offset)
        array = self.call(args[0], args[1], offset)
        self.set_state(array, args[2], offset)
        return array

    def _dill_type(self, args: tuple, offset: int) -> Global | Record:
        """Handle `dill._dill._load_type(name)`, for types of plain data; others are unknown."""
        if len(args) == 1 and type(args[0]) is str and f"builtins.{args[0]}" in DATA_TYPES:
            return self.find(Global("builtins", args[0], offset))
        return Record("dill._dill._load_type", offset, args)

    def _bytes(self, args: tuple, offset: int) -> Blob:
        """Handle `bytes()`, and `bytearray` of bytes or of a string in older protocols."""
        if args == ():
            return Blob(memoryview(b""), None)
        if type(args[0]) is Blob and len(args) == 1:
            return args[0]
        return self._encode(args, offset)

    def _frozenset(self, args: tuple, offset: int) -> frozenset:
        return frozenset(self._set(args, offset))

    def _default_dict(self, args: tuple, offset: int) -> dict:
        good = len(args) <= 1 and (args == () or args[0] is None or type(args[0]) in (Global, Record))
        expect(good, "a default dict made of something other than a class", offset)
        return {}

    def _size(self, args: tuple, offset: int) -> tuple:
        expect(len(args) == 1 and type(args[0]) in (tuple, list), "a torch.Size without a tuple", offset)
        self.budget.step(len(args[0]), offset)
        return tuple(args[0])

    def _text(self, args: tuple, offset: int, separator: str = "/") -> str:
        """Return a path or device as its string."""
        expect(all(type(arg) in (str, int) for arg in args), "a path that is not text", offset)
        self.budget.copy(sum(len(arg) if type(arg) is str else 8 for arg in args), offset)
        text = separator.join(map(str, args))
        return text[1:] if text.startswith("//") else text

    def _device(self, args: tuple, offset: int) -> str:
        return self._text(args, offset, ":")


PATHS = ("Path", "PurePath", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")

CALLS: dict[str, Any] = {
    PERSISTENT: CheckpointWorld._persistent_object,
    TF_NETWORK: CheckpointWorld._tf_network,
    **dict.fromkeys((*EASY_DICT, "collections.OrderedDict"), CheckpointWorld._mapping),
    "torch._utils._rebuild_tensor_v2": CheckpointWorld._tensor,
    "torch._utils._rebuild_parameter": CheckpointWorld._parameter,
    "torch.storage._load_from_bytes": CheckpointWorld._storage,
    **dict.fromkeys((prefix + "_reconstruct" for prefix in NUMPY), CheckpointWorld._new_array),
    **dict.fromkeys((prefix + "scalar" for prefix in NUMPY), CheckpointWorld._scalar),
    "numpy.dtype": CheckpointWorld._dtype,
    "_codecs.encode": CheckpointWorld._encode,
    "builtins.set": CheckpointWorld._set,
    "builtins.object": CheckpointWorld._object,
    "copyreg._reconstructor": CheckpointWorld._reconstructor,
    "torch._utils._rebuild_parameter_with_state": CheckpointWorld._parameter_with_state,
    "torch._tensor._rebuild_from_type_v2": CheckpointWorld._tensor_of_type,
    **dict.fromkeys((f"numpy.{core}.numeric._frombuffer" for core in CORES), CheckpointWorld._frombuffer),
    **dict.fromkeys((f"dill.{dill}._create_array" for dill in DILL), CheckpointWorld._dill_array),
    **dict.fromkeys((f"dill.{dill}._load_type" for dill in DILL), CheckpointWorld._dill_type),
    **dict.fromkeys(("builtins.bytes", "builtins.bytearray"), CheckpointWorld._bytes),
    "builtins.frozenset": CheckpointWorld._frozenset,
    "collections.defaultdict": CheckpointWorld._default_dict,
    "torch.Size": CheckpointWorld._size,
    "torch.device": CheckpointWorld._device,
    **dict.fromkeys(
        (f"pathlib.{part}{name}" for part in ("", "_local.") for name in PATHS), CheckpointWorld._text
    ),
}


def _byte_order(dtype: np.dtype, state: Any, offset: int) -> np.dtype:
    good = (
        type(state) is tuple
        and len(state) >= 5
        and type(state[1]) is str
        and state[1] in ("<", ">", "|", "=")
    )
    expect(good and state[2:5] == (None, None, None), "a numpy dtype with fields", offset)
    return dtype.newbyteorder(">" if state[1] == ">" else "<")


def _array(state: Any, offset: int) -> np.ndarray:
    expect(type(state) is tuple and len(state) == 5, "a numpy array without a state", offset)
    _, shape, dtype, is_fortran, raw = state
    if type(dtype) is not Dtype or type(raw) is not Blob:
        damaged("a numpy array without bytes", offset)
    check_extents(shape, offset)
    if math.prod(shape) * dtype.value.itemsize != len(raw):
        damaged(f"a numpy array whose shape does not fit its {len(raw):,} bytes", offset)
    try:
        return np.ndarray(shape, dtype.value, raw.view, order="F" if is_fortran is True else "C")
    except (ValueError, TypeError):
        damaged("a numpy array of impossible shape", offset)
