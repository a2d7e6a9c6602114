"""Principal directions of w: where the intermediate latents of a generator vary most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from finetune.errors import ConfigError
from finetune.models import Network
from finetune.sampling import device_of, label_from_class, label_from_vector

NUM_SAMPLES = 10_000
CHUNK = 1024  # latents that pass through the mapping network at once


@dataclass(frozen=True)
class Directions:
    """The mean of w, its principal directions and the standard deviation along each, largest first.

    mean `[w_dim]`, vectors `[n, w_dim]` of length 1, std `[n]`, all float32 on the CPU. An edit by x standard
    deviations along direction i is `w + x * std[i] * vectors[i]`.
    """

    mean: torch.Tensor
    vectors: torch.Tensor
    std: torch.Tensor


@torch.no_grad()
def principal_directions(
    G: Network,
    n: int = 10,
    *,
    class_index: int | None = None,
    label: Sequence[float] | None = None,
) -> Directions:
    """Return the first `n` principal directions of NUM_SAMPLES w's of `G`, without truncation.

    In a network with classes, `class_index` chooses one; None takes all in turn and leaves out how their
    means differ, so that a direction serves every class. `label`: the label of all, for a network whose
    labels are vectors. Equal arguments give equal directions and signs. ConfigError if `n` is not from 1 to
    w_dim or the class does not exist.
    Source: GANSpace (2004.02546), section 3.1.
    """
    if not 1 <= n <= G.w_dim:
        raise ConfigError(f"{n} directions of w cannot be computed: choose 1 to {G.w_dim} (w_dim).")
    device = device_of(G)
    classes = max(int(G.c_dim), 1) if class_index is None and label is None else 1
    num_samples = -(-NUM_SAMPLES // classes) * classes  # as many of each class
    z = torch.from_numpy(np.random.RandomState(0).randn(num_samples, G.z_dim).astype(np.float32))
    if label is not None:
        c = label_from_vector(G, label).expand(num_samples, -1)
    elif classes > 1:
        c = torch.eye(classes).repeat(num_samples // classes, 1)
    else:
        c = label_from_class(G, 0 if class_index is None and G.c_dim == 1 else class_index, num_samples)
    w = torch.cat(
        [
            G.mapping(z_part.to(device), c_part.to(device))[:, 0].cpu().double()
            for z_part, c_part in zip(z.split(CHUNK), c.split(CHUNK))
        ]
    )
    by_class = w.reshape(-1, classes, G.w_dim)
    deviations = (by_class - by_class.mean(dim=0)).flatten(0, 1)
    variances, vectors = torch.linalg.eigh(deviations.T @ deviations / num_samples)  # in ascending order
    vectors = vectors.T.flip(0)[:n]
    largest = vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True))
    return Directions(
        mean=w.mean(dim=0).float(),
        vectors=(vectors * largest.sign()).float(),
        std=variances.flip(0)[:n].clamp(min=0).sqrt().float(),
    )
