"""Going on with a run: which options may be other ones, and the run as it was."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from finetune.checkpoint.load import Checkpoint
from finetune.checkpoint.provenance import Provenance
from finetune.config import TrainConfig, flag
from finetune.errors import CheckpointError, ConfigError
from finetune.train.losses import lazy_adam
from finetune.train.saved import Saved, find_state, networks_of

# What does not change what a network or a batch is. Everything else makes another run.
CHANGEABLE = (
    "data", "kimg", "tick", "snap", "save_every_min", "keep", "on_divergence", "glr", "dlr", "g_beta1",
    "lr_warmup_kimg",
    "gamma", "ema_kimg", "target", "sd_weight", "sd_interval", "sd_warmup_kimg", "sd_batch_share",
    "sd_resolution",
    "batch_gpu", "workers", "device", "metrics", "metrics_kimg", "metrics_num", "metrics_inception",
)  # fmt: skip
WHERE = ("resume", "outdir", "desc", "recipe")  # without a meaning for a run that is there


def saved_for(resume: str | None) -> Saved | None:
    """The training state that `--resume` means; None where it means something else (a file, a name)."""
    return find_state(Path(resume).expanduser()) if resume else None


def continued(asked: TrainConfig, saved: Saved) -> tuple[TrainConfig, list[str]]:
    """The options of the run with those that are asked for now (what is not a default), and what changed.

    Raises ConfigError that lists what cannot be changed.
    """
    before = TrainConfig.from_json(saved.content["config"])
    if before.lr_warmup_kimg is None:  # of a version that had none
        before = dataclasses.replace(before, lr_warmup_kimg=0.0)
    changes: dict[str, Any] = {}
    problems = []
    for field in dataclasses.fields(TrainConfig):
        value, old = getattr(asked, field.name), getattr(before, field.name)
        default = None if field.default is dataclasses.MISSING else field.default
        if field.name in WHERE or value in (default, old, ""):
            continue
        if field.name in CHANGEABLE:
            changes[field.name] = value
        else:
            problems.append(
                f"{flag(field.name)} {value}: the run has {old}, and going on with it exactly cannot change "
                "that; start a new run from its snapshot instead."
            )
    if problems:
        raise ConfigError(problems)
    config = dataclasses.replace(before, **changes)
    if config.kimg is not None and saved.nimg >= round(config.kimg * 1000):
        raise ConfigError(
            f"--resume {saved.path.parent}: the run has seen its {config.kimg:g} kimg; "
            "to go on, give a larger --kimg."
        )
    said = [f"{flag(name)}: {getattr(before, name)} -> {value}" for name, value in changes.items()]
    return config, said


def checkpoint_of(saved: Saved) -> Checkpoint:
    """The networks of a state as a checkpoint whose provenance is that of the run."""
    networks: dict[str, Any] = networks_of(saved.content)
    own = {"source": saved.path.name, "sha256": "", "size": 0, "licence": None, "generation": "finetune"}
    if any(name not in networks for name in ("G", "D", "G_ema")):
        raise CheckpointError(f"{saved.path} does not hold G, D and G_ema")
    return Checkpoint(
        **{name: networks[name].eval().requires_grad_(False) for name in ("G", "D", "G_ema")},
        augment_pipe=None,
        training_set_kwargs={},
        provenance=Provenance(**own),  # type: ignore[arg-type]
    )


def apply_rates(
    state: Any, config: TrainConfig, before: TrainConfig, intervals: dict[str, int | None]
) -> None:
    """Give the optimisers the rates and betas of `config` where those are not the ones of the run before.

    intervals: of the lazy regularisation of G and D.
    """
    for name, rate, beta in (("G", "glr", "g_beta1"), ("D", "dlr", None)):
        if all(key is None or getattr(config, key) == getattr(before, key) for key in (rate, beta)):
            continue
        for group in getattr(state, f"opt_{name}").param_groups:
            beta1 = getattr(config, beta) if beta else 0.0
            group.update(lazy_adam(getattr(config, rate) or 0.0, (beta1 or 0.0, 0.99), intervals[name]))


def without_surgery(config: TrainConfig, checkpoint: Checkpoint) -> TrainConfig:
    """The options for networks that were changed when the run began: none of it again."""
    network: Any = checkpoint.best
    return dataclasses.replace(
        config,
        resolution=network.img_resolution,
        channels=network.img_channels,
        cond=network.c_dim > 0,
        classes=None,
        new_d=False,
    )
