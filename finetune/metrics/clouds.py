"""Compare two sets of features: KID, precision, recall."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from finetune.errors import ConfigError

KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
NEIGHBORS = 3
PRC_BATCH = 2500  # rows of distances at once


@dataclass(frozen=True)
class MetricValue:
    """One number and its spread: over random networks (random-fid), subsets (kid), or its error (ppl).

    error: its standard error with respect to the generated images, if computed.
    """

    value: float
    spread: float = 0.0
    error: float = 0.0


def kid(generated: torch.Tensor, real: torch.Tensor, seed: int = 0) -> MetricValue:
    """Return the kernel distance of features `[N, d]`, `[M, d]` over 100 subsets: mean and deviation.

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
    return MetricValue(found[KEY_METRIC_KID_MEAN], found[KEY_METRIC_KID_STD])


def precision_recall(generated: torch.Tensor, real: torch.Tensor) -> tuple[float, float]:
    """Return the fraction of generated features in the real manifold, and of real in the generated.

    Source: Kynkäänniemi et al. 2019 (1904.06991), 3 neighbors. Raises ConfigError if there are fewer.
    """
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    if min(len(generated), len(real)) <= NEIGHBORS:
        raise too_few()
    found = prc_features_to_metric(
        generated,
        real,
        prc_neighborhood=NEIGHBORS,
        prc_batch_size=PRC_BATCH,
        save_cpu_ram=True,
        verbose=False,
    )
    return found[KEY_METRIC_PRECISION], found[KEY_METRIC_RECALL]


def too_few() -> ConfigError:
    """Return the error for fewer images than neighbors."""
    what = f"precision and recall need more than {NEIGHBORS} real and generated images."
    return ConfigError(f"{what} Use a larger --num or data set.")
