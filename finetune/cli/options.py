"""Options and parameter types shared by several commands, so they have the same meaning everywhere."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import Any

import click

from finetune.errors import ConfigError
from finetune.options import MAX_SEED

# As torch_utils.ops.impl has them, which imports torch.
OPS_VARIABLE = "FINETUNE_OPS"
OPS_IMPLEMENTATIONS = ("auto", "ref", "cpu", "cuda")
# As finetune.hub.download has it.
OFFLINE_VARIABLE = "FINETUNE_OFFLINE"
NETWORK = "FILE|RUN|NAME|URL"
MAX_NUMBERS = 1_000_000  # a typing mistake such as 0-99999999 should not fill the disk


def parse_numbers(text: str, noun: str = "seed") -> list[int]:
    """Turn `0-15,42` into a list of numbers in the order given; a range counts both ends.

    noun: what the numbers are, for messages. Raises ValueError with one sentence that quotes the part it
    cannot read.
    """
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"{part.strip()!r} is not a {noun} or a range. Write them like 0-15,42.")
        low, high = int(first), int(last) if dash else int(first)
        if high < low:
            raise ValueError(f"the range {part.strip()!r} runs backwards. Write {high}-{low}.")
        if high > MAX_SEED:
            raise ValueError(f"{noun} {high} is above the largest one, {MAX_SEED}.")
        if len(found) + high - low + 1 > MAX_NUMBERS:
            raise ValueError(f"{text!r} names more than {MAX_NUMBERS:,} numbers.")
        found.extend(range(low, high + 1))
    return found


class LocalPath(click.Path):
    """A path; `~` is expanded, which shells leave to programs in `--out=~/file`."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("the path is empty.", param, ctx)
        return super().convert(os.path.expanduser(value), param, ctx)


class NumberRange(click.ParamType):
    """Numbers written like `0-15,42`; the value is a list of ints. noun: what they are, such as seed."""

    def __init__(self, noun: str) -> None:
        self.noun = self.name = noun

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return "LIST"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        if not isinstance(value, str):
            return list(value)
        try:
            return parse_numbers(value, self.noun)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Vector(click.ParamType):
    """Numbers written like `1,180`; the value is a list of floats."""

    name = "numbers"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return "NUMBERS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[float]:
        if not isinstance(value, str):
            return list(value)
        try:
            numbers = [float(part) for part in value.split(",")]
        except ValueError:
            numbers = [math.nan]
        if not all(map(math.isfinite, numbers)):
            self.fail(f"{value!r} is not a list of finite numbers. Separate them with commas.", param, ctx)
        return numbers


class GridSize(click.ParamType):
    """The size of an image grid, columns by rows, like `8x4`; the value is (columns, rows)."""

    name = "grid"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return "CxR"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        if not isinstance(value, str):
            return tuple(value)
        columns, _, rows = value.lower().partition("x")
        if not (columns.isdecimal() and rows.isdecimal() and int(columns) > 0 and int(rows) > 0):
            self.fail(f"{value!r} is not a grid. Write columns x rows, like 8x4.", param, ctx)
        return int(columns), int(rows)


class ImageSize(click.ParamType):
    """The size of images, `256` or width x height like `512x1024`; the value is (height, width)."""

    name = "size"
    smallest = 4

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return "PIXELS|WxH"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        if not isinstance(value, str):
            return tuple(value)
        sides = value.lower().split("x")
        if len(sides) > 2 or not all(side.isdecimal() and int(side) >= self.smallest for side in sides):
            self.fail(f"{value!r} is not a size. Write 256, or width x height like 512x1024.", param, ctx)
        return int(sides[-1]), int(sides[0])


def network_option(**overrides: Any):
    """Add `--network`: what `network_file` takes, as a string (a Path would change URLs)."""
    settings: dict[str, Any] = {
        "required": True,
        "metavar": NETWORK,
        "help": "Checkpoint file, run folder (its newest snapshot), name of `finetune checkpoints`, or URL "
        "(hf://USER/REPO too).",
    }
    return click.option("--network", **{**settings, **overrides})


def network_file(network: str) -> Path:
    """Return the file that `--network` means, downloaded if needed; print its name and license."""
    from finetune.progress import download_bar
    from finetune.resolve import resolve_network

    if not network:
        raise ConfigError("The name of the network is empty. Pass a file, a run folder, a name or a URL.")

    with download_bar() as (on_message, progress):
        return resolve_network(network, on_message=on_message, progress=progress)


def start_ranks(gpus: int, device: str) -> None:
    """Run this command again on the ranks that `--gpus` asks for, and exit with its code.

    Returns if one process is asked for, or if a launcher such as torchrun started this one.
    """
    if gpus == 1:
        return
    from finetune.distributed import env_rank, env_world_size, launch

    if env_rank() is None:
        raise click.exceptions.Exit(launch(sys.argv[1:], gpus, device))
    started = env_world_size()
    if env_rank() == 0 and started != gpus:
        click.echo(f"--gpus {gpus} has no effect: torchrun has started {started} processes.", err=True)


def offline_option(**overrides: Any):
    """Add `--offline`: nothing is downloaded by this process and its children."""

    def set_variable(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        if value:
            before = os.environ.get(OFFLINE_VARIABLE)
            os.environ[OFFLINE_VARIABLE] = "1"
            ctx.call_on_close(lambda: restore(OFFLINE_VARIABLE, before))

    settings: dict[str, Any] = {
        "is_flag": True,
        "callback": set_variable,
        "expose_value": False,
        "help": f"Disable internet access. Also ${OFFLINE_VARIABLE}.",
    }
    return click.option("--offline", **{**settings, **overrides})


def restore(variable: str, value: str | None) -> None:
    """Give an environment variable the value that it had, None for none."""
    if value is None:
        os.environ.pop(variable, None)
    else:
        os.environ[variable] = value


def device_option(**overrides: Any):
    """Add `--device`, which `finetune.device.resolve_device` converts into a torch device."""
    settings: dict[str, Any] = {
        "default": "auto",
        "show_default": True,
        "metavar": "NAME",
        "help": "auto, cpu, cuda, cuda:1 or mps.",
    }
    return click.option("--device", **{**settings, **overrides})


def ops_option(**overrides: Any):
    """Add `--ops`: the implementation of ops in this process and its children."""

    def set_variable(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
        if value is not None:
            os.environ[OPS_VARIABLE] = value

    settings: dict[str, Any] = {
        "type": click.Choice(OPS_IMPLEMENTATIONS),
        "callback": set_variable,
        "expose_value": False,
        "help": f"Implementation of the ops: ref is plain torch; only auto falls back. Also ${OPS_VARIABLE}.",
    }
    return click.option("--ops", **{**settings, **overrides})


class FirstNameOption(click.Option):
    """An option whose help shows only its first name."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        names, self.opts = self.opts, self.opts[:1]
        try:
            return super().get_help_record(ctx)
        finally:
            self.opts = names


def license_option(name: str = "--license", **settings: Any):
    """Add `--license` or a similar option, with the British spelling as a hidden alias."""
    names = (name, name.replace("license", "licence"), name.removeprefix("--").replace("-", "_"))
    return click.option(*names, cls=FirstNameOption, **{"metavar": "TEXT", **settings})


def outdir_option(**overrides: Any):
    """Add `--outdir`: the folder a command writes to; created if missing."""
    settings: dict[str, Any] = {
        "required": True,
        "type": LocalPath(file_okay=False, path_type=Path),
        "metavar": "DIR",
        "help": "Folder to write to.",
    }
    return click.option("--outdir", **{**settings, **overrides})


def force_option(what: str = "the file"):
    """Add `--force`, for a command that calls `refuse_existing`; what: what it replaces, for the help."""
    return click.option("--force", is_flag=True, help=f"Replace {what} if already there.")


def refuse_existing(*paths: Path, force: bool) -> None:
    """Raise ConfigError for a file, or a folder that is not empty, unless `force`.

    The rule for all commands: checkpoints, data sets, videos, web pages, w and directions are replaced only
    with --force; images, tables and reports, which are quickly made again, always.
    """
    for path in paths:
        is_empty = path.is_dir() and not any(path.iterdir())
        if path.exists() and not is_empty and not force:
            raise ConfigError(f"{path}: exists. Move it, write elsewhere, or use --force to replace it.")


def seed_option(help: str = "Random seed."):
    """Add `--seed`: one number that all generators of random numbers take."""
    return click.option("--seed", type=click.IntRange(0, MAX_SEED), default=0, show_default=True, help=help)


def seeds_option(**overrides: Any):
    """Add `--seeds`: a list of ints."""
    settings: dict[str, Any] = {
        "required": True,
        "type": NumberRange("seed"),
        "help": "Seeds, like 0-15,42; a seed always gives the same image.",
    }
    return click.option("--seeds", **{**settings, **overrides})
