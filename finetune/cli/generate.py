"""`finetune generate`: images from a checkpoint, one for each seed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from finetune.cli.options import (
    GridSize,
    NumberRange,
    Vector,
    device_option,
    network_file,
    network_option,
    offline_option,
    ops_option,
    outdir_option,
    seeds_option,
)
from finetune.cli.progress import progress_bar
from finetune.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from finetune.checkpoint.load import Checkpoint

# Few enough pixels that plain torch makes them sooner than the kernels are built (half a minute); StyleGAN3
# takes some thirty times as long without kernels, StyleGAN2 hardly longer.
QUICK_PIXELS = {"stylegan2": 1 << 22, "stylegan3-t": 1 << 14, "stylegan3-r": 1 << 14}


def start_without_build(device_type: str) -> None:
    """Run this command in plain torch if the CPU kernels are not built yet, and build them meanwhile."""
    from torch_utils import custom_ops
    from torch_utils.ops import impl

    if device_type == "cpu" and impl.default_impl() == "auto":
        custom_ops.build_for_next_start()


@click.command("generate", short_help="Make images from a checkpoint, one for each seed.")
@network_option()
@seeds_option()
@outdir_option()
@click.option(
    "--trunc",
    type=click.FloatRange(-10, 10),
    default=1.0,
    show_default=True,
    metavar="PSI",
    help="Truncation: 1 is full variety, 0 the average image.",
)
@click.option(
    "--trunc-cutoff",
    type=click.IntRange(min=0),
    metavar="N",
    help="Truncate only the first N rows of ws (coarse features).  [default: all]",
)
@click.option(
    "--class",
    "classes",
    type=NumberRange("class"),
    help="Classes, like 2 or 0-4, for a checkpoint that has classes; every seed is used with each.",
)
@click.option("--label", type=Vector(), help="Label, like 1,180, for a checkpoint whose labels are vectors.")
@click.option("--grid", type=GridSize(), help="Also write grid.png, columns x rows, like 8x4.")
@click.option(
    "--noise-mode",
    type=click.Choice(["const", "random", "none"]),
    default="const",
    show_default=True,
    help="StyleGAN2's noise: the stored maps, maps drawn from the seed, or none.",
)
@offline_option()
@device_option()
@ops_option()
def command(
    network: str,
    seeds: list[int],
    outdir: Path,
    trunc: float,
    trunc_cutoff: int | None,
    classes: list[int] | None,
    label: list[float] | None,
    grid: tuple[int, int] | None,
    noise_mode: str,
    device: str,
) -> None:
    """Make one image for each seed: OUTDIR/seed0000.png and so on; with several classes seed0000-class2.png.

    A seed always gives the same image, independent of the other seeds.
    """
    if math.isnan(trunc):
        raise ConfigError("--trunc nan is not a number.")
    num_images = len(seeds) * len(chosen(classes))
    if grid is not None and num_images > grid[0] * grid[1]:
        named = "--seeds and --class name" if classes and len(classes) > 1 else "--seeds names"
        raise ConfigError(
            f"--grid {grid[0]}x{grid[1]} has {grid[0] * grid[1]} places, {named} {num_images} images."
        )

    from finetune.device import float32_math, resolve_device
    from finetune.resolve import load
    from finetune.sampling import generate, save_grid, to_image

    checkpoint = load(network_file(network), device=resolve_device(device))
    G = checkpoint.best
    if G is None:
        raise CheckpointError(f"{network} holds no generator, only D.")
    if G.img_resolution**2 * num_images <= QUICK_PIXELS.get(checkpoint.family, 0):
        start_without_build(next(G.parameters()).device.type)
    check_labels(checkpoint, classes, label)  # raises before the folder is created
    if checkpoint.G_ema is None:
        click.echo("The checkpoint has no G_ema; the images come from G.", err=True)
    for line in without_effect(G, trunc, trunc_cutoff, noise_mode):
        click.echo(line, err=True)
    outdir.mkdir(parents=True, exist_ok=True)
    images, paths = [], []
    with float32_math(), progress_bar("images", num_images) as progress:
        for class_index in chosen(classes):
            suffix = f"-class{class_index}" if classes and len(classes) > 1 else ""
            for seed, image in generate(
                G,
                seeds,
                class_index=class_index,
                label=label,
                truncation_psi=trunc,
                truncation_cutoff=trunc_cutoff,
                noise_mode=noise_mode,
            ):
                paths.append(outdir / f"seed{seed:04d}{suffix}.png")
                to_image(image).save(paths[-1])
                progress(len(paths), num_images)
                if grid is not None:
                    images.append(image)
    click.echo(f"{len(set(paths))} images: {paths[0]}{' …' if len(paths) > 1 else ''}")
    if grid is not None:
        click.echo(f"Grid: {save_grid(images, outdir / 'grid.png', grid=grid)}")


def chosen(classes: list[int] | None) -> list[int] | list[None]:
    """Return the classes to use, `[None]` without `--class`."""
    return classes or [None]


def check_labels(checkpoint: Checkpoint, classes: list[int] | None, label: list[float] | None) -> None:
    """Raise ConfigError for `--class` and `--label` that the network cannot take."""
    from finetune.sampling import label_from_class, label_from_vector

    G: Any = checkpoint.best
    if label is not None:
        if classes is not None:
            raise ConfigError("--class and --label: an image has one label. Give one of the two.")
        if checkpoint.label_kind == "classes":
            raise ConfigError(f"--label: the labels of this network are {G.c_dim} classes. Use --class.")
        label_from_vector(G, label)
    elif checkpoint.label_kind == "vectors":
        given = "" if classes is None else "--class: "
        raise ConfigError(
            f"{given}the labels of this network are vectors of {G.c_dim} numbers. "
            f"Use --label {','.join(['0'] * G.c_dim)} with the numbers of your choice."
        )
    else:
        for class_index in chosen(classes):
            label_from_class(G, class_index)


def without_effect(G: Any, trunc: float, trunc_cutoff: int | None, noise_mode: str) -> Iterator[str]:
    """Yield a line for each option that changes nothing for this network."""
    from finetune.sampling import has_noise

    if noise_mode != "const" and not has_noise(G):
        yield f"--noise-mode {noise_mode} has no effect: this network adds no noise."
    if trunc_cutoff is not None and trunc == 1:
        yield f"--trunc-cutoff {trunc_cutoff} has no effect without --trunc."
    elif trunc_cutoff == 0:
        yield "--trunc has no effect with --trunc-cutoff 0."
    elif trunc_cutoff is not None and trunc_cutoff >= G.num_ws:
        yield f"--trunc-cutoff {trunc_cutoff} has no effect: this network has {G.num_ws} rows of ws."
