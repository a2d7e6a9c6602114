"""`finetune export`: a checkpoint in a format that other programs open."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from finetune.cli.options import license_option, network_file, network_option, offline_option
from finetune.cli.progress import progress_bar
from finetune.errors import ConfigError

if TYPE_CHECKING:
    from finetune.checkpoint.load import Checkpoint

_ENDINGS = {
    "stylegan-pkl": "give --format safetensors, or a name that ends in .pkl",
    "safetensors": "give a name that ends in .safetensors",
}


@click.command("export", short_help="Write a checkpoint for other programs, and check what was written.")
@network_option()
@click.option(
    "--format",
    "file_format",
    type=click.Choice(["stylegan-pkl", "safetensors"]),
    default="stylegan-pkl",
    show_default=True,
    help="stylegan-pkl opens in the StyleGAN2-ADA and StyleGAN3 code bases; safetensors is tensors and JSON.",
)
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="FILE", help="File to write.")
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
@license_option(help="License of the checkpoint, if it does not state one.")
@offline_option()
def command(network: str, file_format: str, out: Path, force: bool, license: str | None) -> None:
    """Write a checkpoint as FILE, read FILE again, and compare every tensor and a set of images.

    FILE is created only if all agree. The source of the weights and their license are written to it, too.
    """
    from finetune.export.verify import export_checkpoint
    from finetune.resolve import load

    source = network_file(network)
    if out.is_dir():
        raise ConfigError(f"--out {out} is a folder; give the name of a file.")
    if (out.suffix.lower() == ".safetensors") != (file_format == "safetensors"):
        raise ConfigError(
            f"--out {out} has not the ending of --format {file_format}; {_ENDINGS[file_format]}."
        )
    if out.exists():
        if out.samefile(source):
            raise ConfigError(f"--out {out} is the checkpoint itself; choose another name.")
        if not force:
            raise ConfigError(f"--out {out} exists; give --force to replace it, or choose another name.")
    checkpoint = with_license(load(source), license)
    with progress_bar("comparing images", 1) as progress:
        result = export_checkpoint(out, checkpoint, file_format, progress=progress)

    click.echo(f"Wrote {out} ({out.stat().st_size:,} bytes, {file_format}): {', '.join(result.networks)}.")
    if checkpoint.missing:
        click.echo(_what_is_missing(checkpoint.missing, file_format))
    if file_format == "safetensors" and checkpoint.augment_pipe is not None:
        click.echo("The augmentation pipe, which only training needs, is not in it.")
    click.echo(
        f"Read back and compared: {result.num_tensors} tensors equal, {result.num_images} images, "
        f"largest difference {result.max_difference:.3g} (of values in -1 to 1)."
    )
    for line in provenance_lines(checkpoint.provenance.to_dict()):
        click.echo(line)


def with_license(checkpoint: Checkpoint, license: str | None) -> Checkpoint:
    """Return the checkpoint with the license that the user states; a known one is not replaced."""
    from finetune.hub.identify import BY_NAME

    origin = checkpoint.provenance
    if not license or license == origin.licence:
        return checkpoint
    if origin.licence and not origin.licence.endswith(BY_NAME):
        raise ConfigError(
            f"--license {license}: {origin.source} has one ({origin.licence}). Omit the option."
        )
    return dataclasses.replace(checkpoint, provenance=dataclasses.replace(origin, licence=license))


def _what_is_missing(missing: list[str], file_format: str) -> str:
    text = f"The source has no {' and no '.join(missing)}, so the file has none either."
    if file_format == "stylegan-pkl":
        text += " Loaders that insist on G, D and G_ema will refuse it."
    return text


def provenance_lines(provenance: dict[str, Any]) -> list[str]:
    """Return lines on where the weights come from, newest first, and their license."""
    lines = []
    step: dict[str, Any] | None = provenance
    word = "Source: "
    while step:
        seen = f", trained for {step['nimg'] / 1000:g} kimg" if step["nimg"] is not None else ""
        lines.append(f"{word}{step['source'] or 'unnamed'} (sha256 {step['sha256'] or 'not known'}){seen}")
        step, word = step["parent"], "  from: "
    lines.append(f"License: {provenance['licence'] or 'not known; see the origin of the source'}")
    return lines
