"""Options of a training run as requested: `TrainOptions`.

A field, its flag (`--sd-weight` for `sd_weight`) and its key in `config.json` share one name. A field of
`TrainOptions` declares an option: help text, default, choices and range. The command line is generated from
it. Defaults that depend on the checkpoint, the data or the machine are in `finetune.recipes`;
`finetune.config` has the resolved options.
"""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from typing import Any

from finetune.errors import ConfigError

FAMILIES = ("stylegan2", "stylegan3-t", "stylegan3-r")
BACKBONES = (
    "lpips-vgg", "lpips-alex", "lpips-squeeze", "st-lpips-alex", "st-lpips-vgg", "efficientnet-lite0",
    "ms-ssim", "l2",
)  # fmt: skip
PRECISIONS = ("auto", "fp32", "tf32", "fp16")
GRAPHS = ("auto", "off")
AUTO = "auto"  # of --batch-gpu, as a word; 0 as a number
FITS = ("crop", "pad", "stretch")
LABELS = ("file", "folders")
RECIPES = ("auto", "improve", "adapt", "few-shot", "custom")
CHANNELS = (1, 3, 4)
OFFLINE_METRICS = ("random-fid", "fd-effnet")  # need neither a download nor torch-fidelity
AUGPIPE_PARTS = {
    "blit": {"xflip": 1, "rotate90": 1, "xint": 1},
    "geom": {"scale": 1, "rotate": 1, "aniso": 1, "xfrac": 1},
    "color": {"brightness": 1, "contrast": 1, "lumaflip": 1, "hue": 1, "saturation": 1},
    "filter": {"imgfilter": 1},
    "noise": {"noise": 1},
    "cutout": {"cutout": 1},
}
# One part by its name, or the first of them by their initials: bg, bgc, bgcf, bgcfn, bgcfnc.
AUGPIPES: dict[str, tuple[str, ...]] = {name: (name,) for name in AUGPIPE_PARTS}
AUGPIPES |= {"bgcfnc"[:count]: tuple(AUGPIPE_PARTS)[:count] for count in range(2, 7)}
MAX_SEED = 2**32 - 1  # what all generators of random numbers take
SCRATCH_ONLY = ("cbase", "cmax", "map_depth", "z_dim")
RESUME_ONLY = ("freezed", "classes", "new_d", "d_warmup_kimg")

# The groups of the help text.
DATA, SHAPE, RECIPE = "Data", "Checkpoint and shape", "Recipe"
DISTILLATION, MACHINE, RECORDS = "Self-distillation", "Machine", "Records"


def flag(field: str) -> str:
    """Return the command-line spelling of a field: `sd_weight` -> `--sd-weight`."""
    return "--" + field.replace("_", "-")


@dataclass(frozen=True)
class DistillWeight:
    """The weight of the self-distillation: λ, or a ratio of gradient norms."""

    value: float
    is_ratio: bool = False

    @classmethod
    def parse(cls, given: DistillWeight | float | str) -> DistillWeight:
        """Read a number or `auto:RATIO`. Raises ConfigError for anything else."""
        if isinstance(given, DistillWeight):
            return given
        word, colon, number = str(given).rpartition(":")
        try:
            weight = cls(float(number), is_ratio=bool(colon))
        except ValueError:
            weight = cls(math.nan)
        is_valid = word == "auto" and weight.value > 0 if colon else weight.value >= 0
        if not is_valid or not math.isfinite(weight.value):
            raise ConfigError(
                f"--sd-weight {given}: must be a number, or auto:RATIO such as auto:0.1 (the norm of its "
                "gradient relative to the adversarial one); 0 or more."
            )
        return weight

    def __bool__(self) -> bool:
        return self.value > 0

    def __str__(self) -> str:
        return f"{'auto:' if self.is_ratio else ''}{self.value:.15g}"

    def to_json(self) -> float | str:
        """Return a number, or `auto:RATIO`."""
        return str(self) if self.is_ratio else self.value


def parse_micro_batch(given: int | str) -> int:
    """Read a number or `auto`, which is 0. Raises ConfigError for anything else."""
    wrong = ConfigError(f"--batch-gpu {given}: must be a whole number above 0, or auto.")
    if given == AUTO:
        return 0
    try:
        number = int(str(given))
    except ValueError:
        raise wrong from None
    if isinstance(given, str) and number < 1:
        raise wrong
    return number


@dataclass(frozen=True)
class Option:
    """Declaration of one option of `train`.

    default: the value where neither a user nor `finetune.recipes` gives another; None if recipes give one.
    shown: the default in the words of the help text.
    """

    help: str
    group: str
    default: Any = None
    shown: str = ""
    choices: tuple = ()
    metavar: str | None = None
    above: float = -math.inf
    at_least: float = -math.inf
    at_most: float = math.inf

    def problem(self, name: str, value: Any) -> str | None:
        """Return what is wrong with a value, None if it can be used."""
        if self.choices and value not in self.choices:
            return f"{flag(name)} {value}: must be one of {', '.join(map(str, self.choices))}."
        if isinstance(value, (bool, str)) or not isinstance(value, (int, float)):
            return None
        if not math.isfinite(value):
            return f"{flag(name)} {value}: must be a finite number."
        if value <= self.above:
            return f"{flag(name)} {value}: must be greater than {self.above:g}."
        if value < self.at_least:
            return f"{flag(name)} {value}: must be {self.at_least:g} or more."
        if value > self.at_most:
            return f"{flag(name)} {value}: must be at most {self.at_most:.10g}."
        return None


def _option(group: str, help: str, **settings: Any) -> Any:
    return dataclasses.field(default=None, metadata={"option": Option(help, group, **settings)})


@dataclass(frozen=True)
class TrainOptions:
    """Options that a user has set; None: not set. Lengths are in kimg (1000 images seen by D)."""

    # fmt: off
    data: str | None = _option(
        DATA, "Images: a folder or a zip.", shown="required unless resuming", metavar="DIR|ZIP")
    mirror: bool | None = _option(DATA, "Train on mirrored images as well.", default=False)
    fit: str | None = _option(
        DATA, "How images of another size are fitted to the resolution.", default="crop", choices=FITS)
    cond: bool | None = _option(
        DATA, "Use class labels. Changes a checkpoint that has them otherwise.",
        shown="as the checkpoint; no labels with --scratch")
    labels: str | None = _option(
        DATA, "Labels from dataset.json, or one class for each folder of images.", default="file",
        choices=LABELS)

    resume: str | None = _option(
        SHAPE, "Checkpoint to start from: a file, a name of `finetune checkpoints`, or a URL. A run folder, "
        "or its training-state file, resumes that run exactly.", default="", metavar="NETWORK|RUN")
    scratch: str | None = _option(
        SHAPE, "Start from random weights instead of a checkpoint.", default="", choices=FAMILIES)
    resolution: int | None = _option(
        SHAPE, "Resolution (longer side), a power of two: required with --scratch; changes a StyleGAN2 "
        "checkpoint.",
        shown="as the checkpoint", at_least=8, at_most=1 << 14)
    channels: int | None = _option(
        SHAPE, "Image channels: 1 (gray), 3 (RGB) or 4 (RGBA); changes the checkpoint.",
        shown="as the checkpoint; 3 with --scratch", choices=CHANNELS, metavar="1|3|4")
    classes: str | None = _option(
        SHAPE, "Class embeddings, if the data set has other classes than the "
        "checkpoint.", default="", shown="refuse", choices=("keep", "extend", "fresh"))
    new_d: bool | None = _option(
        SHAPE, "Start with a new discriminator; needed if the file has none.", default=False)
    d_warmup_kimg: float | None = _option(
        SHAPE, "With --new-d: kimg that D trains alone.", shown="10, at most a tenth of --kimg", at_least=0)
    cbase: int | None = _option(
        SHAPE, "With --scratch: capacity, channels × resolution.", shown="16384 or 32768", above=0,
        at_most=1 << 24)
    cmax: int | None = _option(SHAPE, "With --scratch: maximum channels of a layer.", shown="512", above=0,
        at_most=1 << 16)
    map_depth: int | None = _option(
        SHAPE, "With --scratch: layers of the mapping network.", shown="8 for StyleGAN2, 2 for StyleGAN3",
        above=0, at_most=64)
    z_dim: int | None = _option(
        SHAPE, "With --scratch: dimensions of z, and of w.", shown="512", above=0, at_most=1 << 16)

    recipe: str | None = _option(
        RECIPE, "The images: the checkpoint's own (improve), others (adapt), very few (few-shot); "
        "custom uses published formulas alone.", default="auto", choices=RECIPES)
    kimg: float | None = _option(
        RECIPE, "Training length in thousands of images.",
        shown="1000; 200 below 2,000 images; 5000 with --scratch", above=0)
    batch: int | None = _option(RECIPE, "Total batch size.", shown="by resolution", above=0)
    batch_gpu: int | None = _option(
        RECIPE, "Per-device micro-batch size (gradient accumulation); auto: the largest that fits, found by "
        "a trial on a GPU.", shown="auto", metavar="INTEGER|auto", at_least=0)
    gamma: float | None = _option(
        RECIPE, "R1 regularization weight.", shown="by recipe, resolution and batch size", at_least=0)
    glr: float | None = _option(RECIPE, "Learning rate of the generator.", shown="by recipe", above=0)
    dlr: float | None = _option(RECIPE, "Learning rate of the discriminator.", shown="by recipe", above=0)
    lr_warmup_kimg: float | None = _option(
        RECIPE, "Linear warm-up of both learning rates.", shown="100 steps; 0 with custom and --scratch",
        at_least=0)
    ema_kimg: float | None = _option(
        RECIPE, "Half-life of G_ema, the exported generator.", shown="batch × 10/32", above=0)
    freezed: int | None = _option(
        RECIPE, "Freeze this many layers of the discriminator (FreezeD).", shown="0; few-shot: 40 %",
        at_least=0)
    aug: str | None = _option(
        RECIPE, "Augmentation: adaptive (ADA), none, or with the fixed probability --p.",
        shown="ada; improve: noaug from 50,000 images on",
        choices=("ada", "noaug", "fixed"))
    target: float | None = _option(
        RECIPE, "ADA target.", shown="0.6, or as published", at_least=0, at_most=1)
    p: float | None = _option(
        RECIPE, "Probability of --aug fixed.", shown="required with --aug fixed", at_least=0, at_most=1)
    augpipe: str | None = _option(
        RECIPE, "Augmentations: blit, geometry, color, filter, noise, cutout, or several by their initials.",
        default="bgc", choices=tuple(AUGPIPES))

    sd_preset: str | None = _option(
        DISTILLATION, "Defaults of the options below: those measured here, or the settings of the method's "
        "authors (LPIPS-VGG, augmented pairs, every step, all pixels, a fixed weight).", default="measured",
        choices=("measured", "authors"))
    sd_weight: DistillWeight | None = _option(  # noqa: RUF009
        DISTILLATION, "Weight of the self-distillation loss; 0 disables it, and the distance is only logged. "
        "auto:0.1 keeps its gradient at a tenth of the adversarial one.",
        shown="auto:1; few-shot: 0; ms-ssim, custom and --scratch: auto:0.1; authors: 1",
        metavar="WEIGHT|auto:RATIO")
    sd_backbone: str | None = _option(
        DISTILLATION, "Perceptual distance between student and teacher.",
        shown="lpips-vgg; ms-ssim with --sd-weight 0", choices=BACKBONES)
    sd_augment: bool | None = _option(
        DISTILLATION, "Flip, turn by 5° or shift by 1 % at most, by one draw for student and teacher, before "
        "they are compared.", shown="no-sd-augment; authors: sd-augment")
    sd_interval: int | None = _option(
        DISTILLATION, "Apply the loss every k-th step, k times as strong.",
        shown="4; 1 for l2 and authors; 64 with --sd-weight 0", above=0)
    sd_teacher: str | None = _option(
        DISTILLATION, "The teacher: an EMA of G, or the checkpoint itself.", default="ema",
        choices=("ema", "initial"))
    sd_teacher_kimg: float | None = _option(
        DISTILLATION, "Half-life of a separate EMA for the teacher; 0: use G_ema.", default=0.0, at_least=0)

    device: str | None = _option(
        MACHINE, "auto, cpu, cuda, cuda:1 or mps.", default="auto", metavar="NAME")
    precision: str | None = _option(
        MACHINE, "auto: float16 layers as the checkpoint has them on CUDA, float32 elsewhere; fp32: float32 "
        "everywhere; tf32: as auto, with TF32 convolutions and matrix products; fp16: as auto, with float16 "
        "layers even if the checkpoint has none.", default="auto", choices=PRECISIONS)
    graphs: str | None = _option(MACHINE, "CUDA graphs for the parts of a step, on a GPU.", default="auto",
        choices=GRAPHS)
    deterministic: bool | None = _option(
        MACHINE, "Bit-exact results for repeated and resumed runs on one GPU; slower. CPU runs are always "
        "bit-exact.", default=False)
    workers: int | None = _option(
        MACHINE, "Processes that decode images; 0: the main process.", shown="0 on a CPU, up to 4 on a GPU",
        at_least=0)
    seed: int | None = _option(MACHINE, "Random seed.", default=0, at_least=0, at_most=MAX_SEED)

    outdir: str | None = _option(
        RECORDS, "Where the run folder is created.", default="runs", metavar="DIR")
    tick: float | None = _option(
        RECORDS, "Kimg between log lines.", shown="4, at most a 20th of short runs", above=0)
    snap: int | None = _option(RECORDS, "Ticks between snapshots.", shown="about five in a run", above=0)
    keep: int | None = _option(
        RECORDS, "Keep this many snapshots, the newest; 0: all.", default=0, at_least=0)
    save_every_min: float | None = _option(
        RECORDS, "Minutes between saves of the training state; 0: with snapshots only.", default=30.0,
        at_least=0)
    on_divergence: str | None = _option(
        RECORDS, "If training diverges: stop, return to the last state with half the learning rates (at most "
        "three times), or ignore it.", default="stop", choices=("stop", "rollback", "ignore"))
    metrics: str | None = _option(
        RECORDS, "Metrics to compute at each snapshot, named as in `finetune evaluate`, or none. The first "
        "decides which snapshot is best.", shown="random-fid; few-shot: and memorization", metavar="LIST")
    metrics_num: int | None = _option(
        RECORDS, "Generated images for the metrics.",
        shown="1000 on a CPU, fewer below 5 kimg; 5000 on a GPU", at_least=2)
    # fmt: on

    def __post_init__(self) -> None:
        for name in ("data", "resume", "outdir"):  # shells leave the ~ of `--resume=~/run` alone
            if path := getattr(self, name):
                object.__setattr__(self, name, os.path.expanduser(path))
        if self.sd_weight is not None:
            object.__setattr__(self, "sd_weight", DistillWeight.parse(self.sd_weight))
        if self.batch_gpu is not None:
            object.__setattr__(self, "batch_gpu", parse_micro_batch(self.batch_gpu))

    def given(self) -> dict[str, Any]:
        """Return the options that were asked for."""
        return {name: value for name in OPTIONS if (value := getattr(self, name)) not in (None, "")}

    def with_defaults(self) -> TrainOptions:
        """Return the options with every default that depends on nothing."""
        return TrainOptions(**{name: each.default for name, each in OPTIONS.items()} | self.given())

    def validate(self, run: TrainOptions | None = None) -> None:
        """Raise one ConfigError that lists every problem: its flag, the value seen and what to do.

        run: the options in effect, if they are more than what was asked: those of a resumed run.
        """
        problems = [OPTIONS[name].problem(name, value) for name, value in self.given().items()]
        problems += _combination_problems(self, run or self)
        if found := [problem for problem in problems if problem]:
            raise ConfigError(found)


OPTIONS: dict[str, Option] = {
    field.name: field.metadata["option"] for field in dataclasses.fields(TrainOptions)
}


def _combination_problems(asked: TrainOptions, run: TrainOptions) -> list[str | None]:
    """Return what in `asked` contradicts the options of the run, or has no effect with them."""

    def each(names: tuple[str, ...], why: str, *, zero: bool = True) -> list[str | None]:
        """Complain about each of these options that was asked for."""
        values = {name: getattr(asked, name) for name in names}
        return [
            f"{flag(name)}{'' if value is True else f' {value}'}: {why}"
            for name, value in values.items()
            if value not in (None, "", False) or (zero and value == 0 and value is not False)
        ]

    problems: list[str | None] = []
    size = asked.resolution
    if size is not None and size >= 8 and size & (size - 1):
        problems.append(f"--resolution {size}: must be a power of two, 8 or more.")
    if (run.batch or 0) > 0 and (run.batch_gpu or 0) > 0 and run.batch % run.batch_gpu:  # type: ignore[operator]
        problems.append(f"--batch {run.batch}: must be a multiple of --batch-gpu {run.batch_gpu}.")
    if not run.data:
        known = f" {run.resume} is not a run folder with a training state." if run.resume else ""
        problems.append(f"--data: missing. Pass the folder or zip with the images.{known}")
    if asked.resume == "" and not run.scratch:
        problems.append("--resume: empty. Pass the checkpoint to start from.")
    if bool(run.resume) == bool(run.scratch):
        problems.append(
            "Use either --resume PICKLE (start from a checkpoint) or --scratch FAMILY (start without one)."
        )
    if not run.scratch:
        problems += each(SCRATCH_ONLY, "only for --scratch, since a checkpoint has its own.")
    else:
        if run.resolution is None:
            problems.append("--resolution: needed with --scratch (there is no checkpoint to take it from).")
        elif run.cbase is not None and 0 < run.cbase < run.resolution:
            problems.append(
                f"--cbase {run.cbase}: must be at least --resolution {run.resolution}; otherwise, layers "
                "have no channels."
            )
        if run.sd_teacher == "initial":
            problems.append("--sd-teacher initial: there is no initial checkpoint with --scratch. Use ema.")
        why = "only for --resume, not for --scratch."
        problems += each(RESUME_ONLY, why, zero=False)
        if asked.scratch and asked.recipe not in (None, "auto"):  # a resumed run notes it
            problems.append(f"--recipe {asked.recipe}: has no effect with --scratch, which has its own.")
    if run.metrics == "none":
        problems += each(("metrics_num",), "has no effect with --metrics none.")
    if run.cond is False:
        problems += each(("classes",), "has no effect with --no-cond, which drops the classes.")
        if run.labels == "folders":
            problems.append("--labels folders: has no effect with --no-cond, which trains without labels.")
    if run.new_d:
        problems += each(("freezed",), "would freeze random layers with --new-d.", zero=False)
    elif not run.scratch:
        problems += each(("d_warmup_kimg",), "has no effect without --new-d.", zero=False)
    if run.sd_teacher == "initial":
        problems += each(("sd_teacher_kimg",), "no effect with --sd-teacher initial.", zero=False)
    if run.aug == "fixed" and run.p is None:
        problems.append("--aug fixed: set the probability with --p, such as --p 0.2.")
    if run.aug != "fixed":
        other = f"with --aug {run.aug}" if run.aug else "without --aug fixed"
        problems += each(("p",), f"has no effect {other}. Use --aug fixed.")
    if run.aug not in (None, "ada"):
        problems += each(("target",), f"has no effect with --aug {run.aug}. Use --aug ada.")
    if run.aug == "fixed" and run.p == 0:
        problems += each(("augpipe",), "has no effect with --p 0.")
    if run.aug == "noaug":
        problems += each(("augpipe",), "has no effect with --aug noaug.")
    return problems
