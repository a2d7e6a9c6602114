"""The Dirac-GAN: closed form, autograd and simulation must say the same."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

PATH = Path(__file__).resolve().parents[2] / "examples" / "dirac_gan.py"


@pytest.fixture(scope="module")
def dirac():
    spec = importlib.util.spec_from_file_location("dirac_gan", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.parametrize(
    ("k", "tau", "expected"), [(0, 1, 0), (1, 0.1, -0.1315), (1, 1, -0.0312), (5, 0.1, -0.0243)]
)
def test_dirac_gan_known_decays(dirac, k, tau, expected):
    assert dirac.Game(k=k, tau=tau).decay() == pytest.approx(expected, abs=6e-5)


@pytest.mark.parametrize("game", [(0.0, 0.3, 0.0), (0.7, 0.2, 0.0), (0.4, 1.3, 0.6)])
def test_dirac_gan_closed_form_agrees_with_autograd(dirac, game):
    game = dirac.Game(*game)

    def velocity(state):
        theta, psi, m = state
        generator, critic = game.losses(theta, psi, m)
        (to_theta,) = torch.autograd.grad(generator, theta, create_graph=True)
        (to_psi,) = torch.autograd.grad(critic, psi, create_graph=True)
        return torch.stack([-to_theta, -to_psi, game.tau * (theta - m)])

    # The pull treats m as a constant of the loss, yet the flow depends on it: differentiate by hand there.
    rows = torch.autograd.functional.jacobian(velocity, torch.zeros(3, dtype=torch.float64)).numpy()
    rows[0, 2] += game.k
    np.testing.assert_allclose(rows, game.jacobian(), atol=1e-12)

    state = torch.tensor([0.8, -0.3, 0.5], dtype=torch.float64, requires_grad=True)
    np.testing.assert_allclose(
        game.velocity(state.detach().numpy()), velocity(state).detach().numpy(), atol=1e-12
    )
    np.testing.assert_allclose(np.poly(game.jacobian()), game.polynomial(), atol=1e-12)


def test_dirac_gan_hurwitz(dirac):
    """Stable for every pull above 0 and every average, and on the edge without a pull."""
    for k in np.logspace(-3, 2, 11):
        for tau in np.logspace(-3, 2, 11):
            assert dirac.Game(k=k, tau=tau).decay() < 0
    assert dirac.Game().decay() == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("k", [0.02, 0.3, 0.7, 0.9, 2.0, 8.0])
def test_dirac_gan_best_tau_is_the_best(dirac, k):
    tau, rate = dirac.best_tau(k)
    assert -dirac.Game(k=k, tau=tau).decay() == pytest.approx(rate, rel=1e-5)
    others = [-dirac.Game(k=k, tau=tau * factor).decay() for factor in np.logspace(-2, 2, 801)]
    assert max(others) <= rate * (1 + 1e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.8])
def test_dirac_gan_best_pair_is_the_best(dirac, gamma):
    k, tau, rate = dirac.best_pair(gamma)
    roots = np.roots(dirac.Game(k=k, tau=tau, gamma=gamma).polynomial())
    np.testing.assert_allclose(
        roots, -rate, atol=1e-4
    )  # a triple root answers to rounding with its cube root
    for angle in np.linspace(0, 2 * math.pi, 24, endpoint=False):
        near = dirac.Game(k=k + 0.02 * math.cos(angle), tau=tau + 0.02 * math.sin(angle), gamma=gamma)
        assert -near.decay() < rate


def test_dirac_gan_best_pair_in_numbers(dirac):
    k, tau, rate = dirac.best_pair()
    a = dirac.A
    assert (k, tau, rate) == pytest.approx((8 * a / 27**0.5, a / 27**0.5, a / 3**0.5))


@pytest.mark.parametrize("gamma", [-0.1, 1.1, math.nan])
def test_dirac_gan_best_pair_refuses(dirac, gamma):
    with pytest.raises(ValueError, match="gamma"):
        dirac.best_pair(gamma)
    with pytest.raises(ValueError, match="k must be above 0"):
        dirac.best_tau(0)


@pytest.mark.parametrize("game", [(0.3, 0.4, 0.0), (0.0, 0.1, 0.2)])
def test_dirac_gan_flow_comes_to_rest_at_the_rate_of_its_eigenvalues(dirac, game):
    game = dirac.Game(*game)
    states = dirac.flow(game, np.array([1e-3, 1e-3, 1e-3]), 120, step=0.05)
    distance = np.linalg.norm(states[:, :2], axis=1)
    # The envelope: the largest distance in two windows of the same length.
    early, late = distance[800:1200].max(), distance[2000:2400].max()
    assert math.log(late / early) / 60 == pytest.approx(game.decay(), rel=0.1)


@pytest.mark.parametrize("alternating", [False, True])
@pytest.mark.parametrize("game", [(0.0, 0.1, 0.0), (0.75, 0.1, 0.0), (0.5, 0.5, 0.5)])
def test_dirac_gan_gradient_descent_near_the_solution_is_its_matrix(dirac, game, alternating):
    game = dirac.Game(*game)
    start = np.array([1e-6, -2e-6, 0.5e-6])
    states = dirac.train(game, start, 25, rate=0.2, alternating=alternating)
    expected = np.linalg.matrix_power(dirac.step_matrix(game, 0.2, alternating), 25) @ start
    np.testing.assert_allclose(states[-1], expected, rtol=1e-4, atol=1e-13)


@pytest.mark.slow
def test_dirac_gan_what_the_page_says_of_updates(dirac):
    """Plain simultaneous descent is thrown out, alternating circles, self-distillation comes in."""
    plain, distilled = dirac.METHODS["plain"], dirac.METHODS["self-distillation"]
    assert dirac.spectral_radius(dirac.step_matrix(plain, 0.2, False)[:2, :2]) > 1
    assert dirac.spectral_radius(dirac.step_matrix(plain, 0.2, True)[:2, :2]) == pytest.approx(1, abs=1e-12)
    for alternating in (False, True):
        assert dirac.spectral_radius(dirac.step_matrix(distilled, 0.2, alternating)) < 0.97
    for settings in dirac.UPDATES.values():
        ends = {
            name: np.linalg.norm(dirac.train(game, dirac.START, 700, **settings)[-150:, :2], axis=1).mean()
            for name, game in (("plain", plain), ("distilled", distilled))
        }
        assert ends["distilled"] < ends["plain"] / 2


def test_dirac_gan_plain_training_creeps_inwards_as_the_page_says(dirac):
    """By the bend of the logistic loss: 1/r² grows by t/8, and simultaneous steps stop at r² = 2h."""
    end = dirac.flow(dirac.Game(), dirac.START, 60)[-1]
    assert np.linalg.norm(end[:2]) == pytest.approx((1 / 2 + 60 / 8) ** -0.5, rel=0.03)
    states = dirac.train(dirac.Game(), dirac.START, 300, rate=0.2, alternating=False)
    assert np.linalg.norm(states[-1, :2]) == pytest.approx(0.4**0.5, rel=0.03)


def test_dirac_gan_period_is_seen_in_the_cosine_of_successive_steps(dirac):
    tick, period = 2.0, 2 * math.pi / dirac.A
    states = dirac.flow(dirac.Game(), np.array([1e-3, 0, 0]), 3 * tick)[:: round(tick / 0.01), :2]
    first, second = np.diff(states, axis=0)[:2]
    cosine = first @ second / np.linalg.norm(first) / np.linalg.norm(second)
    assert 2 * math.pi * tick / math.acos(cosine) == pytest.approx(period, rel=1e-4)


@pytest.mark.slow
def test_dirac_gan_images(dirac, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(dirac, "METHODS", {name: dirac.METHODS[name] for name in ("plain", "both")})
    monkeypatch.setattr(dirac, "UPDATES", {"one": {"rate": 0.2}, "other": {"alternating": False}})
    dirac.draw(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "trajectories.png",
        "vector_field.png",
        "decay_map.png",
        "updates.png",
    }
