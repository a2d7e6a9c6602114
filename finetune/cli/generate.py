"""`finetune generate`: images from a checkpoint, one for each seed."""

from __future__ import annotations

import math
from pathlib import Path

import click

from finetune.cli.options import (
    GridSize,
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
    "--class", "class_index", type=int, metavar="N", help="Class, for a checkpoint that has classes."
)
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
    class_index: int | None,
    grid: tuple[int, int] | None,
    noise_mode: str,
    device: str,
) -> None:
    """Make one image for each seed: OUTDIR/seed0000.png and so on.

    A seed always gives the same image, independent of the other seeds.
    """
    if math.isnan(trunc):
        raise ConfigError("--trunc nan is not a number.")
    if grid is not None and len(seeds) > grid[0] * grid[1]:
        places = grid[0] * grid[1]
        raise ConfigError(
            f"--grid {grid[0]}x{grid[1]} has {places} places, --seeds names {len(seeds)} images."
        )

    from finetune.device import float32_math, resolve_device
    from finetune.resolve import load
    from finetune.sampling import generate, label_from_class, save_grid, to_image

    checkpoint = load(network_file(network), device=resolve_device(device))
    G = checkpoint.best
    if G is None:
        raise CheckpointError(f"{network} holds no generator, only D.")
    if G.img_resolution**2 * len(seeds) <= QUICK_PIXELS.get(checkpoint.family, 0):
        start_without_build(next(G.parameters()).device.type)
    label_from_class(G, class_index)  # raises before the folder is created
    if checkpoint.G_ema is None:
        click.echo("The checkpoint has no G_ema; the images come from G.", err=True)
    outdir.mkdir(parents=True, exist_ok=True)
    images = []
    with float32_math(), progress_bar("images", len(seeds)) as progress:
        for seed, image in generate(
            G,
            seeds,
            class_index=class_index,
            truncation_psi=trunc,
            truncation_cutoff=trunc_cutoff,
            noise_mode=noise_mode,
            progress=progress,
        ):
            to_image(image).save(outdir / f"seed{seed:04d}.png")
            if grid is not None:
                images.append(image)
    click.echo(
        f"{len(set(seeds))} images: {outdir / f'seed{seeds[0]:04d}.png'}{' …' if len(seeds) > 1 else ''}"
    )
    if grid is not None:
        click.echo(f"Grid: {save_grid(images, outdir / 'grid.png', grid=grid)}")
