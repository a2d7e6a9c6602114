"""Near copies of training images among generated ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# A generated image is a near copy if it is closer to a training image than this part of the median distance
# between a training image and the nearest other one. In features of EfficientNet-Lite0, photographs of one
# class keep a distance of 0.5 or more from those that are left out; copies shifted by a pixel, mirrored or
# made darker come below it.
NEAR = 0.5
ROWS = 2500  # of distances at once


@dataclass(frozen=True)
class NearCopies:
    """The nearest training image of every generated one.

    index, distance: `[N]`, the training image and its distance as a part of the median distance between
    training images and their nearest neighbors.
    """

    index: torch.Tensor
    distance: torch.Tensor

    @property
    def share(self) -> float:
        """Return the share of near copies among the generated images."""
        return float((self.distance < NEAR).float().mean())


def find_near_copies(generated: torch.Tensor, real: torch.Tensor, num_real: int) -> NearCopies:
    """Compare features `[N, d]` of generated images with those of training images `[M, d]`.

    num_real: images before mirroring, which come first: a mirrored image is no neighbor of its own.
    """
    distance, index = nearest(generated, real)
    scale = nearest(real[:num_real], real[:num_real], leave_out_self=True)[0].median()
    return NearCopies(index, distance / scale.clamp_min(1e-12))


def nearest(
    a: torch.Tensor, b: torch.Tensor, *, leave_out_self: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return distance and index of the row of `b` nearest to each row of `a`."""
    distances, indices = [], []
    for start in range(0, len(a), ROWS):
        table = torch.cdist(a[start : start + ROWS], b)
        if leave_out_self:
            rows = torch.arange(len(table))
            table[rows, rows + start] = torch.inf
        found = table.min(dim=1)
        distances.append(found.values)
        indices.append(found.indices)
    return torch.cat(distances), torch.cat(indices)
