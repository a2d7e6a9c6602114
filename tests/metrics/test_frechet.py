"""The Fréchet distance against closed forms and scipy, and the streaming statistics behind it."""

import numpy as np
import pytest
import torch

from finetune.metrics.frechet import FeatureStatistics, frechet_distance


def normal(d, seed, rank=None):
    """A mean and a random covariance of the given rank, float64."""
    rng = np.random.RandomState(seed)
    factor = rng.randn(d, rank or 2 * d)
    return torch.from_numpy(rng.randn(d)), torch.from_numpy(factor @ factor.T / factor.shape[1])


def test_frechet_distance_in_one_dimension():
    mu1, mu2, sd1, sd2 = 1.5, -0.5, 2.0, 0.25
    values = ([mu1], [[sd1**2]], [mu2], [[sd2**2]])
    found = frechet_distance(*(torch.tensor(value) for value in values))
    assert found == pytest.approx((mu1 - mu2) ** 2 + (sd1 - sd2) ** 2, rel=1e-12)


def test_frechet_distance_of_commuting_covariances():
    turn = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    a, b = torch.rand(6, dtype=torch.float64) + 0.1, torch.rand(6, dtype=torch.float64) + 0.1
    zero = torch.zeros(6)
    found = frechet_distance(zero, turn @ torch.diag(a) @ turn.T, zero, turn @ torch.diag(b) @ turn.T)
    assert found == pytest.approx(float((a.sqrt() - b.sqrt()).square().sum()), rel=1e-10)


@pytest.mark.parametrize("rank", [None, 5], ids=["full", "singular"])
def test_frechet_distance_agrees_with_scipy(rank):
    from scipy.linalg import sqrtm

    (mu1, cov1), (mu2, cov2) = normal(12, 0, rank), normal(12, 1)
    root = sqrtm(cov1.numpy() @ cov2.numpy()).real
    expected = float((mu1 - mu2).square().sum() + cov1.trace() + cov2.trace()) - 2 * np.trace(root)
    # With a singular covariance scipy loses digits: its product is not symmetric.
    assert frechet_distance(mu1, cov1, mu2, cov2) == pytest.approx(
        expected, rel=1e-10 if rank is None else 1e-6
    )


def test_frechet_distance_zero_and_symmetric():
    (mu1, cov1), (mu2, cov2) = normal(8, 0, rank=3), normal(8, 1)
    assert frechet_distance(mu1, cov1, mu1, cov1) == pytest.approx(0, abs=1e-9)
    there = frechet_distance(mu1, cov1, mu2, cov2)
    assert there > 1
    assert frechet_distance(mu2, cov2, mu1, cov1) == pytest.approx(there, rel=1e-7)


def test_frechet_distance_where_eigh_does_not_converge(monkeypatch):
    (mu1, cov1), (mu2, cov2) = normal(8, 0, rank=3), normal(8, 1)
    expected = frechet_distance(mu1, cov1, mu2, cov2)

    def fail(matrix):
        raise torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    assert frechet_distance(mu1, cov1, mu2, cov2) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("sizes", [[100], [1, 99], [33, 0, 40, 27]], ids=str)
def test_feature_statistics_independent_of_batches(sizes):
    features = torch.randn(100, 7, dtype=torch.float64) * 3 + 1e6  # a large mean shows lost digits
    found = FeatureStatistics()
    for part in features.split(sizes):
        found.add(part)
    assert found.count == 100
    np.testing.assert_allclose(found.mean, features.mean(dim=0), rtol=1e-14)
    np.testing.assert_allclose(found.covariance, np.cov(features.numpy().T), rtol=1e-7)


def test_feature_statistics_are_float64():
    found = FeatureStatistics()
    found.add(torch.randn(4, 3))
    found.add(torch.randn(4, 3))
    assert found.mean.dtype == found.covariance.dtype == torch.float64
