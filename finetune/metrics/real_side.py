"""Statistics of a set of images in a feature space, and their cache."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import torch

from finetune.metrics.frechet import FeatureStatistics
from torch_utils.files import WriteError, atomic_write, cache_folder

VERSION = 1  # of the files
MOST_KEPT = 50_000  # features, of which KID and precision/recall need each; later ones are left out

log = logging.getLogger("finetune.metrics")


class Features:
    """Mean and covariance of features that arrive in batches, and the features themselves on request."""

    def __init__(self, keep: bool) -> None:
        self.statistics = FeatureStatistics()
        self.keep = keep
        self._kept: list[torch.Tensor] = []

    def add(self, features: torch.Tensor) -> None:
        """Take in `[N, d]` features."""
        features = features.detach().float().cpu()
        room = max(0, MOST_KEPT - self.statistics.count)
        self.statistics.add(features)
        if self.keep and room:
            self._kept.append(features[:room].clone())

    @property
    def kept(self) -> torch.Tensor:
        """`[N, d]`, float32."""
        self._kept = [torch.cat(self._kept)]
        return self._kept[0]

    def state(self) -> dict:
        """Return tensors and numbers from which `from_state` makes an equal object."""
        kept = self.kept if self.keep else None
        return {"version": VERSION, "kept": kept, **self.statistics.state_dict()}

    @classmethod
    def from_state(cls, state: dict) -> Features:
        """Build an object from what `state` returned."""
        found = cls(state["kept"] is not None)
        found.statistics.load_state_dict(state)
        if found.keep:
            found._kept = [state["kept"]]
        return found


def place_of(content: str, space: str) -> Path:
    """Return the cache file for a set of images (its content hash) in a feature space (its identity)."""
    key = hashlib.sha256(f"{VERSION} {content} {space}".encode()).hexdigest()[:32]
    return cache_folder() / "metrics" / f"{key}.pt"


def read(path: Path, keep: bool) -> Features | None:
    """Return the cached statistics; None if there are none, or none that are usable."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["version"] != VERSION or (keep and state["kept"] is None):
            return None
        return Features.from_state(state)
    except FileNotFoundError:
        return None
    except Exception as error:  # a damaged file costs time, not the run
        log.warning("%s cannot be read and is computed again: %s", path, error)
        return None


def write(path: Path, features: Features) -> None:
    """Write statistics to the cache; a folder that cannot be written is a warning."""
    try:
        with atomic_write(path) as stream:
            torch.save(features.state(), stream)
    except (WriteError, RuntimeError) as error:
        log.warning("Statistics of the real images cannot be stored in %s: %s", path.parent, error)
