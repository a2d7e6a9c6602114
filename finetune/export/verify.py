"""The proof that a written file is the network it was made from: read it again, and compare."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from finetune.checkpoint.load import NETWORKS, Checkpoint, load
from finetune.checkpoint.rebuild import tensors_of
from finetune.errors import CheckpointError, ExportError
from finetune.export.provenance import entry_of
from finetune.export.safetensors import save_safetensors
from finetune.export.stylegan_pickle import save_stylegan_pickle
from finetune.models import Network
from finetune.sampling import device_of, z_from_seeds

FORMATS = ("stylegan-pkl", "safetensors")
# Equal weights, equal code, one machine: what may differ is the order of a sum, where a library picks its
# kernel by how memory happens to be aligned. 8-bit images have steps of 2/255.
IMAGE_TOLERANCE = 1e-4

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Verification:
    """What was compared: networks, pairs of images, and the largest difference of a value in -1 to 1."""

    networks: tuple[str, ...]
    num_tensors: int
    num_images: int
    max_difference: float


def export_checkpoint(
    path: str | os.PathLike, checkpoint: Checkpoint, file_format: str, *, progress: Progress | None = None
) -> Verification:
    """Write `checkpoint` as `file_format` (of FORMATS); it takes its name only after `verify_export` agrees.

    Raises WriteError if the file cannot be written, ExportError if it does not read back; a file that was at
    `path` before is then untouched.
    """
    if file_format not in FORMATS:
        raise ExportError(f"{file_format!r} is not a format to export; choose {' or '.join(FORMATS)}.")
    outcome: list[Verification] = []

    def check(written: Path) -> None:
        outcome.append(verify_export(written, checkpoint, file_format, progress=progress))

    if file_format == "safetensors":
        save_safetensors(path, checkpoint, check=check)
    else:
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
    return outcome[0]


def verify_export(
    path: str | Path,
    checkpoint: Checkpoint,
    file_format: str = "stylegan-pkl",
    *,
    progress: Progress | None = None,
) -> Verification:
    """Read `path` again and compare it with `checkpoint`: networks, every tensor bit for bit, every image.

    Each generator makes one image for each of some seeds (8 up to 256 pixels, else 4; classes, truncation and
    noise modes in turn); the discriminator judges them. Raises ExportError, naming the first difference.
    """
    network = checkpoint.best if checkpoint.best is not None else checkpoint.D
    assert network is not None
    try:
        again = load(path, device=device_of(network))
    except CheckpointError as error:
        raise ExportError(f"The written file cannot be read again: {error}", hint=_REPORT) from error
    if again.missing != checkpoint.missing:
        raise ExportError(
            f"The written file lacks {again.missing}, its source {checkpoint.missing}.", hint=_REPORT
        )
    names = tuple(name for name in NETWORKS if name not in checkpoint.missing)
    num_tensors = sum(
        _compare_tensors(name, getattr(checkpoint, name), getattr(again, name)) for name in names
    )
    num_images, max_difference = _compare_images(checkpoint, again, names, progress)
    return Verification(names, num_tensors, num_images, max_difference)


_REPORT = "No file was written. Internal error: please report it."


def _compare_tensors(name: str, ours: torch.nn.Module | None, theirs: torch.nn.Module | None) -> int:
    if ours is None or theirs is None:
        if ours is not theirs:
            raise ExportError(f"{name} differs in the written file.", hint=_REPORT)
        return 0
    wanted, found = tensors_of(ours), tensors_of(theirs)
    if list(wanted) != list(found):
        raise ExportError(f"The tensors of {name} in the written file have other names.", hint=_REPORT)
    for key, tensor in wanted.items():
        # Compared as bits, so that a NaN equals itself.
        if not torch.equal(_bits(tensor), _bits(found[key])):
            raise ExportError(f"{name}.{key} in the written file has other values.", hint=_REPORT)
    return len(wanted)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


@torch.no_grad()
def _compare_images(
    ours: Checkpoint, again: Checkpoint, names: tuple[str, ...], progress: Progress | None
) -> tuple[int, float]:
    generators = [name for name in names if name != "D"]
    resolution = getattr(ours, names[0]).img_resolution
    seeds = range(8 if resolution <= 256 else 4)
    worst, done, total = 0.0, 0, len(seeds) * max(len(generators), 1)
    for seed in seeds:
        images: list[torch.Tensor] = []
        for name in generators:
            pair = [_image(getattr(side, name), seed) for side in (ours, again)]
            worst = max(worst, _difference(f"image {seed} of {name}", *pair))
            images.append(pair[0])
        if "D" in names:
            img = images[-1] if images else _noise_image(ours.D, seed)
            scores = [_score(side.D, img, seed) for side in (ours, again)]
            scale = 1 + float(scores[0].abs().max())
            _difference(f"the score of image {seed} by D", *(score / scale for score in scores))
        done += max(len(generators), 1)
        if progress is not None:
            progress(done, total)
    return len(seeds) * len(generators), worst


def _image(G: Network, seed: int) -> torch.Tensor:
    device = device_of(G)
    mode = ("const", "none")[seed % 2]  # random noise cannot be compared
    psi = 1 if seed % 4 < 2 else 0.7
    return G(
        z_from_seeds([seed], G.z_dim, device), _label(G, seed), truncation_psi=psi, noise_mode=mode
    ).cpu()


def _label(network: Network, seed: int) -> torch.Tensor:
    label = torch.zeros([1, network.c_dim], device=device_of(network))
    if network.c_dim:
        label[0, seed % network.c_dim] = 1
    return label


def _noise_image(D: Network, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand([1, D.img_channels, D.img_resolution, D.img_resolution], generator=generator) * 2 - 1


def _score(D: Network, img: torch.Tensor, seed: int) -> torch.Tensor:
    return D(img.to(device_of(D)), _label(D, seed)).cpu()


def _difference(what: str, ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return the largest difference; equal tensors, non-finite values included, differ by 0."""
    if torch.equal(_bits(ours), _bits(theirs)):
        return 0.0
    difference = float((ours - theirs).abs().max())
    if not difference <= IMAGE_TOLERANCE:  # also where it is not a number
        raise ExportError(f"{what} differs by {difference:.3g} in the written file.", hint=_REPORT)
    return difference
