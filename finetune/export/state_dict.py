"""Write state dicts with the names of the StyleGAN2-ADA and StyleGAN3 trees: `{"G_ema": {name: tensor}}`.

A network of those code bases takes them: `G.load_state_dict(torch.load(path, weights_only=True)["G_ema"])`.
"""

from __future__ import annotations

import os

from finetune.checkpoint.load import NETWORKS, Checkpoint
from finetune.checkpoint.rebuild import tensors_of
from finetune.export.torch_save import Check, on_cpu, save_tensors


def write(path: str | os.PathLike, checkpoint: Checkpoint, *, check: Check | None = None) -> None:
    """Write the tensors of the networks of `checkpoint`; see `save_tensors` for the rest."""
    content = {
        name: {key: on_cpu(tensor) for key, tensor in tensors_of(network).items()}
        for name in NETWORKS
        if (network := getattr(checkpoint, name)) is not None
    }
    save_tensors(path, checkpoint, content, check)
