"""Self-distillation on the smallest GAN: a point that should move to 0.

    python examples/dirac_gan.py --out dirac-gan

The generator is a point θ, the data are the point 0, the critic is D(x) = ψx. Gradient descent on this game
circles around its solution forever; the gradient penalty R1 and self-distillation (a gradient of
strength k toward m, an EMA of θ with rate τ) both damp it. The script draws trajectories, vector fields
and convergence rates, and prints them as numbers. docs/theory.md derives the results.

Source: Mescheder et al., "Which Training Methods for GANs do actually Converge?", arXiv 1801.04406, sections
2 and 4 (the game, R1); Nowinowski & Krawiec, arXiv 2605.08577 (self-distillation).
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

A = 0.5  # f'(0) of the logistic loss: how strongly θ and ψ act on each other near the solution


@dataclass(frozen=True)
class Game:
    """The game's forces. k: weight of self-distillation. tau: rate of the average. gamma: weight of R1."""

    k: float = 0.0
    tau: float = 0.1
    gamma: float = 0.0

    def losses(self, theta, psi, m) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the losses of generator and critic: non-saturating logistic, as in training.

        The real data at 0 enter as the point 0 itself, so that R1 is γ/2 · |D'(0)|² = γ/2 · ψ².
        """
        softplus = torch.nn.functional.softplus
        # D(x) = -ψx scores high what is real, with the sign of ψ that Mescheder et al. use.
        generator = softplus(psi * theta) + self.k / 2 * (theta - m.detach()).square()
        critic = softplus(-psi * theta) + self.gamma / 2 * psi.square()
        return generator, critic

    def velocity(self, state: np.ndarray) -> np.ndarray:
        """Return the gradient flow (θ', ψ', m') at `state` `[..., 3]`: negative gradients, written out."""
        theta, psi, m = np.moveaxis(np.asarray(state, dtype=float), -1, 0)
        push = _sigmoid(psi * theta)
        pull = _sigmoid(-psi * theta)
        return np.stack(
            [-psi * push - self.k * (theta - m), theta * pull - self.gamma * psi, self.tau * (theta - m)],
            axis=-1,
        )

    def jacobian(self) -> np.ndarray:
        """Return the Jacobian `[3, 3]` of the flow at the solution, in closed form."""
        return np.array([[-self.k, -A, self.k], [A, -self.gamma, 0.0], [self.tau, 0.0, -self.tau]])

    def polynomial(self) -> np.ndarray:
        """Return coefficients of the Jacobian's characteristic polynomial, highest power first."""
        k, tau, gamma = self.k, self.tau, self.gamma
        return np.array([1.0, k + tau + gamma, A**2 + gamma * (k + tau), A**2 * tau])

    def decay(self) -> float:
        """Return the largest real part of the eigenvalues: negative means convergence, at this rate.

        Without self-distillation nothing depends on the average, and its own eigenvalue -τ is left out.
        """
        jacobian = self.jacobian() if self.k else self.jacobian()[:2, :2]
        return float(np.linalg.eigvals(jacobian).real.max())


METHODS = {
    "plain": Game(),
    "R1": Game(gamma=0.5),
    "self-distillation": Game(k=0.75, tau=0.1),  # close to the best pair there is, see best_pair
    "both": Game(k=0.5, tau=0.5, gamma=0.5),  # the best pair for this gamma
}
START = np.array([1.0, 1.0, 1.0])
ADAM = {"rate": 0.01, "optimizer": "adam", "noise": 0.2, "clock": 0.01 / 0.2}
UPDATES = {
    "SGD 0.2, simultaneous": {"rate": 0.2, "alternating": False},
    "SGD 0.2, alternating": {"rate": 0.2, "alternating": True},
    "Adam 0.01 with noise, simultaneous": {**ADAM, "alternating": False},
    "Adam 0.01 with noise, alternating": {**ADAM, "alternating": True},
}


# ---- The optimal EMA rate for a weight, in closed form (docs/theory.md)


def best_pair(gamma: float = 0.0) -> tuple[float, float, float]:
    """Return (k, τ, rate) of fastest convergence, where all three eigenvalues meet.

    gamma: of R1, at least 0 and at most 2a, from where on R1 alone damps enough. ValueError outside of that.
    """
    if not 0 <= gamma <= 2 * A:
        raise ValueError(f"gamma must be at least 0 and at most {2 * A}, got {gamma}")
    rate = (3 * gamma + math.sqrt(12 * A**2 - 3 * gamma**2)) / 6
    tau = rate**3 / A**2
    return 3 * rate - gamma - tau, tau, rate


def best_tau(k: float) -> tuple[float, float]:
    """Return (τ, rate): the best EMA rate for a pull of strength `k` > 0, and the resulting rate."""
    if k <= 0:
        raise ValueError(f"without a pull no average helps: k must be above 0, got {k}")
    if k <= best_pair()[0]:
        # One real eigenvalue beside a pair with the same real part: 2σ³ + 2a²σ = a²k.
        rate = _root(lambda s: 2 * s**3 + 2 * A**2 * s - A**2 * k, 0.0, A)
        return 3 * rate - k, rate
    # Two equal real eigenvalues -σ, and one beyond them.
    rate = _root(lambda s: k - _pull_of_double_root(s), 1e-12, A / math.sqrt(3))
    return rate * (A**2 - rate**2) / (2 * A**2), rate


def _pull_of_double_root(s: float) -> float:
    return 2 * s + (A**2 - s**2) / (2 * s) - s * (A**2 - s**2) / (2 * A**2)


def _root(function, low: float, high: float) -> float:
    """Find the root of a function that is below 0 at `low` and above it at `high`, by bisection."""
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < 0 else (low, middle)
    return (low + high) / 2


# ---- Simulation


def flow(game: Game, start: np.ndarray, seconds: float, step: float = 0.01) -> np.ndarray:
    """Integrate the gradient flow (Runge-Kutta of fourth order); return states `[steps + 1, 3]`."""
    states = [np.asarray(start, dtype=float)]
    for _ in range(round(seconds / step)):
        state = states[-1]
        k1 = game.velocity(state)
        k2 = game.velocity(state + step / 2 * k1)
        k3 = game.velocity(state + step / 2 * k2)
        k4 = game.velocity(state + step * k3)
        states.append(state + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4))
    return np.stack(states)


def train(
    game: Game,
    start: np.ndarray,
    steps: int,
    rate: float = 0.1,
    optimizer: str = "sgd",
    alternating: bool = True,
    betas: tuple[float, float] = (0.0, 0.99),
    noise: float = 0.0,
    clock: float | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Train as the real loop does, with autograd and an optimizer of torch; return `[steps + 1, 3]`.

    alternating: the critic answers the generator's new point (as training runs do), else both move at once.
    The average moves by τ·clock a step, after the generator. clock: time that passes in a step, by default
    `rate`, as gradient descent has it; Adam moves by rate/noise where noise prevails, a step then counts so.
    noise: standard deviation of what is added to every gradient, as batches of samples do; Adam divides by
    the size of past gradients, and without noise it would divide by numbers that vanish.
    """
    generator = torch.Generator().manual_seed(seed)

    theta, psi = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in start[:2])
    m = torch.tensor(start[2], dtype=torch.float64)
    if optimizer not in ("sgd", "adam"):
        raise ValueError(f"optimizer must be sgd or adam, got {optimizer!r}")
    make = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer]
    options = {"betas": betas} if optimizer == "adam" else {}
    players = [make([parameter], lr=rate, **options) for parameter in (theta, psi)]
    states = [[*start]]
    for _ in range(steps):
        shake = torch.randn(2, dtype=torch.float64, generator=generator) * noise
        if alternating:
            for index, parameter in enumerate((theta, psi)):
                loss = game.losses(theta, psi, m)[index]
                parameter.grad = torch.autograd.grad(loss, [parameter])[0] + shake[index]
                players[index].step()
        else:
            losses = game.losses(theta, psi, m)
            gradients = [torch.autograd.grad(loss, [p])[0] for loss, p in zip(losses, (theta, psi))]
            for parameter, gradient, player, error in zip((theta, psi), gradients, players, shake):
                parameter.grad = gradient + error
                player.step()
        m = m.lerp(theta.detach(), game.tau * (rate if clock is None else clock))
        states.append([theta.item(), psi.item(), m.item()])
    return np.array(states)


def step_matrix(game: Game, rate: float, alternating: bool) -> np.ndarray:
    """Return one step of gradient descent near the solution as a matrix `[3, 3]` on (θ, ψ, m)."""
    full = game.jacobian()
    rows = [np.eye(3) for _ in range(3)]
    for index in range(3):
        rows[index][index] += rate * full[index]
    if alternating:
        return rows[2] @ rows[1] @ rows[0]
    together = np.eye(3)
    together[:2] += rate * full[:2]
    return rows[2] @ together  # the average always follows the new point


def spectral_radius(matrix: np.ndarray) -> float:
    """Return factor by which a step stretches the distance to the solution in the long run."""
    return float(np.abs(np.linalg.eigvals(matrix)).max())


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


# ---- Images


def draw(folder: Path) -> None:
    """Write trajectories.png, vector_field.png, decay_map.png and updates.png into `folder`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in (
        ("trajectories", _draw_trajectories(pyplot)),
        ("vector_field", _draw_fields(pyplot)),
        ("decay_map", _draw_map(pyplot)),
        ("updates", _draw_updates(pyplot)),
    ):
        figure.savefig(folder / f"{name}.png", dpi=110, bbox_inches="tight")
        pyplot.close(figure)


def _draw_trajectories(pyplot):
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5))
    for name, game in METHODS.items():
        states = flow(game, START, 60)
        axes[0].plot(states[:, 0], states[:, 1], label=name, linewidth=1)
        distance = np.linalg.norm(states[:, :2], axis=1)
        axes[1].semilogy(np.linspace(0, 60, len(states)), distance, label=name)
    axes[0].set(xlabel="θ (generator)", ylabel="ψ (critic)", title="gradient flow", aspect="equal")
    axes[0].plot(0, 0, "k+")
    axes[1].set(xlabel="time", ylabel="distance of (θ, ψ) to the solution")
    axes[1].legend(loc="lower left")
    return figure


def _draw_fields(pyplot):
    figure, axes = pyplot.subplots(1, len(METHODS), figsize=(4 * len(METHODS), 4), sharey=True)
    theta, psi = np.meshgrid(np.linspace(-1.5, 1.5, 17), np.linspace(-1.5, 1.5, 17))
    for axis, (name, game) in zip(axes, METHODS.items()):
        # The average is shown at 0, its limit, to which the pull then points.
        velocity = game.velocity(np.stack([theta, psi, np.zeros_like(theta)], axis=-1))[..., :2]
        speed = np.linalg.norm(velocity, axis=-1)
        along = np.moveaxis(velocity, -1, 0) / np.maximum(speed, 1e-9)
        # Arrows of one length, or those near the solution would not be seen; darker is faster.
        gray = "Greys"  # codespell:ignore greys
        axis.quiver(theta, psi, *along, speed, cmap=gray, clim=(-0.5, 1.5), scale=22, width=0.005)
        states = flow(game, START, 40)
        axis.plot(states[:, 0], states[:, 1], linewidth=1.5)
        axis.plot(0, 0, "r+")
        axis.set(title=name, xlabel="θ", aspect="equal", xlim=(-1.6, 1.6), ylim=(-1.6, 1.6))
    axes[0].set_ylabel("ψ")
    figure.suptitle(
        "where (θ, ψ) goes while the average is at 0 (arrows), and a whole trajectory from (1, 1)"
    )
    return figure


def _draw_map(pyplot):
    import matplotlib.colors

    figure, axis = pyplot.subplots(figsize=(6.5, 5))
    pulls, rates = np.logspace(-2, 1.3, 90), np.logspace(-3, 1.3, 90)
    decay = np.array([[-Game(k=k, tau=tau).decay() for k in pulls] for tau in rates])
    colors = matplotlib.colors.LogNorm(1e-3, 0.3)
    shown = axis.pcolormesh(pulls, rates, decay, shading="nearest", cmap="viridis", norm=colors)
    lines = axis.contour(pulls, rates, decay, [0.003, 0.01, 0.03, 0.1, 0.2], colors="k", linewidths=0.5)
    axis.clabel(lines, fmt="%g", fontsize=7)
    axis.plot(pulls, [best_tau(k)[0] for k in pulls], "w--", linewidth=1, label="best τ for k")
    axis.plot(*best_pair()[:2], "r*", markersize=12, label="best pair")
    axis.set(xscale="log", yscale="log", xlabel="k (pull to the average)", ylabel="τ (rate of the average)")
    axis.set_ylim(rates[0], rates[-1])
    axis.legend(loc="upper right")
    figure.colorbar(shown, label="rate at which the game comes to rest: smallest -Re(s)")
    return figure


def _draw_updates(pyplot):
    figure, axes = pyplot.subplots(1, len(UPDATES), figsize=(4 * len(UPDATES), 4), sharey=True)
    for axis, (title, settings) in zip(axes, UPDATES.items()):
        for name, game in METHODS.items():
            states = train(game, START, 1500, **settings)
            axis.semilogy(np.linalg.norm(states[:, :2], axis=1), label=name, linewidth=0.8)
        axis.set(title=title, xlabel="step", ylim=(1e-6, 10))
    axes[0].set_ylabel("distance to the solution")
    axes[0].legend(loc="lower right")
    return figure


# ---- Numbers


def table() -> str:
    """Return what converges and how fast, as text."""
    lines = [
        f"{'':20} {'flow':>9} {'simultaneous':>13} {'alternating':>12}   (SGD at rate 0.2: factor a step)"
    ]
    for name, game in METHODS.items():
        factors = [spectral_radius(step_matrix(game, 0.2, alternating)) for alternating in (False, True)]
        if not game.k:  # the factor of the idle average is not one of the game
            factors = [spectral_radius(step_matrix(game, 0.2, order)[:2, :2]) for order in (False, True)]
        lines.append(f"{name:20} {game.decay():9.4f} {factors[0]:13.4f} {factors[1]:12.4f}")
    lines.append("")
    lines.append("Mean distance to the solution, the last 750 of 1500 steps:")
    for title, settings in UPDATES.items():
        means = [
            np.linalg.norm(train(game, START, 1500, **settings)[-750:, :2], axis=1).mean()
            for game in METHODS.values()
        ]
        lines.append(f"{title:36}" + "".join(f"  {name} {mean:.2g}" for name, mean in zip(METHODS, means)))
    lines.append("")
    lines.append(f"{'k':>8} {'best τ':>8} {'rate':>8} {'rate at 10τ':>12} {'rate at τ/10':>13}")
    for k in (0.01, 0.1, 0.5, best_pair()[0], 1.0, 5.0):
        tau, rate = best_tau(k)
        others = [-replace(Game(k=k), tau=tau * factor).decay() for factor in (10, 0.1)]
        lines.append(f"{k:8.3f} {tau:8.4f} {rate:8.4f} {others[0]:12.4f} {others[1]:13.4f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("dirac-gan"), help="folder for the images")
    options = parser.parse_args()
    print(table())
    draw(options.out)
    print(f"\nImages: {options.out}/trajectories.png vector_field.png decay_map.png updates.png")


if __name__ == "__main__":
    main()
