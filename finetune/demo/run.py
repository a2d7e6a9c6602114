"""The demo: fine-tune the bundled checkpoint on the bundled images, and measure the effect."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from finetune.config import TrainConfig
from finetune.data import ImageSet
from finetune.demo import KIMG
from finetune.device import float32_math, resolve_device
from finetune.errors import FinetuneError, WeightsMissing
from finetune.export.save import save
from finetune.metrics.evaluate import OFFLINE, Distance, Evaluation
from finetune.metrics.features import EfficientNetLite0
from finetune.models import Network, image_size
from finetune.options import TrainOptions
from finetune.resolve import load
from finetune.sampling import generate, save_grid
from finetune.train import run

FOLDER = Path(__file__).parent
CHECKPOINT = FOLDER / "faces-3d-64.pkl"
IMAGES = FOLDER / "faces-flat.zip"
GRID = (8, 4)
NUM_IMAGES = 256  # compared with the images before and after; more would take longer and change little
NAMES = {"random-fid": "random network", "fd-effnet": "EfficientNet-Lite0"}


@dataclass(frozen=True)
class DemoResult:
    """The result of a demo: distances to the new images before and after, files written, seconds."""

    before: dict[str, Distance]
    after: dict[str, Distance]
    snapshot: Path
    exported: Path
    seconds: float

    @property
    def improved(self) -> bool:
        """Whether every distance decreased."""
        return all(self.after[name].value < self.before[name].value for name in self.before)


def recipe(outdir: Path, checkpoint: Path, images: Path, kimg: float, seed: int) -> TrainOptions:
    """Return the options of the demo: a short run, so small batches, large steps and a fast EMA."""
    return TrainOptions(
        data=str(images),
        outdir=str(outdir / "runs"),
        resume=str(checkpoint),
        recipe="adapt",  # few as the images are, another look needs all of D
        kimg=kimg,
        batch=8,
        gamma=0.2,
        glr=0.004,
        dlr=0.004,
        ema_kimg=0.5,
        mirror=True,
        augpipe="color",  # geometric augmentations are expensive on a CPU
        sd_backbone="efficientnet-lite0",
        metrics="none",  # measured before and after
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
    """Fine-tune and export, with images and distances before and after, all in `outdir`.

    Without the package of EfficientNet-Lite0, the distillation distance is `l2` and the only metric
    random-FID, which a line reports. Raises FinetuneError if a bundled file is missing.
    """
    started = time.perf_counter()
    console = console if console is not None else Console()
    say = speaker(console)
    for path in (checkpoint, images):
        if not path.is_file():
            raise FinetuneError(f"{path}: missing from the package.", hint="Install the package again.")
    outdir.mkdir(parents=True, exist_ok=True)
    config = recipe(outdir, checkpoint, images, kimg, seed)
    config, metrics = available(config, say)

    source = load(checkpoint, device=resolve_device(device))
    G = source.generator
    say(f"Checkpoint: {checkpoint.name}, {source.family} at {G.img_resolution} px. Images: {images.name}.")
    image_set = ImageSet(images, resolution=image_size(G), channels=G.img_channels)
    say(f"Measuring its distance to the {len(image_set)} images …")
    evaluation = Evaluation(image_set, metrics, device=resolve_device(device))
    before = evaluation.distances(G, num_images, seed)
    save_images(G, outdir / "before.png")

    say("\nFine-tuning with self-distillation:")
    trained = run(config, console=console)

    say("\nMeasuring again, and exporting …")
    result = load(trained.snapshot, device=resolve_device(device))
    after = evaluation.distances(result.generator, num_images, seed)
    save_images(result.generator, outdir / "after.png")
    exported = outdir / "fine-tuned.pkl"
    verification = save(result, exported)

    done = DemoResult(before, after, trained.snapshot, exported, time.perf_counter() - started)
    report(done, trained.config, outdir, verification.num_images, say)
    return done


def speaker(console: Console) -> Callable[[str], None]:
    """Return a function that prints lines without markup, highlighting and wrapping."""
    return lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True)


def available(config: TrainOptions, say: Callable[[str], None]) -> tuple[TrainOptions, tuple[str, ...]]:
    """Return the run and the metrics for the packages that are installed."""
    try:
        EfficientNetLite0()
    except WeightsMissing as missing:
        say(f"{missing}\nContinuing without: l2 for the distillation, random-FID as the only metric.\n")
        return dataclasses.replace(config, sd_backbone="l2"), ("random-fid",)
    return config, OFFLINE


def save_images(G: Network, path: Path) -> None:
    """Save a grid of the first seeds, equal for every generator, cycling through the classes."""
    columns, rows = GRID
    images = []
    for seed in range(columns * rows):
        class_index = seed % int(G.c_dim) if G.c_dim else None
        images += [image for _, image in generate(G, [seed], class_index=class_index)]
    save_grid(images, path, GRID)


def report(
    done: DemoResult, config: TrainConfig, outdir: Path, num_compared: int, say: Callable[[str], None]
) -> None:
    """Print what was done, the distances before and after, and where the files are."""
    say(
        f"\nFine-tuned for {config.kimg:g} kimg with self-distillation: weight {config.sd_weight}, "
        f"backbone {config.sd_backbone}, every {config.sd_interval} steps.\n"
    )
    say(f"{'distance to the new images':<32}{'before':>18}{'after':>18}")
    for name, before in done.before.items():
        after = done.after[name]
        say(f"{f'{name} ({NAMES[name]})':<32}{shown(before):>18}{shown(after):>18}")
    if done.improved:
        say("Lower is better: every distance decreased.")
    else:
        say("Lower is better, but not every distance decreased: this run failed.")
    say(
        f"\n{outdir / 'before.png'} and {outdir / 'after.png'}: the same seeds, before and after\n"
        f"{done.snapshot.parent / 'report.html'}: the page of the run, to open in a browser\n"
        f"{done.exported}: the exported checkpoint, read back and compared in {num_compared} images\n"
        f"Sources and licenses of images and checkpoint: {FOLDER / 'ATTRIBUTION.md'}\n\n"
        f"{done.seconds:.0f} seconds in all. One short run with one seed: it shows that the tool works, not "
        "how much self-distillation helps."
    )


def shown(distance: Distance) -> str:
    """Return a distance as text, with its spread if there is one."""
    return f"{distance.value:.4g}" + (f" ± {distance.spread:.2g}" if distance.spread else "")
