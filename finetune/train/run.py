"""A training run from its config to its last snapshot: check everything, make the run folder, train."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console

from finetune import recipes
from finetune.checkpoint.load import Checkpoint
from finetune.checkpoint.surgery import Operation, TargetShape, operate
from finetune.config import TrainConfig, distils
from finetune.data import ImageSet, scan
from finetune.device import resolve_device, training_math
from finetune.distributed import SINGLE, ProcessGroup, init
from finetune.errors import ConfigError, DataError, FinetuneError
from finetune.metrics.perceptual import build_distance, ensure_weights
from finetune.recipes import Facts, Reason
from finetune.resolve import load, newest_snapshot, published_for
from finetune.train import measure
from finetune.train.allocator import keep_freed_memory
from finetune.train.build import build_plan, build_saved_state, build_state
from finetune.train.continuing import checkpoint_of, continued, saved_for, without_surgery
from finetune.train.hooks import Display, NoFolder, RunFolder, check_outdir, make_run_dir, print_reasons
from finetune.train.saved import Saved, restore_random
from finetune.train.session import Session, begin, check_ours, how_to_go_on
from finetune.train.state import Plan, TrainState


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
    operations: list[Operation]
    saved: Saved | None = None
    changes: tuple[str, ...] = ()


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
    saved = saved_for(config.resume)
    changes: list[str] = []
    if saved is not None:
        config, changes = continued(config, saved)
        check_ours(saved.path.parent)
    config.validate()
    processes, device = init(resolve_device(config.device))
    if config.batch and config.batch % processes.world_size:
        raise ConfigError(
            f"--batch {config.batch}: must be a multiple of the {processes.world_size} processes."
        )
    if config.precision in ("tf32", "fp16") and device.type != "cuda":
        raise ConfigError(
            f"--precision {config.precision}: this needs CUDA, the device is {device}; use --precision auto."
        )
    measure.names_of(config)
    checkpoint = None
    if saved is not None:
        checkpoint = checkpoint_of(saved)
    elif config.resume is not None:
        tell(f"Loading {config.resume} …")
        checkpoint = load_for_training(config.resume, new_d=config.new_d)
    as_it_is = config if saved is None else without_surgery(config, checkpoint)
    image_set, facts, notes = read_data(as_it_is, checkpoint, device, tell, processes)
    facts = replace(facts, from_scratch=config.scratch is not None, num_processes=processes.world_size)
    # After what takes a moment to find wrong: these may be half a gigabyte to fetch.
    if config.sd_weight is None or distils(config.sd_weight):  # no recipe goes without
        tell(f"Checking the weights of {config.sd_backbone} …")
        ensure_weights(config.sd_backbone, tell)
    measure.ensure_weights(config, tell)
    tell("Building the networks …")
    operations: list[Operation] = []
    if checkpoint is not None and saved is None:
        if facts.resolution == cast(Any, checkpoint.best).img_resolution:
            # Published settings are those of a resolution.
            facts = replace(facts, published=published_for(checkpoint.provenance))
        wanted = TargetShape(facts.c_dim, config.classes, config.channels, config.resolution, config.new_d)
        checkpoint, operations = operate(checkpoint, wanted, config.seed)
        facts = replace(facts, num_freezable=num_freezable(checkpoint.D))
    config, reasons = recipes.resolve(config, facts)
    config.validate()
    if (config.batch or 1) % ((config.batch_gpu or 1) * processes.world_size):
        raise ConfigError(
            f"--batch-gpu {config.batch_gpu}: {config.batch} images on {processes.world_size} ranks do not "
            f"split into micro-batches of that size; use {(config.batch or 1) // processes.world_size}."
        )
    if not recipes.can_group(config.batch_gpu or 1, facts.group_size):
        raise ConfigError(
            f"--batch-gpu {config.batch_gpu}: the discriminator compares images in groups of "
            f"{facts.group_size}; use a multiple of {facts.group_size}."
        )

    torch.manual_seed(config.seed)
    if saved is None:
        state = build_state(config, facts, checkpoint, device)
        check_outdir(config, [state.G, state.D, state.G_ema])
    else:
        state = build_saved_state(config, facts, saved, device)
    distance = None
    if config.sd_weight:
        # Building a network draws random numbers even where its weights are then loaded.
        with torch.random.fork_rng(devices=[]):
            distance = build_distance(config.sd_backbone, facts.channels, device)
    if saved is None:
        state.label_generator.manual_seed(config.seed)

    def labels(count: int) -> torch.Tensor:
        return image_set.random_labels(count, state.label_generator).to(device)

    plan = build_plan(config, facts, distance, labels, device, processes)
    networks = (state.G, state.D, state.G_ema, state.teacher)
    processes.broadcast((each for net in networks for each in net.state_dict().values()), "the start")
    return Prepared(
        config, facts, reasons, checkpoint, image_set, state, plan, notes, operations, saved, tuple(changes)
    )


def load_for_training(path: str, *, new_d: bool = False) -> Checkpoint:
    """Load the checkpoint of `--resume`, and refuse what training cannot start from."""
    if Path(path).is_dir():
        try:
            snapshot = newest_snapshot(Path(path))
        except FinetuneError:
            raise ConfigError(f"--resume {path}: this is a folder without snapshots; name a file.") from None
        raise ConfigError(
            f"--resume {path}: this run folder holds no training state to go on from.",
            hint=f"To start from the weights of its newest snapshot: --resume {snapshot}",
        )
    checkpoint = load(path)
    if checkpoint.best is None:
        raise ConfigError(
            f"--resume {path}: the file holds a discriminator alone, and no generator to improve."
        )
    if new_d:
        return checkpoint
    if checkpoint.D is None:
        have = ", ".join(name for name in ("G", "G_ema") if getattr(checkpoint, name) is not None)
        raise ConfigError(
            f"--resume {path}: the file holds {have or 'no generator'} but no discriminator D, "
            "and training needs the D that belongs to the generator.",
            hint="Use a full training snapshot (network-snapshot-*.pkl with G, D and G_ema), or --new-d to "
            "begin with a new discriminator that first learns alone.",
        )
    G, D = checkpoint.best, checkpoint.D
    problems = [
        f"--resume {path}: {name} is {getattr(G, name)} in G and {getattr(D, name)} in D: not a pair."
        for name in ("img_resolution", "img_channels", "c_dim")
        if getattr(G, name) != getattr(D, name)
    ]
    if problems:
        raise ConfigError(problems)
    return checkpoint


def read_data(
    config: TrainConfig,
    checkpoint: Checkpoint | None,
    device: torch.device,
    tell: Callable[[str], None],
    processes: ProcessGroup = SINGLE,
) -> tuple[ImageSet, Facts, list[str]]:
    """Look at every picture, compare data and network; the set, the facts of the run, and what is worth
    knowing."""
    group_size = Facts.group_size
    family, resolution, channels = config.scratch, config.resolution, config.channels or 3
    use_labels, num_classes = bool(config.cond), None
    if checkpoint is not None:
        G: Any = checkpoint.best
        if checkpoint.D is not None and not config.new_d:
            group_size = group_size_of(checkpoint.D)
        family = checkpoint.family
        resolution, channels = config.resolution or G.img_resolution, config.channels or G.img_channels
        use_labels = G.c_dim > 0 if config.cond is None else config.cond
        # With --classes, or where labels are new, the pictures say how many classes there shall be.
        num_classes = G.c_dim if use_labels and config.classes is None and G.c_dim else None
        if config.classes and not use_labels:
            raise ConfigError(
                f"--classes {config.classes}: the checkpoint has no classes; use --cond to begin with those "
                "of the pictures."
            )
    notes: list[str] = []
    if processes.is_first:
        with naming_the_ways_out(num_classes):
            found = scan(
                config.data,
                resolution=resolution,
                fit=config.fit,
                use_labels=use_labels,
                num_classes=num_classes,
                workers=config.workers,
                progress=lambda done, total: tell(f"Looking at pictures: {done} of {total}"),
            )
            found.raise_for_problems()
        notes = [*found.notes, *found.against(channels)]
        if checkpoint is not None and config.cond is None and not use_labels and found.has_labels:
            notes.append(
                "The pictures have labels and the checkpoint has no classes: they are not used. --cond gives "
                "it those of the pictures."
            )
    processes.barrier("looking at the pictures")
    image_set = ImageSet(
        config.data,
        resolution=resolution,
        channels=channels,
        fit=config.fit,
        use_labels=use_labels,
        num_classes=num_classes,
        mirror=config.mirror,
        seed=config.seed,
    )
    c_dim = image_set.num_classes if use_labels else 0
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
        gpu_memory_gib=gpu_memory_gib(device),
    )
    return image_set, facts, notes


@contextlib.contextmanager
def naming_the_ways_out(num_classes: int | None) -> Iterator[None]:
    """Where labels do not fit a checkpoint with classes, say which options change the checkpoint."""
    try:
        yield
    except DataError as error:
        if num_classes and "label" in error.what:
            hint = (
                f"The checkpoint has {num_classes} classes. To give it those of the pictures: --classes keep "
                "(or extend, or fresh); to drop its classes: --no-cond."
            )
            error.hint = f"{error.hint}\n{hint}" if error.hint else hint
        raise


def group_size_of(D: Any) -> int:
    """How many images the last block of D compares with each other, 1 where every number of them goes."""
    return (D.b4.mbstd.group_size or 1) if D.b4.mbstd is not None else 1


def num_freezable(D: Any) -> int:
    """How many layers of D FreezeD can freeze."""
    return sum(getattr(D, f"b{size}").num_layers for size in D.block_resolutions)


def gpu_memory_gib(device: torch.device) -> float | None:
    """Memory of a CUDA device in GiB, None for others."""
    if device.type != "cuda":
        return None
    return torch.cuda.get_device_properties(device).total_memory / 2**30


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
    for line in (line for operation in prepared.operations for line in operation.lines()):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if prepared.saved is not None:
        return show_continued(prepared, console)
    if prepared.checkpoint is not None:
        missing = [name for name in prepared.checkpoint.missing if name in ("G", "G_ema")]
        console.print(
            "Weights only: the optimisers, the augmentation probability and the averages of a run start anew."
            + (f" The file has no {missing[0]}; the other generator stands in for it." if missing else ""),
            highlight=False,
            soft_wrap=True,
        )
    print_reasons(console, "", prepared.reasons)


def show_continued(prepared: Prepared, console: Console) -> None:
    """Say where a run goes on, and with which other options."""
    saved = prepared.saved
    assert saved is not None
    lines = [*saved.skipped, f"Going on after {saved.nimg / 1000:g} kimg, from {saved.path}."]
    lines.append("Changed: " + "; ".join(prepared.changes) if prepared.changes else "All options as before.")
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def start(
    prepared: Prepared,
    *,
    console: Console,
    on_tick: Callable[[TrainState, dict], None] | None = None,
) -> RunResult:
    """Make the run folder, or go on in the one that there is, and train."""
    config, image_set, state, plan = prepared.config, prepared.image_set, prepared.state, prepared.plan
    if plan.device.type == "cpu":
        keep_freed_memory()
    source = None if prepared.checkpoint is None else prepared.checkpoint.provenance.to_dict()
    if prepared.saved is None:
        desc = f"{image_set.name}-{prepared.facts.family}-{prepared.facts.resolution}"
        desc = f"{desc}-{config.desc}" if config.desc else desc
        made = make_run_dir(config.outdir, desc) if plan.processes.is_first else None
        run_dir = cast(Path, plan.processes.broadcast_object(made, "making the run folder"))
    else:
        run_dir, source = prepared.saved.path.parent, prepared.saved.content["source"]
    kind = RunFolder if plan.processes.is_first else NoFolder
    folder = kind(run_dir, config, image_set, source=source, chunk=plan.batch_gpu, device=plan.device)
    folder.write_reals()
    math = training_math(config.precision)
    with math, Display(console, plan.total_nimg, state.nimg) as display:
        display.say(f"Run folder: {run_dir}")
        session = Session(prepared, folder, display, on_tick)
        if prepared.saved is None:
            begin(session)
        else:
            session.resume(prepared.saved.content)
            restore_random(prepared.saved.content)
        session.run()
        if session.stopped_by is not None:
            display.say(how_to_go_on(session))
    plan.processes.barrier("the end")  # nobody leaves before everything is saved and said
    if session.stopped_by == signal.SIGINT:
        raise KeyboardInterrupt
    assert session.snapshot is not None, "the last save either works or raises"
    return RunResult(run_dir, session.snapshot, state.nimg, config)
