"""Infinite data loader."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from finetune.data.image_set import CACHE_BYTES, ImageSet
from finetune.data.sampler import InfiniteSampler
from finetune.data.workers import (
    available_cores,
    leave_interrupts_to_the_main_process,
    restart_dead_workers,
    started,
)
from finetune.errors import DataError

Batch = tuple[torch.Tensor, torch.Tensor]

NUM_STAND_INS = 8  # images tried in place of one that cannot be read any more
MAX_UNREADABLE = 0.1  # of the items of an epoch; above that, the set is no longer the given one
GONE = (
    "A disk or network drive may be disconnected. Saved files are intact: once the images can be read, "
    "--resume the run folder."
)

log = logging.getLogger("finetune.data")


class InfiniteLoader(Iterator[Batch]):
    """Yields `(uint8 [N, C, H, W], float32 [N, num_classes])` indefinitely, on the CPU (pinned for CUDA).

    An image that cannot be read any more is replaced by another one, and counted in `unreadable` (items, not
    files); the first one is logged. Raises DataError if none of the replacements can be read either, or if
    more than `MAX_UNREADABLE` of an epoch were replaced. If a worker dies, it is restarted.
    `state_dict` counts the batches that were yielded, not what workers have read ahead; load it before the
    first batch.
    """

    def __init__(self, loader: DataLoader, sampler: InfiniteSampler, batch_size: int) -> None:
        self._loader, self._sampler = loader, sampler
        self._batch_size = batch_size
        self._step = batch_size * sampler.num_replicas
        self._position = sampler.position
        self._batches: Iterator | None = None
        self.unreadable = 0
        self._replaced = 0  # in this epoch

    def __next__(self) -> Batch:
        if self._batches is None:
            self._batches = restart_dead_workers(self._start)
        batch = next(self._batches)
        if isinstance(batch, DataError):
            raise batch
        images, labels, lost = batch
        self._count(lost)
        self._position += self._step
        return images, labels

    def _start(self) -> Iterator:
        self._sampler.position = self._position
        return started(self._loader)

    def _count(self, lost: list[str]) -> None:
        """Count the images of a batch that had to be replaced. Raises DataError if they are too many."""
        if lost and not self.unreadable:
            log.warning("%s Another image replaces it; `unreadable` in the log counts these.", lost[0])
        self.unreadable += len(lost)
        num_items = self._sampler.num_items
        if self._position % num_items < self._step:  # another epoch
            self._replaced = 0
        self._replaced += len(lost)
        if self._replaced > MAX_UNREADABLE * num_items / self._sampler.num_replicas:
            raise DataError(
                f"{self._replaced} of {num_items} images of this epoch can no longer be read (limit: "
                f"{MAX_UNREADABLE:.0%}). The last one: {lost[-1]}",
                hint=GONE,
            )

    def state_dict(self) -> dict:
        """Return the position in the order of items, as `InfiniteSampler.state_dict`, and the counts."""
        return {**self._sampler.state_dict(), "position": self._position, "unreadable": self.unreadable}

    def load_state_dict(self, state: dict) -> None:
        """Continue from `state`. Raises ValueError if it belongs to another order."""
        self._batches = None
        self._sampler.load_state_dict(state)
        self._position = self._sampler.position
        self.unreadable = int(state.get("unreadable", 0))
        self._replaced = 0

    def close(self) -> None:
        """Stop the workers; the next batch, if one is asked for, follows the last one handed out."""
        self._batches = None
        self._sampler.position = self._position


def build_loader(
    image_set: ImageSet,
    batch_size: int,
    *,
    workers: int,
    seed: int,
    device: torch.device | str,
    rank: int = 0,
    num_replicas: int = 1,
    cache_bytes: int = CACHE_BYTES,
) -> InfiniteLoader:
    """Build an endless loader of shuffled batches of `batch_size` items for replica `rank`.

    A set that takes no more than `cache_bytes` decoded is read once, here, and served from memory without
    workers. Otherwise `workers` processes decode, at most one a core; with 0 the calling process does.
    Neither touches the global random state. Raises DataError.
    """
    workers = min(workers, available_cores())
    if image_set.preload(cache_bytes, workers=workers):
        workers = 0
    sampler = InfiniteSampler(
        len(image_set), rank=rank, num_replicas=num_replicas, block=batch_size, seed=seed
    )
    loader = DataLoader(
        _Items(image_set),
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=torch.device(device).type == "cuda",
        worker_init_fn=leave_interrupts_to_the_main_process,
        # Workers are seeded from here; the global generator is left alone.
        generator=torch.Generator().manual_seed(seed % 2**63),
    )
    return InfiniteLoader(loader, sampler, batch_size)


class _Items(Dataset):
    """Items `(image, label, why)` of a set; `why`: what is wrong with the image it replaces.

    The replacement depends on the number of the item and on what can be read, so that a resumed run gets the
    same. A remaining problem is returned as an item, because torch rewords what workers raise.
    """

    def __init__(self, image_set: ImageSet) -> None:
        self.image_set = image_set

    def __len__(self) -> int:
        return len(self.image_set)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray, str | None] | DataError:
        why: str | None = None
        # From the whole data set: often a folder vanishes, whose images are adjacent in the order.
        others = np.random.RandomState(index).randint(len(self), size=NUM_STAND_INS)
        for candidate in (index, *others.tolist()):
            try:
                return (*self.image_set[candidate], why)
            except DataError as error:
                why = why or error.what
        return DataError(f"{why} Neither can {NUM_STAND_INS} replacements.", hint=GONE)


def _collate(items: list) -> tuple[torch.Tensor, torch.Tensor, list[str]] | DataError:
    for item in items:
        if isinstance(item, DataError):
            return item
    images, labels, why = zip(*items)
    return torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(labels)), [w for w in why if w]
