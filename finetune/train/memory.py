"""Explain out-of-memory errors on a GPU: the measured memory, and the option to change."""

from __future__ import annotations

import torch

from finetune.config import TrainConfig
from finetune.errors import TrainingError
from finetune.recipes import RunFacts, can_group

# Family -> resolution, micro-batch, peak GiB of a step. The peak includes the search of cuDNN for algorithms.
MEASURED = {"stylegan2": (256, 32, 17.57), "stylegan3-t": (256, 32, 27.27), "stylegan3-r": (256, 32, 28.11)}
SOURCE = "docs/performance.md"


def out_of_memory(
    error: torch.OutOfMemoryError, config: TrainConfig, facts: RunFacts, run_dir: str
) -> TrainingError:
    """Return the error to show: the option to change, with a value, and the largest measured size."""
    resolution, largest, peak = MEASURED[facts.family]
    total = f" of {facts.gpu_memory_gib:.0f} GiB" if facts.gpu_memory_gib else ""
    smaller = smaller_micro_batch(config, facts)
    if smaller:
        remedy = f"Resume with a smaller micro-batch: finetune train --resume {run_dir} --batch-gpu {smaller}"
    else:
        remedy = (
            "The micro-batch cannot be smaller. Use a GPU with more memory, or in a new run --sd-weight 0 or "
            "--sd-backbone efficientnet-lite0."
        )
    first_line = str(error).split("\n")[0]
    return TrainingError(
        f"--batch-gpu {config.batch_gpu}: out of memory on the GPU{total} ({first_line}).",
        hint=f"{remedy}\nLargest measured size of {facts.family}: {resolution} px with --batch-gpu {largest} "
        f"takes {peak:.1f} GiB ({SOURCE}).",
    )


def smaller_micro_batch(config: TrainConfig, facts: RunFacts) -> int | None:
    """Return the next micro-batch to try: the largest that is half of the present one or less, and that fits.

    Memory is taken to be in proportion to micro-batch and pixels. None if the present one is the smallest.
    """
    resolution, largest, peak = MEASURED[facts.family]
    fitting = config.batch_gpu // 2
    if facts.gpu_memory_gib:
        per_image = peak / largest * facts.num_pixels / resolution**2
        fitting = max(1, min(fitting, int(facts.gpu_memory_gib / per_image)))
    own = config.batch // facts.num_processes
    sizes = [n for n in range(1, fitting + 1) if own % n == 0 and can_group(n, facts.group_size)]
    return max(sizes, default=None) if config.batch_gpu > 1 else None
