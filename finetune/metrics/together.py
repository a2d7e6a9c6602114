"""Several processes that measure together: each takes its share, and all of them learn of a failure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from finetune.errors import FinetuneError

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """This process among `world` of them. group: of torch.distributed, for tensors on the CPU (None: all)."""

    rank: int = 0
    world: int = 1
    group: Any = None

    @property
    def is_first(self) -> bool:
        """Whether this is the one that keeps what all have found."""
        return self.rank == 0

    def mine(self, items: list[T]) -> list[T]:
        """Every `world`-th of the items, which all processes have."""
        return items[self.rank :: self.world]

    def all_of(self, call: Callable[[], T], what: str) -> list[T]:
        """What `call` gives in each process, in their order; its error, in all, where it fails in one."""
        if self.world == 1:
            return [call()]
        mine: tuple[T | None, FinetuneError | None] = (None, None)
        try:
            mine = (call(), None)
        except FinetuneError as error:
            mine = (None, FinetuneError(error.what, hint=error.hint))
        except Exception as error:  # the others would wait for this process in vain
            mine = (None, FinetuneError(f"{what} failed in process {self.rank}: {error}"))
        found: list[tuple[T, FinetuneError | None]] = [None] * self.world  # type: ignore[list-item]
        import torch.distributed as dist

        dist.all_gather_object(found, mine, group=self.group)
        for _, error in found:
            if error is not None:
                raise error
        return [value for value, _ in found]

    def first_of(self, call: Callable[[], T], what: str) -> T:
        """What `call` gives in the first process, which alone calls it."""
        found = self.all_of(lambda: call() if self.is_first else None, what)[0]
        return found  # type: ignore[return-value]


ALONE = Share()
