"""Evaluate a generator against real images: distances, precision and recall, path length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from finetune.checkpoint.load import Checkpoint
from finetune.data import ImageSet, images_to_float, scan
from finetune.data.labels import differing_names
from finetune.device import float32_math
from finetune.distributed import SINGLE, ProcessGroup
from finetune.errors import ConfigError
from finetune.metrics import real_side
from finetune.metrics.clouds import NEIGHBORS, MetricValue, kid, precision_recall, too_few
from finetune.metrics.features import POOLED_SIZE, WEIGHTS_SHA256, EfficientNetLite0, RandomFeatures
from finetune.metrics.frechet import frechet_error
from finetune.metrics.inception import inception_features, inception_weights, require_torch_fidelity
from finetune.metrics.memorization import NearCopies, find_near_copies
from finetune.metrics.path_length import perceptual_path_length
from finetune.metrics.perceptual import ImageDistance, build_distance, ensure_weights
from finetune.metrics.real_side import Features
from finetune.metrics.st_lpips import FILES, StLpips
from finetune.metrics.st_lpips import POOLED_SIZE as POOLED_PIXELS
from finetune.models import Network, image_size
from finetune.progress import progress_bar
from finetune.sampling import check_finite, check_seed, device_of, image_grid, run_network_chunked, to_uint8
from torch_utils.files import atomic_write

PAIRS_PER_ROW = 8
BATCH = 16  # bounds memory; no number depends on it
# Of random-fid (2002.09797, 2208.09218): one random network is one sample, so several give mean and spread.
RANDOM_SEEDS = (0, 1, 2)

# Name -> (feature space, what is computed in it).
METRICS = {
    "random-fid": ("random", "frechet"),
    "fd-effnet": ("effnet", "frechet"),
    "kid-effnet": ("effnet", "kid"),
    "prc-effnet": ("effnet", "prc"),
    "ppl-effnet": ("", "ppl"),
    "memorization": ("effnet", "copies"),
    "fd-stlpips": ("st-lpips", "frechet"),
    "kid-stlpips": ("st-lpips", "kid"),
    "prc-stlpips": ("st-lpips", "prc"),
    "fid": ("inception", "frechet"),
    "kid": ("inception", "kid"),
    "prc": ("inception", "prc"),
    "ppl": ("", "ppl"),
}
OF_BACKBONE = {"effnet": "efficientnet-lite0", "st-lpips": "st-lpips-vgg"}  # weights of a feature space
PPL_BACKBONES = {"ppl": "lpips-vgg", "ppl-effnet": "efficientnet-lite0"}
HIGHER_IS_BETTER = ("precision", "recall")


class Evaluation:
    """Statistics of the real images, computed once and compared with any number of generators.

    which: of METRICS. `random-fid`: `RandomFeatures` over the seeds 0, 1, 2 (mean and spread). `fid`, `kid`,
    `prc` (precision and recall): Inception features; with `-effnet` those of `EfficientNetLite0.pooled`,
    with `-stlpips` those of ST-LPIPS's VGG16. `ppl`: perceptual path length. `memorization`: fraction of near
    copies of real images, in the features of EfficientNet-Lite0. workers: processes that decode images.
    cache: keep the statistics of the real images. inception: the file of its weights, fetched if None.
    group: this process among others that do the same; each processes its part of the images, in batches that
    do not depend on their number, and all get the same distances. with_error: also compute the standard error
    of the first of `which` if it is a Fréchet distance (eight more distances). Raises ConfigError for unknown
    metrics and if torch-fidelity is missing, WeightsMissing without weights.
    """

    def __init__(
        self,
        image_set: ImageSet,
        which: Sequence[str],
        *,
        device: torch.device | str = "cpu",
        batch: int | None = None,
        workers: int = 0,
        cache: bool = False,
        inception: Path | None = None,
        on_message: Callable[[str], None] = lambda text: None,
        progress: Callable[[int, int], None] | None = None,
        group: ProcessGroup = SINGLE,
        with_error: bool = False,
    ) -> None:
        self.group = group
        self.with_error = with_error
        self.which = check_names(which)
        if len(image_set.names) < 2:  # mirrored, it would be two: equal in all that metrics compare
            raise ConfigError(f"{image_set.path}: one image, and a distance needs at least 2.")
        if len(image_set) <= NEIGHBORS and any(METRICS[name][1] == "prc" for name in self.which):
            raise too_few()
        self.device = torch.device(device)
        self.image_set = image_set
        self.batch = BATCH if batch is None else batch
        self._keeps = {METRICS[name][0] for name in which if METRICS[name][1] in ("kid", "prc", "copies")}
        self._networks: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
        self._identities: dict[str, str] = {}
        self._distances: dict[str, ImageDistance] = {}
        self.near_copies: NearCopies | None = None  # of the last generator, on rank 0
        self.group.all_gather_results(lambda: self._build(inception, on_message), "loading the networks")
        self._real = self._of_images(workers, cache, progress)

    def _build(self, inception: Path | None, on_message: Callable[[str], None]) -> None:
        """Build the networks of the feature spaces, and the distances of path lengths."""
        spaces = {METRICS[name][0] for name in self.which}
        if "random" in spaces:
            for seed in RANDOM_SEEDS:
                self._add(
                    f"random-{seed}", f"random features 1, seed {seed}", RandomFeatures(seed, self.device)
                )
        if "effnet" in spaces:
            self._add(
                "effnet",
                f"EfficientNet-Lite0 {WEIGHTS_SHA256} at {POOLED_SIZE}",
                EfficientNetLite0(self.device).pooled,
            )
        if "st-lpips" in spaces:
            identity = f"ST-LPIPS vgg {FILES['vgg'][1]} at {POOLED_PIXELS}, directions"
            self._add("st-lpips", identity, StLpips("vgg", self.device).pooled)
        if "inception" in spaces:
            path = inception_weights(inception, on_message)
            self._add("inception", "torch-fidelity inception 2048", inception_features(path, self.device))
        for name in self.which:
            if name in PPL_BACKBONES:
                ensure_weights(PPL_BACKBONES[name], on_message, wanted_by=name)
                self._distances[name] = build_distance(
                    PPL_BACKBONES[name], self.image_set.channels, self.device, checked=False
                )

    def _add(self, name: str, identity: str, network: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._networks[name], self._identities[name] = network, identity

    def distances(
        self,
        G: torch.nn.Module,
        num: int,
        seed: int = 0,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> dict[str, MetricValue]:
        """Compare `num` images of `G` (no truncation, stored noise, labels as in the set) with the real.

        The same seed draws the same latents and labels for every generator. Distances grow as `num` shrinks,
        so only those of equal `num` can be compared. `prc` gives `precision` and `recall`. `progress(done,
        total)` counts images. Raises ConfigError for too few images, and for a seed outside 0 … 2³²-1.
        """
        check_seed(seed)
        if num < 2:
            raise ConfigError(f"--num {num}: a distance needs at least 2 generated images.")
        for name in self.which:
            if METRICS[name][1] == "prc" and num <= NEIGHBORS:
                raise too_few()
        images = _generated(G, self.image_set, num, seed, self.batch, self.group)
        fake = self._statistics(self._networks, images, num, progress, self._keeps | self._jackknifed())
        result: dict[str, MetricValue] = {}
        for metric in self.which:
            result |= self._compute(metric, fake, G, num, seed)
        return result

    @torch.no_grad()
    def write_pairs(self, G: Network, num: int, seed: int, path: Path) -> None:
        """Write a sheet of the generated images nearest to real ones, each above its real image; on rank 0.

        num, seed: those of the last call of `distances`, which measured `memorization`.
        """
        if self.near_copies is None:
            return
        columns = min(PAIRS_PER_ROW, num)
        worst = self.near_copies.distance.argsort()[: columns * min(4, num // columns)].tolist()
        z, c = draw_latents(G, self.image_set, num, seed)
        made = to_uint8(run_network_chunked(G, z[worst], c[worst], noise_mode="const"))
        nearest = self.near_copies.index[worst].tolist()
        real = [self.image_set[index][0].transpose(1, 2, 0) for index in nearest]
        rows = range(0, len(worst), columns)
        images = [each for row in rows for side in (made, real) for each in side[row : row + columns]]
        with atomic_write(path) as stream:
            image_grid(images, columns).save(stream, "PNG")

    def _compute(
        self, metric: str, fake: dict[str, Features], G: torch.nn.Module, num: int, seed: int
    ) -> dict[str, MetricValue]:
        space, kind = METRICS[metric]
        if kind == "ppl":
            mean, error = perceptual_path_length(
                G, self.image_set, self._distances[metric], num, seed, self.batch, self.group
            )
            return {metric: MetricValue(mean, error, error)}
        return self.group.broadcast_result(lambda: self._compare(metric, space, kind, fake, seed), metric)

    def _compare(
        self, metric: str, space: str, kind: str, fake: dict[str, Features], seed: int
    ) -> dict[str, MetricValue]:
        """Compute numbers from features, on rank 0, which has them all."""
        if kind == "frechet":
            names = networks_of(space)
            statistics = [self._real[name].statistics for name in names]
            found = [
                fake[name].statistics.distance(each) for name, each in zip(names, statistics, strict=True)
            ]
            is_jackknifed = self.with_error and metric == self.which[0]
            error = frechet_error([fake[name].kept for name in names], statistics) if is_jackknifed else 0.0
            return {metric: MetricValue(fmean(found), stdev(found) if len(found) > 1 else 0.0, error)}
        generated, real = fake[space].kept, self._real[space].kept
        if kind == "kid":
            return {metric: kid(generated, real, seed)}
        if kind == "copies":
            self.near_copies = find_near_copies(generated, real, len(self.image_set.names))
            fraction = self.near_copies.fraction
            return {metric: MetricValue(fraction, error=binomial_error(fraction, len(generated)))}
        precision, recall = precision_recall(generated, real)
        error = binomial_error(precision, len(generated))
        suffix = metric.removeprefix("prc")
        return {
            f"precision{suffix}": MetricValue(precision, error=error),
            f"recall{suffix}": MetricValue(recall),
        }

    def _jackknifed(self) -> set[str]:
        """Return the networks whose features of generated images are needed for a standard error."""
        space, kind = METRICS[self.which[0]]
        return set(networks_of(space)) if self.with_error and kind == "frechet" else set()

    def _of_images(
        self, workers: int, cache: bool, progress: Callable[[int, int], None] | None
    ) -> dict[str, Features]:
        places: dict[str, Path] = {}
        found: dict[str, Features] = {}

        def look() -> list[str]:
            """Return what has to be computed, on rank 0, which alone reads and writes the cache."""
            if not cache:
                return list(self._networks)
            content = self.image_set.content_hash()
            for name, identity in self._identities.items():
                places[name] = real_side.place_of(content, identity)
                if (known := real_side.read(places[name], name in self._keeps)) is not None:
                    found[name] = known
            return [name for name in self._networks if name not in found]

        missing = {name: self._networks[name] for name in self.group.broadcast_result(look, "the cache")}
        if missing:
            parts = self.group.shard(list(torch.arange(len(self.image_set)).split(self.batch)))
            images = self.image_set.batches(parts, workers=workers)
            new = self._statistics(missing, images, len(self.image_set), progress, self._keeps)
            if self.group.is_first:
                for name in places.keys() & new.keys():
                    real_side.write(places[name], new[name])
            found |= new
        return found

    @torch.no_grad()
    def _statistics(
        self,
        networks: dict[str, Callable[[torch.Tensor], torch.Tensor]],
        batches: Iterator[torch.Tensor],
        total: int,
        progress: Callable[[int, int], None] | None,
        keeps: set[str],
    ) -> dict[str, Features]:
        """Return features of all images, in order, on rank 0; nothing is kept on the others.

        keeps: networks whose features themselves are needed. batches: those of this process, every
        `world`-th. One of each process at a time, so that memory stays bounded.
        """
        found = {name: Features(name in keeps) for name in networks}
        num_batches = -(-total // self.batch) if networks else 0

        def next_features() -> dict[str, torch.Tensor]:
            pixels = next(batches, None)
            if pixels is None:
                return {}
            img = images_to_float(pixels.to(self.device))
            return {name: network(img).float().cpu() for name, network in networks.items()}

        done = 0
        for _ in range(0, num_batches, self.group.world_size):
            for part in self.group.all_gather_results(next_features, "a batch of images"):
                for name, features in part.items() if self.group.is_first else ():
                    found[name].add(features)
                done += len(next(iter(part.values()))) if part else 0
            if progress is not None:
                progress(done, total)
        return found


def binomial_error(fraction: float, num: int) -> float:
    """Return the standard error of a fraction of `num` generated images."""
    return (fraction * (1 - fraction) / num) ** 0.5


def networks_of(space: str) -> list[str]:
    """Return the networks of a feature space: one, or several random ones."""
    return [f"random-{seed}" for seed in RANDOM_SEEDS] if space == "random" else [space]


def open_evaluation(
    checkpoint: Checkpoint,
    data: str | Path,
    which: Sequence[str],
    *,
    fit: str | None = None,
    labels_from: str = "file",
    mirror: bool = False,
    workers: int = 0,
    on_message: Callable[[str], None] = lambda text: None,
    group: ProcessGroup = SINGLE,
    **options: Any,
) -> Evaluation:
    """Scan real images, and compute the statistics to compare the generator of `checkpoint` with.

    The arguments are those of `real_images` and `Evaluation`. Shows progress bars, on rank 0.
    """
    G = checkpoint.generator
    image_set = real_images(
        G, data, fit=fit, labels_from=labels_from, mirror=mirror, workers=workers, group=group
    )
    if group.is_first and (others := differing_names(checkpoint.class_names, image_set.class_names)):
        on_message(f"{data}: {others}. Classes are compared by number.")
    bar = progress_bar("computing features of the real images", len(image_set), is_shown=group.is_first)
    with float32_math(), bar as progress:
        return Evaluation(
            image_set,
            which,
            device=device_of(G),
            workers=workers,
            on_message=on_message,
            progress=progress,
            group=group,
            **options,
        )


def real_images(
    G: Network,
    data: str | Path,
    *,
    fit: str | None = None,
    labels_from: str = "file",
    mirror: bool = False,
    workers: int = 0,
    group: ProcessGroup = SINGLE,
) -> ImageSet:
    """Scan the real images to compare `G` with, and open them in its size, with labels if it has them.

    workers: processes that decode images in the scan, on rank 0 of `group`. Raises ConfigError for options
    that do not fit the network, DataError that lists every image that cannot be used, as in training, and
    what ImageSet raises.
    """
    use_labels = G.c_dim > 0
    if labels_from == "folders" and not use_labels:
        raise ConfigError("--labels folders: has no effect on a network without classes. Omit it.")
    asked: dict[str, Any] = dict(
        resolution=image_size(G),
        fit=fit,
        use_labels=use_labels,
        labels_from=labels_from,
        num_classes=G.c_dim if use_labels else None,
    )

    def check() -> None:
        with progress_bar("reading images", 0) as progress:
            found = scan(data, **asked, workers=workers, progress=progress)
        found.raise_for_problems()

    group.broadcast_result(check, "the scan of the data")
    return ImageSet(data, **asked, channels=G.img_channels, mirror=mirror)


def check_names(which: Sequence[str]) -> tuple[str, ...]:
    """Return the metrics, each once. Raises ConfigError for unknown ones, and without torch-fidelity."""
    unknown = [name for name in which if name not in METRICS]
    if unknown:
        raise ConfigError(f"unknown metric ({', '.join(unknown)}). Choose from {', '.join(METRICS)}.")
    for name in which:
        if METRICS[name][1] in ("kid", "prc", "ppl") or METRICS[name][0] == "inception":
            require_torch_fidelity(name)
    return tuple(dict.fromkeys(which))


def ensure_metric_weights(
    which: Sequence[str], inception: Path | None = None, on_message: Callable[[str], None] = lambda text: None
) -> None:
    """Find or fetch, and verify, every file that the metrics need. Raises WeightsMissing, ConfigError."""
    for name in check_names(which):
        if METRICS[name][0] == "inception":
            inception_weights(inception, on_message)
        elif METRICS[name][0] in OF_BACKBONE:
            ensure_weights(OF_BACKBONE[METRICS[name][0]], on_message)
        elif name in PPL_BACKBONES:
            ensure_weights(PPL_BACKBONES[name], on_message, wanted_by=name)


def draw_latents(G: Network, image_set: ImageSet, num: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return latents `[num, z_dim]` and labels `[num, c_dim]` that the seed draws, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn([num, G.z_dim], generator=generator)
    return z, image_set.random_labels(num, generator) if G.c_dim else torch.zeros([num, 0])


@torch.no_grad()
def _generated(
    G: Network, image_set: ImageSet, num: int, seed: int, batch: int, group: ProcessGroup
) -> Iterator[torch.Tensor]:
    """Yield this rank's batches as they would be stored: rounded to uint8 `[N, C, H, W]`."""
    device = next(G.parameters()).device
    z, c = draw_latents(G, image_set, num, seed)
    for z_part, c_part in group.shard(list(zip(z.split(batch), c.split(batch), strict=True))):
        img = G(z_part.to(device), c_part.to(device), noise_mode="const")
        check_finite(img, "A generated image")
        yield torch.from_numpy(to_uint8(img)).movedim(-1, 1)
