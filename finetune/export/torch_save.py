"""Write files of `torch.save` that hold tensors and plain values: the tensors of a network by name."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from finetune.checkpoint.load import NETWORKS, Checkpoint
from finetune.export.provenance import entry_of
from finetune.export.stylegan_pickle import constructor_arguments, plain
from torch_utils.files import atomic_write

Check = Callable[[Path], None]


def save_tensors(
    path: str | os.PathLike, checkpoint: Checkpoint, content: Mapping[str, Any], check: Check | None
) -> None:
    """Write `content`, the training set options, and "finetune": provenance and how to build the networks.

    The file opens with torch.load(weights_only=True). `check` is called with the finished temporary file
    before it takes its name. Raises WriteError if the file cannot be written.
    """
    networks = {
        name: {"class": type(network).__name__, "init_kwargs": constructor_arguments(network, name)}
        for name in NETWORKS
        if (network := getattr(checkpoint, name)) is not None
    }
    entry = {**plain(entry_of(checkpoint), "provenance"), "networks": networks}
    options = plain(checkpoint.training_set_kwargs, "training_set_kwargs")
    with atomic_write(path) as stream:
        torch.save({**content, "training_set_kwargs": options, "finetune": entry}, stream)
        if check is not None:
            stream.flush()
            check(Path(stream.name))


def on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor to the CPU, alone in its storage, contiguous."""
    return tensor.detach().to("cpu", copy=True).contiguous()
