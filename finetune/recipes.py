"""The defaults of a training run, each from the checkpoint, the resolution, the machine or the data set.

`RULES` is the table of them, in the order in which they are decided: a rule may use the values of earlier
rules.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from finetune.config import TrainConfig
from finetune.errors import ConfigError
from finetune.options import OPTIONS, DistillWeight, TrainOptions

# Sources of the numbers.
WARMUP = "benchmarks/results/ab_warmup_epyc-2core_202611.md"
AB = "benchmarks/results/ab_improve-photos_epyc-2core_202611.md"
SMALL_RATIO = "benchmarks/results/ab_small-ratio-photos_amd-epyc-2core_202611.md"
ADAPT = "benchmarks/results/ab_adapt-photos_epyc-2core_202611.md"
FEW_SHOT = "benchmarks/results/ab_few-shot-photos_epyc-2core_202611.md"
UNVERIFIED = "default (unverified)"
TRAINED = "published settings of {name_published}"
USER = "user-specified"
AUTHORS = "public code of the authors of 2605.08577"

# By ratio, because distances of different backbones differ by orders of magnitude. Compared with none in
# AB, ADAPT and FEW_SHOT, at the interval below, on small networks.
SD_WEIGHT = DistillWeight(1.0, is_ratio=True)
CAREFUL_SD_WEIGHT = DistillWeight(0.1, is_ratio=True)
ADA_TARGET = 0.6
# 1/(1 - beta2): the memory of Adam's averages. Half of what Ma and Yarats take; measured in WARMUP.
WARMUP_STEPS = 100
FEW_IMAGES, SOME_IMAGES, MANY_IMAGES = 1000, 2000, 50_000

# The recipes. A run without a checkpoint has its own.
SCRATCH = "scratch"
IMPROVE, TRANSFER = ("improve",), ("adapt", "few-shot")
CHECKPOINT = (*IMPROVE, *TRANSFER, "custom")
ANY = (*CHECKPOINT, SCRATCH)


@dataclass(frozen=True)
class Published:
    """Published settings of the training of a checkpoint of the catalog.

    trained, finetune: (gamma, batch) of its own training, and of fine-tuning it; glr, dlr, target: learning
    rates and ADA's target of its own training. None if unknown.
    """

    name: str
    trained: tuple[float, int] | None = None
    finetune: tuple[float, int] | None = None
    glr: float | None = None
    dlr: float | None = None
    target: float | None = None

    def gamma(self, which: str, batch: int) -> float | None:
        """Return the R1 weight for another batch; it is proportional to 1/batch."""
        known = getattr(self, which)
        return None if known is None else float(f"{known[0] * known[1] / batch:.4g}")


@dataclass(frozen=True)
class RunFacts:
    """Facts about a run, known before it starts.

    resolution: of the longer side. base_shape: height and width of an image whose longer side is 4.
    num_images: images before mirroring. group_size: images that D compares with each other, 1 if it takes any
    number. num_freezable: layers that FreezeD can freeze. converts_d: its first layers are new or converted,
    for another resolution or other channels. published: settings in the catalog, for a checkpoint that is in
    it. has_effnet: the weights of EfficientNet-Lite0 are installed.
    """

    family: str
    resolution: int
    channels: int
    c_dim: int
    num_images: int
    device_type: str
    cpu_count: int
    from_scratch: bool
    group_size: int = 4
    num_freezable: int | None = None
    converts_d: bool = False
    gpu_memory_gib: float | None = None
    published: Published | None = None
    num_processes: int = 1
    base_shape: tuple[int, int] = (4, 4)
    has_effnet: bool = False

    @property
    def num_pixels(self) -> int:
        """Return the pixels of an image."""
        return self.resolution**2 * math.prod(self.base_shape) // 16


@dataclass(frozen=True)
class Reason:
    """One line of the table printed at the start: an option, its value, and why it has that value."""

    name: str
    value: Any
    why: str


@dataclass(frozen=True)
class Rule:
    """The value of an option in some recipes. The first rule that applies to an option determines it.

    value: a constant, or a function of the facts and of the options decided before; None passes on to the
    next rule. why: the reason, a template over the same names; empty if the option has no effect. source:
    where the number comes from. when: a further condition.
    """

    option: str
    recipes: tuple[str, ...]
    value: Any
    why: str | Callable[[Any], str]
    source: str = ""
    when: Callable[[Any], bool] = lambda run: True

    def decide(self, run: SimpleNamespace) -> tuple[Any, str] | None:
        """Return value and reason for a run, None if the rule does not apply."""
        if run.recipe not in self.recipes or not self.when(run):
            return None
        value = self.value(run) if callable(self.value) else self.value
        if value is None:
            return None
        why = self.why(run) if callable(self.why) else self.why
        text = f"{why}; {self.source}" if self.source else why
        return value, text.format(**vars(run) | {"value": value})


def _is_stylegan2(run: Any) -> bool:
    return run.family == "stylegan2"


def _as_authors(run: Any) -> bool:
    return run.sd_preset == "authors"


def _logs_only(run: Any) -> bool:
    return not run.sd_weight


def _on_gpu(run: Any) -> bool:
    return run.device_type == "cuda"


def _round(value: float) -> float:
    return float(f"{value:.4g}")


def _batch(run: Any) -> int:
    size = max(8, 4096 // run.resolution) if _has_batch_rule(run) else 32
    return fair(size, run) if run.num_processes > 1 else size


def _has_batch_rule(run: Any) -> bool:
    return _is_stylegan2(run) and run.resolution > 128


def _ranks(run: Any) -> str:
    return f", split evenly among {run.num_processes} ranks" if run.num_processes > 1 else ""


def _per_rank(run: Any) -> int:
    return max(1, run.batch // run.num_processes)


def _micro_batch(run: Any) -> int:
    """Return a divisor of the batch per rank that fits into the groups of D; on a GPU, trials follow."""
    sizes = micro_batch_sizes(_per_rank(run), run.group_size)
    return max(size for size in sizes if _on_gpu(run) or size <= 32)


def _why_micro_batch(run: Any) -> str:
    why, own = "images in memory at once", _per_rank(run)
    if _on_gpu(run):
        why += "; the largest that fits is found by trial at the start"
    if run.num_processes > 1:
        why += f"; batch size {own} on each of {run.num_processes} ranks"
    if _micro_batch(run) < min(own, run.group_size):
        why += f"; batch {own} does not divide into the groups of {run.group_size} that D compares"
    return why


def _published(name: str) -> Callable[[Any], Any]:
    return lambda run: getattr(run.published, name, None)


def _published_gamma(which: str) -> Callable[[Any], Any]:
    return lambda run: run.published and run.published.gamma(which, run.batch)


def _gamma(run: Any) -> float:
    return _round(r1_gamma(run.family, run.num_pixels, run.batch))


def _why_gamma(run: Any) -> str:
    height, width = (run.resolution * side // 4 for side in run.base_shape)
    area, px = ("res²", width) if height == width else ("width·height", f"{width}×{height}")
    return f"0.0002 {area}/batch at {px} px, batch {run.batch}"


def tick_kimg(kimg: float) -> float:
    """Return the kimg between log lines: 4, or a 20th of a run shorter than 100 kimg."""
    return 4.0 if kimg >= 100 else kimg / 20


def _metrics_num(run: Any) -> int:
    """Return 1000, or 200 for each kimg of a shorter run: in all, no more images than it trains on."""
    return round(min(1000, max(200, 200 * run.kimg)))


def _why_metrics_num(run: Any) -> str:
    return "" if run.metrics == "none" else "few generated images: compare only equal numbers"


# fmt: off
RULES = (
    # Shape. Surgery is listed if the user asked for it; an architecture belongs to --scratch.
    Rule("cond", ANY, True, "--labels folders", when=lambda run: run.labels == "folders"),
    Rule("cond", (SCRATCH,), lambda run: run.c_dim > 0, "from scratch: labels only on request"),
    Rule("cond", CHECKPOINT, lambda run: run.c_dim > 0, "as the checkpoint"),
    Rule("resolution", ANY, lambda run: run.resolution, ""),
    Rule("channels", ANY, lambda run: run.channels, ""),
    Rule("classes", ANY, "", ""),
    Rule("new_d", ANY, False, ""),
    Rule("cbase", CHECKPOINT, 0, ""),
    Rule("cbase", (SCRATCH,), 16384, "published size",
         when=lambda run: _is_stylegan2(run) and run.resolution < 512),
    Rule("cbase", (SCRATCH,), 32768, "published size"),
    Rule("cmax", CHECKPOINT, 0, ""),
    Rule("cmax", (SCRATCH,), 512, "published size"),
    Rule("map_depth", CHECKPOINT, 0, ""),
    Rule("map_depth", (SCRATCH,), 8, "mapping layers of {family}", when=_is_stylegan2),
    Rule("map_depth", (SCRATCH,), 2, "mapping layers of {family}"),
    Rule("z_dim", CHECKPOINT, 0, ""),
    Rule("z_dim", (SCRATCH,), 512, "published size"),

    # Length and batch.
    Rule("kimg", CHECKPOINT, 200.0, "images: {num_images}; short run, a small data set overfits", UNVERIFIED,
         when=lambda run: run.num_images < SOME_IMAGES),
    Rule("kimg", CHECKPOINT, 1000.0, "{num_images} images", UNVERIFIED),
    Rule("kimg", (SCRATCH,), 5000.0, "from scratch", UNVERIFIED),
    Rule("batch", ANY, _batch, lambda run: "{family} at {resolution} px: 4096/res" + _ranks(run),
         "published rule for one GPU, the minimum of 8 is unverified", when=_has_batch_rule),
    Rule("batch", ANY, _batch, lambda run: "{family} at {resolution} px" + _ranks(run), "published runs"),
    Rule("batch_gpu", ANY, _micro_batch, _why_micro_batch),

    # Losses and optimizers.
    Rule("gamma", IMPROVE, _published_gamma("trained"), "as this checkpoint was trained", TRAINED),
    Rule("gamma", TRANSFER, _published_gamma("finetune"), "as this checkpoint is fine-tuned", TRAINED),
    Rule("gamma", ANY, _gamma, _why_gamma, "published rule for StyleGAN2", when=_is_stylegan2),
    Rule("gamma", ANY, _gamma, "res²/(1024 batch) at {resolution} px, batch {batch}",
         "fits the published values for StyleGAN3"),
    Rule("glr", IMPROVE + TRANSFER, _published("glr"), "as this checkpoint was trained", TRAINED),
    Rule("glr", ANY, 0.002, "{family}", "published rate", when=_is_stylegan2),
    Rule("glr", ANY, 0.0025, "{family}", "published rate"),
    Rule("dlr", IMPROVE + TRANSFER, _published("dlr"), "as this checkpoint was trained", TRAINED),
    Rule("dlr", ANY, 0.002, "discriminator", "published rate"),
    Rule("lr_warmup_kimg", IMPROVE + TRANSFER,
         lambda run: _round(min(WARMUP_STEPS * run.batch / 1000, run.kimg / 3)),
         f"linear warm-up over {WARMUP_STEPS} steps, at most a third of the run", WARMUP),
    Rule("lr_warmup_kimg", ("custom", SCRATCH), 0.0, "no warm-up", "as published"),
    Rule("ema_kimg", ANY, lambda run: run.batch * 10 / 32, "half-life of G_ema: batch·10/32 = {value:g} kimg",
         "published rule"),

    # Data and discriminator.
    Rule("mirror", ANY, False, "images are mirrored only on request"),
    Rule("d_warmup_kimg", ANY, 0.0, "", when=lambda run: not run.new_d),
    Rule("d_warmup_kimg", ANY, lambda run: min(10.0, run.kimg / 10), "D trains alone first", UNVERIFIED),
    Rule("freezed", (SCRATCH,), 0, ""),
    Rule("freezed", ANY, 0, "no effect on a new discriminator", when=lambda run: run.new_d),
    Rule("freezed", ANY, 0, "the first layers of D are new or converted", when=lambda run: run.converts_d),
    Rule("freezed", ("few-shot",), lambda run: min(10, round(0.4 * run.num_freezable)),
         "40 % of {num_freezable} layers of D; images: {num_images}",
         "published advice: 10 or 13 of 25 at 1024 px", when=lambda run: bool(run.num_freezable)),
    Rule("freezed", ANY, 0, "all of D trains", UNVERIFIED),
    Rule("aug", IMPROVE, "noaug", "{num_images} images are too many to overfit",
         "published runs on FFHQ (70,000 images)", when=lambda run: run.num_images >= MANY_IMAGES),
    Rule("aug", ANY, "ada", "augment just enough to prevent D from overfitting", "ADA"),
    Rule("p", ANY, 0.0, ""),
    Rule("target", ANY, ADA_TARGET, "", when=lambda run: run.aug != "ada"),
    Rule("target", IMPROVE, _published("target"), "as this checkpoint was trained", TRAINED),
    Rule("target", ANY, ADA_TARGET, "mean sign of D on real images", "ADA"),
    Rule("augpipe", ANY, OPTIONS["augpipe"].default, "", when=lambda run: run.aug == "noaug"),
    Rule("augpipe", ANY, OPTIONS["augpipe"].default, "blit, geometry and color, as in the ADA paper"),

    # Self-distillation.
    Rule("sd_preset", ANY, OPTIONS["sd_preset"].default, ""),
    Rule("sd_weight", ANY, DistillWeight(1.0), "fixed, as in the authors' code; their value is not public",
         UNVERIFIED, when=_as_authors),
    Rule("sd_weight", (*IMPROVE, "adapt"), CAREFUL_SD_WEIGHT, "a larger ratio costs fidelity with MS-SSIM",
         SMALL_RATIO, when=lambda run: run.sd_backbone == "ms-ssim"),
    Rule("sd_weight", IMPROVE, SD_WEIGHT, "gradient norm equal to the adversarial one", AB),
    Rule("sd_weight", ("adapt",), SD_WEIGHT, "gradient norm equal to the adversarial one", ADAPT),
    Rule("sd_weight", ("few-shot",), DistillWeight(0.0), "self-distillation costs fidelity with few images",
         FEW_SHOT),
    Rule("sd_weight", ANY, CAREFUL_SD_WEIGHT, "gradient norm a tenth of the adversarial one", UNVERIFIED),
    Rule("sd_backbone", ANY, "ms-ssim", "distance to G_ema, for the log; needs no weights", when=_logs_only),
    Rule("sd_backbone", ANY, "lpips-vgg", "perceptual distance to the teacher"),
    Rule("sd_augment", ANY, True, "the same change of student and teacher", AUTHORS, when=_as_authors),
    Rule("sd_augment", ANY, False, ""),
    Rule("sd_teacher", ANY, OPTIONS["sd_teacher"].default, "", when=_logs_only),
    Rule("sd_teacher", ANY, OPTIONS["sd_teacher"].default, "the student is regularized toward its EMA"),
    Rule("sd_teacher_kimg", ANY, 0.0, ""),
    Rule("sd_interval", ANY, 64, "a distance for the log every 64th step", when=_logs_only),
    Rule("sd_interval", ANY, 1, "every step", AUTHORS, when=_as_authors),
    Rule("sd_interval", ANY, 1, "every step: l2 is cheap", when=lambda run: run.sd_backbone == "l2"),
    Rule("sd_interval", ANY, 4, "every 4th step, four times as strong", AB),

    # Machine and records.
    Rule("precision", ANY, "auto", "float16 layers as the networks have them", when=_on_gpu),
    Rule("precision", ANY, "auto", "float32 on {device_type}"),
    Rule("graphs", ANY, "auto", "phases of a step are replayed as CUDA graphs", when=_on_gpu),
    Rule("graphs", ANY, "auto", ""),
    Rule("tick", ANY, lambda run: tick_kimg(run.kimg), "kimg between log lines"),
    Rule("snap", ANY, lambda run: max(1, round(run.kimg / run.tick / 5)), "about five snapshots"),
    Rule("metrics", ("few-shot",), "random-fid,memorization", "the best snapshot; copies of the images",
         when=lambda run: run.has_effnet),
    Rule("metrics", ANY, "random-fid", "keeps the best snapshot; independent of the loss, needs no download"),
    Rule("metrics_num", ANY, 5000, _why_metrics_num, when=_on_gpu),
    Rule("metrics_num", ANY, _metrics_num, _why_metrics_num),
    Rule("workers", ANY, lambda run: min(4, run.cpu_count), "decode in parallel with the GPU", when=_on_gpu),
    Rule("workers", ANY, 0, "the CPU is busy training"),
)
# fmt: on


def recipe_of(asked: TrainOptions, facts: RunFacts) -> tuple[str, str]:
    """Return the recipe of a run, "scratch" without a checkpoint, and why; no reason without a choice."""
    if facts.from_scratch:
        return SCRATCH, ""
    if asked.recipe not in (None, "auto"):
        return str(asked.recipe), USER
    if facts.num_images < FEW_IMAGES:
        return "few-shot", f"fewer than {FEW_IMAGES} images ({facts.num_images})"
    return "adapt", "use --recipe improve for the checkpoint's own images"


def r1_gamma(family: str, num_pixels: int, batch: int) -> float:
    """Return the R1 weight; num_pixels: res², or width·height of images that are not square.

    StyleGAN2: 0.0002 res²/batch. StyleGAN3: one formula for 0.5, 2, 8, 32 at 128…1024 px (batch 32).
    Source: the published settings follow weight ∝ pixels / batch in both families.
    """
    per_pixel = 0.0002 if family == "stylegan2" else 0.5 * 32 / 128**2
    return per_pixel * num_pixels / batch


def fair(batch: int, facts: Any) -> int:
    """Return the next larger batch that divides evenly among ranks, in whole groups of D."""
    unit = facts.num_processes * facts.group_size
    return math.ceil(batch / unit) * unit


def can_group(count: int, group_size: int) -> bool:
    """Return whether D can take `count` images at once: one group, or whole groups of `group_size`."""
    return count <= group_size or count % group_size == 0


def micro_batch_sizes(batch: int, group_size: int) -> list[int]:
    """Return the micro-batches, ascending, that the batch of a rank and the groups of D can be split into."""
    return [size for size in range(1, batch + 1) if batch % size == 0 and can_group(size, group_size)]


def resolve(asked: TrainOptions, facts: RunFacts) -> tuple[TrainConfig, list[Reason]]:
    """Give every option of valid options a value, and return why each that has an effect has its value.

    Raises ConfigError if a new D would train alone for the whole run.
    """
    recipe, why = recipe_of(asked, facts)
    reasons = [Reason("recipe", recipe, why)] if why else []
    given = asked.given() | {"recipe": recipe, "resolution": facts.resolution, "channels": facts.channels}
    name_published = facts.published.name if facts.published else ""
    run = SimpleNamespace(**vars(facts), num_pixels=facts.num_pixels, name_published=name_published)
    for name, value in (vars(asked.with_defaults()) | given).items():
        setattr(run, name, value)
    for name in dict.fromkeys(rule.option for rule in RULES):
        value, why = getattr(asked, name), USER
        if value is None or (name == "batch_gpu" and not value):
            value, why = derive(name, run)
        setattr(run, name, value)
        if name == "graphs" and why == USER and not _on_gpu(run):
            why = "no effect: CUDA graphs need a GPU"
        if why:
            reasons.append(Reason(name, value, why))
    if run.new_d and run.d_warmup_kimg >= run.kimg:
        raise ConfigError(
            f"--d-warmup-kimg {run.d_warmup_kimg:g}: D would train alone for all {run.kimg:g} kimg. "
            "Choose fewer, or a larger --kimg."
        )
    return TrainConfig(**{name: getattr(run, name) for name in OPTIONS}), reasons


def derive(option: str, run: SimpleNamespace) -> tuple[Any, str]:
    """Return the value that `RULES` give an option, with the reason and its source."""
    for rule in RULES:
        if rule.option == option and (decided := rule.decide(run)) is not None:
            return decided
    raise AssertionError(f"no rule gives {option} a value in {run.recipe}")
