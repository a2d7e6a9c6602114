"""Blend two related checkpoints: interpolate their weights, as a whole or by resolution."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from finetune.checkpoint.load import NETWORKS, Checkpoint
from finetune.checkpoint.provenance import NOT_KNOWN, Provenance
from finetune.checkpoint.rebuild import tensors_of
from finetune.editing.interpolate import Interpolation, difference, resolution_of
from finetune.errors import ConfigError
from finetune.models import Network

# Weights of independent trainings are orthogonal, at a distance of √2; fine-tuning moves them much less.
MAX_DISTANCE = 1.0
MAPPING = "mapping"

Alpha = float | Mapping[int | str, float]  # of everything, or by resolution and for "mapping"


@dataclasses.dataclass(frozen=True)
class Relation:
    """How two checkpoints are related: name of a common ancestor, if any, and distance of the weights."""

    ancestor: str | None
    distance: float

    def __bool__(self) -> bool:
        return self.ancestor is not None or self.distance <= MAX_DISTANCE


def relation(A: Checkpoint, B: Checkpoint) -> Relation:
    """Find a common ancestor in the provenance of two checkpoints, and measure how far their weights are.

    Raises ConfigError if their generators are not of one architecture.
    """
    if problem := difference(A.generator, B.generator):
        raise ConfigError(problem, hint="Only checkpoints of one architecture can be blended.")
    known = {step["sha256"] for step in _family(B.provenance.to_dict()) if step["sha256"]}
    shared = (step["source"] for step in _family(A.provenance.to_dict()) if step["sha256"] in known)
    return Relation(next(shared, None), weight_distance(A.best, B.best))


def weight_distance(A: Network, B: Network) -> float:
    """Return the relative distance of the convolutions of two generators: 0 if equal, √2 if unrelated.

    |a - b| / sqrt((|a|² + |b|²) / 2), over the weights with 4 dimensions.
    """
    a, b = tensors_of(A), tensors_of(B)
    squares = [0.0, 0.0]
    for name, tensor in a.items():
        if tensor.ndim == 4:
            left, right = tensor.detach().double().cpu(), b[name].detach().double().cpu()
            squares[0] += float((left - right).square().sum())
            squares[1] += float(left.square().sum() + right.square().sum()) / 2
    return math.sqrt(squares[0] / squares[1]) if squares[1] else 0.0


def blend(A: Checkpoint, B: Checkpoint, alpha: Alpha) -> Checkpoint:
    """Return a checkpoint with the weights A + alpha (B - A): exactly those of A for 0, those of B for 1.

    alpha: a number, or numbers by resolution: a layer takes that of its resolution or the next lower one
    given, mapping networks that of "mapping" or the lowest one. The result has the networks (G, D,
    G_ema) that both have.
    Source of layer swapping: Pinkney and Adler, "Resolution Dependent GAN Interpolation" (2010.05334).
    ConfigError if no network is left, an architecture differs, or a resolution is not one of the network.
    """
    networks: dict[str, Any] = dict.fromkeys(NETWORKS)
    for name in NETWORKS:
        if name not in (*A.missing, *B.missing):
            between = Interpolation(getattr(A, name), getattr(B, name))
            networks[name] = between.set(by_resolution(alpha, between.network))
    if networks["G"] is None and networks["G_ema"] is None:
        raise ConfigError("The checkpoints have no generator in common: one has G, the other G_ema.")
    first, second = A.provenance, B.provenance
    licenses = dict.fromkeys(origin.licence or NOT_KNOWN for origin in (first, second))
    shown = alpha if isinstance(alpha, float) else {str(key): value for key, value in alpha.items()}
    provenance = Provenance(
        generation="finetune",
        source=f"blend of {first.source} and {second.source}",
        sha256="",
        size=0,
        licence="; ".join(licenses) if first.licence or second.licence else None,
        parent=first.to_dict(),
        blended_with=second.to_dict(),
        training={"alpha": shown},
    )
    return dataclasses.replace(A, **networks, provenance=provenance, notes=(), foreign={})


def by_resolution(alpha: Alpha, network: Network) -> float | Callable[[str], float]:
    """Turn `alpha` into what `Interpolation.set` takes."""
    if not isinstance(alpha, Mapping):
        return float(alpha)
    numbers = sorted((key, value) for key, value in alpha.items() if isinstance(key, int))
    largest = network.img_resolution
    if not numbers or any(not 4 <= key <= largest or key & (key - 1) for key, _ in numbers):
        given = ", ".join(str(key) for key, _ in numbers) or "none"
        raise ConfigError(
            f"--alpha: resolutions {given}; this network has the powers of two from 4 to {largest}. "
            "Write 4=0,16=1."
        )

    def of_tensor(name: str) -> float:
        resolution = resolution_of(name, network)
        if resolution is None:
            return alpha.get(MAPPING, numbers[0][1])
        return next((value for key, value in reversed(numbers) if key <= resolution), numbers[0][1])

    return of_tensor


def _family(step: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """Yield the provenance of a checkpoint and of all its ancestors."""
    pending = [step]
    while pending:
        step = pending.pop()
        if step is not None:
            yield step
            pending += [step.get("blended_with"), step.get("parent")]
