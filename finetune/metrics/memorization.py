"""Near copies of training images among generated ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from finetune.errors import ConfigError

# A generated image is a near copy if it is closer to a training image than this part of the median distance
# between a training image and the nearest other one. In features of EfficientNet-Lite0, photographs of one
# class keep a distance of 0.5 or more from those that are left out; copies shifted by a pixel, mirrored or
# made darker come below it.
NEAR = 0.5
EQUAL = 1e-4  # of the length of features: closer images are the same one, apart from rounding
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
    def fraction(self) -> float:
        """Return the fraction of near copies among the generated images."""
        return float((self.distance < NEAR).float().mean())


def find_near_copies(generated: torch.Tensor, real: torch.Tensor, num_real: int) -> NearCopies:
    """Compare features `[N, d]` of generated images with those of training images `[M, d]`.

    num_real: images before mirroring, which come first: a mirrored image is no neighbor of its own. Images
    with an exact duplicate have no part in the median. Raises ConfigError if all of them have one.
    """
    distance, index = nearest(generated, real)
    originals = real[:num_real]
    apart = nearest(originals, originals, leave_out_self=True)[0]
    apart = apart[apart > EQUAL * originals.norm(dim=1).mean()]
    if not len(apart):
        raise ConfigError(
            "memorization: every real image has an exact duplicate, so no distance between them is known. "
            "Remove duplicates, which `finetune dataset check` lists."
        )
    return NearCopies(index, distance / apart.median())


def nearest(
    a: torch.Tensor, b: torch.Tensor, *, leave_out_self: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return distance and index of the row of `b` nearest to each row of `a`; equal rows have distance 0."""
    distances, indices = [], []
    for start in range(0, len(a), ROWS):
        rows_of_a = a[start : start + ROWS]
        table = torch.cdist(rows_of_a, b)
        if leave_out_self:
            rows = torch.arange(len(table))
            table[rows, rows + start] = torch.inf
        indices.append(table.argmin(dim=1))
        # Not those of the table: cdist takes differences of products, which leave a rest for equal rows.
        distances.append((rows_of_a - b[indices[-1]]).norm(dim=1))
    return torch.cat(distances), torch.cat(indices)
