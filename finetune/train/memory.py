"""Find the largest micro-batch that fits into the memory of a GPU; explain out-of-memory errors."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import torch

from finetune.config import TrainConfig
from finetune.distributed import SINGLE
from finetune.errors import TrainingError
from finetune.models import image_size
from finetune.recipes import RunFacts, micro_batch_sizes
from finetune.train import steps
from finetune.train.ada import AdaController
from finetune.train.graphs import Graphs
from finetune.train.state import Plan, TrainState
from finetune.train.stats import Stats

# Family -> resolution, micro-batch, peak GiB with CUDA graphs, after cuDNN has chosen its algorithms.
MEASURED = {"stylegan2": (256, 32, 6.2), "stylegan3-t": (256, 32, 20.8), "stylegan3-r": (256, 32, 19.8)}
SOURCE = "docs/performance.md"
# Part of the memory that a trial leaves free: for libraries of CUDA, metrics and previews.
RESERVE = 0.1

log = logging.getLogger("finetune.train")


def can_run_out(device: torch.device) -> bool:
    """Return whether the micro-batch is found by trial on `device`."""
    return device.type == "cuda"


def largest_micro_batch(sizes: list[int], state: TrainState, plan: Plan) -> int:
    """Return the largest of `sizes` (ascending) with which a step fits into memory on every rank.

    The smallest is not tried. Nothing of the state changes, random numbers included.
    """
    for size in reversed(sizes[1:]):
        failed = int(not _fits(size, state, plan))
        if not plan.group.all_reduce_max(failed, f"the trial of --batch-gpu {size}"):
            return size
    return sizes[0]


def _fits(size: int, state: TrainState, plan: Plan) -> bool:
    """Return whether every phase of a step with one micro-batch of `size` fits into memory."""
    on_cuda = plan.device.type == "cuda"
    buffers = [*steps.moving_buffers(state.G)]
    buffers += state.augment_pipe.buffers() if state.augment_pipe is not None else ()
    before, labels = [buffer.clone() for buffer in buffers], state.label_generator.get_state()
    with torch.random.fork_rng([plan.device] if on_cuda else []), _limited_memory(state, plan):
        try:
            _run_phases(size, state, plan)
            fits = True
        except RuntimeError as error:  # not only OutOfMemoryError: cuDNN "was unable to find an engine"
            log.info("--batch-gpu %d does not fit: %s", size, str(error).split("\n")[0])
            fits = False
    # After the block: until then, the error keeps the tensors of the trial alive.
    steps.copy_all(buffers, before)
    state.label_generator.set_state(labels)
    for network in (state.G, state.D):
        network.requires_grad_(False)
        network.zero_grad(set_to_none=True)
    if on_cuda:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(plan.device)  # the log shows the peak of training
    return fits


def _run_phases(size: int, state: TrainState, plan: Plan) -> None:
    """Run every phase once, augmented and with distillation, as the first step does; no optimizer step."""
    no_step = cast(Any, SimpleNamespace(step=lambda: None))
    state = replace(
        state,
        opt_G=no_step,
        opt_D=no_step,
        ada=AdaController(1.0, target=None, swing_kimg=1.0),
        path_mean=state.path_mean.clone(),
        sd_norms=state.sd_norms.clone(),
    )
    # Graphs capture at the second call of a part, so these capture nothing.
    graphs = Graphs(plan.device, enabled=plan.graphs.enabled)
    plan = replace(plan, batch=size, batch_gpu=size, group=SINGLE, graphs=graphs)
    stats = Stats(plan.device)
    shape = [size, state.G.img_channels, *image_size(state.G)]
    reals = [(torch.randn(shape, device=plan.device), plan.labels(size))]
    with graphs.stream():
        steps.generator_step(state, plan, stats)
        if plan.path_interval:
            steps.path_length_step(state, plan, stats)
        steps.discriminator_step(state, plan, reals, stats)
        if plan.gamma > 0:
            steps.r1_step(state, plan, reals, stats)


@contextlib.contextmanager
def _limited_memory(state: TrainState, plan: Plan) -> Iterator[None]:
    """Limit torch to the memory that is free, less RESERVE and what Adam will take.

    To half of it with CUDA graphs: their pool takes what a phase needs, and phases that run without a graph,
    as each does at first, take it once more.
    """
    if plan.device.type != "cuda":
        yield
        return
    index = plan.device.index or 0
    free, total = torch.cuda.mem_get_info(index)
    parameters = [*state.G.parameters(), *state.D.parameters()]
    adam = sum(2 * each.numel() * each.element_size() for each in parameters)
    allocated = torch.cuda.memory_allocated(index)
    spare = (free + torch.cuda.memory_reserved(index)) * (1 - RESERVE) - adam - allocated
    limit = allocated + (spare / 2 if plan.graphs.enabled else spare)
    torch.cuda.set_per_process_memory_fraction(min(max(limit / total, 0.01), 1.0), index)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, index)


def out_of_memory(
    error: torch.OutOfMemoryError, config: TrainConfig, facts: RunFacts, run_dir: str
) -> TrainingError:
    """Return the error to show: the option to change, with a value, and a measured size."""
    resolution, size, peak = MEASURED[facts.family]
    total = f" of {facts.gpu_memory_gib:.0f} GiB" if facts.gpu_memory_gib else ""
    smaller = smaller_micro_batch(config, facts)
    if smaller:
        remedy = f"Resume with a smaller micro-batch: finetune train --resume {run_dir} --batch-gpu {smaller}"
    elif config.graphs == "auto":
        remedy = (
            "The micro-batch cannot be smaller. Resume without CUDA graphs, which take as much memory again: "
            f"finetune train --resume {run_dir} --graphs off"
        )
    else:
        remedy = (
            "The micro-batch cannot be smaller. Use a GPU with more memory, or in a new run --sd-weight 0 or "
            "--sd-backbone efficientnet-lite0."
        )
    first_line = str(error).split("\n")[0]
    return TrainingError(
        f"--batch-gpu {config.batch_gpu}: out of memory on the GPU{total} ({first_line}).",
        hint=f"{remedy}\nMeasured for {facts.family}: {resolution} px with --batch-gpu {size} takes "
        f"{peak:.1f} GiB ({SOURCE}).",
    )


def smaller_micro_batch(config: TrainConfig, facts: RunFacts) -> int | None:
    """Return the next micro-batch to try: the largest that is half of the present one or less, and that fits.

    Memory is taken to be in proportion to micro-batch and pixels. None if the present one is the smallest.
    """
    resolution, size, peak = MEASURED[facts.family]
    fitting = config.batch_gpu // 2
    if facts.gpu_memory_gib:
        per_image = peak / size * facts.num_pixels / resolution**2
        fitting = max(1, min(fitting, int(facts.gpu_memory_gib / per_image)))
    sizes = micro_batch_sizes(config.batch // facts.num_processes, facts.group_size)
    return max(size for size in sizes if size <= fitting) if config.batch_gpu > 1 else None
