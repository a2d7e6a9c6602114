"""Write the pickle that the StyleGAN2-ADA and StyleGAN3 code bases open with a plain `pickle.load`.

Each network becomes a tree of `torch_utils.persistence` records: the text of our model file, a class name and
the module's state. Only what Python 3.8 and torch 1.9 understand goes in: plain containers and numbers, CPU
tensors, and the globals in `ALLOWED_GLOBALS`; the written file is scanned for others before it gets its name.
"""

from __future__ import annotations

import inspect
import os
import pickle
import pickletools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from finetune.checkpoint.load import Checkpoint
from finetune.errors import ExportError
from finetune.export.provenance import complete_entry, entry_of
from finetune.models import Network
from torch_utils import persistence
from torch_utils.files import atomic_write

PROTOCOL = 4  # the newest that Python 3.8 writes by default

#: All that a file of ours may name; every one of them exists in torch 1.9 and in both code bases.
ALLOWED_GLOBALS = frozenset(
    {
        "torch_utils.persistence._reconstruct_persistent_obj",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_parameter",
        "torch.storage._load_from_bytes",
        "collections.OrderedDict",
    }
)

# What torch 1.9 keeps in a module besides the plain attributes. Newer hook dictionaries are left out:
# torch's own Module.__setstate__ adds the ones that its version needs.
_MODULE_FIELDS = frozenset(
    {
        "training",
        "_parameters",
        "_buffers",
        "_non_persistent_buffers_set",
        "_modules",
        "_backward_hooks",
        "_is_full_backward_hook",
        "_forward_hooks",
        "_forward_pre_hooks",
        "_state_dict_hooks",
        "_load_state_dict_pre_hooks",
    }
)
_HOOK_FIELDS = frozenset(name for name in _MODULE_FIELDS if name.endswith("_hooks"))
_BARE_MODULE_FIELDS = frozenset(vars(torch.nn.Module()))
_PLAIN = (bool, int, float, str, bytes, type(None))


def write(
    path: str | os.PathLike, checkpoint: Checkpoint, *, check: Callable[[Path], None] | None = None
) -> None:
    """Write all that `checkpoint` holds, with its provenance; see `save_stylegan_pickle`."""
    save_stylegan_pickle(
        path,
        G=checkpoint.G,
        D=checkpoint.D,
        G_ema=checkpoint.G_ema,
        augment_pipe=checkpoint.augment_pipe,
        training_set_kwargs=checkpoint.training_set_kwargs,
        provenance=entry_of(checkpoint),
        check=check,
    )


def save_stylegan_pickle(
    path: str | os.PathLike,
    *,
    G: torch.nn.Module | None,
    D: torch.nn.Module | None,
    G_ema: torch.nn.Module | None,
    augment_pipe: torch.nn.Module | None = None,
    training_set_kwargs: Mapping | None = None,
    provenance: Mapping | None = None,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write networks as one pickle; a network that is None is left out.

    `provenance` becomes the plain entry "finetune" (`source`, `training`, `nimg`; `format` and `version` are
    added), which other readers ignore. The networks given are not changed: copies are saved on the CPU, in
    evaluation mode, without gradients. `check` is called with the finished temporary file before it takes its
    name. Raises WriteError if the file cannot be written, ExportError if a network holds what no reader
    supports; a file that was at `path` before is then untouched.
    """
    networks = {"G": G, "D": D, "G_ema": G_ema}
    present = {name: network for name, network in networks.items() if network is not None}
    if not present:
        raise ExportError("No network to save: G, D and G_ema are all None.")
    shared: dict[int, tuple[Any, Any]] = {}
    content: dict[str, Any] = {name: _describe(net, shared, name) for name, net in present.items()}
    content["augment_pipe"] = (
        None if augment_pipe is None else _describe(augment_pipe, shared, "augment_pipe")
    )
    content["training_set_kwargs"] = plain(training_set_kwargs, "training_set_kwargs")
    content["finetune"] = plain(complete_entry(provenance or {}), "provenance")
    with atomic_write(path) as stream:
        pickle.dump(content, stream, protocol=PROTOCOL)
        stream.flush()
        with open(stream.name, "rb") as written:
            _refuse_other_globals(written, Path(path))
        if check is not None:
            check(Path(stream.name))


class _Record:
    """A network in the tree to be pickled, as the call that rebuilds it from `meta`."""

    def __init__(self, meta: dict) -> None:
        self.meta = meta

    def __reduce__(self):
        return persistence._reconstruct_persistent_obj, (self.meta,)


def _describe(module: Network, shared: dict, where: str) -> _Record:
    """Turn a module, and all modules within, into records that hold nothing but plain values and tensors."""
    if not persistence.is_persistent(module):
        raise ExportError(
            f"{where}: other code bases cannot rebuild a {type(module).__name__}.",
            hint="Only the networks of finetune.models can be written to a pickle.",
        )
    own = module.__reduce__()[1][0]
    arguments = constructor_arguments(module, where)
    state: dict[str, Any] = {"_init_args": (), "_init_kwargs": arguments}
    for name, value in vars(module).items():
        if name in _HOOK_FIELDS:
            state[name] = OrderedDict()
        elif name == "training":
            state[name] = False
        elif name == "_modules":
            state[name] = OrderedDict(
                (key, None if sub is None else _describe(sub, shared, f"{where}.{key}"))
                for key, sub in value.items()
            )
        elif name in ("_parameters", "_buffers"):
            state[name] = OrderedDict((key, _tensor(tensor, shared)) for key, tensor in value.items())
        elif name not in state and (name in _MODULE_FIELDS or name not in _BARE_MODULE_FIELDS):
            state[name] = plain(value, f"{where}.{name}", shared)
    meta = {key: own[key] for key in ("type", "version", "module_src", "class_name")}
    return _Record({**meta, "module_name": type(module).__module__, "state": state})


def constructor_arguments(module: Network, where: str) -> dict[str, Any]:
    """Return all constructor arguments by name, so that readers without our classes can identify them."""
    by_name = inspect.signature(type(module)).bind_partial(*module.init_args).arguments
    return plain({**by_name, **module.init_kwargs}, f"{where}.init_kwargs")


def _tensor(tensor: torch.Tensor | None, shared: dict) -> torch.Tensor | None:
    """Copy a tensor to the CPU, alone in its storage; one tensor met twice stays one tensor."""
    if tensor is None:
        return None
    if id(tensor) not in shared:
        copy = tensor.detach().to("cpu", copy=True).contiguous()
        if isinstance(tensor, torch.nn.Parameter):
            copy = torch.nn.Parameter(copy, requires_grad=False)
        shared[id(tensor)] = (tensor, copy)  # the original is kept alive, so that its id stays its own
    return shared[id(tensor)][1]


def plain(value: Any, where: str, shared: dict | None = None) -> Any:
    """Copy a value into built-in containers and numbers; ExportError names what has no plain form.

    Mappings become dict (their order kept), numpy scalars and paths become numbers and text, and numpy arrays
    become nested lists, since the name under which numpy pickles an array differs by version.
    """
    shared = {} if shared is None else shared
    if isinstance(value, np.generic):
        return plain(value.item(), where)
    if isinstance(value, _PLAIN):
        base: Any = next(kind for kind in _PLAIN if isinstance(value, kind))
        return value if type(value) is base else base(value)
    if isinstance(value, torch.Tensor):
        return _tensor(value, shared)
    if isinstance(value, np.ndarray):
        return plain(value.tolist(), where)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {plain(key, where): plain(item, f"{where}[{key!r}]", shared) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        items = [plain(item, f"{where}[{i}]", shared) for i, item in enumerate(value)]
        return next(kind(items) for kind in (list, tuple, set, frozenset) if isinstance(value, kind))
    kind = type(value)
    raise ExportError(f"{where}: a {kind.__module__}.{kind.__qualname__} cannot be written as plain values.")


def _refuse_other_globals(stream: BinaryIO, path: Path) -> None:
    unknown = sorted(set(named_globals(stream)) - ALLOWED_GLOBALS)
    if unknown:
        raise ExportError(
            f"{path}: not written, since torch {torch.__version__} makes it refer to {', '.join(unknown)}, "
            "which older readers do not have.",
            hint="Please report this with the version of torch.",
        )


def named_globals(stream: BinaryIO) -> list[str]:
    """List what a pickle refers to, as `module.name`, without loading it (nested storages are not opened)."""
    found = []
    texts: dict[int, str] = {}  # memo slot -> text
    recent: list[str] = []  # the last two texts put on the stack
    slot = 0
    last: str | None = None
    arg: Any  # text, a number or nothing, by opcode
    for opcode, arg, _ in pickletools.genops(stream):
        if "UNICODE" in opcode.name:
            last = arg
            recent = [*recent[-1:], arg]
        elif opcode.name == "MEMOIZE":
            if last is not None:
                texts[slot] = last
            slot += 1
            last = None
        elif opcode.name in ("BINGET", "LONG_BINGET", "GET"):
            if int(arg) in texts:
                recent = [*recent[-1:], texts[int(arg)]]
            last = None
        elif opcode.name == "STACK_GLOBAL":
            found.append(".".join(recent))
            last = None
        else:
            if opcode.name in ("GLOBAL", "INST"):
                found.append(arg.replace(" ", "."))
            last = None
    return found
