"""What is measured while training: losses, times, the tick, and whether to stop."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

import torch

from finetune.distributed import SINGLE, ProcessGroup
from finetune.train.diagnose import Diagnostics
from finetune.train.guard import Alarm, Diverged
from finetune.train.state import TrainState

CHECK_EVERY = 16  # steps between looks for non-finite losses on a device that would have to be waited for


class Watch:
    """Collects numbers between ticks, calls `on_tick(state, numbers)` on each, and stops where a loss is not
    finite.

    Times are seconds spent in each phase; nested phases are subtracted from the one around them.
    """

    def __init__(
        self, device: torch.device, tick_nimg: float, on_tick: Callable[[TrainState, dict], None],
        on_step: Callable[[TrainState], None] = lambda state: None,
        diagnostics: Diagnostics | None = None,
        on_divergence: Callable[[Alarm, TrainState], None] | None = None,
        processes: ProcessGroup = SINGLE,
    ) -> None:  # fmt: skip
        self.processes = processes
        self.step = 0  # for messages
        self.on_divergence = on_divergence
        self.device = device
        self.diagnostics = diagnostics
        self.tick_nimg = tick_nimg
        self.on_tick = on_tick
        self.on_step = on_step
        self.heard: int | None = None  # the signal that asked this process to stop
        self.stop_signal: int | None = None  # the one that all processes stop for
        self.next_tick_nimg = tick_nimg
        self.tick_started = time.perf_counter()
        self.tick_nimg_start = 0
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, int] = {}
        self.added_up = False
        self.phase_of: dict[str, str] = {}
        self.clock = PhaseClock(device)

    def phase(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Charge the time of a `with` block to the phase `name`."""
        return self.clock.phase(name)

    def wants_gradients(self, state: TrainState) -> Diagnostics | None:
        """What compares gradients, once in the second half of each tick (student and teacher begin equal)."""
        middle = self.next_tick_nimg - self.tick_nimg / 2
        seen = self.diagnostics
        return seen if seen is not None and seen.due and state.nimg >= middle else None

    @property
    def phase_name(self) -> str:
        """The phase that is being timed."""
        return self.clock.open[-1] if self.clock.open else ""

    def record(self, phase: str, **values: torch.Tensor) -> None:
        """Add values (any shape) to the averages of this tick."""
        for name, value in values.items():
            value = value.detach()
            self.sums[name] = self.sums.get(name, 0.0) + value.sum(dtype=torch.float32)
            self.counts[name] = self.counts.get(name, 0) + value.numel()
            self.phase_of[name] = phase

    def end_of_step(self, state: TrainState) -> None:
        """Look for trouble, report progress and, when it is time, the tick."""
        self.on_step(state)
        if self.device.type == "cpu" or state.step % CHECK_EVERY == 0:
            self.check_finite(state)
        if state.nimg >= self.next_tick_nimg:
            self.tick(state)

    def check_finite(self, state: TrainState) -> None:
        """Hand a recorded value that is not finite to `on_divergence`; without one, raise Diverged."""
        for name, total in list(self.sums.items()):
            if not self.is_shared(name):
                continue  # one process alone must not turn back: the others would wait for it
            if not bool(torch.isfinite(total)):
                value = float(total)
                del self.sums[name], self.counts[name]  # told once
                what = f"{name} became {value} in {self.phase_of[name]}"
                if self.on_divergence is None:
                    raise Diverged("not-finite", f"{what} at {state.nimg / 1000:g} kimg.", {name: value})
                self.on_divergence(Alarm("not-finite", what, {name: str(value)}, True), state)

    def is_finite(self) -> bool:
        """Whether everything that was recorded in this tick is finite, in this process."""
        return all(bool(torch.isfinite(torch.as_tensor(total))) for total in self.sums.values())

    def is_shared(self, name: str) -> bool:
        """Whether all processes see the same sum: of gradients always, of the rest once it is added up."""
        return self.processes.world_size == 1 or self.added_up or name.startswith("grad_norm")

    def add_up(self) -> None:
        """Make sums and counts those of all processes."""
        self.added_up = True
        if self.processes.world_size == 1 or not self.sums:
            return
        names = sorted(self.sums)
        sums = torch.stack([torch.as_tensor(self.sums[name], device=self.device) for name in names])
        counts = torch.tensor([self.counts[name] for name in names], device=self.device, dtype=torch.float32)
        self.processes.all_reduce_sum([sums, counts], f"the log of step {self.step}")
        self.sums = dict(zip(names, sums.unbind(), strict=True))
        self.counts = dict(zip(names, map(round, counts.tolist()), strict=True))

    def start_at(self, nimg: int) -> None:
        """Begin a tick at `nimg` images, with nothing measured yet."""
        self.sums, self.counts, self.added_up = {}, {}, False
        self.clock.read()
        self.tick_started, self.tick_nimg_start = time.perf_counter(), nimg
        self.next_tick_nimg = (nimg // self.tick_nimg + 1) * self.tick_nimg

    def tick(self, state: TrainState) -> None:
        """Hand out the averages since the last tick and start anew."""
        if state.nimg == self.tick_nimg_start:
            return
        self.add_up()
        self.check_finite(state)
        seconds = time.perf_counter() - self.tick_started
        numbers = {name: float(total) / self.counts[name] for name, total in self.sums.items()}
        if self.diagnostics is not None:
            with self.phase("diagnose"):
                numbers |= self.diagnostics.read(state)
        numbers["img_per_sec"] = (state.nimg - self.tick_nimg_start) / seconds
        numbers["sec_per_phase"] = self.clock.read()
        numbers["memory_gib"] = peak_memory_gib(self.device)
        self.on_tick(state, numbers)
        self.sums, self.counts, self.added_up = {}, {}, False
        self.tick_started = time.perf_counter()
        self.tick_nimg_start = state.nimg
        while self.next_tick_nimg <= state.nimg:
            self.next_tick_nimg += self.tick_nimg

    def is_told_to_stop(self, state: TrainState) -> bool:
        """Whether a signal has reached any of the processes, which all stop after the same step then."""
        self.step = state.step
        heard = self.processes.all_reduce_max(self.heard or 0, f"the beginning of step {state.step}")
        self.stop_signal = heard or None
        return self.stop_signal is not None

    @contextlib.contextmanager
    def stop_on_signals(self) -> Iterator[None]:
        """The first Ctrl-C or SIGTERM finishes the step and ends the loop; a second one ends it at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        signals = (signal.SIGINT, signal.SIGTERM)
        before = [signal.getsignal(number) for number in signals]

        def request(number: int, frame: FrameType | None) -> None:
            if self.heard:
                raise KeyboardInterrupt
            self.heard = number

        for number in signals:
            signal.signal(number, request)
        try:
            yield
        finally:
            for number, handler in zip(signals, before, strict=True):
                signal.signal(number, handler)


class PhaseClock:
    """Seconds per phase: wall time on the CPU, events on CUDA (so that measuring makes nothing wait)."""

    def __init__(self, device: torch.device) -> None:
        self.on_cuda = device.type == "cuda"
        self.marks: list[tuple[str, object, object]] = []
        self.open: list[str] = []
        self.inside: list[tuple[str, str]] = []

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a block; a block inside another belongs to the inner name only."""
        start = self._now()
        self.open.append(name)
        try:
            yield
        finally:
            self.open.pop()
            self.marks.append((name, start, self._now()))
            self.inside.append((name, self.open[-1] if self.open else ""))

    def read(self) -> dict[str, float]:
        """Seconds per phase since the last call."""
        if self.on_cuda:
            torch.cuda.synchronize()
        seconds: dict[str, float] = {}
        for (name, start, end), (_, outer) in zip(self.marks, self.inside, strict=True):
            spent = start.elapsed_time(end) / 1000 if self.on_cuda else end - start  # type: ignore
            seconds[name] = seconds.get(name, 0.0) + spent
            if outer:
                seconds[outer] = seconds.get(outer, 0.0) - spent
        self.marks, self.inside = [], []
        return seconds

    def _now(self) -> object:
        if not self.on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory so far: of the device on CUDA, else of this process (0 where unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":
        return 0.0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
