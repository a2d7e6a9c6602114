"""From a resolved config to the objects that are trained: networks, optimisers, the plan."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from finetune.config import AUGPIPE_PARTS, AUGPIPES, TrainConfig, target_ratio
from finetune.distributed import SINGLE, ProcessGroup
from finetune.errors import ConfigError
from finetune.metrics.perceptual import Distance
from finetune.recipes import Facts
from finetune.train.ada import AdaController
from finetune.train.continuing import apply_rates
from finetune.train.distill import Distillation
from finetune.train.losses import lazy_adam
from finetune.train.saved import Saved, networks_of, restore
from finetune.train.state import Plan, TrainState
from torch_utils import misc

if TYPE_CHECKING:
    from finetune.checkpoint.load import Checkpoint

BETAS = (0.0, 0.99)
R1_INTERVAL = 16
PATH_INTERVAL = 4
ADA_SWING_KIMG = {True: 500.0, False: 100.0}  # from scratch; fine-tuning
BLUR_SIGMA, BLUR_KIMG = (
    10.0,
    200.0,
)  # Source: Karras et al. 2021 (2106.12423), appendix: config R from scratch


def build_state(
    config: TrainConfig, facts: Facts, checkpoint: Checkpoint | None, device: torch.device
) -> TrainState:
    """The networks (from the checkpoint, or new), their average, and the optimisers. Draws random numbers."""
    if checkpoint is None:
        G, D = new_networks(config, facts)
        G_ema = copy.deepcopy(G)
    else:
        G, D, G_ema = networks_from(checkpoint, config, facts)
    for network in (G, D):
        network.train().requires_grad_(False).to(device)
    G_ema.eval().requires_grad_(False).to(device)
    path_interval = PATH_INTERVAL if facts.family == "stylegan2" else None
    own_teacher = bool(config.sd_weight) and (config.sd_teacher == "initial" or config.sd_teacher_kimg)
    return TrainState(
        G=G,
        D=D,
        G_ema=G_ema,
        teacher=copy.deepcopy(G_ema) if own_teacher else G_ema,
        opt_G=adam(G, config.glr, config.g_beta1, path_interval),
        opt_D=adam(D, config.dlr, BETAS[0], R1_INTERVAL if config.gamma else None),
        augment_pipe=build_augment_pipe(config, device),
        ada=AdaController(
            config.p or 0.0,
            target=config.target if config.aug == "ada" else None,
            swing_kimg=ADA_SWING_KIMG[facts.from_scratch],
        ),
        path_mean=torch.zeros([], device=device),
        sd_norms=torch.zeros(2, device=device),
    )


def build_saved_state(config: TrainConfig, facts: Facts, saved: Saved, device: torch.device) -> TrainState:
    """The TrainState of a state file, with the rates of `config` where they were changed."""
    networks = networks_of(saved.content)
    for name, network in networks.items():
        network.train(name in ("G", "D")).requires_grad_(False).to(device)
    G, D, G_ema = networks["G"], networks["D"], networks["G_ema"]
    intervals = {
        "G": PATH_INTERVAL if facts.family == "stylegan2" else None,
        "D": R1_INTERVAL if config.gamma else None,
    }
    state = TrainState(
        G=G,
        D=D,
        G_ema=G_ema,
        teacher=networks.get("teacher", G_ema),
        opt_G=adam(G, config.glr, config.g_beta1, intervals["G"]),
        opt_D=adam(D, config.dlr, BETAS[0], intervals["D"]),
        augment_pipe=build_augment_pipe(config, device),
        ada=AdaController(
            config.p or 0.0,
            target=config.target if config.aug == "ada" else None,
            swing_kimg=ADA_SWING_KIMG[facts.from_scratch],
        ),
        path_mean=torch.zeros([], device=device),
        sd_norms=torch.zeros(2, device=device),
    )
    restore(state, saved.content)
    apply_rates(state, config, TrainConfig.from_json(saved.content["config"]), intervals)
    return state


def build_plan(
    config: TrainConfig,
    facts: Facts,
    distance: Distance | None,
    labels: Callable[[int], torch.Tensor],
    device: torch.device,
    processes: ProcessGroup = SINGLE,
) -> Plan:
    """What stays fixed while training. `distance` None means no self-distillation."""
    c = required(config)
    stylegan2 = facts.family == "stylegan2"
    blurred = facts.from_scratch and facts.family == "stylegan3-r"
    force_fp32 = config.precision == "fp32"
    distillation = None
    if distance is not None:
        distillation = Distillation(
            distance=distance,
            weight=c["sd_weight"] if target_ratio(c["sd_weight"]) is None else 1.0,
            ratio=target_ratio(c["sd_weight"]),
            interval=c["sd_interval"],
            warmup_nimg=config.sd_warmup_kimg * 1000,
            batch_share=config.sd_batch_share,
            resolution=c["sd_resolution"],
        )
    return Plan(
        device=device,
        total_nimg=round(c["kimg"] * 1000),
        batch=c["batch"],
        batch_gpu=c["batch_gpu"],
        gamma=c["gamma"],
        mixing=0.9 if stylegan2 else 0.0,
        r1_interval=R1_INTERVAL,
        path_interval=PATH_INTERVAL if stylegan2 else None,
        path_weight=2.0,
        path_decay=0.01,
        ema_nimg=c["ema_kimg"] * 1000,
        ema_rampup=0.05 if facts.from_scratch else None,
        teacher_nimg=config.sd_teacher_kimg * 1000 if distance and config.sd_teacher_kimg else None,
        blur_sigma=BLUR_SIGMA if blurred else 0.0,
        blur_nimg=BLUR_KIMG * 1000,
        distillation=distillation,
        labels=labels,
        seed=config.seed,
        processes=processes,
        d_warmup_nimg=(config.d_warmup_kimg or 0) * 1000,
        lr_warmup_nimg=(config.lr_warmup_kimg or 0) * 1000,
        skip_overflow=device.type == "cuda" and not force_fp32,
        # Said explicitly, so that the teacher (in evaluation mode) convolves in the same order as the
        # student.
        synthesis={
            "noise_mode": "random",
            "fused_modconv": "pointwise",
            "force_fp32": force_fp32,
        },
        discriminator={"force_fp32": force_fp32},
    )


def required(config: TrainConfig) -> dict[str, Any]:
    """The fields of a resolved config, for the numbers whose type still allows None."""
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


def new_networks(config: TrainConfig, facts: Facts) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Networks with random weights, as `--scratch` asks for them."""
    c = required(config)
    shape = {"c_dim": facts.c_dim, "img_resolution": facts.resolution, "img_channels": facts.channels}
    size = {"channel_base": c["cbase"], "channel_max": c["cmax"]}
    options: dict[str, Any] = {
        "mapping_kwargs": {"num_layers": c["map_depth"]},
        "num_fp16_res": 4,
        "conv_clamp": 256,
    }
    if facts.family != "stylegan2":
        options["magnitude_ema_beta"] = magnitude_beta(c["batch"])
    if facts.family == "stylegan3-r":
        # 1×1 kernels leave room for twice the channels.
        options |= {"conv_kernel": 1, "use_radial_filters": True}
        options |= {name: value * 2 for name, value in size.items()}
    models = importlib.import_module("finetune.models." + facts.family[:9])
    discriminator = importlib.import_module("finetune.models.stylegan2").Discriminator
    G = models.Generator(z_dim=c["z_dim"], w_dim=c["w_dim"], **{**shape, **size, **options})
    D = discriminator(**shape, **size, num_fp16_res=4, conv_clamp=256)
    return G, D


def networks_from(
    checkpoint: Checkpoint, config: TrainConfig, facts: Facts
) -> tuple[torch.nn.Module, torch.nn.Module, torch.nn.Module]:
    """A checkpoint's G, D and G_ema, copied with the recipe's switches; a missing generator is the other."""
    start = checkpoint.G if checkpoint.G is not None else checkpoint.G_ema
    changes: dict[str, Any] = {}
    if facts.family != "stylegan2":
        changes["magnitude_ema_beta"] = magnitude_beta(required(config)["batch"])
    half = {"num_fp16_res": 4, "conv_clamp": 256} if config.precision == "fp16" else {}
    if half and not start.synthesis.num_fp16_res:
        changes |= half
    G = rebuild(start, changes)
    G_ema = rebuild(checkpoint.best, changes)
    blocks = {**(checkpoint.D.init_kwargs.get("block_kwargs") or {}), "freeze_layers": config.freezed or 0}
    changes = {"block_kwargs": blocks}
    if half and not checkpoint.D.init_kwargs.get("num_fp16_res", 4):
        changes |= half
    D = rebuild(checkpoint.D, changes)
    layers = facts.num_freezable or 0
    if (config.freezed or 0) > layers:
        raise ConfigError(
            f"--freezed {config.freezed}: this discriminator has {layers} layers that can be frozen."
        )
    return G, D, G_ema


def rebuild(network: torch.nn.Module, changes: dict[str, Any]) -> torch.nn.Module:
    """A new network with all tensors and constructor arguments of `network`, but for those in `changes`."""
    kwargs = network.init_kwargs
    for name, value in changes.items():
        nested = kwargs.get("synthesis_kwargs")
        (nested if nested and name in nested else kwargs)[name] = value
    fresh = type(network)(*network.init_args, **kwargs)
    misc.copy_params_and_buffers(network, fresh, require_all=True)
    return fresh


def build_augment_pipe(config: TrainConfig, device: torch.device) -> torch.nn.Module | None:
    """The pipe that `--augpipe` names, None with `--aug noaug` or a fixed probability of 0."""
    if config.aug == "noaug" or (config.aug == "fixed" and not config.p):
        return None
    from finetune.models.augment import AugmentPipe

    parts = AUGPIPES[config.augpipe or "bgc"]
    settings = {name: value for part in parts for name, value in AUGPIPE_PARTS[part].items()}
    return AugmentPipe(**settings).train().requires_grad_(False).to(device)


def adam(
    network: torch.nn.Module, lr: float | None, beta1: float | None, lazy_interval: int | None
) -> torch.optim.Adam:
    """Adam over all parameters of a network, corrected for lazy regularisation."""
    settings = lazy_adam(lr or 0.0, (beta1 or 0.0, BETAS[1]), lazy_interval)
    return torch.optim.Adam(list(network.parameters()), eps=1e-8, **settings)


def magnitude_beta(batch: int) -> float:
    """Decay of StyleGAN3's magnitude averages: half in 20 kimg."""
    return 0.5 ** (batch / 20e3)
