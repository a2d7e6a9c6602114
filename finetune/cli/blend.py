"""`finetune blend`: a checkpoint between two related ones."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from finetune.cli.options import LocalPath, network_file, offline_option, refuse_existing
from finetune.progress import progress_bar


class AlphaType(click.ParamType):
    """A number, or numbers by resolution like `4=0,16=0.5,mapping=0`; the value is a float or a dict."""

    name = "alpha"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            if "=" not in value:
                return self.number(value)
            pairs = [part.partition("=") for part in value.split(",")]
            return {
                key if (key := name.strip()) == "mapping" else int(key): self.number(number)
                for name, _, number in pairs
            }
        except ValueError:
            self.fail(f"{value!r} is not a number, or numbers by resolution like 4=0,16=0.5.", param, ctx)

    @staticmethod
    def number(text: str) -> float:
        if not math.isfinite(number := float(text)):
            raise ValueError(text)
        return number


@click.command("blend", short_help="Blend two related checkpoints, as a whole or by resolution.")
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@click.option(
    "--alpha",
    type=AlphaType(),
    default="0.5",
    show_default=True,
    metavar="X|RES=X,…",
    help="Weight of B: 0 is A, 1 is B. By resolution: 4=0,32=1 takes layers below 32 from A, the others from "
    "B; mapping=X is the weight for the mapping network (default: that of the lowest resolution).",
)
@click.option(
    "--out",
    required=True,
    type=LocalPath(path_type=Path),
    metavar="FILE",
    help="File to write, with a suffix of `finetune export`: .pkl and others.",
)
@click.option("--force", is_flag=True, help="Blend unrelated checkpoints; replace FILE if already there.")
@offline_option()
def command(first: str, second: str, alpha: Any, out: Path, force: bool) -> None:
    """Write a checkpoint with weights between those of A and B.

    A and B are anything that --network of other commands accepts. Only related checkpoints blend well: one is
    refused unless both descend from the same file, or their weights are close.
    """
    from finetune.editing.blend import MAX_DISTANCE, blend, relation
    from finetune.errors import ConfigError
    from finetune.export.formats import format_of
    from finetune.export.save import save
    from finetune.resolve import load

    format_of(out, option=None)
    refuse_existing(out, force=force)
    A, B = (load(network_file(network)) for network in (first, second))
    related = relation(A, B)
    distance = f"distance of the weights {related.distance:.3f}"
    if not related and not force:
        raise ConfigError(
            f"{first} and {second} are not related: no common ancestor, {distance} (related: up to "
            f"{MAX_DISTANCE:g}, independent: 1.41).",
            hint="A blend of unrelated checkpoints gives noise. Give --force to write it anyway.",
        )
    blended = blend(A, B, alpha)
    with progress_bar("comparing images", 1) as progress:
        result = save(blended, out, progress=progress)
    ancestor = f"common ancestor {related.ancestor}" if related.ancestor else "no common ancestor known"
    click.echo(f"Wrote {out}: {', '.join(result.networks)}. {ancestor[0].upper()}{ancestor[1:]}, {distance}.")
    click.echo(f"License: {blended.provenance.licence or 'not known'}")
