"""The Fréchet distance between two clouds of features, and the statistics it needs, in float64 on the CPU."""

from __future__ import annotations

import torch

BLOCK = 1024  # features that are added to the sums together
JACKKNIFE = 8  # groups of images


class FeatureStatistics:
    """Mean and covariance of features that arrive in batches; only the running sums are kept.

    They are added in blocks of one size, so that the sums depend on the features and their order alone, and
    not on the batches; and because a small block costs as much memory traffic as a large one.
    Source: Chan, Golub and LeVeque 1983, the pairwise update, which stays exact where the mean is far from 0.
    """

    def __init__(self) -> None:
        self._summed = 0
        self._waiting: list[torch.Tensor] = []
        self._mean = torch.zeros(0, dtype=torch.float64)
        self._scatter = torch.zeros(0, dtype=torch.float64)

    def add(self, features: torch.Tensor) -> None:
        """Take in `[N, d]` features, any float type and device."""
        self._waiting.append(features.detach().cpu().clone())
        if sum(map(len, self._waiting)) >= BLOCK:
            *blocks, rest = torch.cat(self._waiting).split(BLOCK)
            if len(rest) == BLOCK:
                blocks, rest = [*blocks, rest], rest[:0]
            for block in blocks:
                self._sum_up(block)
            self._waiting = [rest.clone()]

    def _sum_up(self, features: torch.Tensor) -> None:
        batch = features.to(torch.float64)
        if self._summed == 0:
            width = batch.shape[1]
            self._mean, self._scatter = batch.new_zeros(width), batch.new_zeros(width, width)
        batch_mean = batch.mean(dim=0)
        centered = batch - batch_mean
        shift = batch_mean - self._mean
        total = self._summed + len(batch)
        self._scatter += centered.T @ centered
        self._scatter += torch.outer(shift, shift) * (self._summed * len(batch) / total)
        self._mean += shift * (len(batch) / total)
        self._summed = total

    def _finish(self) -> None:
        """Sum up what waits for its block to be full."""
        waiting, self._waiting = self._waiting, []
        if waiting and len(rest := torch.cat(waiting)):
            self._sum_up(rest)

    @property
    def count(self) -> int:
        """Features that were taken in."""
        return self._summed + sum(map(len, self._waiting))

    @property
    def mean(self) -> torch.Tensor:
        """`[d]`, float64."""
        self._finish()
        return self._mean

    @property
    def covariance(self) -> torch.Tensor:
        """`[d, d]`, float64, the unbiased estimate (divided by count - 1)."""
        assert self.count >= 2, "a covariance needs at least two features"
        self._finish()
        return self._scatter / (self._summed - 1)

    def state_dict(self) -> dict:
        """Return tensors and numbers from which `load_state_dict` continues exactly."""
        self._finish()
        return {"count": self._summed, "mean": self._mean, "scatter": self._scatter}

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` returned."""
        self._summed, self._mean, self._scatter = int(state["count"]), state["mean"], state["scatter"]
        self._waiting = []

    def distance(self, other: FeatureStatistics) -> float:
        """Return the Fréchet distance to the features of `other`."""
        return frechet_distance(self.mean, self.covariance, other.mean, other.covariance)


def frechet_error(generated: list[torch.Tensor], real: list[FeatureStatistics]) -> float:
    """Return the standard error of a Fréchet distance with respect to the generated images.

    generated, real: features `[N, d]` and statistics in one or more spaces, whose distances are averaged. The
    delete-one-group jackknife over `JACKKNIFE` groups; 0 for fewer than 3 images.
    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, equation 11.5.
    """
    count = len(generated[0])
    groups = min(JACKKNIFE, count)
    if count < 3:
        return 0.0
    group = torch.arange(count) % groups
    values = torch.zeros(groups, dtype=torch.float64)
    for index in range(groups):
        for features, statistics in zip(generated, real, strict=True):
            rest = FeatureStatistics()
            rest.add(features[group != index])
            values[index] += rest.distance(statistics) / len(real)
    return float(((groups - 1) / groups * (values - values.mean()).square().sum()).sqrt())


def frechet_distance(mu1: torch.Tensor, cov1: torch.Tensor, mu2: torch.Tensor, cov2: torch.Tensor) -> float:
    """Return the squared Fréchet distance of two normal distributions, means `[d]`, covariances `[d, d]`.

    |mu1 - mu2|² + tr(cov1 + cov2 - 2 (cov1^½ cov2 cov1^½)^½). Only symmetric matrices are decomposed, so
    singular covariances (fewer images than features) need no special case.
    Source: Dowson and Landau 1982, equation 4.
    """
    mu1, cov1, mu2, cov2 = (value.detach().cpu().to(torch.float64) for value in (mu1, cov1, mu2, cov2))
    try:
        values, vectors = torch.linalg.eigh(cov1)
    except torch.linalg.LinAlgError:  # divide and conquer does not converge on some singular matrices
        vectors, values, _ = torch.linalg.svd(cov1)
    # Directions without variance in cov1 add nothing; without them, the second step is smaller.
    kept = values > values.amax() * len(values) * torch.finfo(torch.float64).eps
    root = vectors[:, kept] * values[kept].sqrt()
    overlap = torch.linalg.eigvalsh(root.T @ cov2 @ root).clamp(min=0).sqrt().sum()
    distance = (mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * overlap
    return max(float(distance), 0.0)  # rounding can give a tiny negative number for equal distributions
