"""Ctrl-C and SIGTERM: the first one ends training after the step, the second one at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType

from finetune.distributed import ProcessGroup

HANDLED = (signal.SIGINT, signal.SIGTERM)


class StopSignal:
    """Inside a `with` block, note the first signal instead of ending the process.

    `received`: the signal of this process; `number`: the one on which all ranks have agreed.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.number: int | None = None
        self._before: list = []

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            self._before = [signal.signal(number, self._handle) for number in HANDLED]
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in zip(HANDLED, self._before):
            signal.signal(number, handler)

    def requested(self, group: ProcessGroup, step: int) -> bool:
        """Return whether any rank has received a signal; to be called on every rank."""
        self.number = (
            group.all_reduce_max(self.received or 0, f"the exchange of signals (step {step})") or None
        )
        return self.number is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = number
