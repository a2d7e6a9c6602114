"""The options of a training run: one frozen dataclass that checks itself and goes to JSON and back.

A field, its flag (`--sd-weight` for `sd_weight`) and its key in `config.json` carry one name. `None` means
"decided from the checkpoint, the resolution and the data" (`finetune.recipes`); every other default stands
here alone.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from dataclasses import dataclass
from pathlib import Path

from finetune.errors import ConfigError

FAMILIES = ("stylegan2", "stylegan3-t", "stylegan3-r")
BACKBONES = ("lpips-vgg", "lpips-alex", "lpips-squeeze", "efficientnet-lite0", "l2")
AUGMENTATIONS = ("ada", "noaug", "fixed")
TEACHERS = ("ema", "initial")
PRECISIONS = ("auto", "fp32", "tf32", "fp16")
GRAPHS = ("auto", "off")
FITS = ("crop", "pad", "stretch")
LABELS = ("file", "folders")
POLICIES = ("stop", "rollback", "ignore")
RECIPES = ("auto", "improve", "adapt", "few-shot", "custom")
CLASSES = ("keep", "extend", "fresh")
CHANNELS = (1, 3, 4)
AUGPIPE_PARTS = {
    "blit": {"xflip": 1, "rotate90": 1, "xint": 1},
    "geom": {"scale": 1, "rotate": 1, "aniso": 1, "xfrac": 1},
    "color": {"brightness": 1, "contrast": 1, "lumaflip": 1, "hue": 1, "saturation": 1},
    "filter": {"imgfilter": 1},
    "noise": {"noise": 1},
    "cutout": {"cutout": 1},
}
AUGPIPES = {
    "blit": ("blit",),
    "geom": ("geom",),
    "color": ("color",),
    "filter": ("filter",),
    "noise": ("noise",),
    "cutout": ("cutout",),
    "bg": ("blit", "geom"),
    "bgc": ("blit", "geom", "color"),
    "bgcf": ("blit", "geom", "color", "filter"),
    "bgcfn": ("blit", "geom", "color", "filter", "noise"),
    "bgcfnc": ("blit", "geom", "color", "filter", "noise", "cutout"),
}
MAX_SEED = 2**32 - 1  # what all generators of random numbers take
SCRATCH_ONLY = ("cbase", "cmax", "map_depth", "z_dim", "w_dim")
RESUME_ONLY = ("freezed", "classes", "new_d", "d_warmup_kimg")


def flag(field: str) -> str:
    """The command-line spelling of a field: `sd_weight` -> `--sd-weight`."""
    return "--" + field.replace("_", "-")


def distils(weight: float | str) -> bool:
    """Whether a value of `sd_weight` means self-distillation."""
    return isinstance(weight, str) or weight > 0


def target_ratio(weight: float | str) -> float | None:
    """The ratio of gradient norms that `auto:RATIO` asks for, None for a fixed weight.

    Raises ValueError for another text.
    """
    if not isinstance(weight, str):
        return None
    word, _, ratio = weight.partition(":")
    if word != "auto" or not 0 < float(ratio) < math.inf:
        raise ValueError(weight)
    return float(ratio)


@dataclass(frozen=True)
class TrainConfig:
    """Everything a person can say about a training run. Lengths are in kimg (1000 images seen by D)."""

    data: str
    outdir: str = "runs"
    resume: str | None = None
    scratch: str | None = None
    desc: str | None = None
    cond: bool | None = None
    mirror: bool = False
    labels: str = "file"
    fit: str | None = "crop"
    # The shape. A checkpoint says what it is; with --resume these change it, and only these.
    resolution: int | None = None
    channels: int | None = None
    classes: str | None = None
    new_d: bool = False
    # The architecture, for --scratch only.
    cbase: int | None = None
    cmax: int | None = None
    map_depth: int | None = None
    z_dim: int | None = None
    w_dim: int | None = None
    # The recipe.
    recipe: str = "auto"
    kimg: float | None = None
    batch: int | None = None
    batch_gpu: int | None = None
    gamma: float | None = None
    glr: float | None = None
    dlr: float | None = None
    g_beta1: float | None = None
    lr_warmup_kimg: float | None = None
    ema_kimg: float | None = None
    d_warmup_kimg: float | None = None
    freezed: int | None = None
    aug: str | None = None
    target: float | None = None
    p: float | None = None
    augpipe: str | None = None
    # Self-distillation.
    sd_weight: float | str | None = None
    sd_backbone: str = "lpips-vgg"
    sd_interval: int | None = None
    sd_resolution: int | None = None
    sd_teacher: str = "ema"
    sd_teacher_kimg: float | None = None
    # The machine and the records.
    device: str = "auto"
    precision: str = "auto"
    graphs: str = "auto"
    workers: int | None = None
    seed: int = 0
    tick: float | None = None
    snap: int | None = None
    save_every_min: float = 30.0
    keep: int | None = None
    on_divergence: str = "stop"
    metrics: str | None = None
    metrics_kimg: float | None = None
    metrics_num: int | None = None
    metrics_inception: str | None = None

    def validate(self) -> None:
        """Raise one ConfigError that lists every problem: its flag, the value seen and what to do."""
        problems = [*_range_problems(self), *_choice_problems(self), *_combination_problems(self)]
        if problems:
            raise ConfigError(problems)

    def to_json(self) -> str:
        """The options as readable JSON text; `from_json` reads it back to an equal object."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> TrainConfig:
        """Read what `to_json` wrote. Raises ConfigError that lists unknown, missing and ill-typed entries."""
        try:
            entries = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"the configuration is not JSON: {error}.") from None
        if not isinstance(entries, dict):
            raise ConfigError(f"the configuration must be a JSON object, not {type(entries).__name__}.")
        hints = typing.get_type_hints(cls)
        problems = [f"{key}: no such option." for key in entries if key not in hints]
        if "data" not in entries:
            problems.append("data: missing.")
        for key, value in entries.items():
            if key in hints and not _has_type(value, hints[key]):
                problems.append(f"{key}: {value!r} is not of type {_type_name(hints[key])}.")
        if problems:
            raise ConfigError(problems)
        return cls(**entries)

    @classmethod
    def read(cls, path: str | Path) -> TrainConfig:
        """Read `config.json` of a run folder."""
        return cls.from_json(Path(path).read_text(encoding="utf-8"))


def _has_type(value: object, hint: object) -> bool:
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if isinstance(value, bool):
        return bool in allowed
    return isinstance(value, allowed) or (isinstance(value, int) and float in allowed)


def _type_name(hint: object) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint)


def _range_problems(config: TrainConfig) -> list[str]:
    """Numbers outside what they mean; None passes, NaN and infinity never do."""
    positive = {"kimg", "batch", "batch_gpu", "glr", "dlr", "ema_kimg", "tick", "snap", *SCRATCH_ONLY}
    positive |= {"sd_interval", "sd_resolution", "sd_teacher_kimg", "metrics_kimg", "keep"}
    not_negative = {"gamma", "freezed", "sd_weight", "d_warmup_kimg", "workers", "seed"}
    not_negative |= {"save_every_min", "lr_warmup_kimg"}
    problems = []
    for name in TrainConfig.__dataclass_fields__:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if not math.isfinite(value):
            problems.append(f"{flag(name)} {value}: must be a finite number.")
        elif name in positive and value <= 0:
            problems.append(f"{flag(name)} {value}: must be greater than 0.")
        elif name in not_negative and value < 0:
            problems.append(f"{flag(name)} {value}: must be 0 or more.")
        elif name == "seed" and value > MAX_SEED:
            problems.append(f"--seed {value}: must be at most {MAX_SEED}.")
        elif name in ("target", "p") and not 0 <= value <= 1:
            problems.append(f"{flag(name)} {value}: must lie between 0 and 1.")
        elif name == "g_beta1" and not 0 <= value < 1:
            problems.append(f"--g-beta1 {value}: must be at least 0 and less than 1.")
        elif name == "metrics_num" and value < 2:
            problems.append(f"--metrics-num {value}: must be at least 2.")
    size = config.resolution
    if size is not None and (size < 8 or size & (size - 1)):
        problems.append(f"--resolution {size}: must be a power of two, 8 or more.")
    if config.batch and config.batch_gpu and config.batch > 0 and config.batch_gpu > 0:
        if config.batch % config.batch_gpu:
            problems.append(f"--batch {config.batch}: must be a multiple of --batch-gpu {config.batch_gpu}.")
    return problems


def _choice_problems(config: TrainConfig) -> list[str]:
    choices: dict[str, typing.Collection[object]] = {
        "scratch": FAMILIES, "fit": FITS, "labels": LABELS, "aug": AUGMENTATIONS, "augpipe": AUGPIPES,
        "sd_backbone": BACKBONES, "sd_teacher": TEACHERS, "precision": PRECISIONS, "graphs": GRAPHS,
        "recipe": RECIPES,
        "classes": CLASSES, "channels": CHANNELS, "on_divergence": POLICIES,
    }  # fmt: skip
    return [
        f"{flag(name)} {getattr(config, name)}: must be one of {', '.join(map(str, allowed))}."
        for name, allowed in choices.items()
        if getattr(config, name) is not None and getattr(config, name) not in allowed
    ]


def _combination_problems(config: TrainConfig) -> list[str]:
    """Options that contradict each other, or that would have no effect."""
    problems = []
    try:
        target_ratio(config.sd_weight or 0.0)
    except ValueError:
        problems.append(
            f"--sd-weight {config.sd_weight}: must be a number, or auto:RATIO such as auto:0.1 (the "
            "strength of its gradient in parts of the adversarial one)."
        )
    if config.metrics in (None, "none"):
        problems += [
            f"{flag(name)} {getattr(config, name)}: has no effect without --metrics."
            for name in ("metrics_kimg", "metrics_num", "metrics_inception")
            if getattr(config, name) is not None
        ]
    if not config.data:
        problems.append("--data: name the folder or zip with the pictures.")
    if config.resume == "":
        problems.append("--resume: name the checkpoint to start from.")
    if (config.resume is None) == (config.scratch is None):
        problems.append(
            "Say either --resume PICKLE (go on from a checkpoint) or --scratch FAMILY (start without one)."
        )
    if config.scratch is None:
        problems += [
            f"{flag(name)} {getattr(config, name)}: only for --scratch; a checkpoint says what it is."
            for name in SCRATCH_ONLY
            if getattr(config, name) is not None
        ]
    else:
        if config.resolution is None:
            problems.append("--resolution: needed with --scratch (there is no checkpoint to say it).")
        if config.sd_teacher == "initial":
            problems.append("--sd-teacher initial: there is no initial checkpoint with --scratch; use ema.")
        problems += [
            f"{flag(name)}{'' if name == 'new_d' else ' ' + str(getattr(config, name))}: only for --resume; "
            "a network from scratch has nothing to keep."
            for name in RESUME_ONLY
            if getattr(config, name)
        ]
    if config.classes and config.cond is False:
        problems.append(f"--classes {config.classes}: has no effect with --no-cond, which drops the classes.")
    if config.labels == "folders" and config.cond is False:
        problems.append("--labels folders: has no effect with --no-cond, which trains without labels.")
    if config.new_d and config.freezed:
        problems.append(f"--freezed {config.freezed}: would freeze random layers with --new-d.")
    if config.sd_teacher == "initial" and config.sd_teacher_kimg is not None:
        problems.append(f"--sd-teacher-kimg {config.sd_teacher_kimg}: no effect with --sd-teacher initial.")
    if config.aug == "fixed" and config.p is None:
        problems.append("--aug fixed: say the probability with --p, such as --p 0.2.")
    if config.aug != "fixed" and config.p is not None:
        other = f"with --aug {config.aug}" if config.aug else "without --aug fixed"
        problems.append(f"--p {config.p}: has no effect {other}; use --aug fixed.")
    if config.aug not in (None, "ada") and config.target is not None:
        problems.append(f"--target {config.target}: has no effect with --aug {config.aug}; use --aug ada.")
    if config.aug == "noaug" and config.augpipe is not None:
        problems.append(f"--augpipe {config.augpipe}: has no effect with --aug noaug.")
    return problems
