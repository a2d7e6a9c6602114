"""A training run from its config to its last snapshot: check everything, make the run folder, train."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from finetune import recipes
from finetune.checkpoint import Checkpoint, load, newest_snapshot
from finetune.config import TrainConfig
from finetune.data import ImageSet, build_loader, scan
from finetune.device import resolve_device
from finetune.errors import ConfigError, FinetuneError
from finetune.recipes import Facts, Reason
from finetune.train.allocator import keep_freed_memory
from finetune.train.build import build_plan, build_state
from finetune.train.hooks import Display, RunFolder, check_outdir, make_run_dir, print_reasons
from finetune.train.loop import train
from finetune.train.perceptual import build_distance, ensure_weights
from finetune.train.state import Plan, TrainState
from finetune.train.watch import Watch


@dataclass(frozen=True)
class Prepared:
    """A run in which everything has been checked and built, and that can start: nothing was written yet."""

    config: TrainConfig
    facts: Facts
    reasons: list[Reason]
    checkpoint: Checkpoint | None
    image_set: ImageSet
    state: TrainState
    plan: Plan
    notes: list[str]


@dataclass(frozen=True)
class RunResult:
    """What a run left: its folder, its last snapshot, images seen, and the config as it was resolved."""

    run_dir: Path
    snapshot: Path
    nimg: int
    config: TrainConfig


def run(
    config: TrainConfig,
    *,
    console: Console | None = None,
    on_tick: Callable[[TrainState, dict], None] | None = None,
) -> RunResult:
    """Train as `config` says and return what was left behind.

    `on_tick(state, numbers)` is called after each line of the log. Raises FinetuneError before anything is
    written if something does not fit; KeyboardInterrupt, after the snapshot is safe, if the run was asked to
    stop.
    """
    console = console if console is not None else Console()
    prepared = prepare(config, console)
    show(prepared, console)
    return start(prepared, console=console, on_tick=on_tick)


def prepare(config: TrainConfig, console: Console | None = None) -> Prepared:
    """Check options, backbone weights, checkpoint and pictures; settle all defaults; build the networks."""
    with (console or Console(quiet=True)).status("Checking …") as status:
        return _prepare(config, lambda text: status.update(text))


def _prepare(config: TrainConfig, tell: Callable[[str], None]) -> Prepared:
    config.validate()
    device = resolve_device(config.device)
    if config.precision == "fp16" and device.type != "cuda":
        raise ConfigError(
            f"--precision fp16: float16 layers need CUDA, this is {device}; use --precision auto."
        )
    if (recipes.SD_WEIGHT if config.sd_weight is None else config.sd_weight) > 0:
        tell(f"Checking the weights of {config.sd_backbone} …")
        ensure_weights(config.sd_backbone, tell)
    checkpoint = None
    if config.resume is not None:
        tell(f"Loading {config.resume} …")
        checkpoint = load_for_training(config.resume)
    image_set, facts, notes = read_data(config, checkpoint, device, tell)
    tell("Building the networks …")
    config, reasons = recipes.resolve(config, facts)
    config.validate()
    if not recipes.can_group(config.batch_gpu or 1, facts.group_size):
        raise ConfigError(
            f"--batch-gpu {config.batch_gpu}: the discriminator compares images in groups of "
            f"{facts.group_size}; use a multiple of {facts.group_size}."
        )

    torch.manual_seed(config.seed)
    state = build_state(config, facts, checkpoint, device)
    check_outdir(config, [state.G, state.D, state.G_ema])
    distance = None
    if config.sd_weight:
        # Building a network draws random numbers even where its weights are then loaded.
        with torch.random.fork_rng(devices=[]):
            distance = build_distance(config.sd_backbone, facts.channels, device)
    generator = torch.Generator().manual_seed(config.seed)

    def labels(count: int) -> torch.Tensor:
        return image_set.random_labels(count, generator).to(device)

    plan = build_plan(config, facts, distance, labels, device)
    return Prepared(config, facts, reasons, checkpoint, image_set, state, plan, notes)


def load_for_training(path: str) -> Checkpoint:
    """Load the checkpoint of `--resume`, and refuse what training cannot start from."""
    if Path(path).is_dir():
        try:
            snapshot = newest_snapshot(Path(path))
        except FinetuneError:
            raise ConfigError(f"--resume {path}: this is a folder without snapshots; name a file.") from None
        raise ConfigError(
            f"--resume {path}: this is a run folder, and continuing a run exactly is not possible yet.",
            hint=f"To start from its weights alone: --resume {snapshot}",
        )
    checkpoint = load(path)
    if checkpoint.D is None:
        have = ", ".join(name for name in ("G", "G_ema") if getattr(checkpoint, name) is not None)
        raise ConfigError(
            f"--resume {path}: the file holds {have or 'no generator'} but no discriminator D, "
            "and training needs the D that belongs to the generator.",
            hint="Use a full training snapshot (network-snapshot-*.pkl with G, D and G_ema).",
        )
    G, D = checkpoint.best, checkpoint.D  # `best` refuses a file without any generator
    problems = [
        f"--resume {path}: {name} is {getattr(G, name)} in G and {getattr(D, name)} in D: not a pair."
        for name in ("img_resolution", "img_channels", "c_dim")
        if getattr(G, name) != getattr(D, name)
    ]
    if problems:
        raise ConfigError(problems)
    return checkpoint


def read_data(
    config: TrainConfig, checkpoint: Checkpoint | None, device: torch.device, tell: Callable[[str], None]
) -> tuple[ImageSet, Facts, list[str]]:
    """Look at every picture, compare data and network; the set, the facts of the run, and what is worth
    knowing."""
    group_size = Facts.group_size
    if checkpoint is not None:
        G: Any = checkpoint.best
        group_size = group_size_of(checkpoint.D)
        family, resolution, channels, c_dim = checkpoint.family, G.img_resolution, G.img_channels, G.c_dim
        if config.cond is not None and config.cond != (c_dim > 0):
            kind = f"has {c_dim} classes" if c_dim else "has no classes"
            raise ConfigError(
                f"--{'' if config.cond else 'no-'}cond: the checkpoint {kind}; leave the option out."
            )
        use_labels = c_dim > 0
    else:
        family, resolution, channels, c_dim = config.scratch, config.resolution, 3, 0
        use_labels = bool(config.cond)
    found = scan(
        config.data,
        resolution=resolution,
        fit=config.fit,
        use_labels=use_labels,
        num_classes=c_dim or None,
        workers=config.workers,
        progress=lambda done, total: tell(f"Looking at pictures: {done} of {total}"),
    )
    found.raise_for_problems()
    image_set = ImageSet(
        config.data,
        resolution=resolution,
        channels=channels,
        fit=config.fit,
        use_labels=use_labels,
        num_classes=c_dim or None,
        mirror=config.mirror,
        seed=config.seed,
    )
    if checkpoint is None:
        c_dim = image_set.num_classes
    facts = Facts(
        family=family,
        resolution=resolution,
        channels=channels,
        c_dim=c_dim,
        num_images=len(image_set) // (2 if config.mirror else 1),
        device_type=device.type,
        cpu_count=os.cpu_count() or 1,
        from_scratch=checkpoint is None,
        group_size=group_size,
    )
    return image_set, facts, found.notes


def group_size_of(D: Any) -> int:
    """How many images the last block of D compares with each other, 1 where every number of them goes."""
    return (D.b4.mbstd.group_size or 1) if D.b4.mbstd is not None else 1


def show(prepared: Prepared, console: Console) -> None:
    """Say what will be trained on what, and why each option has its value."""
    facts, config = prepared.facts, prepared.config
    start = f"weights of {config.resume}" if config.resume else f"random weights ({facts.family})"
    classes = f", {facts.c_dim} classes" if facts.c_dim else ""
    console.print(
        f"Starting from {start}: {facts.resolution}×{facts.resolution}, {facts.channels} channels{classes}.\n"
        f"{facts.num_images} pictures from {config.data}{', mirrored too' if config.mirror else ''}. "
        f"Training on {prepared.plan.device}.",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    for note in prepared.notes:
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    if prepared.checkpoint is not None:
        missing = [name for name in prepared.checkpoint.missing if name in ("G", "G_ema")]
        console.print(
            "Weights only: the optimisers, the augmentation probability and the averages of a run start anew."
            + (f" The file has no {missing[0]}; the other generator stands in for it." if missing else ""),
            highlight=False,
            soft_wrap=True,
        )
    print_reasons(console, "", prepared.reasons)


def start(
    prepared: Prepared,
    *,
    console: Console,
    on_tick: Callable[[TrainState, dict], None] | None = None,
) -> RunResult:
    """Make the run folder and train."""
    config, image_set, state, plan = prepared.config, prepared.image_set, prepared.state, prepared.plan
    if plan.device.type == "cpu":
        keep_freed_memory()
    source = None if prepared.checkpoint is None else prepared.checkpoint.provenance.to_dict()
    desc = f"{image_set.name}-{prepared.facts.family}-{prepared.facts.resolution}"
    run_dir = make_run_dir(config.outdir, f"{desc}-{config.desc}" if config.desc else desc)
    folder = RunFolder(run_dir, config, image_set, source=source, chunk=plan.batch_gpu, device=plan.device)
    folder.write_reals()
    folder.write_fakes(state.G_ema, "-init")
    workers, seed = config.workers or 0, config.seed
    batches = build_loader(image_set, plan.batch, workers=workers, seed=seed, device=plan.device)
    torch.manual_seed(seed + 1)  # not the numbers that the first weights were drawn from

    ticks = 0

    def tick(state: TrainState, numbers: dict) -> None:
        nonlocal ticks
        ticks += 1
        folder.log(state, numbers)
        display.tick(state, numbers)
        if ticks % (config.snap or 1) == 0 and state.nimg < plan.total_nimg:
            save(state, folder)
        if on_tick is not None:
            on_tick(state, numbers)

    with Display(console, plan.total_nimg) as display:
        watch = Watch(plan.device, (config.tick or 1) * 1000, tick, display.step)
        display.say(f"Run folder: {run_dir}")
        with watch.stop_on_signals():
            train(state, plan, batches, watch)
            watch.tick(state)
            snapshot = save(state, folder)
            display.say(f"Saved {snapshot}")
    if watch.stop_requested:
        raise KeyboardInterrupt
    return RunResult(run_dir, snapshot, state.nimg, config)


def save(state: TrainState, folder: RunFolder) -> Path:
    """A snapshot and its sheet of pictures."""
    folder.write_fakes(state.G_ema, folder.stem(state.nimg))
    return folder.write_snapshot(state)
