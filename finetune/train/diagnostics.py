"""Gradient cosine similarity and weight trajectory of the generator, once per tick.

Nothing here changes a number of the training: gradients are taken beside the backward pass, and no random
number is drawn.
"""

from __future__ import annotations

import math
import re
from collections import deque

import torch

from finetune.train.state import TrainState

LAGS = (2, 4, 8)  # ticks, beside 1
MAX_KEPT = 1 << 16  # weights, spread over all, that cosines at a lag are taken of

LAYER = re.compile(r"(mapping|synthesis\.(?:b\d+|L\d+|input))")


class Diagnostics:
    """Collects numbers between ticks; `due`: whether gradients are still to be compared in this tick.

    Weights are copied to the CPU once a tick: six copies of the generator are kept there.
    """

    def __init__(self, state: TrainState) -> None:
        self.due = True
        self._gradients: dict[str, object] = {}
        self._paths = {"G": Trajectory(state.G), "ema": Trajectory(state.G_ema)}
        self._nimg = state.nimg

    def compare_gradients(
        self, G: torch.nn.Module, img: torch.Tensor, adversarial: torch.Tensor, distillation: torch.Tensor
    ) -> None:
        """Compare the weight gradients that follow from two gradients at the images, in all and by block.

        Keeps the graph of `img` for the backward pass that follows. Cosine, and norm of the distillation
        gradient over that of the adversarial one.
        """
        self.due = False
        named = [(name, each) for name, each in G.named_parameters() if each.requires_grad]
        weights = [each for _, each in named]
        sides = [
            torch.autograd.grad(img, weights, gradient, retain_graph=True, allow_unused=True)
            for gradient in (adversarial, distillation)
        ]
        products: dict[str, torch.Tensor] = {}
        for (name, _), a, b in zip(named, *sides, strict=True):
            if a is None or b is None:
                continue
            found = LAYER.match(name)
            a, b = a.float().flatten(), b.float().flatten()
            three = torch.stack([a @ b, a @ a, b @ b])
            for group in ("all", found[1].removeprefix("synthesis.") if found else "other"):
                products[group] = products.get(group, 0) + three
        numbers = dict(zip(products, torch.stack(list(products.values())).double().tolist(), strict=True))
        cosines = {name: _cosine(*each) for name, each in numbers.items()}
        ratios = {name: math.sqrt(each[2] / each[1]) if each[1] else 0.0 for name, each in numbers.items()}
        self._gradients = {
            "sd_cosine": cosines.pop("all"),
            "sd_ratio": ratios.pop("all"),
            "sd_cosine_of": cosines,
            "sd_ratio_of": ratios,
        }

    def read(self, state: TrainState) -> dict[str, object]:
        """Return the numbers of the tick that ends here, and begin the next one."""
        kimg = (state.nimg - self._nimg) / 1000
        student, average = _weights(state.G), _weights(state.G_ema)
        numbers = {**self._gradients, "weight_distance": float((student - average).norm() / average.norm())}
        for name, weights in (("G", student), ("ema", average)):
            numbers |= {f"{key}_{name}": value for key, value in self._paths[name].add(weights, kimg).items()}
        self.due, self._gradients, self._nimg = True, {}, state.nimg
        return numbers


class Trajectory:
    """The path of a network's weights from tick to tick."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.start = self.last = _weights(network)
        self.step: torch.Tensor | None = None
        self.sparse: deque[torch.Tensor] = deque(maxlen=max(LAGS) + 1)
        self.length = 0.0

    def add(self, weights: torch.Tensor, kimg: float) -> dict[str, float]:
        """Return the numbers of a tick.

        path_per_kimg: in parts of the weights' norm. straightness: distance from the start over the path.
        update_cosine: of this tick's step and the last one's, update_cosine_lag2, 4, 8 of earlier ones;
        below 0 at lags of a quarter to three quarters of a period if training rotates.
        """
        step = weights - self.last
        moved = float(step.norm())
        self.length += moved
        numbers = {"path_per_kimg": moved / float(weights.norm()) / kimg if kimg else 0.0}
        if self.length:
            numbers["straightness"] = float((weights - self.start).norm()) / self.length
        if self.step is not None:
            numbers["update_cosine"] = _cosine_of(step, self.step)
        self.sparse.append(step[:: len(step) // MAX_KEPT + 1].clone())
        for lag in LAGS:
            if len(self.sparse) > lag:
                numbers[f"update_cosine_lag{lag}"] = _cosine_of(self.sparse[-1], self.sparse[-1 - lag])
        self.last, self.step = weights, step
        return numbers


def _weights(network: torch.nn.Module) -> torch.Tensor:
    """Return all parameters as one vector, float32 on the CPU."""
    return torch.cat([each.detach().flatten().float() for each in network.parameters()]).cpu()


def _cosine_of(a: torch.Tensor, b: torch.Tensor) -> float:
    return _cosine(float(a @ b), float(a @ a), float(b @ b))


def _cosine(product: float, a: float, b: float) -> float:
    return product / math.sqrt(a * b) if a > 0 and b > 0 else 0.0
