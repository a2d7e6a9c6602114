"""`finetune dataset`: check a data set, and prepare a zip that loads fastest."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import click

from finetune.cli.options import (
    NETWORK,
    ImageSize,
    LocalPath,
    force_option,
    network_file,
    offline_option,
    refuse_existing,
)
from finetune.errors import ConfigError, DataError
from finetune.options import FITS, LABELS
from finetune.progress import progress_bar

workers_option = click.option(
    "--workers",
    type=click.IntRange(min=0),
    metavar="N",
    help="Processes that decode images.  [default: one per core, which is the maximum]",
)


@click.group("dataset", short_help="Check a data set, or prepare a zip that loads fastest.")
def command() -> None:
    """Check a data set before training, or resize it into a zip that loads fastest.

    Both are optional: training reads any folder or zip of images, checks all of them first, and resizes
    them by --fit.
    """


@command.command("check", short_help="Decode every image and list all problems.")
@click.argument("path", type=LocalPath(path_type=Path), metavar="DIR|ZIP")
@click.option(
    "--network",
    metavar=NETWORK,
    help="Check for training on this checkpoint: its resolution, channels and classes.",
)
@click.option("--resolution", type=ImageSize(), help="Check for this resolution.")
@click.option("--fit", type=click.Choice(FITS), help="How other sizes are resized.  [default: crop]")
@click.option(
    "--cond/--no-cond",
    default=None,
    help="Check labels.  [default: as the network; without one, if there are any]",
)
@click.option(
    "--labels",
    "labels_from",
    type=click.Choice(LABELS),
    default="file",
    show_default=True,
    help="Check dataset.json, or classes from the folders.",
)
@workers_option
@click.option("--fresh", is_flag=True, help="Decode unchanged images as well.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with every problem, instead of text.")
@offline_option()
def check_command(
    path: Path,
    network: str | None,
    resolution: tuple[int, int] | None,
    fit: str | None,
    cond: bool | None,
    labels_from: str,
    as_json: bool,
    **options: Any,
) -> None:
    """Decode every image and list, by kind, everything that training would refuse, and other findings:
    unusual modes, animations, duplicates, colliding names, labels without a file.

    Images that have not changed since the last check or training are not decoded again. Exit code 2 if
    training would refuse something, else 0.
    """
    from finetune.cli import dataset_report
    from finetune.data import ImageSet, scan
    from finetune.data.image_set import check_channels
    from finetune.data.labels import has_labels
    from finetune.data.problems import BAD_LABEL, hint
    from finetune.data.scanning import counted
    from finetune.data.sources import open_source
    from finetune.models import image_size
    from finetune.resolve import load

    channels, num_classes = None, None
    if labels_from == "folders":
        if cond is False:
            raise ConfigError("--labels folders: has no effect with --no-cond. Omit one of the two.")
        cond = True
    if network is not None:
        if resolution is not None:
            raise ConfigError("--resolution: already given by --network. Give one of the two.")
        checkpoint = load(network_file(network))
        G = checkpoint.generator
        resolution, channels, num_classes = image_size(G), G.img_channels, G.c_dim or None
        check_channels(channels)
        cond = G.c_dim > 0 if cond is None else cond
    elif resolution is not None and max(resolution) & (max(resolution) - 1):
        raise ConfigError(f"--resolution {max(resolution)}: the longer side must be a power of two.")
    if fit is not None and resolution is None:
        raise ConfigError(f"--fit {fit}: the size is unknown. Set it with --resolution or --network.")
    if resolution is not None and fit is None:
        fit = "crop"
    use_labels = has_labels(open_source(path)) if cond is None else cond
    asked: dict[str, Any] = dict(
        resolution=resolution,
        fit=fit,
        use_labels=use_labels,
        labels_from=labels_from,
        num_classes=num_classes,
    )
    with progress_bar("reading images", 0) as progress:
        found = scan(path, **asked, progress=progress, thorough=True, **options)
    if channels is not None:
        found = dataclasses.replace(found, notes=[*found.notes, *found.against(channels)])
    if network is not None and use_labels and not found.problems:
        from finetune.train.facts import compare_labels

        compare_labels(checkpoint, ImageSet(path, channels=G.img_channels, **asked), None)
    training = dataset_report.what_training_does(found, resolution, channels, fit)
    if as_json:
        values = dataset_report.as_values(found, use_labels, training)
        click.echo(json.dumps(values, indent=2))
    else:
        click.echo(dataset_report.as_text(found, training))
    if found.problems:
        number = counted(len(found.problems), "problem")
        advice = hint(found.problems, path)
        if labels_from == "file" and any(problem.kind == BAD_LABEL for problem in found.problems):
            advice += "\nOr train, and check, without labels: --no-cond."
        raise DataError(f"{path}: training would refuse this data set ({number}).", hint=advice)


@command.command("prepare", short_help="Resize images into a zip that loads fastest.")
@click.argument("src", type=LocalPath(path_type=Path), metavar="SRC")
@click.argument("dest", type=LocalPath(path_type=Path), metavar="DEST")
@click.option(
    "--resolution",
    type=ImageSize(),
    help="Size of the images: the side of squares, or width x height.  [default: that of the first one]",
)
@click.option(
    "--fit",
    type=click.Choice(FITS),
    help="How images of other sizes are resized.  [default: crop; without --resolution, refuse them]",
)
@click.option(
    "--channels",
    type=click.Choice(["1", "3", "4"]),
    default="3",
    show_default=True,
    help="Gray, color, or color with alpha.",
)
@click.option(
    "--labels",
    type=click.Choice([*LABELS, "none"]),
    help="Labels of dataset.json, one class for each folder, or none.  [default: file, if there are any]",
)
@click.option(
    "--bits",
    type=click.IntRange(1, 16),
    default=16,
    show_default=True,
    help="Bits used by the values of 16-bit images, such as 12 for many scanners.",
)
@click.option(
    "--format",
    "encoding",
    type=click.Choice(["tiff", "png"]),
    default="tiff",
    show_default=True,
    help="tiff is read fastest, png is smaller.",
)
@click.option(
    "--skip-bad",
    is_flag=True,
    help="Leave out unusable images instead of refusing the data set; 16-bit images may still need --bits.",
)
@workers_option
@force_option("DEST")
def prepare_command(src: Path, dest: Path, channels: str, force: bool, **options: Any) -> None:
    """Resize the images of SRC, a folder or zip, and write them to the uncompressed zip DEST.

    Subfolders are kept. Repeat the command to resume an interrupted call; the zip is identical byte
    for byte. DEST is created when it is complete.
    """
    from finetune.data.preparing import prepare
    from finetune.data.problems import escaped
    from finetune.data.scanning import counted

    refuse_existing(dest, force=force)
    try:
        with progress_bar("preparing the images", 0) as progress:
            made = prepare(src, dest, channels=int(channels), progress=progress, **options)
    except KeyboardInterrupt:
        click.echo("\nFinished images are kept: run the same command to resume.", err=True)
        raise
    for problem in made.left_out:
        click.echo(f"left out: {escaped(problem.name)} {problem.kind}: {problem.detail}")
    if made.settings.bits < 16 and not made.num_deep:
        click.echo(f"--bits {made.settings.bits} has no effect: no image has 16 bits a channel.")
    (height, width), mib = made.settings.size, made.num_bytes / 2**20
    earlier = f", {made.num_found_done} of them by an earlier call" if made.num_found_done else ""
    images = counted(made.num_images, "image")
    click.echo(f"{made.path}: {images} of {width}×{height}{earlier}, {mib:,.1f} MiB")
    for number, name in enumerate(made.classes):
        click.echo(f"class {number}: {escaped(name)}")
    cond = " --cond" if made.has_labels else ""
    data = shlex.quote(str(made.path))
    click.echo(f"To train on them: finetune train --resume CHECKPOINT --data {data}{cond}")
