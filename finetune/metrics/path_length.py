"""Perceptual path length in W: how far pictures jump for a small step, through torch-fidelity.

Source: Karras et al. 2019 (1812.04948), section 4.1, with the full path and no crop; steps of 1e-4 between
two latents of W, the lowest and highest per cent left out.
"""

from __future__ import annotations

import uuid
from typing import Any

import numpy as np
import torch

from finetune.data import ImageSet
from finetune.metrics.perceptual import Distance

EPSILON = 1e-4
PERCENTILES = (1, 99)
RESOLUTION = 256  # at which pictures are compared, if they are larger


def perceptual_path_length(
    G: Any, image_set: ImageSet, distance: Distance, num: int, seed: int, batch: int
) -> tuple[float, float]:
    """Mean and standard error of d(G(w), G(w + 1e-4·(w' - w))) / 1e-8 over `num` pairs, stored noise."""
    from torch_fidelity import registry
    from torch_fidelity.generative_model_base import GenerativeModelBase
    from torch_fidelity.metric_ppl import KEY_METRIC_PPL_RAW, calculate_ppl
    from torch_fidelity.sample_similarity_base import SampleSimilarityBase

    device = next(G.parameters()).device

    def draw(rng: np.random.RandomState, shape: tuple[int, int]) -> torch.Tensor:
        """Latents of W, with labels as frequent as in the pictures."""
        generator = torch.Generator().manual_seed(int(rng.randint(2**31)))
        ws = []
        for size in torch.arange(shape[0]).split(batch):
            z = torch.randn([len(size), G.z_dim], generator=generator)
            c = image_set.random_labels(len(size), generator) if G.c_dim else z[:, :0]
            with torch.no_grad():
                ws.append(G.mapping(z.to(device), c.to(device))[:, 0].cpu())
        return torch.cat(ws)

    class Synthesis(GenerativeModelBase):
        z_size, num_classes = G.w_dim, 0
        z_type = f"w-{uuid.uuid4().hex}"  # torch-fidelity keeps names for ever

        def forward(self, w: torch.Tensor) -> torch.Tensor:
            return G.synthesis(w.to(device)[:, None].expand(-1, G.num_ws, -1), noise_mode="const")

    class Similarity(SampleSimilarityBase):
        def __init__(self, name: str, **kwargs: Any) -> None:
            super().__init__(name)

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            factor = max(1, a.shape[-1] // RESOLUTION)
            a, b = (torch.nn.functional.avg_pool2d(img, factor) for img in (a, b))
            return distance(a.float(), b.float())

    registry.register_noise_source(Synthesis.z_type, draw)
    registry.register_sample_similarity(Synthesis.z_type, Similarity)
    try:
        found = calculate_ppl(
            1,
            input1=Synthesis(),
            input1_model_num_samples=num,
            batch_size=batch,
            cuda=False,  # the functions above know where G is
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
    lengths = found[KEY_METRIC_PPL_RAW]
    low = np.percentile(lengths, PERCENTILES[0], method="lower")
    high = np.percentile(lengths, PERCENTILES[1], method="higher")
    kept = lengths[(lengths >= low) & (lengths <= high)]
    return float(kept.mean()), float(kept.std(ddof=1) / len(kept) ** 0.5) if len(kept) > 1 else 0.0
