"""Networks as a safetensors file: tensors named `G_ema.synthesis.b4.const`, all else in its header.

The strings: `format`, `version`, `family`, `networks` (JSON: name to class and constructor arguments),
`training_set_kwargs` (JSON), `finetune` (JSON: provenance, as in our pickles) and `licence`. The augmentation
pipe, which only training needs, is not written.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch

from finetune.checkpoint import NETWORKS, Checkpoint, arguments, load
from finetune.checkpoint.described import Described
from finetune.checkpoint.rebuild import Allowance, build_on_meta, compare, fill, tensors_of
from finetune.checkpoint.safe_pickle import Tensor
from finetune.errors import CheckpointError, CheckpointMismatch, PickleRefused
from finetune.export.atomic import atomic_write
from finetune.export.provenance import entry_of, provenance_of
from finetune.export.stylegan_pickle import plain
from finetune.models import stylegan2
from finetune.version import __version__

FORMAT = "stylegan-finetune/1"


def save_safetensors(
    path: str | os.PathLike, checkpoint: Checkpoint, *, check: Callable[[Path], None] | None = None
) -> None:
    """Write the networks of `checkpoint`, float32 as they are, with constructor arguments and provenance.

    `check` is called with the finished temporary file before it takes its name. Raises ExportError where the
    file cannot be written; a file that was at `path` before is then untouched.
    """
    present = {name: getattr(checkpoint, name) for name in NETWORKS if name not in checkpoint.missing}
    networks = {name: _constructor_of(network) for name, network in present.items()}
    tensors = {
        f"{name}.{key}": tensor.detach().to("cpu", copy=True).contiguous()
        for name, network in present.items()
        for key, tensor in tensors_of(network).items()
    }
    metadata = {
        "format": FORMAT,
        "version": __version__,
        "family": checkpoint.family,
        "networks": json.dumps(networks),
        "training_set_kwargs": json.dumps(plain(checkpoint.training_set_kwargs, "training_set_kwargs")),
        "finetune": json.dumps(plain(entry_of(checkpoint), "provenance")),
        "licence": checkpoint.provenance.licence or "",
    }
    content = safetensors.torch.save(tensors, metadata)
    with atomic_write(path) as stream:
        stream.write(content)
        if check is not None:
            stream.flush()
            check(Path(stream.name))


def _constructor_of(network: torch.nn.Module) -> dict[str, Any]:
    arguments = plain(network.init_kwargs, type(network).__name__)
    return {"module": type(network).__module__, "class": type(network).__name__, "init_kwargs": arguments}


def load_any(path: str | os.PathLike, *, device: str | torch.device = "cpu") -> Checkpoint:
    """Open what `--network` names: `.safetensors` as a file of ours, all else by `finetune.load`."""
    suffix = Path(path).suffix.lower()
    return (load_safetensors if suffix == ".safetensors" else load)(Path(path), device=device)


def load_safetensors(path: str | os.PathLike, *, device: str | torch.device = "cpu") -> Checkpoint:
    """Open a file that `save_safetensors` wrote; the networks are in eval mode, without gradients.

    Raises CheckpointError where it is no such file, CheckpointMismatch where its tensors are not exactly
    those of the networks that its header describes.
    """
    path = Path(path)
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            found = {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is no safetensors file, or a damaged one ({error})") from None
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has the format {metadata.get('format')!r}, not {FORMAT!r}",
            hint="Only safetensors files of `finetune export` say how to build their networks.",
        )
    networks = _read_json(path, metadata, "networks")
    stray = sorted(name for name in found if name.split(".", 1)[0] not in networks)
    if unknown := sorted(set(networks) - set(NETWORKS)) or stray:
        raise CheckpointError(f"{path} holds what is no network: {', '.join(unknown[:20])}")
    allowance = Allowance.for_file(path.stat().st_size)
    modules = {name: _rebuild(path, name, networks[name], found, allowance) for name in networks}
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Checkpoint(
        **{name: modules[name].to(device) if name in modules else None for name in NETWORKS},
        augment_pipe=None,
        training_set_kwargs=_read_json(path, metadata, "training_set_kwargs"),
        provenance=provenance_of(
            _read_json(path, metadata, "finetune"),
            source=path.name,
            sha256=digest,
            size=path.stat().st_size,
        ),
    )


def _read_json(path: Path, metadata: dict[str, str], key: str) -> dict[str, Any]:
    try:
        value = json.loads(metadata.get(key) or "{}")
    except (ValueError, RecursionError):
        value = None
    if value is None and metadata.get(key) == "null":
        return {}
    if type(value) is not dict:
        raise CheckpointError(f"{path}: {key} in its header is no JSON object")
    return value


def _rebuild(
    path: Path, name: str, constructor: Any, found: dict[str, np.ndarray], allowance: Allowance
) -> torch.nn.Module:
    """Build one network under the same checks as one from a pickle: arguments, then names, shapes, dtypes."""
    given = constructor.get("init_kwargs") if type(constructor) is dict else None
    if type(given) is not dict:
        raise CheckpointError(f"{path}: the header does not say how {name} was built")
    net = Described(class_name=str(constructor.get("class"))[:80], offset=0)
    net.modules[""] = {"_init_kwargs": given}
    prefix = name + "."
    for key, array in found.items():
        if key.startswith(prefix):
            local = key.removeprefix(prefix)
            net.tensors[local] = Tensor(array, array.dtype.name, offset=0)
            while "." in local:
                local = local.rpartition(".")[0]
                net.modules.setdefault(local, {})
    try:
        cls, kwargs = _recognise(net)
        module = build_on_meta(cls, kwargs, net)
        differences = compare(net.tensors, module)
        if differences:
            raise CheckpointMismatch(
                f"{path}: the tensors of {name} are not those it describes:", differences
            )
        fill(module, net.tensors, allowance, 0)
    except PickleRefused as error:
        raise CheckpointError(
            f"{path}: {name} cannot be built from what the header says ({error.what})"
        ) from None
    return module


def _recognise(net: Described) -> tuple[type, dict[str, Any]]:
    if net.has("synthesis.input"):
        from finetune.models import stylegan3

        return stylegan3.Generator, arguments.generator_arguments(net)
    if net.has("synthesis"):
        return stylegan2.Generator, arguments.generator_arguments(net)
    return stylegan2.Discriminator, arguments.discriminator_arguments(net)
