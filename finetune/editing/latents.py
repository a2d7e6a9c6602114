"""Intermediate latents in rows and columns: a row for each seed or saved w, a column for each variation.

`finetune generate` makes an image of every cell; `finetune video` moves along the columns.
"""

from __future__ import annotations

import itertools
import os
import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetune.errors import ConfigError
from finetune.models import Network
from finetune.sampling import device_of, z_from_seeds
from torch_utils.files import atomic_write

MAX_COLUMNS = 10_000
NAMES = "names"  # the array of a file of directions that holds text


@dataclass(frozen=True)
class Edit:
    """Move rows `layers` of ws along `direction` `[w_dim]`, as far as each of `amounts`."""

    name: str
    direction: torch.Tensor
    amounts: tuple[float, ...]
    layers: slice


@dataclass(frozen=True)
class Column:
    """One variation: label `[1, c_dim]`, truncation, shift of ws `[num_ws, w_dim]`, seed to mix with."""

    name: str
    label: torch.Tensor
    psi: float = 1.0
    shift: torch.Tensor | None = None
    mix_seed: int | None = None


@dataclass(frozen=True)
class LatentTable:
    """The cells `ws` `[num_ws, w_dim]` of a table, computed row by row.

    rows: seeds, or ws `[num_ws, w_dim]` such as `load_ws` gives. cutoff: truncate only this many rows of ws.
    mix_layers: the rows of ws that come from the seed to mix with.
    """

    G: Network
    rows: Sequence[int | torch.Tensor]
    columns: Sequence[Column]
    cutoff: int | None = None
    mix_layers: slice = field(default_factory=lambda: slice(None))

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Yield ws `[columns, num_ws, w_dim]` for each row."""
        return (torch.stack([self.cell(start, column) for column in self.columns]) for start in self.rows)

    @torch.no_grad()
    def cell(self, start: int | torch.Tensor, column: Column) -> torch.Tensor:
        """Return ws `[num_ws, w_dim]`: mapped, truncated, mixed, then edited."""
        ws = self._truncated(start, column)
        if column.mix_seed is not None:
            ws[self.mix_layers] = self._truncated(column.mix_seed, column)[self.mix_layers]
        return ws if column.shift is None else ws + column.shift

    def _truncated(self, start: int | torch.Tensor, column: Column) -> torch.Tensor:
        device = device_of(self.G)
        if isinstance(start, torch.Tensor):
            return truncate(self.G, start.to(device), column.psi, self.cutoff)
        z = z_from_seeds([start], self.G.z_dim, device)
        return self.G.mapping(
            z, column.label.to(device), truncation_psi=column.psi, truncation_cutoff=self.cutoff
        )[0]

    def row_names(self) -> list[str]:
        """Return `seed0007` for seed 7 and `w0003` for the fourth of the saved w."""
        return [
            f"seed{row:04d}" if isinstance(row, int) else f"w{index:04d}"
            for index, row in enumerate(self.rows)
        ]

    def noise_seeds(self) -> list[int]:
        """Return the seed of each row's random noise."""
        return [row if isinstance(row, int) else index for index, row in enumerate(self.rows)]


def columns(
    G: Network,
    labels: Sequence[tuple[str, torch.Tensor]],
    *,
    psis: Sequence[float] = (1.0,),
    edits: Sequence[Edit] = (),
    mix_seeds: Sequence[int] = (),
) -> list[Column]:
    """Return a column for each combination of the values given; the name has those that differ.

    labels: name and one label `[1, c_dim]` each. With `mix_seeds` there is a column without mixing as well.
    ConfigError if there are more than `MAX_COLUMNS`.
    """
    axes: list[list[tuple[str, Any]]] = [
        list(labels),
        [(f"trunc{psi:g}", psi) for psi in psis],
        *[[(f"{edit.name}={amount:g}", amount) for amount in edit.amounts] for edit in edits],
        [("", None), *((f"mix{seed:04d}", seed) for seed in mix_seeds)],
    ]
    count = int(np.prod([len(axis) for axis in axes]))
    if count > MAX_COLUMNS:
        raise ConfigError(f"{count:,} combinations of values: at most {MAX_COLUMNS:,}. Use fewer values.")
    found = []
    for combination in itertools.product(*axes):
        names = [name for (name, _), axis in zip(combination, axes) if name and len(axis) > 1]
        label, psi, *amounts, mix_seed = (value for _, value in combination)
        found.append(Column("-".join(names), label, psi, _shift(G, edits, amounts), mix_seed))
    return found


def _shift(G: Network, edits: Sequence[Edit], amounts: Sequence) -> torch.Tensor | None:
    if not edits:
        return None
    shift = torch.zeros(G.num_ws, G.w_dim, device=device_of(G))
    for edit, amount in zip(edits, amounts):
        shift[edit.layers] += amount * edit.direction.to(shift.device)
    return shift


def truncate(G: Network, ws: torch.Tensor, psi: float, cutoff: int | None = None) -> torch.Tensor:
    """Return a copy of `ws` `[num_ws, w_dim]`, moved toward the average w as the mapping network does."""
    moved = ws.clone()
    if psi != 1:
        moved[:cutoff] = G.mapping.w_avg.lerp(ws[:cutoff], psi)
    return moved


def save_ws(path: str | os.PathLike, ws: torch.Tensor) -> None:
    """Write ws `[N, num_ws, w_dim]` float32 as `w` of an .npz file; WriteError if it cannot be written."""
    with atomic_write(path) as stream:
        np.savez(stream, w=ws.detach().float().cpu().numpy())


def load_ws(path: str | os.PathLike, G: Network) -> list[torch.Tensor]:
    """Read the `w` of an .npz file: `[N, num_ws, w_dim]`, or one vector for all layers, `[N, w_dim]`.

    Returns a list of ws `[num_ws, w_dim]`. ConfigError if the file holds no such array for this network.
    """
    w = read_arrays(path, "w")["w"]
    if w.ndim == 2:
        w = w[:, None]
    if w.ndim != 3 or w.shape[1] not in (1, G.num_ws) or w.shape[2] != G.w_dim or not len(w):
        raise ConfigError(
            f"{path}: w has the shape {list(w.shape)}; this network takes [N, {G.num_ws}, {G.w_dim}].",
            hint="Use the w of this network, or of one that was fine-tuned from it or to it.",
        )
    return [torch.from_numpy(row).expand(G.num_ws, -1).clone() for row in w]


def read_arrays(path: str | os.PathLike, *names: str) -> dict[str, np.ndarray]:
    """Read arrays of an .npz file as float32, that called NAMES as it is.

    ConfigError if one is missing, has other values than real numbers, or is not finite.
    """
    found = {}
    try:
        if Path(path).is_file() and not zipfile.is_zipfile(path):  # numpy would advise to unpickle it
            raise ValueError("it is not a zip of arrays")
        with np.load(path, allow_pickle=False) as file:
            if not hasattr(file, "files") or set(names) - set(file.files):
                raise ValueError(f"no array called {' or '.join(names)}")
            for name in names:
                array = file[name]
                if array.dtype.kind in "fiu":
                    array = array.astype(np.float32)
                    if not np.isfinite(array).all():
                        raise ValueError(f"{name} is not finite")
                elif name != NAMES:
                    raise ValueError(f"{name} holds no real numbers")
                found[name] = array
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist.") from None
    except (ValueError, OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise ConfigError(f"{Path(path)} is not an .npz file with {', '.join(names)} ({error}).") from None
    return found


def parse_layers(text: str, num_ws: int) -> slice:
    """Read rows of ws such as `0-3` or `5`; ConfigError unless they are within 0 … num_ws - 1."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text.strip())
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if not first <= last < num_ws:
        raise ConfigError(f"layers {text!r}: not rows of ws. Write them like 0-3, from 0 to {num_ws - 1}.")
    return slice(first, last + 1)
