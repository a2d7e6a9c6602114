"""A run under way: what is saved when, what is told, and what happens when something goes wrong."""

from __future__ import annotations

import contextlib
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.data import build_loader
from finetune.errors import CheckpointError, ConfigError, ExportError, TrainingError
from finetune.train import saved
from finetune.train.diagnose import Diagnostics
from finetune.train.guard import Alarm, Diverged, Guard
from finetune.train.hooks import Display, RunFolder
from finetune.train.loop import train
from finetune.train.measure import Measurements, is_better
from finetune.train.state import TrainState
from finetune.train.watch import Watch

if TYPE_CHECKING:
    from finetune.train.run import Prepared

ROLLBACKS = 3  # in one run
SLOWER = 0.5  # learning rates after a rollback
SETTLED = 3  # half-lives of the average, after which its distance from G means something


@dataclass
class Book:
    """What a run knows about itself besides its weights; it is saved with them."""

    ticks: int = 0
    rollbacks: int = 0
    sec: float = 0.0
    written: dict[str, int] = field(default_factory=dict)  # snapshot -> images seen
    best: dict[str, Any] = field(default_factory=dict)  # metric, value, nimg


class Session:
    """Trains what was prepared. `on_tick(state, numbers)` is called after each line of the log."""

    def __init__(
        self,
        prepared: Prepared,
        folder: RunFolder,
        display: Display,
        on_tick: Callable[[TrainState, dict], None] | None,
    ) -> None:
        self.config, self.state, self.plan = prepared.config, prepared.state, prepared.plan
        self.image_set = prepared.image_set
        self.folder, self.display, self.on_tick = folder, display, on_tick
        self.book = Book()
        self.guard = self.new_guard()
        self.snapshot: Path | None = None
        self.processes = self.plan.processes
        self.measurements = Measurements(
            self.config,
            self.image_set,
            self.plan.device,
            display.say,
            self.processes,
        )
        self.batches = build_loader(
            self.image_set,
            self.plan.batch // self.processes.world_size,
            workers=self.config.workers or 0,
            seed=self.config.seed,
            device=self.plan.device,
            rank=self.processes.rank,
            num_replicas=self.processes.world_size,
        )
        self.watch = Watch(
            self.plan.device,
            (self.config.tick or 1) * 1000,
            self.tick,
            self.step,
            Diagnostics(self.state) if self.processes.is_first else None,
            self.diverged,
            self.processes,
        )
        self.unreadable_elsewhere = 0  # items that other processes had to replace, as of the last tick
        self.started = self.last_save = time.monotonic()  # which no clock that is set can change

    def new_guard(self) -> Guard:
        """A watch-dog that knows nothing yet."""
        return Guard(self.state.nimg + SETTLED * self.plan.ema_nimg)

    def resume(self, content: dict[str, Any]) -> None:
        """Go on where a state was saved; the networks and optimisers are there already.

        Raises ConfigError where the pictures are not those of the run.
        """
        self.book = Book(**content["book"])
        self.folder.written = self.book.written
        self.folder.seconds_before = self.book.sec
        self.folder.drop_later_lines(self.state.nimg)
        self.measurements.start_at(self.state.nimg)
        try:
            self.go_to(content["sampler"])
        except ValueError as error:
            raise ConfigError(
                f"--data {self.config.data}: these are not the pictures of the run: {error}."
            ) from None
        self.watch.start_at(self.state.nimg)

    def go_to(self, sampler: dict[str, Any]) -> None:
        """Go on in the order of pictures where a state was saved. Raises ValueError for another order."""
        self.batches.load_state_dict(sampler)
        self.unreadable_elsewhere = 0
        if not self.processes.is_first:
            self.batches.unreadable = 0  # the first one has what all of them had counted

    def run(self) -> None:
        """Train to the end, or to a signal, and save. Raises TrainingError, Diverged among them."""
        with self.watch.stop_on_signals():
            while True:
                try:
                    train(self.state, self.plan, self.batches, self.watch)
                    self.watch.tick(self.state)
                    break
                except Diverged as error:
                    self.roll_back(error)
            self.save(is_last=True)
        self.batches.close()

    def step(self, state: TrainState) -> None:
        """After every step: move the bar, and save by the clock, which the first process alone looks at."""
        self.display.step(state)
        minutes = self.config.save_every_min
        if not minutes or not self.processes.is_first or state.nimg >= self.plan.total_nimg:
            return
        # What is not finite is not saved. It is not acted on either: all processes will see it together.
        if time.monotonic() - self.last_save > minutes * 60 and self.watch.is_finite():
            self.save_state(is_last=False)

    def tick(self, state: TrainState, numbers: dict[str, Any]) -> None:
        """After every tick: measure, write it down, look for trouble, save."""
        self.book.ticks += 1
        is_end = state.nimg >= self.plan.total_nimg
        if self.measurements.due(state.nimg, is_end) and (found := self.measurements.take(state)) is not None:
            numbers["metrics"] = found
        own = self.batches.unreadable
        if unreadable := self.processes.all_reduce_total(own, f"the log of step {state.step}"):
            numbers["unreadable"] = unreadable
        self.unreadable_elsewhere = unreadable - own
        self.folder.log(state, numbers)
        self.display.tick(state, numbers)
        for alarm in self.guard.look(state, numbers):
            self.diverged(alarm, state) if alarm.is_divergence else self.tell(alarm, state)
        if "metrics" in numbers:
            self.keep_best(numbers["metrics"])
        if self.book.ticks % (self.config.snap or 1) == 0 and not is_end and not self.watch.heard:
            self.save(is_last=False)
        if self.on_tick is not None:
            self.on_tick(state, numbers)

    def tell(self, alarm: Alarm, state: TrainState) -> None:
        """Write an event down and show it."""
        self.folder.event(alarm.kind, state, what=alarm.what, **alarm.numbers)
        self.display.say(f"{state.nimg / 1000:g} kimg: {alarm.what}")

    def diverged(self, alarm: Alarm, state: TrainState) -> None:
        """Act on a divergence as `--on-divergence` says. Raises Diverged, unless it is to be ignored."""
        self.tell(alarm, state)
        if self.config.on_divergence != "ignore":
            raise Diverged(
                alarm.kind, f"{alarm.what.rstrip('.')} at {state.nimg / 1000:g} kimg.", alarm.numbers
            )

    def roll_back(self, error: Diverged) -> None:
        """Return to the last state with slower learning, or raise the error."""
        if self.config.on_divergence != "rollback":
            raise error
        if self.book.rollbacks >= ROLLBACKS:
            error.what += f" {ROLLBACKS} rollbacks did not help."
            raise error
        found = saved.find_state(self.folder.path)
        if found is None:
            raise error
        rollbacks = self.book.rollbacks + 1
        networks = {
            "G": self.state.G,
            "D": self.state.D,
            "G_ema": self.state.G_ema,
            "teacher": self.state.teacher,
        }
        for name, values in found.content["networks"].items():
            networks[name].load_state_dict(values["tensors"])
        saved.restore(self.state, found.content)
        self.go_to(found.content["sampler"])
        saved.restore_random(found.content)
        factor = SLOWER**rollbacks / SLOWER ** found.content["book"]["rollbacks"]
        for optimizer in (self.state.opt_G, self.state.opt_D):
            for group in optimizer.param_groups:
                group["lr"] *= factor
        self.book = replace(Book(**found.content["book"]), rollbacks=rollbacks)
        self.guard = self.new_guard()
        self.watch.start_at(self.state.nimg)
        rates = [optimizer.param_groups[0]["lr"] for optimizer in (self.state.opt_G, self.state.opt_D)]
        self.folder.event("rollback", self.state, number=rollbacks, lr_G=rates[0], lr_D=rates[1])
        self.display.say(
            f"Back to {self.state.nimg / 1000:g} kimg (rollback {rollbacks} of {ROLLBACKS}), learning rates "
            f"now {rates[0]:.3g} and {rates[1]:.3g}"
            f"{' after the warm-up' if self.plan.rate_share('G', self.state.nimg) < 1 else ''}."
        )

    def save(self, *, is_last: bool) -> None:
        """A snapshot, its sheet of pictures, and the state. What fails is a warning, but for the last one."""
        try:
            self.check_space()
            self.folder.write_fakes(self.state.G_ema, self.folder.stem(self.state.nimg))
            self.snapshot = self.folder.write_snapshot(self.state)
        except (ExportError, OSError) as error:
            self.not_saved(error, is_last)
            return
        self.save_state(is_last=is_last)
        self.folder.keep_newest(self.config.keep)
        self.display.say(f"Saved {self.snapshot}") if is_last else None

    def save_state(self, *, is_last: bool) -> None:
        """The state alone, from which the run can go on."""
        if not self.processes.is_first:
            return
        self.last_save = time.monotonic()
        self.book.sec = self.folder.seconds()
        sampler = self.batches.state_dict()
        sampler["unreadable"] += self.unreadable_elsewhere
        try:
            saved.write_state(
                saved.path_for(self.folder.path, self.state.nimg),
                self.state,
                config=self.config.to_json(),
                source=self.folder.source,
                sampler=sampler,
                book={**vars(self.book), "written": dict(self.folder.written)},
            )
        except (ExportError, OSError) as error:
            self.not_saved(error, is_last)

    def not_saved(self, error: Exception, is_last: bool) -> None:
        """A save that failed: a warning while there are more to come, the end of the run at its end."""
        what = getattr(error, "what", None) or str(error)
        with contextlib.suppress(OSError):
            self.folder.event("not-saved", self.state, what=what)
        if is_last:
            raise TrainingError(
                f"The run is over and cannot be saved: {what}",
                hint="What was saved before is whole; make room, and --resume the run folder for the rest.",
            ) from error
        self.display.say(f"{self.state.nimg / 1000:g} kimg: not saved, and training goes on: {what}")

    def check_space(self) -> None:
        """Raise ExportError where the disk has no room for a snapshot and a state."""
        if not self.processes.is_first:
            return
        networks = (self.state.G, self.state.D, self.state.G_ema)
        size = sum(
            each.numel() * each.element_size()
            for network in networks
            for each in network.state_dict().values()
        )
        needed = 4 * size  # the snapshot, and the state: the networks again with two moments for G and D
        free = shutil.disk_usage(self.folder.path).free
        if free < needed:
            raise ExportError(
                f"No space left in {self.folder.path}: a snapshot and its state take about "
                f"{needed / 2**20:,.0f} MiB, {free / 2**20:,.0f} MiB are free."
            )

    def keep_best(self, metrics: dict[str, Any]) -> None:
        """Keep the generator with the best value of the first metric as `network-best.pkl`."""
        name = next(key for key in metrics if key != "num")
        before = self.book.best.get("value") if self.book.best.get("metric") == name else None
        if not is_better(name, metrics[name], before):
            return
        self.book.best = {"metric": name, "value": metrics[name], "nimg": self.state.nimg}
        try:
            self.folder.write_best(self.state)
        except (ExportError, OSError) as error:
            self.not_saved(error, is_last=False)

    @property
    def stopped_by(self) -> int | None:
        """The signal that ended the run early, if one did."""
        return self.watch.stop_signal


def begin(session: Session) -> None:
    """What a new run leaves before its first step: sheets, and a state, so that there is always one."""
    session.folder.write_fakes(session.state.G_ema, "-init")
    session.save_state(is_last=False)


def how_to_go_on(session: Session) -> str:
    """What to say after a run was stopped."""
    word = "SIGTERM" if session.stopped_by == signal.SIGTERM else "Ctrl-C"
    done = f"Stopped by {word} after {session.state.nimg / 1000:g} kimg."
    return f"{done} To go on: finetune train --resume {session.folder.path}"


def check_ours(run_dir: Path) -> None:
    """Raise CheckpointError where a run folder cannot be written to."""
    try:
        probe = run_dir / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise CheckpointError(f"{run_dir} cannot be written to: {error.strerror or error}") from None
