"""`finetune ema`: choose the half-life of G_ema after training."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from finetune.cli.options import (
    LocalPath,
    device_option,
    force_option,
    offline_option,
    ops_option,
    refuse_existing,
    seed_option,
)
from finetune.errors import ConfigError
from finetune.progress import progress_bar

if TYPE_CHECKING:
    from finetune.checkpoint.load import Checkpoint
    from finetune.config import TrainConfig
    from finetune.train.posthoc_ema import SavedAverages

BAR = 24  # characters
NAME = "network-ema.pkl"
AS_TRAINED = "as trained"


class Row(NamedTuple):
    """A half-life in kimg: the metric and its standard error, and the error of the reconstructed profile."""

    label: str
    kimg: float
    value: float
    error: float
    profile_error: float


@click.command("ema", short_help="Choose the half-life of G_ema after training.")
@click.argument("run", metavar="RUN|SNAPSHOT", type=LocalPath(exists=True, path_type=Path))
@click.option(
    "--metric", default="fd-effnet", show_default=True, help="Metric to optimize (see `finetune evaluate`)."
)
@click.option(
    "--half-lives",
    metavar="KIMG,…",
    help="Half-lives to try.  [default: nine from 1 % to 20 % of the run, and its own]",
)
@click.option(
    "--num",
    type=click.IntRange(min=2),
    help="Images to generate for each.  [default: 1000 on a CPU, 5000 on a GPU]",
)
@seed_option("Seed of the latents.")
@click.option("--data", type=LocalPath(), metavar="DIR|ZIP", help="The real images.  [default: as trained]")
@force_option(NAME)
@offline_option()
@device_option()
@ops_option()
def command(
    run: Path,
    metric: str,
    half_lives: str | None,
    num: int | None,
    seed: int,
    data: str | None,
    force: bool,
    device: str,
) -> None:
    """Choose the half-life of G_ema after training.

    \b
    finetune ema runs/00000-images-stylegan2-256 --metric fd-effnet

    Every snapshot is written with two averages of G over training. Combined, they give G_ema as another
    --ema-kimg would have made it. This command measures a grid of half-lives at the newest snapshot, or at
    SNAPSHOT, and writes the best one as network-ema.pkl into the run folder.
    """
    from finetune.config import TrainConfig
    from finetune.device import resolve_device
    from finetune.metrics.evaluate import check_names, ensure_metric_weights
    from finetune.resolve import load, newest_snapshot
    from finetune.train import posthoc_ema

    (name,) = check_names([metric])
    wanted = parse_half_lives(half_lives)
    snapshot = newest_snapshot(run) if run.is_dir() else run
    out = snapshot.with_name(NAME)
    refuse_existing(out, force=force)
    saved = posthoc_ema.saved_averages(snapshot)
    config = TrainConfig.read(snapshot.parent / "config.json")
    target = resolve_device(device)
    ensure_metric_weights([name], on_message=lambda text: click.echo(text, err=True))
    checkpoint = load(snapshot, device=target)
    G_ema: Any = checkpoint.G_ema
    num = num or (5000 if target.type == "cuda" else 1000)
    tried = wanted or posthoc_ema.grid(config, saved)
    rows = measure(checkpoint, config, saved, tried, data or config.data, name, num, seed)
    click.echo(f"{snapshot.name}: {num:,} generated images for each half-life, seed {seed}.")
    click.echo("\n".join(curve(rows, name)))
    network, _ = posthoc_ema.reconstruct(config, saved, config.ema_kimg, G_ema)
    difference = posthoc_ema.relative_difference(network, G_ema)
    click.echo(f"Check: the half-life as trained is reconstructed with a difference of {difference:.1e}.")
    best = rows[best_of(rows, name)].kimg
    if best == config.ema_kimg:
        click.echo(f"No half-life is better than that of the run ({config.ema_kimg:g} kimg): use {snapshot}")
        return
    network, _ = posthoc_ema.reconstruct(config, saved, best, G_ema)
    write(checkpoint, network, best, out)
    click.echo(f"Best: {best:g} kimg. Wrote {out}")


def parse_half_lives(text: str | None) -> list[float]:
    """Return the half-lives of `--half-lives` in kimg. Raises ConfigError."""
    try:
        found = [float(part) for part in text.split(",")] if text is not None else []
    except ValueError:
        found = [0.0]
    if any(not 0 < each < float("inf") for each in found):
        raise ConfigError(f"--half-lives {text}: must be positive numbers of kimg, such as 1,2.5,10.")
    return found


def measure(
    checkpoint: Checkpoint,
    config: TrainConfig,
    saved: list[SavedAverages],
    half_lives: list[float],
    data: str,
    name: str,
    num: int,
    seed: int,
) -> list[Row]:
    """Measure G_ema as trained, and with each half-life."""
    from finetune.device import float32_math
    from finetune.metrics.evaluate import open_evaluation
    from finetune.train import posthoc_ema

    G_ema: Any = checkpoint.G_ema
    evaluation = open_evaluation(
        checkpoint,
        data,
        [name],
        fit=config.fit,
        labels_from=config.labels,
        mirror=config.mirror,
        workers=config.workers,
        cache=True,
        with_error=True,
    )

    def row(label: str, kimg: float, network: Any, profile_error: float) -> Row:
        with progress_bar(f"measuring {label}", num) as progress:
            found = next(iter(evaluation.distances(network, num, seed, progress=progress).values()))
        return Row(label, kimg, found.value, found.error, profile_error)

    with float32_math():
        rows = [row(AS_TRAINED, config.ema_kimg, G_ema, 0.0)]
        for kimg in half_lives:
            rows.append(row(f"{kimg:g}", kimg, *posthoc_ema.reconstruct(config, saved, kimg, G_ema)))
    return rows


def write(checkpoint: Checkpoint, G_ema: Any, kimg: float, path: Path) -> None:
    """Write the checkpoint with another G_ema, of the half-life `kimg`."""
    from finetune.export.save import save

    origin = checkpoint.provenance
    origin = dataclasses.replace(origin, training={**(origin.training or {}), "ema_kimg": kimg})
    save(dataclasses.replace(checkpoint, G_ema=G_ema, provenance=origin), path)


def best_of(rows: list[Row], name: str) -> int:
    """Return the index of the best row; the first of equals."""
    from finetune.metrics.evaluate import HIGHER_IS_BETTER

    sign = -1 if name.startswith(("prc", *HIGHER_IS_BETTER)) else 1
    return min(range(len(rows)), key=lambda index: sign * rows[index].value)


def curve(rows: list[Row], name: str) -> list[str]:
    """Return a table with bars: label, half-life, value, standard error, profile error."""
    values = [row.value for row in rows]
    low, high = min(values), max(values)
    lines = [f"{'half-life (kimg)':<18}{name:>22}  {'profile error':>13}"]
    for label, kimg, value, error, profile in rows:
        shown = f"{label} ({kimg:g})" if label == AS_TRAINED else label
        number = f"{value:.4g}" + (f" ± {error:.2g}" if error else "")
        bar = "█" * round(1 + (BAR - 1) * (value - low) / ((high - low) or 1))
        text = "" if label == AS_TRAINED else f"{profile:.1e}"
        lines.append(f"{shown:<18}{number:>22}  {text:>13}  {bar}")
    return lines
