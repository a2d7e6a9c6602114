"""Console output of a run: a progress bar on a terminal, one plain line per tick elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from finetune.metrics.evaluate import names_in
from finetune.recipes import Reason
from finetune.train.state import TrainState


class Display:
    """A progress bar on a terminal, one plain line per tick elsewhere; use it in a `with` block."""

    def __init__(self, console: Console, total_nimg: int) -> None:
        self.console = console
        self.first_nimg = 0
        self.total_nimg = total_nimg
        self.started = time.perf_counter()
        self.losses = ""
        self.progress: Progress | None = None
        if console.is_terminal and not console.quiet:
            # One text column, so that a narrow terminal cuts off its end and not a piece of each number.
            columns = (TextColumn("{task.description}"), BarColumn(10), TextColumn("{task.fields[note]}"))
            self.progress = Progress(*columns, console=console)
            self.task = self.progress.add_task("0 kimg", total=total_nimg, note="starting")

    def start_at(self, nimg: int) -> None:
        """Measure rate and time left from here on."""
        self.first_nimg, self.started = nimg, time.perf_counter()
        if self.progress is not None:
            self.progress.update(self.task, completed=nimg, description=f"{nimg / 1000:g} kimg")

    def __enter__(self) -> Display:
        if self.progress is not None:
            self.progress.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self.progress is not None:
            self.progress.stop()

    def step(self, state: TrainState) -> None:
        """Move the bar."""
        if self.progress is not None:
            seconds = time.perf_counter() - self.started
            note = (
                f"{(state.nimg - self.first_nimg) / seconds:.1f} img/s · {self._left(state)} · {self.losses}"
            )
            kimg = f"{state.nimg / 1000:.2f}/{self.total_nimg / 1000:g} kimg"
            self.progress.update(self.task, completed=state.nimg, description=kimg, note=note)

    def tick(self, state: TrainState, numbers: dict) -> None:
        """Show the averages of a tick."""
        self.losses = _losses(numbers, state)
        if self.progress is None:
            self.say(
                f"{state.nimg / 1000:8.2f} kimg  {numbers['img_per_sec']:6.1f} img/s  "
                f"{_duration(time.perf_counter() - self.started)} gone, {self._left(state)}  {self.losses}"
            )

    def _left(self, state: TrainState) -> str:
        seconds = time.perf_counter() - self.started
        done = max(1, state.nimg - self.first_nimg)
        return _duration(seconds / done * max(0, self.total_nimg - state.nimg)) + " left"

    def say(self, text: str) -> None:
        """Print one line above the bar."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def _losses(numbers: dict, state: TrainState) -> str:
    shown = {"G": "loss_G", "D": "loss_D", "SD": "loss_sd"}
    parts = [f"{name} {numbers[key]:.3f}" for name, key in shown.items() if key in numbers]
    metrics = numbers.get("metrics", {})
    parts += [
        f"{name}@{metrics['num']} {metrics[name]:.4g}"
        for name in names_in(metrics)
    ]
    return " ".join([*parts, f"p {state.ada.p:.3f}"] if state.augment_pipe is not None else parts)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def print_reasons(console: Console, title: str, reasons: list[Reason]) -> None:
    """Print the table "option · value · why"."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in ("option", "value", "why"):
        table.add_column(column, overflow="fold")
    for reason in reasons:
        value = f"{reason.value:g}" if isinstance(reason.value, float) else str(reason.value)
        table.add_row("--" + reason.name.replace("_", "-"), value, reason.why)
    console.print(table)
