"""Directions of w by name: principal ones of a network, or those of a file."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from finetune.directions import Directions, principal_directions
from finetune.editing.latents import NAMES, read_arrays
from finetune.errors import ConfigError
from finetune.models import Network
from torch_utils.files import atomic_write

PRINCIPAL = re.compile(r"pc([1-9]\d*)")


def find_directions(
    G: Network, names: Iterable[str], file: Path | None = None, label: Sequence[float] | None = None
) -> dict[str, torch.Tensor]:
    """Return directions `[w_dim]` by name, each one standard deviation long.

    They are those of `file` or, if that is None, the principal directions `pc1`, `pc2` … of `G` with `label`,
    or over all its classes. ConfigError names a direction that does not exist.
    """
    names = list(names)
    if not names:
        return {}
    if file is not None:
        known = _read(file, G)
        for name in names:
            if name not in known:
                raise ConfigError(f"--edit {name}: {file} has the directions {', '.join(known)}.")
        return {name: known[name] for name in names}
    numbers = [int(match[1]) if (match := PRINCIPAL.fullmatch(name)) else 0 for name in names]
    for name, number in zip(names, numbers):
        if not 1 <= number <= G.w_dim:
            raise ConfigError(
                f"--edit {name}: not a principal direction; this network has pc1 to pc{G.w_dim}. "
                "Name the file of other directions with --directions."
            )
    found = principal_directions(G, max(numbers), label=label)
    return {name: found.vectors[i - 1] * found.std[i - 1] for name, i in zip(names, numbers)}


def save_directions(path: str | os.PathLike, directions: Directions) -> None:
    """Write directions as an .npz file: `names`, `vectors` `[n, w_dim]`, `std` `[n]`, `mean` `[w_dim]`.

    Other directions can be added to such a file, or names replaced.
    """
    names = np.array([f"pc{i + 1}" for i in range(len(directions.std))])
    with atomic_write(path) as stream:
        np.savez(
            stream,
            names=names,
            vectors=directions.vectors.numpy(),
            std=directions.std.numpy(),
            mean=directions.mean.numpy(),
        )


def _read(path: Path, G: Network) -> dict[str, torch.Tensor]:
    arrays = read_arrays(path, NAMES, "vectors", "std")
    names, vectors, std = (arrays[key] for key in (NAMES, "vectors", "std"))
    if vectors.shape != (names.size, G.w_dim) or std.shape != names.shape or names.ndim != 1:
        raise ConfigError(
            f"{path}: vectors have the shape {list(vectors.shape)}, expected [{names.size}, {G.w_dim}]: "
            f"the number of names and the w_dim of this network."
        )
    return {str(name): torch.from_numpy(row * scale) for name, row, scale in zip(names, vectors, std)}
