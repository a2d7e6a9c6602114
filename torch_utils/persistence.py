"""Objects that carry the source of their class, in the file format of the StyleGAN family.

An instance of a class decorated with `persistent_class` is pickled as a call of `_reconstruct_persistent_obj`
with a dict: the source text of the module that defines the class, the name of the class and the state. Other
code bases execute that source to read such a file. This one never does: it rebuilds an object only if the
same source is already installed here as one of its own models, and leaves every other file to
`finetune.load`.
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import sys
from typing import Any, TypeVar

FORMAT_VERSION = 6
MODELS = "finetune.models."  # the only modules whose classes are rebuilt

_Class = TypeVar("_Class", bound=type)
_classes: set[type] = set()
_sources: dict[str, str | None] = {}  # module name -> source text, read when the module was imported


def persistent_class(cls: _Class) -> _Class:
    """Make the instances of a class remember their constructor arguments and pickle with their source.

    Adds the read-only properties `init_args` (tuple) and `init_kwargs` (dict), which return copies.
    """
    target: Any = cls
    module = target.__module__
    # Read now: by the time of pickling the file may have been edited, and objects live by what was imported.
    _sources[module] = _read_source(module)
    target.__init__ = _recording(target.__init__)
    target.__reduce__ = _reduce
    target.init_args = property(lambda self: copy.deepcopy(self._init_args))
    target.init_kwargs = property(lambda self: copy.deepcopy(self._init_kwargs))
    _classes.add(cls)
    return cls


def _recording(constructor):
    """Make a constructor note its arguments; of nested ones, the outermost is the one that was called."""

    @functools.wraps(constructor)
    def wrapper(self, *args, **kwargs):
        if "_init_args" not in self.__dict__:
            self.__dict__.update(_init_args=_plain(args), _init_kwargs=_plain(kwargs))
        constructor(self, *args, **kwargs)

    return wrapper


def _reduce(self):
    if type(self) not in _classes:  # an undecorated subclass pickles by reference, like any other class
        return _blank, (type(self),), self.__dict__
    return _reconstruct_persistent_obj, (_describe(self),)


def _blank(cls: Any) -> Any:
    return cls.__new__(cls)


def is_persistent(obj: Any) -> bool:
    """Return whether a class, or the class of an object, was decorated with `persistent_class`."""
    return (obj if isinstance(obj, type) else type(obj)) in _classes


def _describe(obj) -> dict:
    cls = type(obj)
    source = _sources[cls.__module__]
    if source is None:
        raise RuntimeError(f"{cls.__name__} cannot be pickled: module {cls.__module__} has no source file")
    return {
        "type": "class",
        "version": FORMAT_VERSION,
        "module_src": source,
        "class_name": cls.__name__,
        "state": dict(obj.__dict__),
        "module_name": cls.__module__,
    }


def _reconstruct_persistent_obj(meta: dict) -> Any:
    """Rebuild an object that this installation wrote; never executes `meta['module_src']`.

    Raises RuntimeError for everything else, and says what to use instead.
    """
    cls = _find_class(meta)
    obj = _blank(cls)
    if hasattr(obj, "__setstate__"):
        obj.__setstate__(meta["state"])
    else:
        obj.__dict__.update(meta["state"])
    return obj


def _find_class(meta) -> type:
    if not isinstance(meta, dict) or not isinstance(meta.get("state"), dict):
        raise RuntimeError(f"not a persistent object: {type(meta).__name__} without a state")
    module, name = meta.get("module_name"), meta.get("class_name")
    refusal = (
        f"{name!r} does not come from this installation, and the source it carries is never executed; "
        "open the file with finetune.load(path) instead of pickle"
    )
    if meta.get("type") != "class" or meta.get("version") != FORMAT_VERSION:
        raise RuntimeError(refusal)
    if not isinstance(module, str) or not module.startswith(MODELS) or not isinstance(name, str):
        raise RuntimeError(refusal)
    try:
        importlib.import_module(module)
    except ImportError:
        raise RuntimeError(refusal) from None
    cls = vars(sys.modules[module]).get(name)
    if not isinstance(cls, type) or not is_persistent(cls) or cls.__module__ != module:
        raise RuntimeError(refusal)
    if _sources[module] is None or _sources[module] != meta.get("module_src"):
        raise RuntimeError(refusal)
    return cls


def _read_source(module: str) -> str | None:
    known = _sources.get(module)
    if known is not None:
        return known  # the same text object for every class of a module, so that a pickle holds it once
    try:
        return inspect.getsource(sys.modules[module])
    except (OSError, TypeError):
        return None


def _plain(value: Any) -> Any:
    """Deep-copy, with every kind of dict turned into a dict."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(item) for item in value)
    return copy.deepcopy(value)
