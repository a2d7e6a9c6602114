"""`finetune project`: the w of given images."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from finetune.cli.latent_options import generator_of, label_option, labels_of
from finetune.cli.options import (
    LocalPath,
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
from finetune.errors import ConfigError, DataError
from finetune.options import BACKBONES
from finetune.progress import progress_bar

if TYPE_CHECKING:
    import torch

    from finetune.checkpoint.load import Checkpoint
    from finetune.editing.project import Projection
    from finetune.models import Network


@click.command("project", short_help="Find the w of images, and optionally tune the generator to them.")
@click.argument(
    "images",
    nargs=-1,
    required=True,
    metavar="IMAGE…",
    type=LocalPath(exists=True, dir_okay=False, path_type=Path),
)
@network_option()
@outdir_option()
@click.option(
    "--space",
    type=click.Choice(["w", "w+"]),
    default="w+",
    show_default=True,
    help="w: one w for all layers, easier to edit; w+: one for each layer, closer to the image.",
)
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    default=500,
    show_default=True,
    help="Optimization steps in W, and as many in W+.",
)
@click.option(
    "--tune",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Pivotal tuning: then train the generator for this many steps per image, and write tuned.pkl. "
    "About 350.",
)
@click.option(
    "--backbone",
    type=click.Choice(BACKBONES),
    default="lpips-vgg",
    show_default=True,
    help="Perceptual distance to the image.",
)
@label_option("Label to start from, like 1,180, for a checkpoint whose labels are vectors.")
@seed_option()
@force_option("NAME.npz and tuned.pkl")
@offline_option()
@device_option()
@ops_option()
def command(
    images: tuple[Path, ...],
    network: str,
    outdir: Path,
    space: str,
    steps: int,
    tune: int,
    backbone: str,
    label: list[float] | None,
    seed: int,
    force: bool,
    device: str,
) -> None:
    """Find the w whose image is closest to each IMAGE.

    Writes OUTDIR/NAME.npz for --w of `finetune generate` and `finetune video`, its image NAME.png,
    projections.png (every image beside its projection), and projections.json (distances). Images of another
    size are cropped to the center and resized: align faces as the training images of the network were.
    """
    from finetune.device import float32_math, resolve_device
    from finetune.editing.project import Projector
    from finetune.metrics.perceptual import build_distance, ensure_weights
    from finetune.resolve import load
    from finetune.sampling import device_of

    names = [path.stem for path in images]
    for path, name in zip(images, names):
        if names.count(name) > 1 or name in ("projections", "tuned"):
            raise ConfigError(f"{path}: two outputs would be named {name}. Rename an image.")
        if (out := outdir / f"{name}.png").exists() and any(out.samefile(image) for image in images):
            raise ConfigError(f"--outdir {outdir}: {out.name} would replace an image. Use another folder.")
    kept = [f"{name}.npz" for name in names] + (["tuned.pkl"] if tune else [])
    refuse_existing(*(outdir / name for name in kept), force=force)
    checkpoint = load(network_file(network), device=resolve_device(device))
    G = generator_of(checkpoint)
    if label is not None and checkpoint.label_kind == "classes":
        raise ConfigError("--label: the labels of this network are classes, and none is needed. Omit it.")
    if label is not None or checkpoint.label_kind == "vectors":
        labels_of(checkpoint, None, label)  # raises for a label that does not fit
    targets = [read_target(path, G) for path in images]
    ensure_weights(backbone, lambda text: click.echo(text, err=True), option="--backbone")
    total = len(images) * (steps * (2 if space == "w+" else 1) + tune)
    with float32_math(), progress_bar("steps", total) as bar:
        count = itertools.count(1)

        def progress() -> None:
            bar(next(count), total)

        distance = build_distance(backbone, G.img_channels, device_of(G), checked=False)
        projector = Projector(G, distance, seed=seed, label=label)
        pivots = [projector.project(target, steps, space, progress) for target in targets]
        makers = [G, projector.tune(targets, pivots, tune, progress)] if tune else [G]
        results = [
            [projector.result(maker, ws, target) for maker in makers] for ws, target in zip(pivots, targets)
        ]
    options = {"network": network, "space": space, "steps": steps, "tune": tune, "backbone": backbone}
    options |= {} if label is None else {"label": label}
    write_results(outdir, names, targets, results, {**options, "seed": seed})
    if tune:
        write_tuned(outdir / "tuned.pkl", checkpoint, makers[-1], options)


def read_target(path: Path, G: Network) -> torch.Tensor:
    """Read an image as `[1, C, H, W]`, -1 to 1, of the output size of `G`; DataError if it cannot be used."""
    import torch

    from finetune.data import images_to_float
    from finetune.data.decode import decode
    from finetune.data.image_set import check_channels
    from finetune.data.problems import Unusable
    from finetune.models import image_size
    from finetune.sampling import device_of

    check_channels(G.img_channels)
    try:
        pixels = decode(path.read_bytes(), resolution=image_size(G), channels=G.img_channels, fit="crop")
    except Unusable as error:
        raise DataError(f"{path}: {error.kind} ({error.detail}). Use another image.") from None
    return images_to_float(torch.tensor(pixels)).unsqueeze(0).to(device_of(G))


def write_results(
    outdir: Path,
    names: list[str],
    targets: list[torch.Tensor],
    results: list[list[Projection]],
    options: dict[str, Any],
) -> None:
    """Write w, images, sheet and distances; print the distances."""
    from finetune.editing.latents import save_ws
    from finetune.sampling import save_grid, to_image, to_uint8

    outdir.mkdir(parents=True, exist_ok=True)
    sheet, distances = [], {}
    for name, target, found in zip(names, targets, results):
        save_ws(outdir / f"{name}.npz", found[-1].ws.unsqueeze(0))
        to_image(found[-1].image).save(outdir / f"{name}.png")
        sheet += [to_uint8(target)[0], *(result.image for result in found)]
        distances[name] = {
            kind: {"distance": result.distance, "rmse": result.rmse}
            for kind, result in zip(("projected", "tuned"), found)
        }
        for kind, numbers in distances[name].items():
            click.echo(
                f"{name}, {kind}: distance {numbers['distance']:.4f}, rmse {numbers['rmse']:.2f} of 255"
            )
    text = json.dumps({**options, "images": distances}, indent=2)
    (outdir / "projections.json").write_text(text + "\n", encoding="utf-8")
    grid = (len(sheet) // len(names), len(names))
    click.echo(f"Images beside their projections: {save_grid(sheet, outdir / 'projections.png', grid)}")


def write_tuned(path: Path, checkpoint: Checkpoint, tuned: Network, options: dict[str, Any]) -> None:
    """Write the tuned generator as G_ema of a checkpoint that descends from `checkpoint`."""
    from finetune.checkpoint.provenance import Provenance
    from finetune.export.save import save

    source = checkpoint.provenance
    provenance = Provenance(
        generation="finetune",
        source=path.name,
        sha256="",
        size=0,
        licence=source.licence,
        parent=source.to_dict(),
        training={"pivotal_tuning": options},
    )
    networks: dict[str, Any] = {"G": None, "D": None, "G_ema": tuned, "augment_pipe": None}
    save(dataclasses.replace(checkpoint, **networks, provenance=provenance, notes=(), foreign={}), path)
    click.echo(f"Tuned generator: {path}")
