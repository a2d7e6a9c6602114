"""An endless, shuffled, resumable order of items."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


class InfiniteSampler(Sampler[int]):
    """Yields item numbers indefinitely: every epoch is a new permutation with each item exactly once.

    The order is one stream that depends on `seed` and `num_items` alone; `num_replicas` replicas take turns
    with `block` items each (their batch), so that together they see what a single one would have seen, in
    the same batches. `position` counts the items that all replicas together have drawn; it is all that
    changes.
    """

    def __init__(
        self,
        num_items: int,
        *,
        rank: int = 0,
        num_replicas: int = 1,
        block: int = 1,
        seed: int = 0,
    ) -> None:
        if num_items < 1 or block < 1 or not 0 <= rank < num_replicas:
            raise ValueError(
                f"num_items={num_items}, rank={rank}, num_replicas={num_replicas}, block={block}"
            )
        self.block = block
        self.num_items, self.rank, self.num_replicas = num_items, rank, num_replicas
        self.seed = seed
        self.position = 0

    def __iter__(self) -> Iterator[int]:
        epoch, order = -1, np.empty(0, np.int64)
        while True:
            first = self.position + self.rank * self.block
            self.position += self.num_replicas * self.block
            for turn in range(first, first + self.block):
                if turn // self.num_items != epoch:
                    epoch = turn // self.num_items
                    order = self._order(epoch)
                yield int(order[turn % self.num_items])

    def state_dict(self) -> dict:
        """Return plain numbers from which another sampler continues exactly."""
        return {"position": self.position, "num_items": self.num_items, "seed": self.seed}

    def load_state_dict(self, state: dict) -> None:
        """Continue from `state`. Raises ValueError if it belongs to another order."""
        for name in ("num_items", "seed"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"the state has {name}={state[name]}, this sampler has {getattr(self, name)}"
                )
        self.position = int(state["position"])

    def _order(self, epoch: int) -> np.ndarray:
        # RandomState is the one generator whose stream numpy promises never to change.
        words = [self.seed % 2**32, (self.seed >> 32) % 2**32, epoch % 2**32]
        return np.random.RandomState(words).permutation(self.num_items)
