"""The jobs of ab_distillation.py: which checkpoint continues on which images, with which arms, for how long.

Images are photographs of clothing in 15 classes (a zip, given as --photos; none are in this repository), made
into sets by make_sets.py. `ab_distillation.py --make-base` trains the checkpoints on them without hats
(`BASES`) and writes them into benchmarks/checkpoints with their logs. Lengths and numbers of images are such
that a job takes one to two hours on two CPU cores (`--parallel 2 --threads 1`). Metrics are measured on the
last snapshot, by networks that no loss uses (random ones) and by two that are losses of some arms;
`ab_report.is_related` marks those.
"""

from __future__ import annotations

import dataclasses
from typing import Any

# Settings of small networks on a CPU.
SMALL: dict[str, Any] = dict(
    batch=8, mirror=True, augpipe="color", workers=0, sd_backbone="efficientnet-lite0"
)
RATES: dict[str, Any] = dict(gamma=0.4, glr=0.0025, dlr=0.0025, ema_kimg=2.5)
# The size of the bundled checkpoint.
NETWORK: dict[str, Any] = dict(cbase=1024, cmax=96, z_dim=64, map_depth=4)
JUDGES = "random-fid,fd-effnet,kid-effnet,prc-effnet,fd-stlpips,kid-stlpips,prc-stlpips"

BASES: dict[str, dict[str, Any]] = {
    "clothing-64-stylegan2": dict(scratch="stylegan2", kimg=100.0, **NETWORK),
    "clothing-32-stylegan3-t": dict(scratch="stylegan3-t", kimg=60.0, **NETWORK | dict(cbase=512, cmax=32)),
    "clothing-64-stylegan3-t": dict(scratch="stylegan3-t", kimg=200.0, **NETWORK | dict(cmax=32)),
    "clothing-128-stylegan2": dict(scratch="stylegan2", kimg=2000.0, cbase=4096, cmax=128, z_dim=128),
}

PLAIN = "plain:sd_weight=0"
OURS = "ours:sd_weight=auto:1,sd_interval=4"
AUTHORS_MS_SSIM = "authors-ms-ssim:sd_preset=authors,sd_backbone=ms-ssim,sd_weight=1"
DISTANCES = ("efficientnet-lite0", "st-lpips-alex", "ms-ssim")  # that a CPU can compute
FIVE, FOUR, TWO = (0, 1, 2, 3, 4), (0, 1, 2, 3), (0, 1)


@dataclasses.dataclass(frozen=True)
class Job:
    """One comparison: arms on the same checkpoint and images, paired by seed.

    base: of `BASES`. data: a set of `make_sets.PHOTO_SETS` with its size. recipe, settings: options of all
    arms. num: generated images at the end. half_lives: also measure other half-lives of G_ema, afterwards.
    needs: "cpu" (hours on two cores) or "gpu".
    """

    question: str
    arms: tuple[str, ...]
    base: str = "clothing-64-stylegan2"
    data: str = "clothing-64"
    recipe: str = "improve"
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    kimg: float = 15.0
    seeds: tuple[int, ...] = FIVE
    num: int = 2000
    judges: str = JUDGES
    half_lives: bool = False
    needs: str = "cpu"


JOBS = {
    "improve": Job(
        "Is fine-tuning on the checkpoint's own images better with it?", (PLAIN, OURS), half_lives=True
    ),
    "settings": Job(
        "Which distance, ratio of gradients and interval, and does paired augmentation help?",
        (
            PLAIN,
            *(
                f"{name}-{ratio}:sd_backbone={name},sd_weight=auto:{ratio},sd_interval=4"
                for name in DISTANCES
                for ratio in (0.3, 1)
            ),
            "augmented:sd_weight=auto:1,sd_interval=4,sd_augment=true",
            "every-step:sd_weight=auto:1,sd_interval=1",
        ),
        seeds=TWO,
    ),
    "variants": Job(
        "Other half-lives of the teacher, and the authors' settings with distances that a CPU can compute.",
        (
            PLAIN,
            OURS,
            *(f"teacher-{h}:sd_weight=auto:1,sd_interval=4,sd_teacher_kimg={h}" for h in (0.5, 1, 5)),
            "authors-st-lpips:sd_preset=authors,sd_backbone=st-lpips-alex,sd_weight=1",
            AUTHORS_MS_SSIM,
        ),
        seeds=TWO,
    ),
    "authors": Job(
        "Are the authors' settings with MS-SSIM, which looked best at two seeds, better at five?",
        (PLAIN, AUTHORS_MS_SSIM),
    ),
    "small-ratio": Job(
        "Does a small ratio of gradients cost less fidelity, for each distance?",
        (PLAIN, *(f"{name}-0.1:sd_backbone={name},sd_weight=auto:0.1,sd_interval=4" for name in DISTANCES)),
        seeds=TWO,
    ),
    "adapt": Job(
        "Is fine-tuning to other images better with it?",
        (PLAIN, OURS),
        data="dresses-64",
        recipe="adapt",
        kimg=10.0,
        settings=dict(gamma=0.2, ema_kimg=1.0, freezed=0),
        half_lives=True,
    ),
    "few-shot": Job(
        "171 hats, which the checkpoint has not seen: does it help, and does it prevent copies?",
        (PLAIN, OURS, "initial:sd_weight=auto:1,sd_interval=4,sd_teacher=initial"),
        data="hats-64",
        recipe="few-shot",
        settings=dict(ema_kimg=1.0),
        kimg=6.0,
        judges=f"{JUDGES},memorization",
        half_lives=True,
    ),
    "few-shot-ratios": Job(
        "The same hats: do smaller ratios cost less fidelity?",
        (PLAIN, *(f"auto-{ratio}:sd_weight=auto:{ratio},sd_interval=4" for ratio in (0.1, 0.3))),
        data="hats-64",
        recipe="few-shot",
        settings=dict(ema_kimg=1.0),
        kimg=6.0,
        judges=f"{JUDGES},memorization",
    ),
    "improve-stylegan3-t": Job(
        "Is fine-tuning on the checkpoint's own images better with it, for StyleGAN3-T at 32 px?",
        (PLAIN, OURS),
        base="clothing-32-stylegan3-t",
        data="clothing-32",
        kimg=10.0,
        seeds=FOUR,
    ),
    # Open: for a GPU.
    "improve-50": Job("Does the effect last?", (PLAIN, OURS), kimg=50.0, needs="gpu"),
    "few-shot-50": Job(
        "50 hats.", (PLAIN, OURS), data="hats-50-64", recipe="few-shot", judges=f"{JUDGES},memorization",
        needs="gpu",
    ),
    "few-shot-10": Job(
        "10 hats.", (PLAIN, OURS), data="hats-10-64", recipe="few-shot", judges=f"{JUDGES},memorization",
        needs="gpu",
    ),
    "improve-stylegan3-t-64": Job(
        "StyleGAN3-T at 64 px.", (PLAIN, OURS), base="clothing-64-stylegan3-t", needs="gpu"
    ),
    "improve-128": Job(
        "StyleGAN2 at 128 px, with LPIPS.",
        (PLAIN, "lpips:sd_backbone=lpips-vgg", "authors:sd_preset=authors"),
        base="clothing-128-stylegan2",
        data="clothing-128",
        kimg=200.0,
        needs="gpu",
    ),
}  # fmt: skip
