"""The demo: fine-tune the bundled checkpoint without and with self-distillation, and compare the images."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image, ImageDraw
from rich.console import Console

from finetune.config import TrainConfig
from finetune.data import ImageSet
from finetune.demo import KIMG
from finetune.device import float32_math, resolve_device
from finetune.errors import FinetuneError, WeightsMissing
from finetune.export.save import save
from finetune.metrics.evaluate import Evaluation, MetricValue
from finetune.metrics.features import EfficientNetLite0
from finetune.models import Network, image_size
from finetune.options import OFFLINE_METRICS, DistillWeight, TrainOptions
from finetune.resolve import load
from finetune.sampling import generate, image_grid
from finetune.train import run

FOLDER = Path(__file__).parent
CHECKPOINT = FOLDER / "faces-3d-64.pkl"
IMAGES = FOLDER / "faces-flat.zip"
GRID = (4, 8)  # columns and rows of a sheet
NUM_IMAGES = 256  # of each network, compared with the data set; more would take longer and change little
START, PLAIN, DISTILLED = "start", "plain", "self-distillation"
NAMES = {"random-fid": "random network", "fd-effnet": "EfficientNet-Lite0"}


@dataclass(frozen=True)
class DemoResult:
    """The result of a demo: distances to the new images by network, what was written, seconds.

    distances: of START, PLAIN and DISTILLED. snapshot: the last one with self-distillation.
    """

    distances: dict[str, dict[str, MetricValue]]
    snapshot: Path
    exported: Path
    comparison: Path
    seconds: float

    @property
    def improved(self) -> bool:
        """Whether every distance decreased from the start to the end of the run with self-distillation."""
        start, end = self.distances[START], self.distances[DISTILLED]
        return all(end[name].value < start[name].value for name in start)


def recipe(outdir: Path, checkpoint: Path, images: Path, kimg: float, seed: int) -> TrainOptions:
    """Return the options of the demo: a short run, so small batches, large steps and a fast EMA."""
    return TrainOptions(
        data=str(images),
        outdir=str(outdir / "runs"),
        resume=str(checkpoint),
        recipe="adapt",  # the style changes, so all of D has to train
        kimg=kimg,
        batch=8,
        gamma=0.2,
        glr=0.0025,
        dlr=0.0025,
        ema_kimg=0.5,
        mirror=True,
        augpipe="color",  # geometric augmentations are expensive on a CPU
        sd_backbone="efficientnet-lite0",
        metrics="none",  # measured here
        seed=seed,
        workers=0,
    )


@float32_math()
def run_demo(
    outdir: Path,
    *,
    kimg: float = KIMG,
    seed: int = 0,
    device: str = "cpu",
    checkpoint: Path = CHECKPOINT,
    images: Path = IMAGES,
    num_images: int = NUM_IMAGES,
    console: Console | None = None,
) -> DemoResult:
    """Fine-tune twice from the same seed, without and with self-distillation; compare and export.

    Everything is written into `outdir`; the run with self-distillation is exported. Without the package of
    EfficientNet-Lite0, the distillation distance is `l2` and the only metric random-FID, which a line
    reports. Raises FinetuneError if a bundled file is missing.
    """
    started = time.perf_counter()
    console = console if console is not None else Console()
    echo = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    for path in (checkpoint, images):
        if not path.is_file():
            raise FinetuneError(f"{path}: missing from the package.", hint="Install the package again.")
    outdir.mkdir(parents=True, exist_ok=True)
    options = dataclasses.replace(recipe(outdir, checkpoint, images, kimg, seed), device=device)
    options, metrics = available(options, echo)

    source = load(checkpoint, device=resolve_device(device))
    G = source.generator
    echo(f"Checkpoint: {checkpoint.name}, {source.family} at {G.img_resolution} px. Images: {images.name}.")
    image_set = ImageSet(images, resolution=image_size(G), channels=G.img_channels)
    echo(f"Measuring its distance to the {len(image_set)} images …")
    evaluation = Evaluation(image_set, metrics, device=resolve_device(device))
    distances = {START: evaluation.distances(G, num_images, seed)}
    sheets = {START: sheet(G)}

    for name, asked in (
        (PLAIN, dataclasses.replace(options, sd_weight=DistillWeight.parse(0))),
        (DISTILLED, options),
    ):
        echo(f"\nFine-tuning {'without' if name == PLAIN else 'with'} self-distillation:")
        trained = run(asked, console=console)
        result = load(trained.snapshot, device=resolve_device(device))
        distances[name] = evaluation.distances(result.generator, num_images, seed)
        sheets[name] = sheet(result.generator)

    echo("\nExporting …")
    comparison = outdir / "comparison.png"
    side_by_side(sheets, distances).save(comparison)
    exported = outdir / "fine-tuned.pkl"
    verification = save(result, exported)

    seconds = time.perf_counter() - started
    done = DemoResult(distances, trained.snapshot, exported, comparison, seconds)
    report(done, trained.config, verification.num_images, echo)
    return done


def available(config: TrainOptions, echo: Callable[[str], None]) -> tuple[TrainOptions, tuple[str, ...]]:
    """Return the run and the metrics for the packages that are installed."""
    try:
        EfficientNetLite0()
    except WeightsMissing as missing:
        echo(f"{missing}\nContinuing without: l2 for the distillation, random-FID as the only metric.\n")
        return dataclasses.replace(config, sd_backbone="l2"), ("random-fid",)
    return config, OFFLINE_METRICS


def sheet(G: Network) -> Image.Image:
    """Return a grid of the first seeds, equal for every generator, cycling through the classes."""
    columns, rows = GRID
    images = []
    for seed in range(columns * rows):
        class_index = seed % int(G.c_dim) if G.c_dim else None
        images += [image for _, image in generate(G, [seed], class_index=class_index)]
    return image_grid(images, columns)


def side_by_side(sheets: dict[str, Image.Image], distances: dict[str, dict[str, MetricValue]]) -> Image.Image:
    """Return the sheets beside each other on white, each below its name and its distances."""
    width, height = next(iter(sheets.values())).size
    top, gap = 12 * (1 + len(distances[START])) + 6, 16
    page = Image.new("RGB", (len(sheets) * (width + gap) - gap, top + height), "white")
    draw = ImageDraw.Draw(page)
    for i, (name, grid) in enumerate(sheets.items()):
        lines = [name, *(f"{metric} {each.value:.4g}" for metric, each in distances[name].items())]
        for row, line in enumerate(lines):
            draw.text((i * (width + gap), 12 * row), line, fill="black")
        page.paste(grid, (i * (width + gap), top))
    return page


def report(done: DemoResult, config: TrainConfig, num_compared: int, echo: Callable[[str], None]) -> None:
    """Print what was done, the distances, and where the files are."""
    echo(
        f"\nFine-tuned for {config.kimg:g} kimg without and with self-distillation (weight "
        f"{config.sd_weight}, backbone {config.sd_backbone}, every {config.sd_interval} steps).\n"
    )
    echo(f"{'distance to the new images':<32}" + "".join(f"{name:>18}" for name in done.distances))
    for name in done.distances[START]:
        values = "".join(f"{shown(found[name]):>18}" for found in done.distances.values())
        echo(f"{f'{name} ({NAMES[name]})':<32}{values}")
    if done.improved:
        echo("Lower is better: every distance decreased.")
    else:
        echo("Lower is better, but not every distance decreased with self-distillation: this run failed.")
    echo(
        f"\n{done.comparison}: the same seeds from all three networks, side by side\n"
        f"{done.snapshot.parent / 'report.html'}: the page of the run, to open in a browser\n"
        f"{done.exported}: the second network, exported and compared in {num_compared} images\n"
        f"Sources and licenses of images and checkpoint: {FOLDER / 'ATTRIBUTION.md'}\n\n"
        f"{done.seconds:.0f} seconds in all. Two short runs with one seed show that the tool works, not how "
        "much self-distillation helps."
    )


def shown(distance: MetricValue) -> str:
    """Return a distance as text, with its spread if there is one."""
    return f"{distance.value:.4g}" + (f" ± {distance.spread:.2g}" if distance.spread else "")
