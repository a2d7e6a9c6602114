"""Statistics of a tick (the time between two lines of the log): averages, seconds per phase, memory."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

from finetune.distributed import SINGLE, ProcessGroup
from finetune.train.diagnostics import Diagnostics
from finetune.train.divergence import Alarm
from finetune.train.state import TrainState

CHECK_EVERY = 16  # steps between checks for non-finite values on a device that needs a synchronization


class Stats:
    """Sums of everything recorded since the last tick, and the clock of the phases.

    `tick_nimg`: images seen at the last tick. It is saved, so that ticks, snapshots and metrics come at the
    same numbers of images whether or not the run was resumed in between. diagnostics: on rank 0 alone.
    """

    def __init__(
        self, device: torch.device, interval_nimg: float = 1e9, group: ProcessGroup = SINGLE
    ) -> None:
        self.device, self.interval_nimg, self.group = device, interval_nimg, group
        self.diagnostics: Diagnostics | None = None
        self.clock = PhaseClock(device)
        self.tick_nimg = 0
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, torch.Tensor] = {}
        self.phases: dict[str, str] = {}
        self.restart(0)

    def restart(self, nimg: int) -> None:
        """Forget what was recorded: training continues at `nimg` images."""
        for name in self.sums:
            self._forget(name)
        self.is_reduced = False
        self.clock.read()
        self.started, self.started_nimg = time.perf_counter(), nimg

    def state_dict(self) -> dict[str, int]:
        """Return the place in the schedule; sums are not saved."""
        return {"tick_nimg": self.tick_nimg}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take over what `state_dict` returned."""
        self.tick_nimg = int(state["tick_nimg"])

    def passed(self, interval_nimg: float, nimg: int) -> bool:
        """Return whether a multiple of `interval_nimg` lies between the last tick and `nimg` images."""
        return nimg // interval_nimg > self.tick_nimg // interval_nimg

    def phase(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Charge the time of a `with` block, and what is recorded in it, to the phase `name`."""
        return self.clock.phase(name)

    def record(self, **values: torch.Tensor) -> None:
        """Add values (any shape) to the averages of this tick.

        Sums and counts stay where they are on the device, so that a CUDA graph can add to them.
        """
        for name, value in values.items():
            if name not in self.sums:
                self.sums[name] = torch.zeros([], device=self.device)
                self.counts[name] = torch.zeros([], device=self.device)
            self.sums[name] += value.detach().sum(dtype=torch.float32)
            self.counts[name] += value.numel()
            self.phases[name] = self.clock.current

    def _forget(self, name: str) -> None:
        self.sums[name].zero_()
        self.counts[name].zero_()

    def _recorded(self) -> dict[str, tuple[float, int]]:
        """Return sum and count of what was recorded since the last tick, in one copy from the device."""
        if not self.sums:
            return {}
        sums, counts = (torch.stack(list(each.values())).tolist() for each in (self.sums, self.counts))
        found = zip(self.sums, sums, map(round, counts), strict=True)
        return {name: (total, count) for name, total, count in found if count}

    def due_diagnostics(self, nimg: int) -> Diagnostics | None:
        """Return what compares gradients, once in each tick; None before and after.

        In its second half, since student and teacher may be equal at the start.
        """
        middle = (self.tick_nimg // self.interval_nimg + 0.5) * self.interval_nimg
        found = self.diagnostics
        return found if found is not None and found.due and nimg >= middle else None

    def find_not_finite(self, step: int, *, at_tick: bool) -> list[Alarm]:
        """Return an alarm for each recorded value that is not finite, and forget the value.

        Sums over all ranks first if a tick is due. On a device that needs a synchronization, looks only then
        and every `CHECK_EVERY` steps.
        """
        if at_tick:
            self.is_reduced = True
            tensors = [each[name] for name in sorted(self.sums) for each in (self.sums, self.counts)]
            self.group.all_reduce_sum(tensors, f"the log (step {step})")
        elif self.device.type != "cpu" and step % CHECK_EVERY:
            return []
        alarms = []
        for name, (value, _) in self._recorded().items():
            # A rank must not stop by itself: the others would wait.
            is_shared = self.group.world_size == 1 or self.is_reduced or name.startswith("grad_norm")
            if is_shared and not math.isfinite(value):
                self._forget(name)
                what = f"{name} became {value} in {self.phases[name]}"
                alarms.append(Alarm("not-finite", what, {name: str(value)}, True))
        return alarms

    def is_finite(self) -> bool:
        """Return whether everything that was recorded in this tick is finite, on this rank."""
        return all(math.isfinite(total) for total, _ in self._recorded().values())

    def read(self, state: TrainState) -> dict[str, Any]:
        """Return the numbers of the tick that ends here, and begin the next one."""
        numbers: dict[str, Any] = {name: total / count for name, (total, count) in self._recorded().items()}
        if self.diagnostics is not None:
            with self.phase("diagnose"):
                numbers |= self.diagnostics.read(state)
        seconds = time.perf_counter() - self.started
        numbers["img_per_sec"] = (state.nimg - self.started_nimg) / seconds
        numbers["sec_per_phase"] = self.clock.read()
        numbers["memory_gib"] = peak_memory_gib(self.device)
        self.tick_nimg = state.nimg
        self.restart(state.nimg)
        return numbers


class PhaseClock:
    """Seconds per phase: wall time on the CPU, events on CUDA (so that measuring makes nothing wait)."""

    def __init__(self, device: torch.device) -> None:
        self.on_cuda = device.type == "cuda"
        self.marks: list[tuple[str, str, Any, Any]] = []  # phase, the one around it, start and end
        self.open: list[str] = []

    @property
    def current(self) -> str:
        """The innermost phase that is being timed."""
        return self.open[-1] if self.open else ""

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a block; a block inside another belongs to the inner name only.

        A block inside a CUDA graph is a part of what is around it.
        """
        if self.on_cuda and torch.cuda.is_current_stream_capturing():
            yield
            return
        start = self._now()
        self.open.append(name)
        try:
            yield
        finally:
            self.open.pop()
            self.marks.append((name, self.current, start, self._now()))

    def read(self) -> dict[str, float]:
        """Return seconds per phase since the last call."""
        if self.on_cuda:
            torch.cuda.synchronize()
        seconds: dict[str, float] = {}
        for name, outer, start, end in self.marks:
            spent = start.elapsed_time(end) / 1000 if self.on_cuda else end - start
            seconds[name] = seconds.get(name, 0.0) + spent
            if outer:
                seconds[outer] = seconds.get(outer, 0.0) - spent
        self.marks = []
        return seconds

    def _now(self) -> Any:
        if not self.on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory so far: what torch holds on CUDA, else of this process (0 if unknown)."""
    if device.type == "cuda":
        # Not what is allocated: the pool of CUDA graphs counts as free between captures.
        return torch.cuda.max_memory_reserved(device) / 2**30
    if sys.platform == "win32":
        return 0.0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
