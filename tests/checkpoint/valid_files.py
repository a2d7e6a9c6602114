"""Golden files as objects that Python's own pickler writes, as StyleGAN code bases do, at any protocol."""

from __future__ import annotations

import sys
import types
from typing import Any

import numpy as np
import torch

from dnnlib.util import EasyDict
from finetune.checkpoint.unpickle.files import read_pickle
from finetune.checkpoint.unpickle.stubs import Array, PersistentObject, Tensor, TFNetwork
from finetune.checkpoint.unpickle.values import Blob
from torch_utils.persistence import _reconstruct_persistent_obj


class Net:
    """A persistent object; its `state` may be changed before it is pickled."""

    def __init__(self, class_name: str, state: dict) -> None:
        self.class_name, self.state = class_name, state

    def __reduce__(self):
        meta = {"type": "class", "version": 6, "module_src": "raise SystemExit"}
        meta |= {"class_name": self.class_name, "state": self.state}
        return _reconstruct_persistent_obj, (meta,)

    def modules(self):
        yield self
        for child in self.state["_modules"].values():
            yield from child.modules()


class Network:
    """A network of the TensorFlow generation."""

    def __init__(self, state: dict) -> None:
        self.state = state

    def __getstate__(self):
        return self.state


def install(monkeypatch) -> None:
    """Let Python's pickler find `Network` under the name that files give it."""
    Network.__module__ = "dnnlib.tflib.network"
    for name in ("dnnlib.tflib", "dnnlib.tflib.network"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["dnnlib.tflib.network"].Network = Network


def read(path) -> Any:
    return real(read_pickle(path).root)


def real(value: Any) -> Any:
    """The object that a stub represents."""
    if isinstance(value, PersistentObject):
        return Net(value.class_name, {key: real(item) for key, item in value.state.items()})
    if isinstance(value, TFNetwork):
        return Network(real(value.state))
    if isinstance(value, Tensor):
        tensor = torch.from_numpy(np.array(value.array))
        return torch.nn.Parameter(tensor) if value.is_parameter else tensor
    if isinstance(value, Array):
        return np.array(value.value)
    if isinstance(value, Blob):
        return bytes(value.view)
    if isinstance(value, dict):
        return EasyDict({key: real(item) for key, item in value.items()})
    if isinstance(value, (list, tuple, set)):
        return type(value)(map(real, value))
    return value


def convert(net: Net, dtype: torch.dtype) -> None:
    """Give all float tensors of a network another type."""
    for module in net.modules():
        for group in ("_parameters", "_buffers"):
            for name, tensor in module.state[group].items():
                if tensor is not None and tensor.is_floating_point():
                    tensor = tensor.detach().to(dtype)
                    is_parameter = group == "_parameters"
                    module.state[group][name] = torch.nn.Parameter(tensor) if is_parameter else tensor
