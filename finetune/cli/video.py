"""`finetune video`: a walk through latents, or a morph from one network to another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from finetune.cli.latent_options import (
    generator_of,
    latent_options,
    latent_table,
    print_options_without_effect,
    start_without_build,
)
from finetune.cli.options import (
    NETWORK,
    GridSize,
    LocalPath,
    device_option,
    force_option,
    network_file,
    network_option,
    offline_option,
    ops_option,
    refuse_existing,
)
from finetune.errors import ConfigError
from finetune.progress import progress_bar


@click.command("video", short_help="Render a video: a walk through latents, or a morph between networks.")
@network_option()
@click.option(
    "--to",
    metavar=NETWORK,
    help="Morph to this network, such as a fine-tuned descendant: interpolate all weights.",
)
@latent_options
@click.option(
    "--out",
    required=True,
    type=LocalPath(path_type=Path),
    metavar="FILE|DIR",
    help="File to write: .mp4 (needs the extra `video`), .gif or .webp; or a folder for frames as PNG.",
)
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    default=60,
    show_default=True,
    help="Frames from one point to the next.",
)
@click.option("--fps", type=click.IntRange(1, 120), default=30, show_default=True, help="Frames per second.")
@click.option(
    "--loop/--no-loop",
    default=True,
    show_default=True,
    help="Return to the start, so that the video repeats.",
)
@click.option("--grid", type=GridSize(), help="Show several walks at once, columns x rows, like 4x2.")
@force_option("the video")
@offline_option()
@device_option()
@ops_option()
def command(
    network: str,
    to: str | None,
    out: Path,
    steps: int,
    fps: int,
    loop: bool,
    grid: tuple[int, int] | None,
    force: bool,
    noise_mode: str,
    device: str,
    **latents: Any,
) -> None:
    """Render a video of a walk through latents, on a smooth curve in w.

    It walks from seed to seed (or saved w). If --trunc, --class or --edit have several values, every seed
    walks along those, each in a place of the grid; with --to, every seed stays and the network changes.
    Frames are equal to the images of `finetune generate`.
    """
    from finetune.device import float32_math, resolve_device
    from finetune.editing.video import check_kind, full_grid, morph_frames, render, walk_frames, write_video
    from finetune.resolve import load

    check_kind(out, fps)
    refuse_existing(out, force=force)
    target = resolve_device(device)
    checkpoint = load(network_file(network), device=target)
    generator_of(checkpoint)
    table = latent_table(checkpoint, **latents)
    print_options_without_effect(table, noise_mode)
    is_walk = to is None and len(table.columns) == 1
    if not is_walk:
        grid = grid or full_grid(len(table))
        if len(table) > grid[0] * grid[1]:
            raise ConfigError(
                f"--grid {grid[0]}x{grid[1]} has {grid[0] * grid[1]} places, for {len(table)} seeds. "
                "Use a larger grid, or fewer seeds."
            )
    with float32_math():
        columns, rows = grid or (1, 1)
        if to is None:
            count, frames = walk_frames(table, steps, loop=loop, cells=columns * rows)
        else:
            B = generator_of(load(network_file(to), device=target))
            count, frames = morph_frames(table, B, steps, loop=loop)
        start_without_build(checkpoint, count * columns * rows)
        noise_seeds = table.noise_seeds()[: 1 if is_walk else None]
        with progress_bar("frames", count) as progress:
            images = render(
                frames,
                (columns, rows),
                noise_mode=noise_mode,
                noise_seeds=noise_seeds,
                progress=lambda done: progress(done, count),
            )
            write_video(out, images, fps=fps, count=count)
    click.echo(f"{count} frames, {count / fps:.1f} seconds: {out}")
