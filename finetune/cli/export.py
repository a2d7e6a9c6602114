"""`finetune export`: a checkpoint in a format that other programs open."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from finetune.cli.options import (
    NETWORK,
    LocalPath,
    force_option,
    license_option,
    network_file,
    network_option,
    offline_option,
    refuse_existing,
)
from finetune.errors import ConfigError
from finetune.export.formats import FORMATS, HALF, WHICH, Format, format_of, half_refused
from finetune.progress import progress_bar

if TYPE_CHECKING:
    from finetune.checkpoint.load import Checkpoint
    from finetune.export.verify import Verification

WEB = "web"


def write_options(command):
    """Add the options of `export` and `convert` that determine what is written."""
    for option in reversed(
        (
            click.option(
                "--which",
                type=click.Choice(WHICH),
                help="Networks to write.  [default: all; "
                + ", ".join(row.name for row in FORMATS.values() if row.which != "all")
                + ", web: G_ema]",
            ),
            click.option("--slim", is_flag=True, help="Same as --which G_ema, which is enough to generate."),
            click.option(
                "--half", is_flag=True, help=f"Weights in float16 ({HALF}); the difference is measured."
            ),
            force_option(),
            license_option(help="License of the checkpoint, if it does not state one."),
            offline_option(),
        )
    ):
        command = option(command)
    return command


@click.command("export", short_help="Write a checkpoint for other programs, and verify the file.")
@network_option()
@click.option(
    "--format",
    "file_format",
    type=click.Choice([*FORMATS, WEB]),
    help="; ".join(f"{row.name} ({row.suffix}) opens in {row.opens_in}" for row in FORMATS.values())
    + "; web is a folder with a page that generates images in a browser.  "
    "[default: that of the suffix of FILE]",
)
@click.option(
    "--out",
    required=True,
    type=LocalPath(path_type=Path),
    metavar="FILE",
    help="File (web: folder) to write.",
)
@click.option(
    "--original",
    metavar=NETWORK,
    help="web: the checkpoint that training started from; the page morphs between both.",
)
@click.option(
    "--runtime",
    type=LocalPath(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="web: folder with the files of onnxruntime-web.  [default: fetched with npm, and cached]",
)
@write_options
def command(
    network: str,
    file_format: str | None,
    out: Path,
    original: str | None,
    runtime: Path | None,
    **options: Any,
) -> None:
    """Write a checkpoint as FILE, read FILE again, and compare every tensor and a set of images.

    FILE is created only if all agree. It also states the source of the weights and their license.
    """
    if file_format == WEB:
        write_web(network, out, original, runtime, **options)
        return
    for name, value in (("--original", original), ("--runtime", runtime)):
        if value:
            raise ConfigError(f"{name} {value}: has no effect without --format web. Omit it, or add that.")
    write(network, out, file_format, **options)


def write(
    network: str,
    out: Path,
    format_name: str | None,
    *,
    architecture: dict[str, Any] | None = None,
    which: str | None,
    slim: bool,
    half: bool,
    force: bool,
    license: str | None,
) -> None:
    """Write the checkpoint `network` as `out` and print what was compared, and its provenance.

    format_name: one of FORMATS, by default that of the suffix of `out`. Mistakes in the options are refused
    before anything is downloaded.
    """
    from finetune.export.save import save
    from finetune.resolve import load

    if out.is_dir():
        raise ConfigError(f"{out}: this is a folder. Pass the name of a file.")
    file_format = format_of(out, format_name, option="--format")
    if half and not file_format.half:
        raise half_refused(file_format.name, "--half")
    if slim and which not in (None, "G_ema"):
        raise ConfigError(f"--slim: has no effect with --which {which}. Use one of the two.")
    source = network_file(network)
    if out.exists() and out.samefile(source):
        raise ConfigError(f"{out}: this is the checkpoint itself. Choose another name.")
    refuse_existing(out, force=force)
    checkpoint = with_license(load(source, architecture=architecture), license)
    with progress_bar("comparing images", 1) as progress:
        result = save(
            checkpoint,
            out,
            file_format.name,
            which="G_ema" if slim else which,
            half=half,
            progress=progress,
        )
    print_result(checkpoint, out, file_format, result)


def print_result(checkpoint: Checkpoint, out: Path, file_format: Format, result: Verification) -> None:
    """Print what was written and compared, what the file lacks, and its provenance."""
    from finetune.checkpoint.load import NETWORKS

    name, networks = file_format.name, result.networks
    click.echo(f"Wrote {out} ({out.stat().st_size:,} bytes, {name}): {', '.join(networks)}.")
    if checkpoint.missing:
        click.echo(f"The source has no {' and no '.join(checkpoint.missing)}, so the file has none.")
    if name == "stylegan-pkl" and len(networks) < 3:
        click.echo("Loaders that require G, D and G_ema will refuse it.")
    if "D" in networks and checkpoint.augment_pipe is not None and not file_format.augment_pipe:
        click.echo("It does not contain the augmentation pipe, which only training needs.")
    tensors = f"{result.num_tensors} tensors equal, " if result.num_tensors else ""
    click.echo(
        f"Read back and compared: {tensors}{result.num_images} images, "
        f"largest difference {result.max_difference:.3g} (of values in -1 to 1)."
    )
    for line in provenance_lines(checkpoint.provenance.to_dict()):
        click.echo(line)
    left_out = tuple(f"{each}: " for each in NETWORKS if each not in (*networks, *checkpoint.missing))
    for note in checkpoint.notes:
        if not note.startswith(left_out):
            click.echo(f"Note: {note}.")


def write_web(
    network: str,
    out: Path,
    original: str | None,
    runtime: Path | None,
    *,
    which: str | None,
    slim: bool,
    half: bool,
    force: bool,
    license: str | None,
) -> None:
    """Write the page of the checkpoint `network` to the folder `out`."""
    from finetune.export.save import select
    from finetune.export.web import write_page
    from finetune.resolve import load

    if half:
        raise half_refused(WEB, "--half")
    if which in ("D", "all"):
        raise ConfigError(f"--format web with --which {which}: a page has one generator. Use G_ema or G.")
    refuse_existing(out, force=force)
    checkpoint = with_license(load(network_file(network)), license)
    if which or slim:
        checkpoint = select(checkpoint, which or "G_ema")
    first = None if original is None else load(network_file(original))
    with progress_bar("writing the page", 1) as progress:
        page = write_page(out, checkpoint, original=first, runtime=runtime, progress=progress)
    click.echo(f"Wrote {out} ({page.num_bytes:,} bytes). To open it: python -m http.server --directory {out}")
    click.echo(
        f"Models compared: {page.num_images} images, largest difference {page.max_difference:.3g} "
        "(of values in -1 to 1)."
    )
    for line in provenance_lines(checkpoint.provenance.to_dict()):
        click.echo(line)


def with_license(checkpoint: Checkpoint, license: str | None) -> Checkpoint:
    """Return the checkpoint with the license that the user states; a known one is not replaced."""
    from finetune.export.publish import is_uncertain

    origin = checkpoint.provenance
    if not license or license == origin.licence:
        return checkpoint
    if origin.licence and not is_uncertain(origin.licence):
        raise ConfigError(
            f"--license {license}: {origin.source} has one ({origin.licence}). Omit the option."
        )
    return dataclasses.replace(checkpoint, provenance=dataclasses.replace(origin, licence=license))


def step_text(step: dict[str, Any]) -> str:
    """Return the name and hash of one step of a provenance."""
    return f"{step['source'] or 'unnamed'} (sha256 {step['sha256'] or 'not known'})"


def provenance_lines(provenance: dict[str, Any]) -> list[str]:
    """Return lines on where the weights come from, newest first, and their license."""
    lines = []
    step: dict[str, Any] | None = provenance
    word = "Source: "
    while step:
        seen = f", trained for {step['nimg'] / 1000:g} kimg" if step["nimg"] is not None else ""
        lines.append(f"{word}{step_text(step)}{seen}")
        if other := step.get("blended_with"):
            lines.append(f"  blended with: {step_text(other)}")
        step, word = step["parent"], "  from: "
    lines.append(f"License: {provenance['licence'] or 'not known; see the origin of the source'}")
    return lines
