"""Seeds to latents to images: truncation, labels, and grids.

A seed stands for one image: its z comes from numpy's RandomState, as everywhere in the field, its random
noise maps (if any) from torch seeded with the same number, and images are made one at a time, so that
neither the order of seeds nor the batch size matters.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from finetune.errors import CheckpointError, ConfigError
from finetune.models import Network
from finetune.options import MAX_SEED

NOISE_MODES = ("const", "random", "none")
_PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def check_seed(seed: int) -> None:
    """Raise ConfigError for a seed outside 0 … 2³²-1, which not all generators of random numbers take."""
    if not 0 <= seed <= MAX_SEED:
        raise ConfigError(f"seed {seed}: must be 0 to {MAX_SEED}.")


def z_from_seeds(seeds: Iterable[int], z_dim: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return the latents of `seeds`, float32 `[N, z_dim]`; ConfigError for a seed outside 0 … 2³²-1."""
    rows = []
    for seed in seeds:
        check_seed(seed)
        rows.append(np.random.RandomState(seed).randn(1, z_dim).astype(np.float32))
    stacked = np.concatenate(rows) if rows else np.zeros([0, z_dim], dtype=np.float32)
    return torch.from_numpy(stacked).to(device)


def label_from_class(
    G: Network, class_index: int | None, n: int = 1, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Return one-hot labels `[n, c_dim]` float32 (`[n, 0]` without classes).

    ConfigError if the network has classes and none is named, has none and one is named, or has fewer.
    """
    c_dim = int(G.c_dim)
    if c_dim == 0:
        if class_index is not None:
            raise ConfigError(f"--class {class_index}: this network has no classes. Omit the option.")
        return torch.zeros([n, 0], device=device)
    if class_index is None:
        raise ConfigError(f"--class: this network has {c_dim} classes. Choose one from 0 to {c_dim - 1}.")
    if not 0 <= class_index < c_dim:
        raise ConfigError(f"--class {class_index}: must be 0 to {c_dim - 1} for this network.")
    label = torch.zeros([n, c_dim], device=device)
    label[:, class_index] = 1
    return label


def label_from_vector(
    G: Network, vector: Sequence[float], device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Return a label vector as `[1, c_dim]` float32. ConfigError if its length is not that of the network."""
    if len(vector) != G.c_dim:
        takes = f"vectors of {G.c_dim} numbers as labels" if G.c_dim else "no labels"
        text = ",".join(f"{number:g}" for number in vector)
        raise ConfigError(f"--label {text}: {len(vector)} numbers, but this network takes {takes}.")
    return torch.tensor([vector], dtype=torch.float32, device=device)


def has_noise(G: Network) -> bool:
    """Return whether the generator adds noise that changes its images: StyleGAN2, unless trained without."""
    return any(
        module.use_noise and bool(module.noise_strength)
        for module in G.synthesis.modules()
        if hasattr(module, "noise_strength")
    )


def to_uint8(img: torch.Tensor) -> np.ndarray:
    """Turn images `[N, C, H, W]` or one `[C, H, W]`, -1 to 1, into uint8 with the channels last.

    Values outside are clipped, the rest is rounded to the nearest of 256 steps (-1 is 0, 1 is 255).
    """
    steps = (img.detach().to(torch.float32) * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
    return np.ascontiguousarray(steps.movedim(-3, -1).cpu().numpy())


@torch.no_grad()
def generate(
    G: Network,
    seeds: Sequence[int],
    *,
    class_index: int | None = None,
    label: Sequence[float] | None = None,
    truncation_psi: float = 1.0,
    truncation_cutoff: int | None = None,
    noise_mode: str = "const",
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield `(seed, image)` for each seed, the image uint8 `[H, W, C]`.

    class_index, label: for a network with labels, the class or the label vector. `progress(done, total)` is
    called after each. ConfigError for options that do not fit the network, CheckpointError if its output is
    not finite.
    """
    if noise_mode not in NOISE_MODES:
        raise ConfigError(f"--noise-mode {noise_mode}: must be one of {', '.join(NOISE_MODES)}.")
    device = device_of(G)
    c = label_from_class(G, class_index, 1, device) if label is None else label_from_vector(G, label, device)
    for done, seed in enumerate(seeds, 1):
        z = z_from_seeds([seed], G.z_dim, device)
        ws = G.mapping(z, c, truncation_psi=truncation_psi, truncation_cutoff=truncation_cutoff)
        yield seed, synthesize(G, ws[0], noise_mode=noise_mode, seed=seed)
        if progress is not None:
            progress(done, len(seeds))


@torch.no_grad()
def synthesize(G: Network, ws: torch.Tensor, *, noise_mode: str = "const", seed: int = 0) -> np.ndarray:
    """Return the image of `ws` `[num_ws, w_dim]`, uint8 `[H, W, C]`; `seed` is that of random noise.

    CheckpointError if the output is not finite.
    """
    device = device_of(G)
    with _random_state_of(seed, device) if noise_mode == "random" else contextlib.nullcontext():
        img = G.synthesis(ws.unsqueeze(0).to(device), noise_mode=noise_mode)
    check_finite(img, f"seed {seed}: the image")
    return to_uint8(img)[0]


def check_finite(img: torch.Tensor, what: str) -> None:
    """Raise CheckpointError if generated images have values that are not finite; what: begins its message."""
    if not bool(torch.isfinite(img).all()):
        raise CheckpointError(
            f"{what} has non-finite values.",
            hint="The weights are damaged, or training had diverged. Use an earlier snapshot.",
        )


@torch.no_grad()
def run_network_chunked(
    G: torch.nn.Module, z: torch.Tensor, c: torch.Tensor, *, chunk: int = 8, **kwargs: Any
) -> torch.Tensor:
    """Return `G(z, c, **kwargs)` as float32 on the CPU, computed `chunk` images at a time to bound memory."""
    device = device_of(G)
    parts = [
        G(z_part.to(device), c_part.to(device), **kwargs).float().cpu()
        for z_part, c_part in zip(z.split(chunk), c.split(chunk), strict=True)
    ]
    return torch.cat(parts)


def device_of(module: torch.nn.Module) -> torch.device:
    """Return the device of a module's first parameter or buffer (the CPU if it has neither)."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")


@contextlib.contextmanager
def _random_state_of(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch inside the block, and restore its random state afterwards."""
    mps_state = torch.mps.get_rng_state() if device.type == "mps" else None  # fork_rng does not support it
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
    if mps_state is not None:
        torch.mps.set_rng_state(mps_state)


def to_image(image: np.ndarray) -> Image.Image:
    """Turn a uint8 array `[H, W, C]` with 1, 3 or 4 channels into an image; ConfigError for other counts."""
    channels = image.shape[2]
    if channels not in _PIL_MODES:
        raise ConfigError(
            f"the network has {channels} image channels. Images can be written for 1 (gray), 3 (RGB) and "
            "4 (RGBA)."
        )
    return Image.fromarray(image[:, :, 0] if channels == 1 else image)


def image_grid(images: Sequence[np.ndarray], columns: int) -> Image.Image:
    """Lay uint8 images `[H, W, C]` of one size out in rows of `columns`, or of all if there are fewer.

    Places that are left in the last row stay black.
    """
    if len(images) == 0:
        raise ConfigError("a grid needs at least one image.")
    height, width, channels = images[0].shape
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    sheet = np.zeros([rows * height, columns * width, channels], dtype=np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * height, i % columns * width
        sheet[top : top + height, left : left + width] = image
    return to_image(sheet)


def save_grid(
    images: torch.Tensor | Sequence[np.ndarray],
    path: str | os.PathLike,
    grid: tuple[int, int] | None = None,
) -> Path:
    """Write images as one sheet and return its path.

    `images` is a float tensor `[N, C, H, W]` in -1 to 1, a uint8 tensor `[N, C, H, W]`, or uint8 arrays
    `[H, W, C]`. `grid` is (columns, rows), and images beyond it are left out; the default is near square.
    """
    if isinstance(images, torch.Tensor):
        if images.dtype == torch.uint8:
            arrays = list(np.ascontiguousarray(images.movedim(1, -1).cpu().numpy()))
        else:
            arrays = list(to_uint8(images))
    else:
        arrays = list(images)
    columns, rows = grid or near_square(len(arrays))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    image_grid(arrays[: columns * rows], columns).save(path)
    return path


def near_square(count: int) -> tuple[int, int]:
    """Return (columns, rows) of the smallest nearly square sheet that holds `count` images."""
    columns = max(1, int(np.ceil(np.sqrt(count))))
    return columns, max(1, -(-count // columns))
