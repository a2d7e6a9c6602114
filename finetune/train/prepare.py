"""Check the options of a run and build everything it needs, without writing anything."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from finetune import recipes, run_lock
from finetune.checkpoint.load import Checkpoint
from finetune.checkpoint.provenance import Provenance
from finetune.checkpoint.surgery import TargetShape, operate
from finetune.config import TrainConfig
from finetune.data import ImageSet
from finetune.data.scanning import counted
from finetune.device import fix_workspace, resolve_device, training_math
from finetune.distributed import env_rank, init
from finetune.errors import CheckpointError, ConfigError, FinetuneError
from finetune.metrics.evaluate import ensure_metric_weights
from finetune.metrics.perceptual import build_distance, ensure_weights
from finetune.models import image_size
from finetune.options import TrainOptions, flag
from finetune.recipes import Reason, RunFacts
from finetune.resolve import load, newest_snapshot
from finetune.train import memory, validation
from finetune.train.build import build_plan, build_state
from finetune.train.checkpointing import SavedState, find_state, merge_options
from finetune.train.facts import read_data
from finetune.train.progress import print_reasons
from finetune.train.run_dir import check_place
from finetune.train.state import Plan, TrainState, unpack_network


@dataclass(frozen=True)
class Origin:
    """Where a run starts: random weights (no checkpoint), a checkpoint, or a saved state of the run.

    options: those that the run is resolved from. shape: the options, with constant defaults, with which data
    and networks are compared; a resumed run repeats no surgery. place: where it writes. source: provenance of
    the checkpoint that the run first started from. lines: to print.
    """

    options: TrainOptions
    checkpoint: Checkpoint | None
    shape: TrainOptions
    place: Path
    source: dict | None
    lines: tuple[str, ...]
    saved: SavedState | None = None

    @property
    def nimg(self) -> int:
        """Images seen by the run before."""
        return self.saved.nimg if self.saved is not None else 0


@dataclass(frozen=True)
class Prepared:
    """A run that has been checked and built, ready to start.

    notes: on the data set, and what was changed in the networks. overview: the data set in words, by subject;
    empty on ranks other than 0.
    """

    config: TrainConfig
    facts: RunFacts
    reasons: list[Reason]
    origin: Origin
    image_set: ImageSet
    state: TrainState
    plan: Plan
    notes: list[str]
    overview: dict[str, str]


def prepare(options: TrainOptions, console: Console | None = None, *, dry_run: bool = False) -> Prepared:
    """Check options, weights of the backbone, checkpoint and data; resolve all defaults; build the networks.

    dry_run: download nothing; the distance is one that needs no weights. Raises FinetuneError before
    anything is written if something does not fit.
    """
    with (console or Console(quiet=True)).status("Checking …") as status:
        return _prepare(options, status.update, dry_run)


def _prepare(asked: TrainOptions, on_message: Callable[[str], None], dry_run: bool) -> Prepared:
    origin = find_origin(asked, on_message)
    shape, checkpoint = origin.shape, origin.checkpoint
    if shape.deterministic:
        fix_workspace()
    group, device = init(resolve_device(shape.device or "auto"))
    if shape.batch and shape.batch % group.world_size:
        raise ConfigError(f"--batch {shape.batch}: must be a multiple of the {group.world_size} ranks.")
    image_set, facts, notes, overview = read_data(shape, checkpoint, device, on_message, group)
    if origin.saved is not None:
        origin.saved.check_images(image_set)
    on_message("Building the networks …")
    if checkpoint is not None:
        classes, new_d, names = shape.classes or None, bool(shape.new_d), image_set.class_names
        wanted = TargetShape(facts.c_dim, classes, shape.channels, shape.resolution, new_d, names)
        checkpoint, operations = operate(checkpoint, wanted, shape.seed or 0)
        notes += [line for operation in operations for line in operation.lines()]
        facts = replace(facts, num_freezable=num_freezable(checkpoint.D))
    config, reasons = recipes.resolve(origin.options, facts)
    if origin.saved is not None:
        reset = (each for each in reasons if getattr(origin.options, each.name) is None)
        notes += [f"{flag(each.name)} {each.value}: {each.why}." for each in reset]
    check_batch(config, facts)
    if not dry_run:  # after all other checks: these may be half a gigabyte to download
        on_message(f"Checking the weights of {config.sd_backbone} …")
        ensure_weights(config.sd_backbone, on_message)
        ensure_metric_weights(validation.names_of(config), None, on_message)

    torch.manual_seed(config.seed)
    state = build_state(config, facts, checkpoint, device)
    # Building a network draws random numbers even if its weights are then loaded.
    with torch.random.fork_rng(devices=[]):
        backbone = "l2" if dry_run else config.sd_backbone
        distance = build_distance(backbone, facts.channels, device)
    state.label_generator.manual_seed(config.seed)

    def labels(count: int) -> torch.Tensor:
        drawn = image_set.random_labels(count, state.label_generator)
        # From pinned memory, the copy does not make the host wait for the device.
        return drawn.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else drawn.to(device)

    plan = build_plan(config, facts, distance, labels, device, group)
    if not origin.options.batch_gpu and memory.can_run_out(device) and not dry_run:
        on_message("Trying micro-batches …")
        with training_math(config.precision, deterministic=config.deterministic):
            sizes = recipes.micro_batch_sizes(config.batch // group.world_size, facts.group_size)
            size = memory.largest_micro_batch(sizes, state, plan)
        config, plan = replace(config, batch_gpu=size), replace(plan, batch_gpu=size)
        tried = Reason("batch_gpu", size, "the largest micro-batch that fits into memory, by trial")
        reasons = [tried if reason.name == "batch_gpu" else reason for reason in reasons]
    written = [state.G, state.D, state.G_ema, *state.power_averages.values()]
    check_place(origin.place, config, written, origin.nimg)
    networks = state.networks().values()
    group.broadcast((each for net in networks for each in net.state_dict().values()), "the start")
    return Prepared(config, facts, reasons, origin, image_set, state, plan, notes, overview)


def find_origin(asked: TrainOptions, on_message: Callable[[str], None]) -> Origin:
    """Open what `--resume` names. Raises FinetuneError if it cannot be used."""
    saved = find_state(Path(asked.resume)) if asked.resume else None
    if saved is not None:
        if not env_rank():
            run_lock.check_free(saved.path.parent)
        options, changed = merge_options(asked, saved)
        check_options(asked, options)
        if not asked.data and not Path(str(options.data)).exists():
            raise ConfigError(
                f"{options.data}: no such folder or zip. It is the --data of the run, as it was given then.",
                hint="Pass where the images are now: --data DIR.",
            )
        lines = (*saved.skipped, f"Resuming after {saved.nimg / 1000:g} kimg, from {saved.path}.", *changed)
        shape = replace(options, classes=None, new_d=False)  # the networks have their shape already
        place, source = saved.path.parent, saved.content["source"]
        return Origin(options, checkpoint_of(saved), shape, place, source, lines, saved)
    check_options(asked, asked)
    shape = asked.with_defaults()
    place = Path(shape.outdir or "")
    if not asked.resume:
        return Origin(asked, None, shape, place, None, ())
    on_message(f"Loading {asked.resume} …")
    checkpoint = load_for_training(asked.resume, new_d=bool(asked.new_d))
    line = "Loaded weights only, G_ema included; optimizer and ADA state start new."
    if missing := [name for name in checkpoint.missing if name in ("G", "G_ema")]:
        line += f" The file has no {missing[0]}; the other generator is used in its place."
    return Origin(asked, checkpoint, shape, place, checkpoint.provenance.to_dict(), (line,))


def check_options(asked: TrainOptions, run: TrainOptions) -> None:
    """Raise ConfigError for options that cannot work in a run, as far as that needs no file."""
    asked.validate(run)
    device = resolve_device(run.device or "auto")
    if run.precision in ("tf32", "fp16") and device.type != "cuda":
        raise ConfigError(
            f"--precision {run.precision}: needs CUDA (the device is {device}). Use --precision auto."
        )
    if run.deterministic and device.type == "mps":
        raise ConfigError("--deterministic: needs CUDA or a CPU (the device is mps). Use --device cpu.")
    validation.names_of(run)


def check_batch(config: TrainConfig, facts: RunFacts) -> None:
    """Raise ConfigError if the batch cannot be split among ranks and micro-batches."""
    batch, batch_gpu, world_size = config.batch, config.batch_gpu, facts.num_processes
    if batch % (batch_gpu * world_size):
        raise ConfigError(
            f"--batch-gpu {batch_gpu}: {batch} images on {world_size} ranks cannot be split into such "
            f"micro-batches. Use {batch // world_size}."
        )
    if not recipes.can_group(batch_gpu, facts.group_size):
        raise ConfigError(
            f"--batch-gpu {batch_gpu}: the discriminator compares images in groups of {facts.group_size}. "
            f"Use a multiple of {facts.group_size}."
        )


def checkpoint_of(saved: SavedState) -> Checkpoint:
    """Return the networks of a state as a checkpoint."""
    networks: dict[str, Any] = {
        name: unpack_network(packed).eval().requires_grad_(False)
        for name, packed in saved.content["networks"].items()
        if name in ("G", "D", "G_ema")
    }
    if len(networks) != 3:
        raise CheckpointError(f"{saved.path} lacks G, D or G_ema")
    provenance = Provenance(source=saved.path.name, sha256="", size=0, generation="finetune")
    return Checkpoint(**networks, provenance=provenance)


def load_for_training(path: str, *, new_d: bool = False) -> Checkpoint:
    """Load the checkpoint of `--resume`. Raises ConfigError for one that training cannot start from."""
    if Path(path).is_dir():
        try:
            snapshot = newest_snapshot(Path(path))
        except FinetuneError:
            raise ConfigError(f"--resume {path}: this folder has no snapshots. Pass a file.") from None
        raise ConfigError(
            f"--resume {path}: this run folder has no training state to resume.",
            hint=f"To start from the weights of its newest snapshot: --resume {shlex.quote(str(snapshot))}",
        )
    checkpoint = load(path)
    G, D, foreign = checkpoint.generator, checkpoint.D, checkpoint.foreign
    if new_d:
        return checkpoint
    if D is None:
        have = ", ".join(name for name in ("G", "G_ema") if getattr(checkpoint, name) is not None)
        without = f"its D is foreign ({foreign['D']})" if "D" in foreign else "no discriminator D"
        raise ConfigError(
            f"--resume {path}: training needs a discriminator; the file has {have}, but {without}.",
            hint="Use a full training snapshot (network-snapshot-*.pkl with G, D and G_ema), or --new-d to "
            "start with a new discriminator, which is first trained alone.",
        )
    shape_G, shape_D = (
        {"size": "×".join(map(str, image_size(net)[::-1])), "channels": net.img_channels, "c_dim": net.c_dim}
        for net in (G, D)
    )
    if problems := [
        f"--resume {path}: {name} is {shape_G[name]} in G and {shape_D[name]} in D: not a pair."
        for name in shape_G
        if shape_G[name] != shape_D[name]
    ]:
        raise ConfigError(problems)
    return checkpoint


def num_freezable(D: Any) -> int:
    """Return how many layers of D FreezeD can freeze."""
    return sum(getattr(D, f"b{size}").num_layers for size in D.block_resolutions)


def show(prepared: Prepared, console: Console) -> None:
    """Print what will be trained on what, and why each option has its value."""
    facts, config = prepared.facts, prepared.config
    resumed = prepared.origin.saved is not None
    source = f"weights of {config.resume}" if config.resume else f"random weights ({facts.family})"
    start = "Networks" if resumed else f"Starting from {source}"
    vectors = prepared.image_set.label_kind == "vectors"
    labels = f"label vectors of {facts.c_dim} numbers" if vectors else f"{facts.c_dim} classes"
    classes = f", {labels}" if facts.c_dim else ""
    height, width = prepared.image_set.size
    images = counted(facts.num_images, "image")
    lines = [
        f"{start}: {width}×{height}, {facts.channels} channels{classes}.",
        f"{images} from {config.data}{', mirrored too' if config.mirror else ''}. "
        f"Training on {prepared.plan.device}.",
        *prepared.notes,
        *prepared.origin.lines,
    ]
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if not resumed:
        print_reasons(console, prepared.reasons)
