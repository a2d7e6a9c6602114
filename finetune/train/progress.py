"""Console output of a run: a live display on a terminal, one plain line per tick elsewhere."""

from __future__ import annotations

import time

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table
from rich.text import Text

from finetune.recipes import Reason
from finetune.report.status import duration, losses, rate
from finetune.train.state import TrainState


class Display:
    """A bar and a line of numbers on a terminal, one plain line per tick elsewhere; use it in a `with` block.

    snap_nimg: images between snapshots, 0 if the next one is not to be shown.
    """

    def __init__(self, console: Console, total_nimg: int, snap_nimg: float = 0.0) -> None:
        self.console = console
        self.total_nimg, self.snap_nimg = total_nimg, snap_nimg
        self.started = self.measured_from = time.perf_counter()
        self.first_nimg = 0
        self.losses = self.memory = ""
        self.live: Live | None = None
        if console.is_terminal and not console.quiet:
            columns = (TextColumn("{task.description}"), BarColumn(20), TaskProgressColumn())
            self.progress = Progress(*columns, console=console)
            self.task = self.progress.add_task("0 kimg", total=total_nimg)
            # One text, so that a narrow terminal cuts off its end and not a piece of each number.
            self.note = Text("starting", no_wrap=True, overflow="ellipsis")
            self.live = Live(Group(self.progress, self.note), console=console, refresh_per_second=4)

    def start_at(self, nimg: int) -> None:
        """Measure rate and time left from here on."""
        self.first_nimg, self.measured_from = nimg, time.perf_counter()
        if self.live is not None:
            self.progress.update(self.task, completed=nimg, description=f"{nimg / 1000:g} kimg")

    def __enter__(self) -> Display:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self.live is not None:
            self.live.stop()

    def step(self, state: TrainState) -> None:
        """Move the bar."""
        if self.live is None:
            return
        nimg, parts = state.nimg, [rate(1 / self._seconds_per_image(state)), self._left(state)]
        if self.memory:
            parts.append(self.memory)
        if self.snap_nimg and (wait := self.snap_nimg - nimg % self.snap_nimg) < self.total_nimg - nimg:
            parts.append(f"snapshot in {duration(wait * self._seconds_per_image(state))}")
        self.note.plain = "  " + " · ".join([*parts, self.losses] if self.losses else parts)
        kimg = f"{nimg / 1000:.2f}/{self.total_nimg / 1000:g} kimg"
        self.progress.update(self.task, completed=nimg, description=kimg)

    def tick(self, state: TrainState, numbers: dict) -> None:
        """Show the averages of a tick."""
        self.losses = losses(numbers)
        if state.augment_pipe is not None:
            self.losses += f" p {state.ada.p:.3f}"
        self.memory = f"{numbers['memory_gib']:.1f} GiB" if numbers.get("memory_gib") else ""
        if self.live is None:
            elapsed = duration(time.perf_counter() - self.started)
            self.print_line(
                f"{state.nimg / 1000:8.2f} kimg  {rate(numbers['img_per_sec']):>12}  {self.memory}  "
                f"{elapsed} elapsed, {self._left(state)}  {self.losses}"
            )

    def _seconds_per_image(self, state: TrainState) -> float:
        return (time.perf_counter() - self.measured_from) / max(1, state.nimg - self.first_nimg)

    def _left(self, state: TrainState) -> str:
        return duration(self._seconds_per_image(state) * max(0, self.total_nimg - state.nimg)) + " left"

    def print_line(self, text: str) -> None:
        """Print one line above the bar; nothing from then on if that fails, while training continues."""
        try:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)
        except (OSError, SystemExit):  # a full disk; a closed pipe, for which rich raises SystemExit
            self.console.quiet = True


def print_reasons(console: Console, reasons: list[Reason]) -> None:
    """Print the table "option · value · why"."""
    table = Table(box=None, pad_edge=False)
    for column in ("option", "value", "why"):
        table.add_column(column, overflow="fold")
    for reason in reasons:
        value = f"{reason.value:g}" if isinstance(reason.value, float) else str(reason.value)
        table.add_row("--" + reason.name.replace("_", "-"), value, reason.why)
    if not console.is_terminal:  # a file or a pipe: wide enough for the names of result files
        console.width = max(console.width, 120)
    console.print(table)
