"""`finetune convert`: a checkpoint from one format to another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from finetune.cli.export import write, write_options
from finetune.cli.options import NETWORK, LocalPath
from finetune.export.formats import FORMATS


class ArgumentType(click.ParamType):
    """A constructor argument like `first_cutoff=1.5`; gives its name and its value, JSON or else text."""

    name = "argument"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        name, sign, text = value.partition("=")
        if not (name.strip() and sign):
            self.fail(f"{value!r} is not an argument. Use NAME=VALUE, like first_cutoff=1.5.", param, ctx)
        try:
            return name.strip(), json.loads(text)
        except ValueError:
            return name.strip(), text.strip()


@click.command("convert", short_help="Convert a checkpoint from one format to another.")
@click.argument("source", metavar=f"IN ({NETWORK})")
@click.argument("out", metavar="OUT", type=LocalPath(path_type=Path))
@click.option(
    "--format",
    "file_format",
    type=click.Choice(list(FORMATS)),
    help="Format of OUT.  [default: that of its suffix: "
    + ", ".join(f"{row.suffix} {row.name}" for row in FORMATS.values())
    + "]",
)
@click.option(
    "--arch",
    type=ArgumentType(),
    multiple=True,
    metavar="NAME=VALUE",
    help="Constructor argument of the networks of a state dict, if its tensors do not determine it; may be "
    "repeated.",
)
@write_options
def command(
    source: str, out: Path, file_format: str | None, arch: tuple[tuple[str, Any], ...], **options: Any
) -> None:
    """Convert the checkpoint IN to the format of OUT, with the same checks as `finetune export`.

    IN is anything that can be opened: official pickles, state dicts and modules written by torch.save, files
    of the StyleGAN2 port by rosinality, and safetensors of this package.
    """
    write(source, out, file_format, architecture=dict(arch), **options)
