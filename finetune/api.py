"""The Python API: `finetune.fine_tune`, `finetune.generate`, `finetune.evaluate`.

Progress is shown on terminals and in notebooks. All raise FinetuneError for what a user can fix.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from rich.console import Console

from finetune import sampling
from finetune.checkpoint.load import Checkpoint
from finetune.device import float32_math, resolve_device
from finetune.metrics.clouds import MetricValue
from finetune.metrics.evaluate import open_evaluation
from finetune.options import OFFLINE_METRICS, TrainOptions
from finetune.progress import progress_bar
from finetune.resolve import load
from finetune.train import RunResult, run


def fine_tune(options: TrainOptions, *, console: Console | None = None) -> RunResult:
    """Train as `options` ask, in this process, and return run folder, last snapshot and resolved options.

    `console` receives the output, by default standard output. Raises KeyboardInterrupt, after a snapshot was
    saved, if the run was interrupted.
    """
    return run(options, console=console)


def generate(
    network: str | Path | Checkpoint,
    seeds: Sequence[int],
    *,
    class_index: int | None = None,
    label: Sequence[float] | None = None,
    truncation_psi: float = 1.0,
    truncation_cutoff: int | None = None,
    noise_mode: str = "const",
    device: str = "auto",
) -> list[Image.Image]:
    """Return an image for each seed, the same as those of `finetune generate`.

    network: a checkpoint, or what `finetune.load` takes, which is loaded to `device`. class_index, label: for
    a network with labels, the class or the label vector.
    """
    G = _checkpoint(network, device).generator
    with float32_math(), progress_bar("images", len(seeds)) as progress:
        images = sampling.generate(
            G,
            seeds,
            class_index=class_index,
            label=label,
            truncation_psi=truncation_psi,
            truncation_cutoff=truncation_cutoff,
            noise_mode=noise_mode,
            progress=progress,
        )
        return [sampling.to_image(image) for _, image in images]


def evaluate(
    network: str | Path | Checkpoint,
    data: str | Path,
    metrics: Sequence[str] = OFFLINE_METRICS,
    *,
    num: int = 50_000,
    seed: int = 0,
    fit: str | None = None,
    labels: str = "file",
    mirror: bool = False,
    batch: int = 16,
    workers: int = 2,
    cache: bool = True,
    device: str = "auto",
) -> dict[str, MetricValue]:
    """Compare `num` generated images with those of a folder or zip; return value and spread by metric.

    The arguments are those of `finetune evaluate`, and so are the numbers.
    """
    checkpoint = _checkpoint(network, device)
    evaluation = open_evaluation(
        checkpoint,
        data,
        metrics,
        fit=fit,
        labels_from=labels,
        mirror=mirror,
        batch=batch,
        workers=workers,
        cache=cache,
    )
    with float32_math(), progress_bar("generating", num) as progress:
        return evaluation.distances(checkpoint.generator, num, seed, progress=progress)


def _checkpoint(network: str | Path | Checkpoint, device: str) -> Checkpoint:
    return network if isinstance(network, Checkpoint) else load(network, device=resolve_device(device))
