"""Batches without end."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from finetune.data.image_set import ImageSet
from finetune.data.sampler import InfiniteSampler
from finetune.data.workers import available_cores, started
from finetune.errors import DataError

Batch = tuple[torch.Tensor, torch.Tensor]


class InfiniteLoader(Iterator[Batch]):
    """Yields `(uint8 [N, C, H, W], float32 [N, num_classes])` for ever, on the CPU (pinned for CUDA).

    `state_dict` counts what was handed out, not what workers have read ahead; load it before the first batch.
    """

    def __init__(self, loader: DataLoader, sampler: InfiniteSampler, batch_size: int) -> None:
        self._loader, self._sampler = loader, sampler
        self._step = batch_size * sampler.num_replicas
        self._position = sampler.position
        self._batches: Iterator | None = None

    def __next__(self) -> Batch:
        if self._batches is None:
            self._batches = started(self._loader)
        batch = next(self._batches)
        if isinstance(batch, DataError):
            raise batch
        self._position += self._step
        return batch

    def state_dict(self) -> dict:
        """The position in the order of items, as `InfiniteSampler.state_dict`."""
        return {**self._sampler.state_dict(), "position": self._position}

    def load_state_dict(self, state: dict) -> None:
        """Go on where `state` was taken. Raises ValueError where it belongs to another order."""
        self._batches = None
        self._sampler.load_state_dict(state)
        self._position = self._sampler.position

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
    cache_bytes: int = 256 << 20,
) -> InfiniteLoader:
    """Endless shuffled batches of `batch_size` items for replica `rank`.

    A set that takes no more than `cache_bytes` decoded is read once, here, and served from memory without
    workers. Otherwise `workers` processes decode, at most one a core; with 0 the calling process does.
    Neither touches the global random state. Raises DataError.
    """
    workers = min(workers, available_cores())
    if image_set.preload(cache_bytes, workers=workers):
        workers = 0
    sampler = InfiniteSampler(len(image_set), rank=rank, num_replicas=num_replicas, seed=seed)
    loader = DataLoader(
        _Items(image_set),
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=torch.device(device).type == "cuda",
        # Workers are seeded from here; the global generator is left alone.
        generator=torch.Generator().manual_seed(seed % 2**63),
    )
    return InfiniteLoader(loader, sampler, batch_size)


class _Items(Dataset):
    """The items of a set; a problem is handed over as an item, because torch rewords what workers raise."""

    def __init__(self, image_set: ImageSet) -> None:
        self.image_set = image_set

    def __len__(self) -> int:
        return len(self.image_set)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray] | DataError:
        try:
            return self.image_set[index]
        except DataError as error:
            return error


def _collate(items: list) -> Batch | DataError:
    for item in items:
        if isinstance(item, DataError):
            return item
    images, labels = zip(*items)
    return torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(labels))
