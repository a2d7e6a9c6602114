"""The Inception network of FID, KID, precision and recall: torch-fidelity's, with verified weights."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from finetune.errors import ConfigError
from finetune.hub import catalog, store
from finetune.metrics.features import to_rgb

WEIGHTS = "pytorch-fid-inception"  # its entry in the catalog
LAYER = "2048"


def require_torch_fidelity(metric: str) -> None:
    """Raise ConfigError, with what to install, if a metric lacks the library that computes it."""
    if importlib.util.find_spec("torch_fidelity") is None:  # imported when it is used: it takes a second
        raise ConfigError(
            f"{metric}: torch-fidelity, which computes it, is not installed. "
            "Run pip install 'stylegan-finetune[metrics]'."
        )


def inception_weights(given: Path | None, on_message: Callable[[str], None]) -> Path:
    """Return the file of the weights: `given`, whose hash must match, or one fetched into the cache.

    Raises ConfigError for another file, and what `finetune.hub.download` raises.
    """
    entry = catalog.get(WEIGHTS)
    if given is None:
        return store.fetch_entry(entry, on_message=on_message)
    if not given.is_file():
        raise ConfigError(f"--inception {given}: no such file.")
    with given.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != entry.sha256:
        raise ConfigError(
            f"--inception {given}: its sha256 is {digest[:12]}…, and numbers are comparable only with "
            f"the file {str(entry.sha256)[:12]}… from {entry.urls[0]}."
        )
    return given


@functools.lru_cache(maxsize=1)
def _network(path: Path, device: torch.device) -> Any:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    return FeatureExtractorInceptionV3(
        "inception-v3-compat", [LAYER], feature_extractor_weights_path=str(path)
    ).to(device)


def inception_features(path: Path, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function from images `[N, C, H, W]` in [-1, 1] to features `[N, 2048]`."""
    network = _network(path, device)

    def features(img: torch.Tensor) -> torch.Tensor:
        pixels = (to_rgb(img) * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
        return network(pixels.contiguous())[0]

    return features
