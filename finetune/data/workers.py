"""Start DataLoader workers, and restart them when one dies."""

from __future__ import annotations

import logging
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from finetune.errors import DataError

PARALLEL_FROM = 64  # images; below, starting workers costs more than they save
MAX_DEATHS = 3  # of workers, one after the other, without one item in between

log = logging.getLogger("finetune.data")


def available_cores() -> int:
    """Return how many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def started(loader: DataLoader) -> Iterator:
    """Return `iter(loader)` without Python 3.12's warning about fork beside threads: the workers use none.

    Torch's handler of SIGCHLD is removed: it raises at any point of the main program, in the middle of a
    training step or of a save. A dead worker is still detected, when its batch is missing.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGCHLD) if in_main_thread and hasattr(signal, "SIGCHLD") else None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*use of fork", category=DeprecationWarning)
        batches = iter(loader)
    if before is not None:
        signal.signal(signal.SIGCHLD, before)
    return batches


def leave_interrupts_to_the_main_process(worker: int) -> None:
    """Ignore Ctrl-C in a worker: the main process finishes its step and needs its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def restart_dead_workers(start: Callable[[], Iterator]) -> Iterator:
    """Yield the items of `start()`; if a worker dies, call `start()` again and continue with the next item.

    Raises DataError if workers die repeatedly without producing data in between.
    """
    deaths, items = 0, start()
    while True:
        try:
            item = next(items)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError) as error:
            if not _is_death(error):
                raise
            why = str(error)  # the error itself would keep the workers that are left alive
        else:
            deaths = 0
            yield item
            continue
        deaths += 1
        if deaths > MAX_DEATHS:
            raise DataError(
                f"Data workers died {deaths} times in a row ({why}).",
                hint="The usual cause is too little memory or shared memory (/dev/shm): use fewer "
                "--workers, or --workers 0.",
            )
        log.warning("A data worker died (%s) and was restarted.", why)
        items = iter(())  # ends the others before there are new ones
        items = start()


def in_order(items: Dataset, num_items: int, workers: int, *, num_images: int | None = None) -> Iterator:
    """Yield the items of a data set in order, from `workers` processes (at most one per core) if it pays.

    num_images: in all items, by default one in each.
    """
    pays = (num_items if num_images is None else num_images) >= PARALLEL_FROM
    num_workers = min(workers, available_cores()) if pays else 0
    done = 0

    def start() -> Iterator:
        loader = DataLoader(
            items,
            batch_size=None,
            sampler=range(done, num_items),
            num_workers=num_workers,
            collate_fn=_as_it_is,
            worker_init_fn=leave_interrupts_to_the_main_process,
            # A generator of its own, because a DataLoader draws a seed from the global one otherwise.
            generator=torch.Generator(),
        )
        return started(loader)

    for item in restart_dead_workers(start):
        done += 1
        yield item


def _as_it_is(item: Any) -> Any:
    return item


def _is_death(error: Exception) -> bool:
    """Return whether an error of a DataLoader means a dead worker, not an error inside one."""
    text = str(error)
    if "in DataLoader worker process" in text:  # an exception raised inside a worker
        return False
    # What receiving an item meets when its sender dies in that moment.
    cut_off = isinstance(error, ConnectionError | FileNotFoundError | EOFError)
    return cut_off or "DataLoader worker (pid" in text
