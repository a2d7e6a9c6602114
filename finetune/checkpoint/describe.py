"""Flat, inert description of a network in a file: modules, attributes and tensors by dotted name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from finetune.checkpoint.unpickle.names import is_harmless
from finetune.checkpoint.unpickle.stubs import Array, PersistentObject, Tensor, TFNetwork, damaged, printable
from finetune.checkpoint.unpickle.values import Record
from finetune.errors import PickleRefused

MAX_MODULES = 5_000  # the largest public network has about 200
MAX_ENTRIES = 50_000  # attributes and tensors of all its modules; the largest has about 5,000
MAX_DEPTH = 16
MAX_VALUES = 1_000  # in the arguments of one constructor, one attribute, or the training options

GROUPS = ("_parameters", "_buffers", "_modules")
MISSING: Any = type("Missing", (), {"__repr__": lambda self: "MISSING", "__slots__": ()})()


@dataclass(slots=True, eq=False)
class Described:
    """A network of the PyTorch generations: `modules[path]` holds the plain attributes of the module at
    `path`.
    """

    class_name: str
    offset: int
    modules: dict[str, dict[str, Any]] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def get(self, path: str, name: str, default: Any = MISSING) -> Any:
        """Return the attribute `name` of the module at `path` ('' is the network) as plain Python."""
        value = self.modules.get(path, {}).get(name, MISSING)
        return default if value is MISSING else plain(value, self.offset)

    def arguments(self, path: str, names: tuple[str, ...] = ()) -> dict[str, Any]:
        """Return the constructor arguments of the module at `path`; `names`: those of positional ones."""
        args, kwargs = self.get(path, "_init_args", ()), self.get(path, "_init_kwargs", {})
        if not isinstance(args, (tuple, list)) or not isinstance(kwargs, dict) or len(args) > len(names):
            damaged(f"the constructor arguments of {path or self.class_name} are unknown", self.offset)
        return {**dict(zip(names, args)), **kwargs}

    def has(self, path: str) -> bool:
        return path in self.modules

    def refusal(self, what: str, hint: str | None = None) -> PickleRefused:
        """Return the error that says what is wrong with this network, and where in the file it is."""
        return PickleRefused(f"{what} (object at byte {self.offset})", offset=self.offset, hint=hint)


def describe(network: PersistentObject) -> Described:
    """Flatten a network. Raises PickleRefused where its state is not that of a module made of modules and
    tensors.
    """
    found = Described(network.class_name, network.offset)
    todo = [("", network)]
    num_entries = 0  # one dict may be the state of many modules, so the file's size bounds nothing here
    while todo:
        path, module = todo.pop()
        tables = (module.state, *(module.state.get(group) for group in GROUPS))
        num_entries += sum(len(table) for table in tables if type(table) is dict)
        if num_entries > MAX_ENTRIES:
            damaged("its modules have too many attributes", network.offset)
        if path.count(".") >= MAX_DEPTH or len(found.modules) >= MAX_MODULES:
            damaged("its modules are too many or nested too deeply", network.offset)
        prefix = path + "." if path else ""
        found.modules[path] = {name: value for name, value in module.state.items() if name not in GROUPS}
        for group in ("_parameters", "_buffers"):
            for name, tensor in _children(module, group, Tensor):
                found.tensors[prefix + name] = tensor
        todo += [(prefix + name, child) for name, child in _children(module, "_modules", PersistentObject)]
    return found


def _children(module: PersistentObject, group: str, expected: type) -> list[tuple[str, Any]]:
    table = module.state.get(group)
    if type(table) is not dict:
        damaged(f"a module without {group}", module.offset)
    for name, value in table.items():
        if type(name) is not str or not name.isidentifier() or len(name) > 100:
            damaged(f"an invalid name in {group} of a module", module.offset)
        if value is not None and type(value) is not expected:
            damaged(f"{printable(name)} in {group} is of another kind", module.offset)
    return [(name, value) for name, value in table.items() if value is not None]


def find_foreign(value: Any, seen: set[int] | None = None) -> Record | None:
    """Return the first unknown name in `value` that may affect a network, None if there is none.

    seen: ids of values that are not searched again, to which those of this call are added. One set for all
    entries of a file bounds the time by its size: entries may share their values.
    """
    seen = set() if seen is None else seen
    todo, found = [value], None
    while todo:
        value = todo.pop()
        if type(value) in (str, int, float, bool, type(None)) or id(value) in seen:
            continue
        seen.add(id(value))
        if type(value) is Record:
            if is_harmless(value.name):
                todo += [value.args, value.keywords, value.state]
            elif found is None or value.offset < found.offset:
                found = value
        elif type(value) in (PersistentObject, TFNetwork):
            todo.append(value.state)
        elif type(value) is dict:
            todo += value.values()
        elif type(value) in (list, tuple):
            todo += value
    return found


def plain(value: Any, offset: int, max_depth: int = MAX_DEPTH, max_values: int = MAX_VALUES) -> Any:
    """Copy `value` into None, bool, int, float, str, list, tuple and dict with names as keys.

    Small numpy arrays become lists; anything else (bytes, tensors, networks) becomes None. Bounded in depth
    and size.
    """
    left = [max_values]

    def copy(value: Any, depth: int) -> Any:
        left[0] -= 1
        if left[0] < 0 or depth > max_depth:
            damaged("a setting with too many values", offset)
        if type(value) in (type(None), bool, int, float, str):
            return value
        if type(value) in (list, tuple):
            return type(value)(copy(item, depth + 1) for item in value)
        if type(value) in (set, frozenset):
            return [copy(item, depth + 1) for item in sorted(map(str, value))]
        if type(value) is dict:
            return {str(key): copy(item, depth + 1) for key, item in value.items()}
        if type(value) is Array and value.value is not None and value.value.size <= left[0]:
            left[0] -= value.value.size
            return value.value.tolist()
        return None

    return copy(value, 0)
