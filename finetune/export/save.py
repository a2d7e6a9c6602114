"""Write a checkpoint in any format; the file gets its name only after it was read again and compared."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import os
from pathlib import Path
from typing import Any

import torch

from finetune.checkpoint.load import NETWORKS, Checkpoint
from finetune.checkpoint.rebuild import tensors_of
from finetune.errors import ConfigError, ExportError
from finetune.export.formats import WHICH, format_of, half_refused
from finetune.export.verify import Progress, Verification, verify_export

LARGE_BUFFER = "noise_const"  # filters and averages, which are small, keep float32


def save(
    checkpoint: Checkpoint,
    path: str | os.PathLike,
    format: str | None = None,
    *,
    which: str | None = None,
    half: bool = False,
    progress: Progress | None = None,
) -> Verification:
    """Write `checkpoint` as `path`, read the file again and compare every tensor and a set of images.

    format: a name of `finetune.export.formats.FORMATS`, by default that of the suffix of `path`.
    which: one of WHICH, by default what the format is for. half: store the weights in float16.
    Raises ConfigError for arguments that do not fit, WriteError if the file cannot be written, ExportError if
    the format cannot hold the checkpoint or the file differs; a file that was at `path` is then untouched.
    """
    row = format_of(path, format)
    if half and not row.half:
        raise half_refused(row.name)
    original = select(checkpoint, which or _default(checkpoint, row.which))
    written = _halved(original) if half else original
    module = importlib.import_module(row.module)
    outcome: list[Verification] = []

    def check(temporary: Path) -> None:
        reopen = getattr(module, "reopen", None)
        found = verify_export(temporary, written, row, original=original, reopen=reopen, progress=progress)
        outcome.append(found)

    module.write(path, written, check=check)
    return outcome[0]


def select(checkpoint: Checkpoint, which: str) -> Checkpoint:
    """Return `checkpoint` with one of its networks, or as it is for "all"; ConfigError if it lacks it."""
    if which == "all":
        return checkpoint
    if which not in WHICH:
        raise ConfigError(f"which {which!r} is unknown. Choose from {', '.join(WHICH)}.")
    if which in checkpoint.missing:
        held = ", ".join(name for name in NETWORKS if name not in checkpoint.missing)
        raise ConfigError(
            f"{checkpoint.provenance.source} has no {which}. It has {held}; choose one of them."
        )
    others: dict[str, Any] = {name: None for name in (*NETWORKS, "augment_pipe") if name != which}
    return dataclasses.replace(checkpoint, **others)


def _default(checkpoint: Checkpoint, which: str) -> str:
    return "all" if which in checkpoint.missing else which


def _halved(checkpoint: Checkpoint) -> Checkpoint:
    """Return `checkpoint` with copies of its networks whose weights are float16."""
    networks: dict[str, Any] = {}
    for name in NETWORKS:
        if name in checkpoint.missing:
            continue
        networks[name] = copy.deepcopy(getattr(checkpoint, name))
        for key, tensor in tensors_of(networks[name]).items():
            if isinstance(tensor, torch.nn.Parameter) or key.endswith(LARGE_BUFFER):
                tensor.data = tensor.data.half()
                if not tensor.data.isfinite().all():
                    raise ExportError(
                        f"{name}.{key} has values above 65504, the largest of float16. Write it in float32.",
                    )
    return dataclasses.replace(checkpoint, **networks)
