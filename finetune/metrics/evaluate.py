"""How near what a generator makes is to real pictures: distances, precision and recall, smoothness."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from finetune.data import ImageSet, images_to_float
from finetune.data.workers import available_cores, started
from finetune.errors import ConfigError
from finetune.metrics import real_side
from finetune.metrics.features import WEIGHTS_SHA256, EfficientNetLite0, RandomFeatures
from finetune.metrics.inception import inception_features, inception_weights, require_torch_fidelity
from finetune.metrics.path_length import perceptual_path_length
from finetune.metrics.perceptual import build_distance, ensure_weights
from finetune.metrics.random_fid import SEEDS, mean_and_spread
from finetune.metrics.real_side import Features
from finetune.sampling import to_uint8

BATCH = 16  # bounds memory; no number depends on it
OFFLINE = ("random-fid", "fd-effnet")  # what needs neither a download nor torch-fidelity
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
NEIGHBOURS = 3
PRC_BATCH = 2500  # rows of distances at once

# Name -> (feature space, what is computed in it).
METRICS = {
    "random-fid": ("random", "frechet"),
    "fd-effnet": ("effnet", "frechet"),
    "kid-effnet": ("effnet", "kid"),
    "prc-effnet": ("effnet", "prc"),
    "ppl-effnet": ("", "ppl"),
    "fid": ("inception", "frechet"),
    "kid": ("inception", "kid"),
    "prc": ("inception", "prc"),
    "ppl": ("", "ppl"),
}
PPL_BACKBONES = {"ppl": "lpips-vgg", "ppl-effnet": "efficientnet-lite0"}
HIGHER_IS_BETTER = ("precision", "recall")


@dataclass(frozen=True)
class Distance:
    """One number and its spread: over random networks (random-fid), subsets (kid), or its error (ppl)."""

    value: float
    spread: float = 0.0


class Evaluation:
    """The real side of `distances`, computed once and compared with as many generators as wanted.

    which: of METRICS. `random-fid`: `RandomFeatures` over the seeds 0, 1, 2 (mean and spread). `fid`, `kid`,
    `prc` (precision and recall): Inception features; with `-effnet` those of `EfficientNetLite0.pooled`.
    `ppl`: perceptual path length. workers: processes that decode pictures. cache: keep what is found out
    about the pictures. inception: the file of its weights, fetched if None. Raises ConfigError for unknown
    metrics and where torch-fidelity is missing, WeightsMissing without weights.
    """

    def __init__(
        self,
        image_set: ImageSet,
        which: Sequence[str] = OFFLINE,
        *,
        device: torch.device | str = "cpu",
        batch: int | None = None,
        workers: int = 0,
        cache: bool = False,
        inception: Path | None = None,
        tell: Callable[[str], None] = lambda text: None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.which = check_names(which)
        self.device = torch.device(device)
        self.image_set = image_set
        self.batch = BATCH if batch is None else batch
        self._keeps = {METRICS[name][0] for name in which if METRICS[name][1] in ("kid", "prc")}
        self._networks: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
        self._identities: dict[str, str] = {}
        spaces = {METRICS[name][0] for name in which}
        if "random" in spaces:
            for seed in SEEDS:
                self._add(
                    f"random-{seed}", f"random features 1, seed {seed}", RandomFeatures(seed, self.device)
                )
        if "effnet" in spaces:
            self._add("effnet", f"EfficientNet-Lite0 {WEIGHTS_SHA256}", EfficientNetLite0(self.device).pooled)
        if "inception" in spaces:
            path = inception_weights(inception, tell)
            self._add("inception", "torch-fidelity inception 2048", inception_features(path, self.device))
        self._distances = {}
        for name in which:
            if name in PPL_BACKBONES:
                ensure_weights(PPL_BACKBONES[name], tell)
                self._distances[name] = build_distance(PPL_BACKBONES[name], image_set.channels, self.device)
        self._real = self._of_pictures(workers, cache, progress)

    def _add(self, name: str, identity: str, network: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._networks[name], self._identities[name] = network, identity

    def distances(
        self,
        G: torch.nn.Module,
        num: int,
        seed: int = 0,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> dict[str, Distance]:
        """Compare `num` pictures of `G` (no truncation, stored noise, labels as in the set) with the real.

        The same seed draws the same latents and labels for every generator. Distances grow as `num` shrinks,
        so only those of equal `num` can be compared. `prc` gives `precision` and `recall`. `progress(done,
        total)` counts pictures. Raises ConfigError where there are too few pictures.
        """
        if num < 2:
            raise ConfigError(f"a distance needs at least 2 generated pictures, not {num}.")
        fake = self._statistics(
            self._networks, _generated(G, self.image_set, num, seed, self.batch), num, progress
        )
        result: dict[str, Distance] = {}
        for metric in self.which:
            result |= self._compute(metric, fake, G, num, seed)
        return result

    def _compute(
        self, metric: str, fake: dict[str, Features], G: torch.nn.Module, num: int, seed: int
    ) -> dict[str, Distance]:
        space, kind = METRICS[metric]
        if kind == "frechet":
            names = [f"random-{each}" for each in SEEDS] if space == "random" else [space]
            found = [fake[name].statistics.distance(self._real[name].statistics) for name in names]
            return {metric: Distance(*mean_and_spread(found))}
        if kind == "ppl":
            distance = self._distances[metric]
            return {
                metric: Distance(*perceptual_path_length(G, self.image_set, distance, num, seed, self.batch))
            }
        generated, real = fake[space].kept, self._real[space].kept
        if kind == "kid":
            return {metric: kid(generated, real, seed)}
        precision, recall = precision_recall(generated, real)
        suffix = metric.removeprefix("prc")
        return {f"precision{suffix}": Distance(precision), f"recall{suffix}": Distance(recall)}

    def _of_pictures(
        self, workers: int, cache: bool, progress: Callable[[int, int], None] | None
    ) -> dict[str, Features]:
        content = self.image_set.content_hash() if cache else ""
        found = {}
        for name, identity in self._identities.items():
            known = (
                real_side.read(real_side.place_of(content, identity), name in self._keeps) if cache else None
            )
            if known is not None:
                found[name] = known
        missing = {name: network for name, network in self._networks.items() if name not in found}
        if missing:
            pictures = _real(self.image_set, self.batch, workers)
            new = self._statistics(missing, pictures, len(self.image_set), progress)
            if cache:
                for name, features in new.items():
                    real_side.write(real_side.place_of(content, self._identities[name]), features)
            found |= new
        return found

    @torch.no_grad()
    def _statistics(
        self,
        networks: dict[str, Callable[[torch.Tensor], torch.Tensor]],
        batches: Iterator[torch.Tensor],
        total: int,
        progress: Callable[[int, int], None] | None,
    ) -> dict[str, Features]:
        found = {name: Features(name in self._keeps) for name in networks}
        done = 0
        for pixels in batches if networks else ():
            img = images_to_float(pixels.to(self.device))
            for name, network in networks.items():
                found[name].add(network(img))
            done += len(img)
            if progress is not None:
                progress(done, total)
        return found


def check_names(which: Sequence[str]) -> tuple[str, ...]:
    """The metrics asked for, each once. Raises ConfigError for unknown ones, and without torch-fidelity."""
    unknown = [name for name in which if name not in METRICS]
    if unknown:
        raise ConfigError(f"no metric is called {', '.join(unknown)}; there are {', '.join(METRICS)}.")
    for name in which:
        if METRICS[name][1] != "frechet" or METRICS[name][0] == "inception":
            require_torch_fidelity(name)
    return tuple(dict.fromkeys(which))


def distances(
    G_ema: torch.nn.Module,
    image_set: ImageSet,
    num: int,
    seed: int = 0,
    which: Sequence[str] = OFFLINE,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Distance]:
    """`Evaluation` for a single generator."""
    return Evaluation(image_set, which, device=device).distances(G_ema, num, seed, progress=progress)


def kid(generated: torch.Tensor, real: torch.Tensor, seed: int = 0) -> Distance:
    """Kernel distance of features `[N, d]`, `[M, d]`: mean and deviation over 100 subsets of at most 1,000.

    Source: Bińkowski et al. 2018 (1801.01401), cubic kernel, unbiased.
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    size = min(KID_SUBSET_SIZE, len(generated), len(real))
    # In float64, as squares of nearly equal sums are subtracted.
    found = kid_features_to_metric(
        generated.double(),
        real.double(),
        kid_subsets=KID_SUBSETS,
        kid_subset_size=size,
        rng_seed=seed,
        verbose=False,
    )
    return Distance(found[KEY_METRIC_KID_MEAN], found[KEY_METRIC_KID_STD])


def precision_recall(generated: torch.Tensor, real: torch.Tensor) -> tuple[float, float]:
    """Share of generated features inside the real manifold, and of real ones inside the generated.

    Source: Kynkäänniemi et al. 2019 (1904.06991), 3 neighbours. Raises ConfigError where there are fewer.
    """
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    if min(len(generated), len(real)) <= NEIGHBOURS:
        raise ConfigError(f"precision and recall need more than {NEIGHBOURS} pictures on both sides.")
    found = prc_features_to_metric(
        generated,
        real,
        prc_neighborhood=NEIGHBOURS,
        prc_batch_size=PRC_BATCH,
        save_cpu_ram=True,
        verbose=False,
    )
    return found[KEY_METRIC_PRECISION], found[KEY_METRIC_RECALL]


def _real(image_set: ImageSet, batch: int, workers: int) -> Iterator[torch.Tensor]:
    loader: DataLoader[Any] = DataLoader(
        image_set, batch_size=batch, num_workers=min(workers, available_cores()), generator=torch.Generator()
    )
    for pixels, _ in started(loader):
        yield pixels


@torch.no_grad()
def _generated(
    G: torch.nn.Module, image_set: ImageSet, num: int, seed: int, batch: int
) -> Iterator[torch.Tensor]:
    """Pictures as they would be stored: rounded to uint8 `[N, C, H, W]`."""
    device = next(G.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn([num, G.z_dim], generator=generator)
    c = image_set.random_labels(num, generator) if G.c_dim else torch.zeros([num, 0])
    for z_part, c_part in zip(z.split(batch), c.split(batch), strict=True):
        img = G(z_part.to(device), c_part.to(device), noise_mode="const")
        yield torch.from_numpy(to_uint8(img)).movedim(-1, 1)
