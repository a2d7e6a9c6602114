"""Perceptual path length in W: change of the image per small step, through torch-fidelity.

Source: Karras et al. 2019 (1812.04948), section 4.1: steps of 1e-4 from one latent of W towards another, at
the ends of paths (t = 0) and without a crop, as in 1912.04958; the lowest and highest per cent are left out.
"""

from __future__ import annotations

import uuid
from typing import Any

import numpy as np
import torch

from finetune.data import ImageSet
from finetune.distributed import SINGLE, ProcessGroup
from finetune.metrics.perceptual import ImageDistance

EPSILON = 1e-4
PERCENTILES = (1, 99)
RESOLUTION = 256  # at which images are compared, if they are larger


def perceptual_path_length(
    G: Any,
    image_set: ImageSet,
    distance: ImageDistance,
    num: int,
    seed: int,
    batch: int,
    group: ProcessGroup = SINGLE,
) -> tuple[float, float]:
    """Return mean and standard error of d(G(w), G(w + 1e-4·(w' - w))) / 1e-8 over `num` pairs, stored noise.

    Both ends of a path have one label. group: this process among others, each of which takes its batches.
    """
    parts = group.all_gather_results(
        lambda: path_lengths(G, image_set, distance, num, seed, batch, group), "the path length"
    )
    # Sorted, so that the mean does not depend on which process had which.
    lengths = np.sort(np.concatenate(parts).astype(np.float64))
    low = np.percentile(lengths, PERCENTILES[0], method="lower")
    high = np.percentile(lengths, PERCENTILES[1], method="higher")
    kept = lengths[(lengths >= low) & (lengths <= high)]
    return float(kept.mean()), float(kept.std(ddof=1) / len(kept) ** 0.5) if len(kept) > 1 else 0.0


def path_lengths(
    G: Any, image_set: ImageSet, distance: ImageDistance, num: int, seed: int, batch: int, group: ProcessGroup
) -> np.ndarray:
    """Return the lengths of this rank's pairs."""
    from torch_fidelity import registry
    from torch_fidelity.generative_model_base import GenerativeModelBase
    from torch_fidelity.metric_ppl import KEY_METRIC_PPL_RAW, calculate_ppl
    from torch_fidelity.sample_similarity_base import SampleSimilarityBase

    device = next(G.parameters()).device
    chosen = group.shard(list(torch.arange(num).split(batch)))
    if not chosen:
        return np.zeros(0, dtype=np.float32)
    labels = image_set.random_labels(num, torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def draw(rng: np.random.RandomState, shape: tuple[int, int]) -> torch.Tensor:
        """Draw latents of W, with labels as frequent as in the images: once for each end of the paths."""
        z = torch.randn([num, G.z_dim], generator=torch.Generator().manual_seed(int(rng.randint(2**31))))
        c = labels if G.c_dim else z[:, :0]
        return torch.cat([G.mapping(z[part].to(device), c[part].to(device))[:, 0].cpu() for part in chosen])

    class Synthesis(GenerativeModelBase):
        z_size, num_classes = G.w_dim, 0
        z_type = f"w-{uuid.uuid4().hex}"  # torch-fidelity never removes names

        def forward(self, w: torch.Tensor) -> torch.Tensor:
            return G.synthesis(w.to(device)[:, None].expand(-1, G.num_ws, -1), noise_mode="const")

    class Similarity(SampleSimilarityBase):
        def __init__(self, name: str, **kwargs: Any) -> None:
            super().__init__(name)

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            factor = max(1, max(a.shape[2:]) // RESOLUTION)
            a, b = (torch.nn.functional.avg_pool2d(img, factor) for img in (a, b))
            return distance(a.float(), b.float())

    registry.register_noise_source(Synthesis.z_type, draw)
    registry.register_sample_similarity(Synthesis.z_type, Similarity)
    try:
        found = calculate_ppl(
            1,
            input1=Synthesis(),
            input1_model_num_samples=sum(map(len, chosen)),
            batch_size=batch,
            cuda=False,  # the functions above move data to G
            verbose=False,
            rng_seed=seed,
            ppl_epsilon=EPSILON,
            ppl_reduction="none",
            ppl_sample_similarity=Synthesis.z_type,
            ppl_z_interp_mode="lerp",
            ppl_discard_percentile_lower=None,
            ppl_discard_percentile_higher=None,
        )
    finally:
        registry.NOISE_SOURCE_REGISTRY.pop(Synthesis.z_type, None)
        registry.SAMPLE_SIMILARITY_REGISTRY.pop(Synthesis.z_type, None)
    return found[KEY_METRIC_PPL_RAW]
