"""The defaults of a training run, each from the checkpoint, the resolution, the machine or the data set.

What depends on the job (`--recipe`) stands in `ROWS`, one row a number, with where the number comes from.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from finetune.config import TrainConfig, distils

WARMUP = "benchmarks/results/ab_warmup_epyc-2core_202611.md"
AB = "benchmarks/results/ab_improve_epyc-2core_202611.md"
ADAPT = "benchmarks/results/ab_adapt_epyc-2core_202611.md"
# By ratio, because distances of different backbones differ by orders of magnitude. Compared with none in
# AB and ADAPT, at the interval below, on small networks.
SD_WEIGHT = "auto:1"
CAREFUL_SD_WEIGHT = "auto:0.1"
ADA_TARGET = 0.6
# 1/(1 - beta2): so many steps Adam's averages remember. Half of what Ma and Yarats take; measured there.
WARMUP_STEPS = 100


@dataclass(frozen=True)
class Published:
    """What is publicly stated about the training of a checkpoint of the catalogue.

    trained, finetune: (gamma, batch) of its own training, and of fine-tuning it; glr, dlr, target: learning
    rates and ADA's target of its own training. None where nothing is known.
    """

    name: str
    trained: tuple[float, int] | None = None
    finetune: tuple[float, int] | None = None
    glr: float | None = None
    dlr: float | None = None
    target: float | None = None

    def gamma(self, which: str, batch: int) -> float | None:
        """The R1 weight for another batch: the weight goes with 1/batch."""
        known = getattr(self, which)
        return None if known is None else float(f"{known[0] * known[1] / batch:.4g}")


@dataclass(frozen=True)
class Facts:
    """What is known about a run before it starts.

    num_images: pictures before mirroring. group_size: images that D compares with each other (minibatch
    standard deviation), 1 where every number of them goes. num_freezable: layers that FreezeD can freeze.
    published: what the catalogue knows, for a checkpoint that is in it.
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
    gpu_memory_gib: float | None = None
    published: Published | None = None
    num_processes: int = 1


@dataclass(frozen=True)
class Reason:
    """One line of the table printed at the start: an option, its value, and why it has that value."""

    name: str
    value: Any
    why: str


@dataclass(frozen=True)
class Row:
    """One number of a recipe. The first row whose recipe and condition fit gives an option its value.

    `value` gets the facts and the batch; None passes on to the next row. `why` may quote fields of the facts,
    the batch and the value.
    """

    option: str
    recipes: tuple[str, ...]
    value: Callable[[Facts, int], Any]
    why: str
    source: str
    only_if: Callable[[Facts], bool] = lambda facts: True


FEW_PICTURES, SOME_PICTURES, MANY_PICTURES = 1000, 2000, 50_000
TRANSFER = ("adapt", "few-shot")
EVERY = ("improve", "adapt", "few-shot", "custom")
SCRATCH = "scratch"  # the job of a run without a checkpoint
OURS = "our choice, not measured yet"
AS_TRAINED = ("as this checkpoint was trained", "published settings of {published}")


def _published(name: str) -> Callable[[Facts, int], Any]:
    return lambda facts, batch: getattr(facts.published, name, None)


def _is_stylegan2(facts: Facts) -> bool:
    return facts.family == "stylegan2"


def _gamma(facts: Facts, batch: int) -> float:
    return float(f"{r1_gamma(facts.family, facts.resolution, batch):.4g}")


ROWS = (
    Row(
        "kimg",
        EVERY,
        lambda facts, batch: 200.0,
        "{num_images} pictures: few pictures are soon learnt by heart",
        OURS,
        lambda facts: facts.num_images < SOME_PICTURES,
    ),
    Row("kimg", EVERY, lambda facts, batch: 1000.0, "{num_images} pictures", OURS),
    Row("kimg", (SCRATCH,), lambda facts, batch: 5000.0, "from scratch", OURS),
    Row(
        "batch",
        (*EVERY, SCRATCH),
        lambda facts, batch: max(8, 4096 // facts.resolution),
        "{family} at {resolution} px: 4096/res",
        "published rule for one GPU; at least 8, our choice",
        lambda facts: _is_stylegan2(facts) and facts.resolution > 128,
    ),
    Row("batch", (*EVERY, SCRATCH), lambda facts, batch: 32, "{family} at {resolution} px", "published runs"),
    Row(
        "gamma",
        ("improve",),
        lambda facts, batch: facts.published and facts.published.gamma("trained", batch),
        *AS_TRAINED,
    ),
    Row(
        "gamma",
        TRANSFER,
        lambda facts, batch: facts.published and facts.published.gamma("finetune", batch),
        "as this checkpoint is fine-tuned",
        "published settings of {published}",
    ),
    Row(
        "gamma",
        (*EVERY, SCRATCH),
        _gamma,
        "0.0002 res²/batch at {resolution} px, batch {batch}",
        "published rule for StyleGAN2",
        _is_stylegan2,
    ),
    Row(
        "gamma",
        (*EVERY, SCRATCH),
        _gamma,
        "res²/(1024 batch) at {resolution} px, batch {batch}",
        "a rule that fits what is published for StyleGAN3",
    ),
    Row("glr", ("improve", *TRANSFER), _published("glr"), *AS_TRAINED),
    Row("glr", (*EVERY, SCRATCH), lambda facts, batch: 0.002, "{family}", "published rate", _is_stylegan2),
    Row("glr", (*EVERY, SCRATCH), lambda facts, batch: 0.0025, "{family}", "published rate"),
    Row("dlr", ("improve", *TRANSFER), _published("dlr"), *AS_TRAINED),
    Row("dlr", (*EVERY, SCRATCH), lambda facts, batch: 0.002, "discriminator", "published rate"),
    Row(
        "lr_warmup_kimg",
        ("improve", *TRANSFER),
        lambda facts, batch: WARMUP_STEPS * batch / 1000,
        f"kimg over which rates rise: {WARMUP_STEPS} steps, a third of the run at most",
        WARMUP,
    ),
    Row("lr_warmup_kimg", ("custom", SCRATCH), lambda facts, batch: 0.0, "no warm-up", "as published"),
    Row(
        "ema_kimg",
        (*EVERY, SCRATCH),
        lambda facts, batch: batch * 10 / 32,
        "half-life of the exported average: batch·10/32 = {value:g} kimg",
        "published rule",
    ),
    Row(
        "aug",
        ("improve",),
        lambda facts, batch: "noaug",
        "{num_images} pictures are too many to learn by heart",
        "published runs on FFHQ (70,000 pictures)",
        lambda facts: facts.num_images >= MANY_PICTURES,
    ),
    Row(
        "aug",
        (*EVERY, SCRATCH),
        lambda facts, batch: "ada",
        "as much augmentation as D needs not to learn the pictures by heart",
        "ADA",
    ),
    Row("target", ("improve",), _published("target"), *AS_TRAINED),
    Row(
        "target",
        (*EVERY, SCRATCH),
        lambda facts, batch: ADA_TARGET,
        "share of real images D should be sure of",
        "ADA",
    ),
    Row(
        "freezed",
        ("few-shot",),
        lambda facts, batch: min(10, round(0.4 * (facts.num_freezable or 0))),
        "the first of {num_freezable} layers of D know enough for {num_images} pictures",
        "published advice: 10 or 13; at 1024 px there are 25",
        lambda facts: bool(facts.num_freezable),
    ),
    Row("freezed", EVERY, lambda facts, batch: 0, "all of the discriminator learns", OURS),
    Row(
        "sd_weight",
        ("improve",),
        lambda facts, batch: SD_WEIGHT,
        "self-distillation, its gradient as long as the adversarial one",
        AB,
    ),
    Row(
        "sd_weight",
        TRANSFER,
        lambda facts, batch: SD_WEIGHT,
        "self-distillation, its gradient as long as the adversarial one",
        ADAPT,
    ),
    Row(
        "sd_weight",
        ("custom", SCRATCH),
        lambda facts, batch: CAREFUL_SD_WEIGHT,
        "self-distillation, its gradient a tenth of the adversarial one",
        OURS,
    ),
)


def job_of(config: TrainConfig, facts: Facts) -> tuple[str, str]:
    """The recipe that `--recipe` means for these facts, and why."""
    if config.recipe != "auto":
        return config.recipe, "set by hand"
    if facts.num_images < FEW_PICTURES:
        return "few-shot", f"{facts.num_images} pictures are fewer than {FEW_PICTURES}"
    return "adapt", "say --recipe improve where the pictures are the checkpoint's own"


def from_rows(option: str, job: str, facts: Facts, batch: int) -> tuple[Any, str]:
    """The value that the recipe gives an option, with the reason and its source."""
    for row in ROWS:
        if row.option != option or job not in row.recipes or not row.only_if(facts):
            continue
        value = row.value(facts, batch)
        if value is not None:
            name = facts.published.name if facts.published else ""
            words = {**vars(facts), "published": name, "batch": batch, "value": value}
            return value, f"{row.why.format(**words)} ({row.source.format(**words)})"
    raise AssertionError(f"no row gives {option} a value for {job}")


def r1_gamma(family: str, resolution: int, batch: int) -> float:
    """R1 weight: 0.0002 res²/batch for StyleGAN2; StyleGAN3's 0.5, 2, 8, 32 at 128…1024 px (batch 32) as one
    formula.

    Source: the published settings follow weight ∝ pixels / batch in both families.
    """
    per_pixel = 0.0002 if family == "stylegan2" else 0.5 * 32 / 128**2
    return per_pixel * resolution**2 / batch


def fair(batch: int, facts: Facts) -> int:
    """The next larger batch of which each process has an equal share, in whole groups that D compares."""
    unit = facts.num_processes * facts.group_size
    return math.ceil(batch / unit) * unit


def can_group(count: int, group_size: int) -> bool:
    """Whether D can take `count` images at once: they make one group, or fill groups of `group_size`."""
    return count <= group_size or count % group_size == 0


def resolve(config: TrainConfig, facts: Facts) -> tuple[TrainConfig, list[Reason]]:
    """Fill every `None` of a valid config that the run needs, and say why each option has its value."""
    reasons: list[Reason] = []
    filled: dict[str, Any] = {}

    def settle(name: str, default: Any, why: str) -> Any:
        given = getattr(config, name)
        by_hand = given is not None and given != getattr(TrainConfig, name)
        value = default if given is None else given
        filled[name] = value
        reasons.append(Reason(name, value, "set by hand" if by_hand else why))
        return value

    def settle_by_job(name: str) -> Any:
        return settle(name, *from_rows(name, job, facts, filled.get("batch") or 0))

    on_gpu = facts.device_type == "cuda"
    job = SCRATCH
    if not facts.from_scratch:
        job, why = job_of(config, facts)
        filled["recipe"] = job
        reasons.append(Reason("recipe", job, why))
    if facts.from_scratch:
        _settle_architecture(settle, facts)
    origin = "from scratch: labels are used only on request" if facts.from_scratch else "as the checkpoint"
    settle("cond", facts.c_dim > 0, origin)
    _settle_shape(settle, config, facts)
    kimg = settle_by_job("kimg")
    batch, why = from_rows("batch", job, facts, 0)
    if facts.num_processes > 1:
        batch = fair(batch, facts)
        why += f", in equal shares of the {facts.num_processes} processes"
    batch = settle("batch", batch, why)
    # A batch given by hand is cut into parts that divide it, and that D can group; they only bound memory.
    limit = _gpu_batch(facts) if on_gpu else 32
    own = max(1, batch // facts.num_processes)
    sizes = range(1, min(own, limit) + 1)
    part = max(size for size in sizes if own % size == 0 and can_group(size, facts.group_size))
    why = "images in memory at once"
    if on_gpu:
        memory = f" and {facts.gpu_memory_gib:.0f} GiB" if facts.gpu_memory_gib else ""
        why += f", for {facts.resolution} px{memory} (published sizes for 16 GiB, not measured here)"
    if facts.num_processes > 1:
        why += f"; each of the {facts.num_processes} processes has {own} of a batch"
    if part < min(own, facts.group_size):
        why += f"; batch {own} does not divide into the groups of {facts.group_size} that D compares"
    settle("batch_gpu", part, why)
    for name in ("gamma", "glr", "dlr"):
        settle_by_job(name)
    settle("g_beta1", 0.0, "published: Adam's momentum of the generator")
    warmup, why = from_rows("lr_warmup_kimg", job, facts, batch)
    settle("lr_warmup_kimg", float(f"{min(warmup, kimg / 3):.4g}"), why)
    settle_by_job("ema_kimg")
    settle("mirror", None, "pictures are shown mirrored only on request")
    if facts.from_scratch:
        filled["freezed"] = 0
    else:
        if config.new_d:
            settle("d_warmup_kimg", min(10.0, kimg / 10), f"D learns alone before G joins ({OURS})")
        if config.new_d:
            settle("freezed", 0, "a new discriminator has nothing to keep")
        else:
            settle_by_job("freezed")
    aug = settle_by_job("aug")
    if aug == "fixed":
        settle("p", None, "probability of augmentation")
    if aug == "ada":
        settle_by_job("target")
    if aug != "noaug":
        settle("augpipe", "bgc", "flips, shifts, turns, scales and colours; the pipe of the ADA paper")
    weight = settle_by_job("sd_weight")
    if distils(weight):
        _settle_distillation(settle, config, facts)
    else:
        reasons += [
            Reason(name, getattr(config, name), "no effect: --sd-weight is 0")
            for name, field in TrainConfig.__dataclass_fields__.items()
            if name.startswith("sd_") and name != "sd_weight" and getattr(config, name) != field.default
        ]
    settle(
        "precision",
        None,
        "float16 layers as the networks have them" if on_gpu else f"float32 on {facts.device_type}",
    )
    if on_gpu:
        settle("graphs", None, "parts of a step replayed as CUDA graphs")
    tick = settle("tick", *_tick(kimg))
    settle("snap", max(1, round(kimg / tick / 5)), "ticks between snapshots: about five in this run")
    if config.metrics not in (None, "none"):
        settle("metrics", None, "measured while training; a failure is a warning")
        settle("metrics_kimg", max(tick, kimg / 5), "kimg between measurements: five in this run")
        settle(
            "metrics_num",
            5000 if on_gpu else 1000,
            "generated pictures: few, so compare only with equal numbers",
        )
    settle(
        "workers",
        min(4, facts.cpu_count) if on_gpu else 0,
        "GPU: decode beside it" if on_gpu else "CPU is busy",
    )
    return dataclasses.replace(config, **filled), reasons


def _settle_architecture(settle: Any, facts: Facts) -> None:
    settle(
        "cbase", 32768 if facts.resolution >= 512 or facts.family != "stylegan2" else 16384, "published size"
    )
    settle("cmax", 512, "published size")
    settle("map_depth", 8 if facts.family == "stylegan2" else 2, f"mapping layers of {facts.family}")
    settle("z_dim", 512, "published size")
    settle("w_dim", 512, "published size")


def _settle_distillation(settle: Any, config: TrainConfig, facts: Facts) -> None:
    cheap = config.sd_backbone == "l2"
    settle("sd_backbone", None, "perceptual distance of the self-distillation")
    settle("sd_teacher", None, "which network the student is held to")
    if config.sd_teacher_kimg is not None:
        settle("sd_teacher_kimg", None, "half-life of a teacher of its own")
    settle(
        "sd_interval",
        1 if cheap else 4,
        "every step: l2 is cheap" if cheap else f"every 4th step, counted four times ({AB})",
    )
    settle("sd_resolution", min(facts.resolution, 256), "distances are taken at 256 px or less")


def _settle_shape(settle: Any, config: TrainConfig, facts: Facts) -> None:
    """What changes the networks is listed where it was asked for."""
    for name in ("resolution", "channels", "classes", "new_d"):
        if not facts.from_scratch and getattr(config, name):
            settle(name, None, "")


def _gpu_batch(facts: Facts) -> int:
    """Images at once on a GPU: the published sizes for 16 GiB, in proportion to its memory."""
    per_16_gib = (2048 if facts.family == "stylegan3-r" else 4096) // facts.resolution
    size = max(4, min(32, per_16_gib)) * (facts.gpu_memory_gib or 16) / 16
    return max(1, min(128, 2 ** int(math.log2(max(size, 1)))))


def _tick(kimg: float) -> tuple[float, str]:
    if kimg >= 100:
        return 4.0, "kimg between lines of the log"
    return kimg / 20, "kimg between lines of the log: twenty in this run"
