"""Build networks, optimizers, ADA and the plan from resolved options."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from finetune.config import TrainConfig
from finetune.distributed import SINGLE, ProcessGroup
from finetune.errors import ConfigError
from finetune.metrics.perceptual import ImageDistance
from finetune.models import Network
from finetune.options import AUGPIPE_PARTS, AUGPIPES
from finetune.recipes import RunFacts
from finetune.train.ada import AdaController
from finetune.train.distill import Distillation
from finetune.train.ema import EMA_RAMPUP, POWERS
from finetune.train.graphs import Graphs
from finetune.train.optim import LearningRate, build_adam
from finetune.train.state import Plan, TrainState
from torch_utils import misc

if TYPE_CHECKING:
    from finetune.checkpoint.load import Checkpoint

R1_INTERVAL = 16
PATH_INTERVAL = 4
G_BETA1 = D_BETA1 = 0.0  # as published
SD_RESOLUTION = 256  # the distance is computed at this many pixels at most; --sd-preset authors: at all
ADA_SWING_KIMG = {True: 500.0, False: 100.0}  # from scratch; fine-tuning
# Source: Karras et al. 2021 (2106.12423), appendix: config R from scratch
BLUR_SIGMA, BLUR_KIMG = 10.0, 200.0


def build_state(
    config: TrainConfig, facts: RunFacts, checkpoint: Checkpoint | None, device: torch.device
) -> TrainState:
    """Build networks (new, or copies of a checkpoint's), their average and the optimizers; draws numbers."""
    if checkpoint is None:
        G, D = new_networks(config, facts)
        G_ema = copy.deepcopy(G)
    else:
        G, D, G_ema = networks_from(checkpoint, config, facts)
    for network in (G, D):
        network.train().requires_grad_(False).to(device)
    G_ema.eval().requires_grad_(False).to(device)
    for network in (G, D, G_ema):
        use_channels_last(network)
    has_own_teacher = config.sd_teacher == "initial" or config.sd_teacher_kimg
    rate_G, rate_D = learning_rates(config, facts)
    return TrainState(
        G=G,
        D=D,
        G_ema=G_ema,
        teacher=copy.deepcopy(G_ema) if has_own_teacher else G_ema,
        opt_G=build_adam(G, rate_G),
        opt_D=build_adam(D, rate_D),
        augment_pipe=build_augment_pipe(config, device),
        ada=AdaController(
            config.p,
            target=config.target if config.aug == "ada" else None,
            swing_kimg=ADA_SWING_KIMG[facts.from_scratch],
        ),
        path_mean=torch.zeros([], device=device),
        sd_norms=torch.zeros(2, device=device),
        power_averages={name: copy.deepcopy(G_ema) for name in POWERS},
    )


def use_channels_last(network: torch.nn.Module) -> None:
    """Let blocks work on channels-last features, which cuDNN's convolutions need not transpose.

    StyleGAN2's blocks and the discriminator have the switch; checkpoints do not contain it.
    """
    for module in network.modules():
        if hasattr(module, "channels_last"):
            module.channels_last = True  # type: ignore[assignment]


def learning_rates(config: TrainConfig, facts: RunFacts) -> tuple[LearningRate, LearningRate]:
    """Return the learning rates of G and D. With a new D, the warm-up of G begins when G begins."""
    lazy_G = PATH_INTERVAL if facts.family == "stylegan2" else None
    lazy_D = R1_INTERVAL if config.gamma else None
    warmup, start = config.lr_warmup_kimg * 1000, config.d_warmup_kimg * 1000
    return (
        LearningRate(config.glr, G_BETA1, lazy_G, config.batch, warmup, start),
        LearningRate(config.dlr, D_BETA1, lazy_D, config.batch, warmup),
    )


def build_plan(
    config: TrainConfig,
    facts: RunFacts,
    distance: ImageDistance | None,
    labels: Callable[[int], torch.Tensor],
    device: torch.device,
    group: ProcessGroup = SINGLE,
) -> Plan:
    """Collect what stays fixed during training. `distance` None: student and teacher are not compared."""
    rate_G, rate_D = learning_rates(config, facts)
    stylegan2 = facts.family == "stylegan2"
    blurred = facts.from_scratch and facts.family == "stylegan3-r"
    force_fp32 = config.precision == "fp32"
    distillation = None
    if distance is not None:
        distillation = Distillation(
            distance=distance,
            weight=1.0 if config.sd_weight.is_ratio else config.sd_weight.value,
            ratio=config.sd_weight.value if config.sd_weight.is_ratio else None,
            interval=config.sd_interval,
            resolution=facts.resolution if config.sd_preset == "authors" else SD_RESOLUTION,
            augment=config.sd_augment,
            tf32=not force_fp32,
        )
    return Plan(
        device=device,
        total_nimg=round(config.kimg * 1000),
        batch=config.batch,
        batch_gpu=config.batch_gpu,
        gamma=config.gamma,
        mixing=0.9 if stylegan2 else 0.0,
        r1_interval=R1_INTERVAL,
        path_interval=PATH_INTERVAL if stylegan2 else None,
        path_weight=2.0,
        path_decay=0.01,
        ema_nimg=config.ema_kimg * 1000,
        ema_rampup=EMA_RAMPUP if facts.from_scratch else None,
        teacher_nimg=config.sd_teacher_kimg * 1000 if distance and config.sd_teacher_kimg else None,
        blur_sigma=BLUR_SIGMA if blurred else 0.0,
        blur_nimg=BLUR_KIMG * 1000,
        distillation=distillation,
        labels=labels,
        rate_G=rate_G,
        rate_D=rate_D,
        tick_nimg=config.tick * 1000,
        snap_nimg=config.tick * 1000 * config.snap,
        seed=config.seed,
        group=group,
        skip_overflow=device.type == "cuda" and not force_fp32,
        graphs=Graphs(device, enabled=config.graphs == "auto" and not blurred),
        d_warmup_nimg=config.d_warmup_kimg * 1000,
        # Explicit, so that the teacher (in evaluation mode) convolves in the same order as the student.
        synthesis={
            "noise_mode": "random",
            "fused_modconv": "pointwise",
            "force_fp32": force_fp32,
        },
        discriminator={"force_fp32": force_fp32},
    )


def new_networks(config: TrainConfig, facts: RunFacts) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Build networks with random weights, as `--scratch` asks for them."""
    shape = {"c_dim": facts.c_dim, "img_resolution": facts.resolution, "img_channels": facts.channels}
    size = {"channel_base": config.cbase, "channel_max": config.cmax}
    options: dict[str, Any] = {
        "mapping_kwargs": {"num_layers": config.map_depth},
        "num_fp16_res": 4,
        "conv_clamp": 256,
    }
    if facts.family != "stylegan2":
        options["magnitude_ema_beta"] = magnitude_beta(config.batch)
    if facts.family == "stylegan3-r":
        # 1×1 kernels leave room for twice the channels.
        options |= {"conv_kernel": 1, "use_radial_filters": True}
        options |= {name: value * 2 for name, value in size.items()}
    models = importlib.import_module("finetune.models." + facts.family[:9])
    discriminator = importlib.import_module("finetune.models.stylegan2").Discriminator
    G = models.Generator(z_dim=config.z_dim, w_dim=config.z_dim, **{**shape, **size, **options})
    D = discriminator(**shape, **size, num_fp16_res=4, conv_clamp=256)
    return G, D


def networks_from(
    checkpoint: Checkpoint, config: TrainConfig, facts: RunFacts
) -> tuple[torch.nn.Module, torch.nn.Module, torch.nn.Module]:
    """Copy a checkpoint's G, D and G_ema with the recipe's switches.

    If G or G_ema is missing, the other one is copied.
    """
    start: Network = checkpoint.G if checkpoint.G is not None else checkpoint.G_ema
    start_D: Network = checkpoint.D
    changes: dict[str, Any] = {}
    if facts.family != "stylegan2":
        changes["magnitude_ema_beta"] = magnitude_beta(config.batch)
    half = {"num_fp16_res": 4, "conv_clamp": 256} if config.precision == "fp16" else {}
    if half and not start.synthesis.num_fp16_res:
        changes |= half
    G = copy_network(start, changes)
    G_ema = copy_network(checkpoint.best, changes)
    blocks = start_D.init_kwargs.get("block_kwargs") or {}
    changes = {}
    if not config.scratch:  # FreezeD is for checkpoints; a resumed run from scratch keeps its arguments
        changes["block_kwargs"] = {**blocks, "freeze_layers": config.freezed}
    if half and not start_D.init_kwargs.get("num_fp16_res", 4):
        changes |= half
    D = copy_network(start_D, changes)
    layers = facts.num_freezable or 0
    if config.freezed and facts.converts_d and not config.new_d:
        raise ConfigError(
            f"--freezed {config.freezed}: the first layers of the discriminator are new or converted, for "
            "another resolution or other channels, and have to train. Use --freezed 0."
        )
    if config.freezed > layers:
        raise ConfigError(
            f"--freezed {config.freezed}: this discriminator has {layers} layers to freeze. Choose fewer."
        )
    return G, D, G_ema


def copy_network(network: Network, changes: dict[str, Any]) -> Network:
    """Return a copy of `network`, built with other constructor arguments where `changes` has some."""
    kwargs = network.init_kwargs
    for name, value in changes.items():
        nested = kwargs.get("synthesis_kwargs")
        (nested if nested and name in nested else kwargs)[name] = value
    copied = type(network)(*network.init_args, **kwargs)
    misc.copy_params_and_buffers(network, copied, require_all=True)
    return copied


def build_augment_pipe(config: TrainConfig, device: torch.device) -> torch.nn.Module | None:
    """Build the pipe that `--augpipe` names; None with `--aug noaug` or a fixed probability of 0."""
    if config.aug == "noaug" or (config.aug == "fixed" and not config.p):
        return None
    from finetune.models.augment import AugmentPipe

    parts = AUGPIPES[config.augpipe]
    settings = {name: value for part in parts for name, value in AUGPIPE_PARTS[part].items()}
    return AugmentPipe(**settings).train().requires_grad_(False).to(device)


def magnitude_beta(batch: int) -> float:
    """Return the decay of StyleGAN3's magnitude averages: half in 20 kimg."""
    return 0.5 ** (batch / 20e3)
