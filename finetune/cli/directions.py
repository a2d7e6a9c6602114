"""`finetune directions`: the principal directions of w, as a file and as a contact sheet."""

from __future__ import annotations

from pathlib import Path

import click

from finetune.cli.latent_options import generator_of, label_option, labels_of, start_without_build
from finetune.cli.options import (
    device_option,
    force_option,
    network_file,
    network_option,
    offline_option,
    ops_option,
    outdir_option,
    refuse_existing,
    seed_option,
)
from finetune.progress import progress_bar

AMOUNTS = (-3, -2, -1, 0, 1, 2, 3)  # standard deviations, the columns of the contact sheet


@click.command("directions", short_help="Find the principal directions of w, and show what they change.")
@network_option()
@outdir_option()
@click.option("--num", type=click.IntRange(min=1), default=10, show_default=True, help="Directions.")
@seed_option("Seed of the image that is edited.")
@click.option(
    "--class",
    "class_index",
    type=click.IntRange(min=0),
    metavar="N",
    help="Directions and image of one class.  [default: directions of all classes, image of class 0]",
)
@label_option("Label of directions and image, like 1,180, for a checkpoint whose labels are vectors.")
@force_option("directions.npz")
@offline_option()
@device_option()
@ops_option()
def command(
    network: str,
    outdir: Path,
    num: int,
    seed: int,
    class_index: int | None,
    label: list[float] | None,
    force: bool,
    device: str,
) -> None:
    """Find the directions in which w varies most.

    Writes OUTDIR/directions.npz, for --directions of `finetune generate` and `finetune video`, and
    OUTDIR/directions.png: a row for each direction, -3 to 3 standard deviations along it.
    """
    from finetune.device import float32_math, resolve_device
    from finetune.directions import principal_directions
    from finetune.editing.directions import save_directions
    from finetune.editing.latents import Edit, LatentTable, columns
    from finetune.resolve import load
    from finetune.sampling import save_grid, synthesize

    out = outdir / "directions.npz"
    refuse_existing(out, force=force)
    checkpoint = load(network_file(network), device=resolve_device(device))
    G = generator_of(checkpoint)
    classes = None if class_index is None else [class_index]
    if classes is None and label is None and G.c_dim and checkpoint.label_kind != "vectors":
        classes = [0]  # of the image alone
    labels = labels_of(checkpoint, classes, label)
    start_without_build(checkpoint, num * len(AMOUNTS))
    with float32_math(), progress_bar("images", num * len(AMOUNTS)) as progress:
        found = principal_directions(G, num, class_index=class_index, label=label)
        images = []
        for vector, std in zip(found.vectors, found.std):
            edit = Edit("", vector * std, AMOUNTS, slice(None))
            for ws in next(iter(LatentTable(G, [seed], columns(G, labels, edits=[edit])))):
                images.append(synthesize(G, ws))
                progress(len(images), num * len(AMOUNTS))
    save_directions(out, found)
    for index, std in enumerate(found.std, 1):
        click.echo(f"pc{index:<4} standard deviation {float(std):.3g}")
    click.echo(f"Directions: {out}")
    sheet = save_grid(images, outdir / "directions.png", (len(AMOUNTS), num))
    click.echo(f"Contact sheet, {AMOUNTS[0]} to {AMOUNTS[-1]} standard deviations: {sheet}")
