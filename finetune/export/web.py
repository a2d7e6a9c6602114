"""Write a page that runs a generator in a browser: a folder for any static server, without the network.

The page computes with onnxruntime-web in 32-bit floats. Its seeds are those of `finetune generate`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetune.checkpoint.load import Checkpoint
from finetune.directions import principal_directions
from finetune.errors import ConfigError, ExportError
from finetune.export import onnx, web_runtime
from finetune.export.formats import FORMATS
from finetune.export.provenance import entry_of
from finetune.export.stylegan_pickle import plain
from finetune.models import Network
from finetune.sampling import z_from_seeds
from torch_utils.files import atomic_write

PAGE = Path(__file__).parent / "web_page"
NUM_DIRECTIONS = 6
NUM_IMAGES = 4  # compared for each network
CHANNELS = (1, 3, 4)


@dataclass(frozen=True)
class WebPage:
    """What was written: size of the folder, images compared, largest difference of a value in -1 to 1."""

    num_bytes: int
    num_images: int
    max_difference: float


def write_page(
    folder: Path,
    checkpoint: Checkpoint,
    *,
    original: Checkpoint | None = None,
    runtime: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> WebPage:
    """Write the page of the generator of `checkpoint`; its models are compared with torch before.

    With `original`, the page morphs: a slider blends the weights of both networks. runtime: folder with the
    files of onnxruntime-web, else the cache or npm. Raises ConfigError for arguments that do not fit,
    ExportError if images differ, WriteError.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder}: this is a file. A page is a folder: choose another name.")
    G, first = _generator(checkpoint), None if original is None else _generator(original)
    onnx.require_packages()
    files = web_runtime.runtime_files(runtime)
    steps = 4
    progress(0, steps)
    models = {}
    for part in onnx.PARTS:
        models[part] = onnx.to_onnx(G, part, original=first, noise_input=False)
        onnx.add_metadata(models[part], onnx.metadata_of(checkpoint))
        progress(len(models), steps)
    contents = {f"{part}.onnx": model.SerializeToString() for part, model in models.items()}
    difference = max(_largest_difference(contents, *pair) for pair in _pairs(G, first))
    progress(3, steps)
    contents["model.json"] = json.dumps(_describe(checkpoint, original, G)).encode()
    contents |= {path.name: path.read_bytes() for path in sorted(PAGE.iterdir()) if path.is_file()}
    for name, path in files.items():
        contents[f"runtime/{name}"] = path.read_bytes()
    for name, content in contents.items():
        with atomic_write(folder / name) as stream:
            stream.write(content)
    progress(steps, steps)
    return WebPage(sum(map(len, contents.values())), len(_pairs(G, first)) * NUM_IMAGES, difference)


def _generator(checkpoint: Checkpoint) -> Network:
    G = checkpoint.generator
    if G.img_channels not in CHANNELS:
        raise ConfigError(
            f"{checkpoint.provenance.source}: {G.img_channels} image channels. "
            "A page can show gray, RGB and RGBA images (1, 3 or 4 channels)."
        )
    return onnx.plain_copy(G)


def _pairs(G: Network, original: Network | None) -> list[tuple[Network, float | None]]:
    """Return networks to compare with, each with its alpha."""
    return [(G, None)] if original is None else [(G, 1.0), (original, 0.0)]


@torch.no_grad()
def _largest_difference(contents: dict[str, bytes], G: Network, alpha: float | None) -> float:
    """Return how far the models are from `G`; ExportError above the tolerance of ONNX files."""
    mapping, synthesis = (onnx.session_of(contents[f"{part}.onnx"]) for part in onnx.PARTS)
    blend = {} if alpha is None else {"alpha": np.array(alpha, np.float32)}
    differences = []
    for seed in range(NUM_IMAGES):
        psi = 1 - 0.3 * (seed % 2)
        z = z_from_seeds([seed], G.z_dim)
        c = torch.zeros([1, G.c_dim])
        inputs = {"z": z.numpy(), "truncation_psi": np.array(psi, np.float32), **blend}
        if G.c_dim:
            c[0, seed % G.c_dim] = 1
            inputs["c"] = c.numpy()
        img = synthesis.run(["img"], {"ws": mapping.run(["ws"], inputs)[0], **blend})[0]
        expected = G(z, c, truncation_psi=psi, noise_mode="const")
        differences.append(np.abs(img - expected.numpy()).max())
    tolerance = FORMATS["onnx"].tolerance
    worst = float(np.max(differences))
    if not worst <= tolerance:  # also if it is not a number
        raise ExportError(
            f"The models of the page differ from the network by {worst:.3g} (tolerance {tolerance:g}).",
            hint="No file was written. Internal error: please report it.",
        )
    return worst


def _describe(checkpoint: Checkpoint, original: Checkpoint | None, G: Network) -> dict[str, Any]:
    """Return what page.js reads: sizes, directions one standard deviation long, names and license."""
    directions = principal_directions(G, min(NUM_DIRECTIONS, G.w_dim))
    origin = checkpoint.provenance
    with torch.no_grad():
        _, *shape = G.synthesis(torch.zeros([1, G.num_ws, G.w_dim])).shape
    about = f"{checkpoint.family}, {shape[2]}×{shape[1]}, license: {origin.licence or 'not known'}"
    if original is not None:
        first = original.provenance
        about += f"; original: {first.source}, license: {first.licence or 'not known'}"
    return {
        "name": origin.source,
        "about": about,
        "z_dim": G.z_dim,
        "c_dim": G.c_dim,
        "w_dim": G.w_dim,
        "num_ws": G.num_ws,
        "img": shape,
        "original": original is not None,
        "directions": (directions.vectors * directions.std[:, None]).tolist(),
        "finetune": plain(entry_of(checkpoint), "provenance"),
    }
