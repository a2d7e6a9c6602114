"""Verify that a written file contains the network it was made from: read it again, and compare."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from finetune.checkpoint.load import NETWORKS, Checkpoint, load
from finetune.checkpoint.rebuild import tensors_of
from finetune.errors import CheckpointError, ExportError
from finetune.export.formats import Format
from finetune.models import Network, image_size
from finetune.sampling import device_of, z_from_seeds

# float16 keeps 11 bits of a weight; an image sums the errors of all layers. Measured: docs/formats.md.
HALF_TOLERANCE = 0.1

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Verification:
    """What was compared: networks, pairs of images, and the largest difference of a value in -1 to 1."""

    networks: tuple[str, ...]
    num_tensors: int
    num_images: int
    max_difference: float


def verify_export(
    path: str | Path,
    written: Checkpoint,
    file_format: Format,
    *,
    original: Checkpoint | None = None,
    reopen: Callable[[Path, torch.device], Mapping[str, Network]] | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Read `path` again and compare it with `written`: networks, every tensor bit for bit, every image.

    Each generator makes one image for each of some seeds (8 up to 256 pixels, else 4; classes, truncation and
    noise modes in turn); the discriminator scores them. The images are compared with those of `original`, by
    default `written`; it differs if weights were rounded to float16. `reopen` reads a format that
    `finetune.load` does not open. Raises ExportError, naming the first difference.
    """
    original = written if original is None else original
    names = tuple(name for name in NETWORKS if name not in written.missing)
    device = device_of(getattr(original, names[0]))
    try:
        again = (reopen or _load)(Path(path), device)
    except CheckpointError as error:
        raise ExportError(f"The written file cannot be opened: {error}", hint=_REPORT) from error
    if set(again) != set(names):
        raise ExportError(
            f"The written file has the networks {sorted(again)}, its source {sorted(names)}.", hint=_REPORT
        )
    num_tensors = sum(_compare_tensors(name, getattr(written, name), again[name]) for name in names)
    tolerance = file_format.tolerance if original is written else HALF_TOLERANCE
    num_images, max_difference = _compare_images(original, again, names, tolerance, progress)
    return Verification(names, num_tensors, num_images, max_difference)


def _load(path: Path, device: torch.device) -> Mapping[str, Network]:
    found = load(path, device=device)
    return {name: getattr(found, name) for name in NETWORKS if name not in found.missing}


_REPORT = "No file was written. Internal error: please report it."


def _compare_tensors(name: str, ours: torch.nn.Module, theirs: Network) -> int:
    """Compare all tensors; return their number, 0 for a network that is not a module."""
    if not isinstance(theirs, torch.nn.Module):
        return 0
    wanted, found = tensors_of(ours), tensors_of(theirs)
    if list(wanted) != list(found):
        raise ExportError(f"{name}: the tensors in the written file have other names.", hint=_REPORT)
    for key, tensor in wanted.items():
        # Compared as bits, so that a NaN equals itself.
        if not torch.equal(_bits(tensor.to(found[key].dtype)), _bits(found[key])):
            raise ExportError(f"{name}.{key}: differs in the written file.", hint=_REPORT)
    return len(wanted)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


@torch.no_grad()
def _compare_images(
    ours: Checkpoint,
    again: Mapping[str, Network],
    names: tuple[str, ...],
    tolerance: float,
    progress: Progress | None,
) -> tuple[int, float]:
    generators = [name for name in names if name != "D"]
    resolution = getattr(ours, names[0]).img_resolution
    seeds = range(8 if resolution <= 256 else 4)
    worst, done, total = 0.0, 0, len(seeds) * max(len(generators), 1)
    for seed in seeds:
        images: list[torch.Tensor] = []
        for name in generators:
            G = getattr(ours, name)
            ours_img, theirs_img = (_image(network, G, seed) for network in (G, again[name]))
            worst = max(worst, _difference(f"image {seed} of {name}", ours_img, theirs_img, tolerance))
            images.append(ours_img)
        if "D" in names:
            img = images[-1] if images else _noise_image(ours.D, seed)
            score, theirs = (_score(network, ours.D, img, seed) for network in (ours.D, again["D"]))
            scale = 1 + float(score.abs().max())
            _difference(f"the score of image {seed} by D", score / scale, theirs / scale, tolerance)
        done += max(len(generators), 1)
        if progress is not None:
            progress(done, total)
    return len(seeds) * len(generators), worst


def _image(network: Network, G: Network, seed: int) -> torch.Tensor:
    """Make image `seed` by `network`, which has the sizes of `G` and lies on its device."""
    z, c = z_from_seeds([seed], G.z_dim, device_of(G)), _label(G, seed)
    mode = ("const", "none")[seed % 2]  # random noise cannot be compared
    return network(z, c, truncation_psi=1 if seed % 4 < 2 else 0.7, noise_mode=mode).cpu()


def _label(network: Network, seed: int) -> torch.Tensor:
    label = torch.zeros([1, network.c_dim], device=device_of(network))
    if network.c_dim:
        label[0, seed % network.c_dim] = 1
    return label


def _noise_image(D: Network, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand([1, D.img_channels, *image_size(D)], generator=generator) * 2 - 1


def _score(network: Network, D: Network, img: torch.Tensor, seed: int) -> torch.Tensor:
    return network(img.to(device_of(D)), _label(D, seed)).cpu()


def _difference(what: str, ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> float:
    """Return the largest difference; equal tensors, non-finite values included, differ by 0."""
    if torch.equal(_bits(ours), _bits(theirs)):
        return 0.0
    difference = float((ours - theirs).abs().max())
    if not difference <= tolerance:  # also if it is not a number
        raise ExportError(
            f"{what} differs by {difference:.3g} in the written file (tolerance {tolerance:g}).", hint=_REPORT
        )
    return difference
