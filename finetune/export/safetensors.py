"""Write networks as a safetensors file: tensors named `G_ema.synthesis.b4.const`, the rest in the header.

The strings: `format`, `version`, `family`, `networks` (JSON: name to class and constructor arguments),
`training_set_kwargs` (JSON), `finetune` (JSON: provenance, as in our pickles) and `licence`. The augmentation
pipe, which only training needs, is not written. `finetune.load` reads the file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from finetune.checkpoint.load import NETWORKS, Checkpoint
from finetune.checkpoint.rebuild import tensors_of
from finetune.checkpoint.tensor_file import FORMAT
from finetune.export.provenance import entry_of
from finetune.export.stylegan_pickle import constructor_arguments, plain
from finetune.version import __version__
from torch_utils.files import atomic_write


def write(
    path: str | os.PathLike, checkpoint: Checkpoint, *, check: Callable[[Path], None] | None = None
) -> None:
    """Write the networks of `checkpoint`, as they are, with constructor arguments and provenance.

    `check` is called with the finished temporary file before it takes its name. Raises WriteError if the
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
    name = type(network).__name__
    arguments = constructor_arguments(network, name)
    return {"module": type(network).__module__, "class": name, "init_kwargs": arguments}
