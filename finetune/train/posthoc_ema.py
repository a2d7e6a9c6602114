"""Post-hoc EMA: the average with any half-life, from averages saved with the snapshots of a run.

A run keeps two power-function averages of G (`finetune.train.ema.POWERS`). Any average of the weights over
training has a profile: how much of it comes from each step. A combination of the kept averages whose profile
is closest to that of an EMA is close to this EMA.
Source: Karras et al. 2024 (2312.02696), section 3 and appendix C; here the target is an exponential profile,
so that half-lives are those of --ema-kimg.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from finetune.config import TrainConfig
from finetune.errors import CheckpointError
from finetune.models import Network
from finetune.train.ema import EMA_RAMPUP, POWERS
from finetune.train.state import TrainState
from torch_utils.files import atomic_write

MAX_ERROR = 0.02  # of a profile, see `fit`; above, a half-life is out of reach of the averages
POINTS = 2048  # where profiles are compared: so many spread evenly, and as many toward the end
FRACTIONS = (0.01, 0.015, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2)  # of the run: half-lives of the grid


@dataclass(frozen=True)
class SavedAverages:
    """The averages of one snapshot, after `updates` steps of G and `nimg` images."""

    path: Path
    updates: int
    nimg: int


def averages_beside(snapshot: Path) -> Path:
    """Return the path of the averages of a snapshot."""
    return snapshot.with_name(snapshot.stem.replace("network-snapshot", "averages") + ".safetensors")


def write_averages(snapshot: Path, state: TrainState, updates: int) -> None:
    """Write the parameters of all averages beside a snapshot. Raises WriteError."""
    tensors = {
        f"{name}/{key}": each.detach().float().cpu().contiguous()
        for name, average in state.power_averages.items()
        for key, each in average.named_parameters()
    }
    metadata = {"averages": json.dumps({"updates": updates, "nimg": state.nimg})}
    with atomic_write(averages_beside(snapshot)) as stream:
        stream.write(safetensors.torch.save(tensors, metadata))


def saved_averages(snapshot: Path) -> list[SavedAverages]:
    """Return the averages of a snapshot and of those before it, the oldest first.

    Raises CheckpointError if the snapshot has none, or if a file is damaged.
    """
    found = []
    for path in snapshot.parent.glob("averages-*.safetensors"):
        try:
            with safetensors.safe_open(path, "pt") as file:
                facts = json.loads(file.metadata()["averages"])
            found.append(SavedAverages(path, int(facts["updates"]), int(facts["nimg"])))
        except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: not the averages of a snapshot ({error}). Delete it.") from None
    last = next((each for each in found if each.path == averages_beside(snapshot)), None)
    if last is None:
        stems = sorted(each.path.stem.replace("averages", "network-snapshot") for each in found)
        hint = "`finetune train` writes them with every snapshot; runs of earlier versions have none."
        if stems:
            hint = f"Use one that has: {', '.join(f'{stem}.pkl' for stem in stems)}."
        raise CheckpointError(f"{snapshot} has no averages of G beside it.", hint=hint)
    return sorted((each for each in found if 0 < each.updates <= last.updates), key=lambda each: each.updates)


def grid(config: TrainConfig, saved: list[SavedAverages]) -> list[float]:
    """Return half-lives in kimg, from 1 % to 20 % of the run and its own, that the averages can give."""
    kimg = saved[-1].updates * config.batch / 1000
    wanted = sorted({float(f"{kimg * fraction:.3g}") for fraction in FRACTIONS} | {config.ema_kimg})
    return [each for each in wanted if fit(config, saved, each)[1] <= MAX_ERROR]


def reconstruct(
    config: TrainConfig, saved: list[SavedAverages], half_life_kimg: float, G_ema: Network
) -> tuple[Network, float]:
    """Return `G_ema` with the parameters that this half-life would have given, and the error of the profile.

    Buffers, which are never averaged, are those of `G_ema`, the snapshot's.
    """
    weights, error = fit(config, saved, half_life_kimg)
    network = copy.deepcopy(G_ema)
    parameters = dict(network.named_parameters())
    totals = {name: torch.zeros_like(each, dtype=torch.float64) for name, each in parameters.items()}
    rows = iter(weights.tolist())
    for each in saved:
        with safetensors.safe_open(each.path, "pt") as file:
            for power in POWERS:
                weight = next(rows)
                for name, total in totals.items():
                    total.add_(file.get_tensor(f"{power}/{name}").to(total), alpha=weight)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(totals[name])
    return network, error


def fit(config: TrainConfig, saved: list[SavedAverages], half_life_kimg: float) -> tuple[torch.Tensor, float]:
    """Return weights of all averages (snapshot by snapshot) that give an EMA, and their error.

    Cumulative profiles are compared: their root mean square difference is the expected error of the
    weights, in parts of the distance that they moved, if they move at random. The weights sum up to 1.
    """
    updates = saved[-1].updates
    points = torch.cat(
        [
            torch.linspace(0, updates, POINTS, dtype=torch.float64),
            updates - torch.logspace(0, 1, POINTS, updates, dtype=torch.float64),
        ]
    )
    points = points.round().clamp(0, updates).unique()
    target = ema_profile(config, half_life_kimg, updates)[points.long()]
    columns = [(points / each.updates).clamp(max=1) ** (g + 1) for each in saved for g in POWERS.values()]
    table = torch.stack(columns, dim=1)
    spacing = torch.diff(points, prepend=points[:1] - 1) / updates
    rows = spacing.sqrt()
    rows[-1] = 1e3  # all profiles end at 1: the weights sum up to 1
    table_rows, target_rows = table * rows[:, None], target * rows
    weights = torch.linalg.lstsq(table_rows, target_rows[:, None], driver="gelsd").solution[:, 0]
    error = ((table @ weights - target).square() * spacing).sum().sqrt()
    return weights, float(error)


def ema_profile(config: TrainConfig, half_life_kimg: float, updates: int) -> torch.Tensor:
    """Return which part of an EMA comes from the first k updates, `[updates + 1]` in float64."""
    nimg = (torch.arange(1, updates + 1, dtype=torch.float64) * config.batch) + config.d_warmup_kimg * 1000
    half_life = torch.full_like(nimg, half_life_kimg * 1000)
    if config.scratch:
        half_life = half_life.minimum(nimg * EMA_RAMPUP)
    halvings = config.batch / half_life
    remaining = halvings.flip(0).cumsum(0).flip(0)  # until the end, after each update
    return torch.cat([0.5**remaining, torch.ones(1, dtype=torch.float64)])


def relative_difference(a: Network, b: Network) -> float:
    """Return the norm of the difference of all parameters, over that of the second network."""
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    square = sum(float((x.double() - y.double()).square().sum()) for x, y in pairs)
    return (square / sum(float(y.double().square().sum()) for y in b.parameters())) ** 0.5
