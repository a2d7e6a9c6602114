"""`finetune train`: a checkpoint and pictures in, a better checkpoint out."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator
from typing import Any

import click

from finetune import config as choices
from finetune.cli.options import device_option, network_file, offline_option, ops_option
from finetune.config import TrainConfig

DEFAULTS = {name: field.default for name, field in TrainConfig.__dataclass_fields__.items()}


def option(name: str, kind: Any = None, help: str = "", **settings: Any):
    """One option whose flag, parameter and config field carry one name; its default stands in TrainConfig."""
    default = DEFAULTS[name]
    if isinstance(kind, tuple):
        kind = click.Choice(kind)
    shown = default is not None and not isinstance(default, bool)
    return click.option(
        settings.pop("flag", choices.flag(name)),
        name,
        type=kind,
        default=default,
        show_default=shown,
        help=help,
        **settings,
    )


class Weight(click.ParamType):
    """A number, or auto:RATIO."""

    name = "weight"

    def get_metavar(self, param: click.Parameter, ctx: Any = None) -> str:
        return "NUMBER|auto:RATIO"

    def convert(self, value: Any, param: Any, ctx: Any) -> float | str:
        try:
            return float(value)
        except ValueError:
            return value  # TrainConfig knows what is wrong with it


@contextlib.contextmanager
def report_errors_on_rank0() -> Iterator[None]:
    """Let rank 0 report an error of all ranks; another one does if it still runs five seconds later."""
    import time

    from finetune.distributed import env_rank
    from finetune.errors import FinetuneError

    try:
        yield
    except FinetuneError as error:
        if rank := env_rank():
            time.sleep(5)
            error.what = f"Rank {rank}: {error.what}"
        raise


@click.command("train", short_help="Fine-tune a checkpoint to a folder of pictures, with self-distillation.")
@option(
    "resume",
    str,
    "Checkpoint to start from: a file, a name of `finetune checkpoints`, or a URL. A run folder, or its "
    "training-state file: go on with that run exactly.",
    metavar="NETWORK|RUN",
)
@option("scratch", choices.FAMILIES, "Start without a checkpoint, from random weights.")
@click.option(
    "--data",
    default="",
    type=click.Path(),
    metavar="DIR|ZIP",
    help="Pictures: a folder or a zip.  [needed, but for going on with a run]",
)
@option("outdir", click.Path(file_okay=False), "Where the run folder is made.", metavar="DIR")
@option(
    "recipe",
    choices.RECIPES,
    "What the job is: the checkpoint's own pictures, others, very few, or nothing but published formulas.",
)
@option("kimg", float, "Length in thousands of images seen; fractions are fine.")
@option("batch", int, "Images a step.")
@option("batch_gpu", int, "Images in memory at once; --batch is cut into such parts.")
@option("gamma", float, "Weight of the R1 penalty.")
@option("mirror", None, "Show the pictures mirrored as well.", flag="--mirror/--no-mirror")
@option(
    "aug",
    choices.AUGMENTATIONS,
    "Augmentation: adaptive (by default, but for very many pictures), none, or with a fixed probability --p.",
)
@option("target", float, "Target of --aug ada.")
@option("p", float, "Probability of --aug fixed.")
@option(
    "augpipe",
    tuple(choices.AUGPIPES),
    "What augmentation may do: blit, geometry, colour, filter, noise, cutout.",
)
@option("freezed", int, "Freeze the first layers of the discriminator (FreezeD).")
@option(
    "cond",
    None,
    "Use the labels of dataset.json, or none; changes a checkpoint that has it otherwise.",
    flag="--cond/--no-cond",
)
@option("labels", choices.LABELS, "Labels from dataset.json, or one class for each folder of images.")
@option("fit", choices.FITS, "How images of another size are brought to the network's.")
@option("glr", float, "Learning rate of the generator.")
@option("dlr", float, "Learning rate of the discriminator.")
@option("g_beta1", float, "First beta of the generator's Adam.")
@option("lr_warmup_kimg", float, "Let both learning rates grow from 0 over so many kimg.")
@option("ema_kimg", float, "Half-life of the average generator, the one that is exported.")
@option(
    "sd_weight",
    Weight(),
    "Weight of the self-distillation; 0 is the plain recipe. auto:0.1 sets it so that its gradient is a "
    "tenth of the adversarial one.",
)
@option("sd_backbone", choices.BACKBONES, "Network that compares student and teacher.")
@option("sd_interval", int, "Compare every k-th step, counted k times.")
@option("sd_resolution", int, "Compare at this many pixels at most.")
@option("sd_teacher", choices.TEACHERS, "The moving average, or the checkpoint as it was.")
@option(
    "sd_teacher_kimg", float, "Half-life of an average for the teacher alone; without it: the exported one."
)
@option(
    "resolution", int, "Pixels, a power of two: of a network from --scratch, or to change a StyleGAN2 to."
)
@option(
    "channels", int, "1 gray, 3 RGB, 4 RGBA: of a network from --scratch, or to change the checkpoint to."
)
@option(
    "classes", choices.CLASSES, "With other classes than the checkpoint's: what becomes of its embeddings."
)
@option(
    "new_d",
    None,
    "Begin with a new discriminator; needed where the file has none.",
    flag="--new-d",
    is_flag=True,
)
@option("d_warmup_kimg", float, "With --new-d: let it learn alone for so long.")
@option("cbase", int, "For --scratch: channels times resolution.")
@option("cmax", int, "For --scratch: most channels in a layer.")
@option("map_depth", int, "For --scratch: layers of the mapping network.")
@option("z_dim", int, "For --scratch: numbers in a z.")
@option("w_dim", int, "For --scratch: numbers in a w.")
@option(
    "metrics", str, "Measure while training: names as `finetune evaluate` has them, or none.", metavar="LIST"
)
@option("metrics_kimg", float, "Kimg between measurements.")
@option("metrics_num", int, "Pictures to generate for a measurement.")
@option("metrics_inception", click.Path(), "Inception weights, where you have them.", metavar="FILE")
@option("snap", int, "Ticks between snapshots.")
@option("save_every_min", float, "Minutes after which the state of the run is saved in between; 0: never.")
@option("keep", int, "Snapshots to keep, the newest ones.  [default: all]")
@option(
    "on_divergence",
    choices.POLICIES,
    "When a loss is not finite, the scores of D explode or G leaves its average: stop, go back to the last "
    "state with slower learning (three times at most), or only say so.",
)
@option("tick", float, "Kimg between lines of the log.")
@option("seed", int, "Seed of everything random.")
@option("workers", int, "Processes that decode pictures; 0 decodes in between.")
@option("desc", str, "Words to add to the name of the run folder.")
@device_option()
@ops_option()
@offline_option()
@option(
    "precision",
    choices.PRECISIONS,
    "auto: float16 layers as the checkpoint says on CUDA, float32 elsewhere, by tensor cores to five digits; "
    "fp32: float32 everywhere; tf32: as auto, with float32 convolutions and products in TF32 (three digits); "
    "fp16: as auto, with float16 layers even if the checkpoint has none.",
)
@option("graphs", choices.GRAPHS, "auto: replay the parts of a step as CUDA graphs on a GPU.")
@click.option(
    "--gpus",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Processes on this machine, one for each GPU (or CPU processes, with --device cpu). More machines: "
    "torchrun.",
)
@click.option(
    "-n", "--dry-run", is_flag=True, help="Check everything, print all options with their reasons, and stop."
)
def command(dry_run: bool, gpus: int, **options: Any) -> None:
    """Go on training a checkpoint on pictures of yours, and hold it to its own average while it learns.

    `finetune train --resume ffhq.pkl --data pictures/ --outdir runs` needs nothing else: what is not said is
    settled from the checkpoint, the resolution and the number of pictures, and printed with the reason.
    The run folder gets config.json, log.jsonl, sheets of pictures and snapshots that open everywhere.
    """
    config = TrainConfig(**options)
    if config.resume is not None and not os.path.exists(config.resume):
        config.validate()  # before a download
        config = dataclasses.replace(config, resume=str(network_file(config.resume)))
    from finetune.distributed import env_rank, launch, shutdown

    if gpus > 1 and env_rank() is None:
        raise click.exceptions.Exit(launch(sys.argv[1:], gpus, options["device"]))
    from rich.console import Console

    from finetune.train.prepare import prepare, show
    from finetune.train.train import start

    is_first = not env_rank()
    console = Console(quiet=not is_first)
    with report_errors_on_rank0():
        prepared = prepare(config, console)
    show(prepared, console)
    if dry_run:
        console.print("Dry run: everything fits; nothing was written.", highlight=False)
        return
    try:
        result = start(prepared, console=console)
    except KeyboardInterrupt:
        if is_first:
            raise
        raise click.exceptions.Exit(130) from None  # rank 0 reports it
    shutdown()
    console.print(
        f"Done: {result.nimg / 1000:g} kimg. Pictures of it: finetune generate --network {result.snapshot} "
        "--seeds 0-15 --outdir pictures",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
