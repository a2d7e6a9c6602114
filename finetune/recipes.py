"""The defaults of a training run, each from the checkpoint, the resolution or the size of the data set."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from finetune.config import TrainConfig

# Provisional: of the range that the pilot looked at (0.05 to 0.2, where small weights already helped); to be
# settled by the A/B runs.
SD_WEIGHT = 0.1
ADA_TARGET = 0.6


@dataclass(frozen=True)
class Facts:
    """What is known about a run before it starts.

    num_images: pictures before mirroring. group_size: images that D compares with each other (minibatch
    standard deviation), 1 where every number of them goes.
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


@dataclass(frozen=True)
class Reason:
    """One line of the table printed at the start: an option, its value, and why it has that value."""

    name: str
    value: Any
    why: str


def r1_gamma(family: str, resolution: int, batch: int) -> float:
    """R1 weight: 0.0002 res²/batch for StyleGAN2; StyleGAN3's 0.5, 2, 8, 32 at 128…1024 px (batch 32) as one
    formula.

    Source: the published settings follow weight ∝ pixels / batch in both families.
    """
    per_pixel = 0.0002 if family == "stylegan2" else 0.5 * 32 / 128**2
    return per_pixel * resolution**2 / batch


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

    on_gpu = facts.device_type == "cuda"
    stylegan2 = facts.family == "stylegan2"
    if facts.from_scratch:
        _settle_architecture(settle, facts)
    origin = "from scratch: labels are used only on request" if facts.from_scratch else "as the checkpoint"
    settle("cond", facts.c_dim > 0, origin)
    kimg = settle("kimg", *_length(facts))
    batch = settle("batch", *_batch(facts))
    # A batch given by hand is cut into parts that divide it, and that D can group; they only bound memory.
    limit = max(4, min(32, 4096 // facts.resolution)) if on_gpu else 32
    sizes = range(1, min(batch, limit) + 1)
    part = max(size for size in sizes if batch % size == 0 and can_group(size, facts.group_size))
    why = "images in memory at once" + (f", for {facts.resolution} px" if on_gpu else "")
    if part < min(batch, facts.group_size):
        why += f"; batch {batch} does not divide into the groups of {facts.group_size} that D compares"
    settle("batch_gpu", part, why)
    formula = "0.0002 res²/batch" if stylegan2 else "res²/(1024 batch)"
    gamma = float(f"{r1_gamma(facts.family, facts.resolution, batch):.4g}")
    settle("gamma", gamma, f"{formula} at {facts.resolution} px, batch {batch}")
    settle("glr", 0.002 if stylegan2 else 0.0025, f"published rate for {facts.family}")
    settle("dlr", 0.002, "published rate for the discriminator")
    settle(
        "ema_kimg",
        batch * 10 / 32,
        f"half-life of the exported average: batch·10/32 = {batch * 10 / 32:g} kimg",
    )
    settle("mirror", None, "pictures are shown mirrored only on request")
    if not facts.from_scratch:
        settle("freezed", None, "all of the discriminator learns")
    settle("aug", None, "as much augmentation as D needs not to learn the pictures by heart")
    if config.aug == "fixed":
        settle("p", None, "probability of augmentation")
    if config.aug == "ada":
        settle("target", ADA_TARGET, "share of real images D should be sure of (ADA)")
    if config.aug != "noaug":
        settle("augpipe", "bgc", "flips, shifts, turns, scales and colours; the pipe of the ADA paper")
    weight = settle("sd_weight", SD_WEIGHT, "provisional: inside the range a pilot found useful")
    if weight > 0:
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
    tick = settle("tick", *_tick(kimg))
    settle("snap", max(1, round(kimg / tick / 5)), "ticks between snapshots: about five in this run")
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
    settle("sd_warmup_kimg", None, "no warm-up: the weight counts from the first step")
    settle("sd_batch_share", None, "the whole batch is compared")
    settle(
        "sd_interval",
        1 if cheap else 2,
        "every step: l2 is cheap" if cheap else "every 2nd step, counted twice",
    )
    settle("sd_resolution", min(facts.resolution, 256), "distances are taken at 256 px or less")


def _length(facts: Facts) -> tuple[float, str]:
    if facts.from_scratch:
        return 5000.0, "from scratch"
    if facts.num_images < 2000:
        return 200.0, f"fine-tuning to {facts.num_images} pictures: few pictures are soon learnt by heart"
    return 1000.0, f"fine-tuning to {facts.num_images} pictures"


def _batch(facts: Facts) -> tuple[int, str]:
    if facts.family != "stylegan2" or facts.resolution <= 128:
        return 32, f"{facts.family} at {facts.resolution} px"
    return max(8, 4096 // facts.resolution), f"{facts.family} at {facts.resolution} px (4096/res, at least 8)"


def _tick(kimg: float) -> tuple[float, str]:
    if kimg >= 100:
        return 4.0, "kimg between lines of the log"
    return kimg / 20, "kimg between lines of the log: twenty in this run"
