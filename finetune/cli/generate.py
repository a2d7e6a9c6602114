"""`finetune generate`: images from a checkpoint, one for each seed or saved w and each variation of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from finetune.cli.latent_options import (
    generator_of,
    latent_options,
    latent_table,
    print_options_without_effect,
    start_without_build,
)
from finetune.cli.options import (
    GridSize,
    LocalPath,
    NumberRange,
    device_option,
    force_option,
    network_file,
    network_option,
    offline_option,
    ops_option,
    outdir_option,
    refuse_existing,
)
from finetune.errors import ConfigError
from finetune.progress import progress_bar

if TYPE_CHECKING:
    import numpy as np

    from finetune.editing.latents import LatentTable

MAX_SHEET_PIXELS = 1 << 27  # of a sheet that nobody asked for: 400 MB in memory


@click.command("generate", short_help="Generate images from a checkpoint, one per seed.")
@network_option()
@latent_options
@click.option(
    "--mix",
    "mix_seeds",
    type=NumberRange("seed"),
    help="Style mixing: also take some rows of ws from each of these seeds.",
)
@click.option(
    "--mix-layers", metavar="N-M", help="Rows of ws that --mix replaces.  [default: the first half]"
)
@outdir_option()
@click.option("--grid", type=GridSize(), help="Also write grid.png, columns x rows, like 8x4.")
@click.option(
    "--save-w",
    type=LocalPath(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Also write the w of all images, for --w (.npz).",
)
@force_option("the file of --save-w")
@offline_option()
@device_option()
@ops_option()
def command(
    network: str,
    outdir: Path,
    grid: tuple[int, int] | None,
    save_w: Path | None,
    force: bool,
    noise_mode: str,
    device: str,
    **latents: Any,
) -> None:
    """Generate one image per seed or saved w: OUTDIR/seed0000.png and so on.

    A seed always gives the same image, independent of the other seeds. If --trunc, --class or --edit have
    several values, or with --mix, an image is made for each combination, OUTDIR/seed0000-trunc0.5.png, and
    grid.png has a row for each seed.
    """
    import torch

    from finetune.data.scanning import counted
    from finetune.device import float32_math, resolve_device
    from finetune.editing.latents import save_ws
    from finetune.models import image_size
    from finetune.resolve import load
    from finetune.sampling import save_grid, synthesize, to_image

    if save_w is not None:
        refuse_existing(save_w, force=force)
    checkpoint = load(network_file(network), device=resolve_device(device))
    G = generator_of(checkpoint)
    table = latent_table(checkpoint, **latents)  # raises before the folder is created
    total = len(table) * len(table.columns)
    if grid is not None and total > grid[0] * grid[1]:
        raise ConfigError(
            f"--grid {grid[0]}x{grid[1]} has {grid[0] * grid[1]} places, for {total} images. "
            "Use a larger grid."
        )
    print_options_without_effect(table, noise_mode)
    start_without_build(checkpoint, total)
    pixels = math.prod(image_size(G)) * total
    is_table = grid is None and len(table.columns) > 1 and pixels <= MAX_SHEET_PIXELS

    outdir.mkdir(parents=True, exist_ok=True)
    saved, images, files = [], [], []
    with float32_math(), progress_bar("images", total) as progress:
        for name, noise_seed, row in zip(table.row_names(), table.noise_seeds(), table):
            for column, ws in zip(table.columns, row):
                image = synthesize(G, ws, noise_mode=noise_mode, seed=noise_seed)
                files.append(outdir / f"{'-'.join(filter(None, (name, column.name)))}.png")
                to_image(image).save(files[-1])
                if grid is not None or is_table:
                    images.append(image)
                if save_w is not None:
                    saved.append(ws.cpu())
                progress(len(files), total)
        if is_table:
            header = mixing_header(table, noise_mode)
            images = header + images
            grid = len(table.columns), len(table) + bool(header)
    click.echo(f"{counted(len(set(files)), 'image')}: {files[0]}{' …' if len(files) > 1 else ''}")
    if grid is not None:
        click.echo(f"Grid: {save_grid(images, outdir / 'grid.png', grid=grid)}")
    if save_w is not None:
        save_ws(save_w, torch.stack(saved))
        click.echo(f"w of all images: {save_w}")


def mixing_header(table: LatentTable, noise_mode: str) -> list[np.ndarray]:
    """Return a row of the images of the seeds that are mixed in, black above others; empty without mixing."""
    import numpy as np

    from finetune.sampling import synthesize

    if all(column.mix_seed is None for column in table.columns):
        return []
    images = [
        None
        if (seed := column.mix_seed) is None
        else synthesize(table.G, table.cell(seed, column), noise_mode=noise_mode, seed=seed)
        for column in table.columns
    ]
    black = np.zeros_like(next(image for image in images if image is not None))
    return [black if image is None else image for image in images]
