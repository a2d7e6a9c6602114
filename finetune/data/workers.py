"""How worker processes of a DataLoader are counted and started."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

PARALLEL_FROM = 512  # pictures; below, starting workers costs more than they save


def available_cores() -> int:
    """How many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def started(loader: DataLoader) -> Iterator:
    """`iter(loader)`, without Python 3.12's warning about fork beside threads: the workers use none."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*use of fork", category=DeprecationWarning)
        return iter(loader)


def in_order(items: Dataset, num_items: int, workers: int) -> Iterator:
    """The items of a data set one by one, made by `workers` processes (at most one a core) where it pays."""
    num_workers = min(workers, available_cores()) if num_items >= PARALLEL_FROM else 0
    # A generator of its own, because a DataLoader draws a seed from the global one otherwise.
    loader = DataLoader(
        items, batch_size=None, num_workers=num_workers, collate_fn=_as_it_is, generator=torch.Generator()
    )
    return started(loader)


def _as_it_is(item: Any) -> Any:
    return item
