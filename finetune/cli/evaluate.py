"""`finetune evaluate`: measure a generator against a data set."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from finetune.cli.options import (
    LocalPath,
    device_option,
    network_file,
    network_option,
    offline_option,
    ops_option,
    seed_option,
    start_ranks,
)
from finetune.errors import ConfigError
from finetune.options import FITS, LABELS, OFFLINE_METRICS
from finetune.progress import progress_bar


@click.command("evaluate", short_help="Measure a generator against a data set.")
@network_option()
@click.option("--data", required=True, type=LocalPath(), metavar="DIR|ZIP", help="The real images.")
@click.option(
    "--metrics",
    default=",".join(OFFLINE_METRICS),
    show_default=True,
    metavar="LIST",
    help="Of fid, kid, prc (precision, recall) and ppl, which download Inception or VGG weights once; "
    "random-fid; fd-effnet, kid-effnet, prc-effnet, ppl-effnet, the first three with -stlpips, and "
    "memorization (fraction of near copies of real images), which need no download.",
)
@click.option(
    "--num", type=click.IntRange(min=2), default=50_000, show_default=True, help="Images to generate."
)
@seed_option("Seed of the latents.")
@click.option(
    "--fit",
    type=click.Choice(FITS),
    help="How images of other sizes are resized, which affects the results.  [default: refuse them]",
)
@click.option(
    "--labels",
    "labels_from",
    type=click.Choice(LABELS),
    default="file",
    show_default=True,
    help="Labels from dataset.json, or one class for each folder of images.",
)
@click.option(
    "--mirror", is_flag=True, help="Compare with mirrored images as well, as after training with --mirror."
)
@click.option("--batch", type=click.IntRange(min=1), default=16, show_default=True, help="Batch size.")
@click.option(
    "--workers",
    type=click.IntRange(min=0),
    default=2,
    show_default=True,
    help="Processes that decode images.",
)
@click.option(
    "--gpus",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Ranks, one per GPU (or CPU processes, with --device cpu). More machines: torchrun.",
)
@click.option(
    "--inception",
    type=LocalPath(path_type=Path),
    metavar="FILE",
    help="File of the Inception weights.  [default: downloaded]",
)
@click.option(
    "--pairs",
    type=LocalPath(dir_okay=False, path_type=Path),
    metavar="PNG",
    help="With memorization: write the generated images nearest to real ones, above those.",
)
@click.option("--no-cache", is_flag=True, help="Do not cache statistics of the real images.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
@offline_option()
@device_option()
@ops_option()
def command(
    network: str,
    data: str,
    metrics: str,
    num: int,
    seed: int,
    fit: str | None,
    labels_from: str,
    mirror: bool,
    batch: int,
    workers: int,
    gpus: int,
    inception: Path | None,
    pairs: Path | None,
    no_cache: bool,
    as_json: bool,
    device: str,
) -> None:
    """Measure the generator of a checkpoint against a data set.

    Uses G_ema if there is one, without truncation. Results depend on the numbers of images, the features and
    the resizing: compare only results measured with the same settings.
    """
    from finetune.cli.train import report_errors_on_rank0
    from finetune.data.sources import open_source
    from finetune.metrics.evaluate import check_names

    names = check_names([name.strip() for name in metrics.split(",") if name.strip()])
    if not names:
        raise ConfigError("--metrics: the list is empty. Name some, such as fd-effnet,random-fid.")
    if pairs is not None and "memorization" not in names:
        raise ConfigError(f"--pairs {pairs}: has no effect without --metrics memorization.")
    if inception is not None and not {"fid", "kid", "prc"} & set(names):
        raise ConfigError(f"--inception {inception}: has no effect without --metrics fid, kid or prc.")
    open_source(data)  # raises before anything is downloaded
    file = network_file(network)
    start_ranks(gpus, device)

    def show(facts: dict[str, Any]) -> None:
        facts = {"network": network, **facts}
        click.echo(json.dumps(facts, indent=2) if as_json else as_text(facts))

    with report_errors_on_rank0():
        measure(
            file, names, data, num, device, show, seed=seed, fit=fit, labels_from=labels_from, mirror=mirror,
            batch=batch, workers=workers, cache=not no_cache, inception=inception, pairs=pairs,
        )  # fmt: skip


def measure(
    file: Path, names: tuple[str, ...], data: str, num: int, device: str,
    show: Callable[[dict[str, Any]], None], *, seed: int, pairs: Path | None, **options: Any,
) -> None:  # fmt: skip
    """Measure, on several ranks if torchrun started them, and write the pairs of images.

    Rank 0 passes the metrics and what they were measured on to `show`, before the pairs are written.
    options: of `open_evaluation`.
    """
    from finetune.device import float32_math, resolve_device
    from finetune.distributed import init, shutdown
    from finetune.metrics.evaluate import open_evaluation
    from finetune.resolve import load

    started = time.perf_counter()
    group, target = init(resolve_device(device))
    checkpoint = load(file, device=target)
    G = checkpoint.generator
    evaluation = open_evaluation(
        checkpoint, data, names, on_message=lambda text: click.echo(text, err=True), group=group, **options
    )
    with float32_math(), progress_bar("generating", num, is_shown=group.is_first) as progress:
        found = evaluation.distances(G, num, seed, progress=progress)
    facts = {
        "sha256": checkpoint.provenance.sha256,
        "data": Path(data).name,
        "real": len(evaluation.image_set),
        "generated": num,
        "seed": seed,
        "processes": group.world_size,
        "sec": round(time.perf_counter() - started, 1),
        "metrics": {name: {"value": each.value, "spread": each.spread} for name, each in found.items()},
    }
    if group.is_first:
        show(facts)
    if pairs is not None:
        with float32_math():
            evaluation.write_pairs(G, num, seed, pairs)
        if group.is_first:
            click.echo(f"Wrote {pairs}.", err=True)
    shutdown()


def as_text(facts: dict[str, Any]) -> str:
    """Return the facts as a small table."""
    lines = [f"{facts['generated']:,} generated against {facts['real']:,} real images, seed {facts['seed']}"]
    for name, each in facts["metrics"].items():
        spread = f" ± {each['spread']:.2g}" if each["spread"] else ""
        lines.append(f"{name:<18}{each['value']:.5g}{spread}")
    return "\n".join(lines)
