"""`finetune train`: fine-tune a checkpoint on a data set."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import typing
from collections.abc import Callable, Iterator
from typing import Any

import click

from finetune.cli.options import network_file, start_ranks
from finetune.options import DATA, DISTILLATION, MACHINE, OPTIONS, RECIPE, RECORDS, SHAPE, TrainOptions, flag

GROUPS = (DATA, SHAPE, RECIPE, DISTILLATION, MACHINE, RECORDS)


class GroupedCommand(click.Command):
    """A command whose help lists its options by purpose."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a section for each group."""
        sections: dict[str, list[tuple[str, str]]] = {group: [] for group in (*GROUPS, "Other")}
        for parameter in self.get_params(ctx):
            group = getattr(parameter, "group", "Other")
            if (record := parameter.get_help_record(ctx)) is not None:
                sections[group].append(record)
        for group, records in sections.items():
            with formatter.section(group):
                formatter.write_dl(records)


class GroupedOption(click.Option):
    """An option that belongs to a group of the help text."""

    def __init__(self, *args: Any, group: str, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.group = group


def train_options(command: Callable) -> Callable:
    """Add an option for every field of TrainOptions, as the field describes it."""
    hints = typing.get_type_hints(TrainOptions)
    for name, option in reversed(OPTIONS.items()):
        kind = typing.get_args(hints[name])[0]
        # `batch_gpu` is a number or a word, which TrainOptions reads.
        number = kind in (int, float) and name != "batch_gpu"
        spelling, settings = flag(name), {"type": kind if number else str}
        default = option.shown or option.default
        if kind is bool:
            settings = {"is_flag": True}
            if name != "new_d":
                spelling = f"{spelling}/--no-{spelling[2:]}"
            default = option.shown or ("" if name == "new_d" else f"no-{name}")
        elif option.choices and kind is str:
            settings["type"] = click.Choice(option.choices)
        if option.metavar:
            settings["metavar"] = option.metavar
        text = option.help
        if default not in (None, ""):
            shown = f"{default:g}" if isinstance(default, float) else default
            text += f"  [{shown}]" if str(shown).startswith("required") else f"  [default: {shown}]"
        command = click.option(
            spelling, name, cls=GroupedOption, group=option.group, default=None, help=text, **settings
        )(command)
    return command


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


def dry_run_without_checkpoint(asked: TrainOptions) -> bool:
    """Print what is known of a run whose checkpoint would be downloaded; return whether that is the case."""
    from rich.console import Console

    from finetune.train.downloads import missing_checkpoint, show_without_checkpoint

    missing = missing_checkpoint(asked.resume or "")
    if missing is None:
        return False
    click.echo(f"Would download: {missing}.")
    show_without_checkpoint(asked, Console())
    click.echo("Dry run: options and images are checked; no run folder was created, nothing downloaded.")
    return True


@click.command(
    "train",
    cls=GroupedCommand,
    short_help="Fine-tune a checkpoint on your images with self-distillation.",
)
@train_options
@click.option(
    "--gpus",
    cls=GroupedOption,
    group=MACHINE,
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Processes on this machine, one for each GPU (with --device cpu: CPU processes). For several "
    "machines, use torchrun.",
)
@click.option(
    "-n",
    "--dry-run",
    cls=GroupedOption,
    group=RECORDS,
    is_flag=True,
    help="Check everything, print all options with their reasons, and exit.",
)
def command(dry_run: bool, gpus: int, **options: Any) -> None:
    """Fine-tune a checkpoint on your images with self-distillation.

    \b
    finetune train --resume ffhq.pkl --data images/ --outdir runs
    finetune train --resume runs/00000-images-stylegan2-256

    All other options have defaults that follow from the checkpoint, the resolution, the data set and the
    machine; `--dry-run` prints each with its reason and downloads nothing. The run folder contains
    config.json, log.jsonl, image grids, snapshots and report.html, the page of the run. `finetune --offline
    train …` prevents downloads, `finetune --ops … train` chooses the kernels.
    """
    asked = TrainOptions(**options)
    if dry_run and dry_run_without_checkpoint(asked):
        return
    if asked.resume and not os.path.exists(asked.resume):
        asked.validate()  # before a download
        asked = dataclasses.replace(asked, resume=str(network_file(asked.resume)))
    start_ranks(gpus, asked.device or "auto")
    from rich.console import Console

    from finetune.distributed import env_rank, shutdown
    from finetune.train.checkpointing import RunFinished
    from finetune.train.prepare import prepare, show
    from finetune.train.train import start

    is_first = not env_rank()
    console = Console(quiet=not is_first)
    with report_errors_on_rank0():
        try:
            prepared = prepare(asked, console, dry_run=dry_run)
        except RunFinished as finished:  # exit code 0: job schedulers start the same command again
            console.print(str(finished), highlight=False, markup=False, soft_wrap=True)
            return
    show(prepared, console)
    if dry_run:
        from finetune.train.downloads import missing_weights

        for each in missing_weights(prepared.config):
            console.print(f"Would download: {each}.", highlight=False)
        done = "Dry run: all checks passed; no run folder was created, nothing downloaded."
        console.print(done, highlight=False)
        return
    try:
        result = start(prepared, console=console)
    except KeyboardInterrupt:
        if is_first:
            raise
        raise click.exceptions.Exit(130) from None  # rank 0 reports it
    shutdown()
    if result.nimg < round(1000 * result.config.kimg):
        return  # stopped by SIGTERM, which has been printed
    from finetune.report import end_message

    found = result.recommended
    text = end_message(result.run_dir, found.path, found.nimg, found.why)
    console.print(text, highlight=False, markup=False, soft_wrap=True)
