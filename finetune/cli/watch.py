"""`finetune watch`: follow a run from another terminal."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from finetune.cli.options import LocalPath

if TYPE_CHECKING:
    from finetune.report import RunRecord

POLL_SEC = 2.0
SPARK = "▁▂▃▄▅▆▇█"
CURVES = {
    "loss G": "loss_G", "loss D": "loss_D", "distance to teacher": "loss_sd", "D sign, real": "sign_real",
    "D sign, fake": "sign_fake", "p": "p", "images/s": "img_per_sec", "memory, GiB": "memory_gib",
}  # fmt: skip


@click.command("watch", short_help="Follow a run from another terminal: progress, curves, events.")
@click.argument("run", metavar="RUN", type=LocalPath(path_type=Path))
def command(run: Path) -> None:
    """Follow a run from another terminal or over ssh, until it ends or Ctrl-C.

    Only reads the run folder. If the output is not a terminal, prints one line per tick and every event.
    """
    from rich.console import Console

    from finetune.report import read_run

    console = Console(highlight=False)
    record = read_run(run)
    try:
        if console.is_terminal:
            record = follow_live(console, record)
        else:
            record = follow_lines(record)
    except KeyboardInterrupt:
        return  # the usual way to end it
    if not record.is_finished:
        from finetune.report import continue_command

        click.echo(f"The run has stopped writing at {record.kimg:g} of {record.total_kimg:g} kimg.")
        click.echo(f"To resume: {continue_command(record.path)}")


def follow_live(console: Any, record: RunRecord) -> RunRecord:
    """Show the state of a run on a terminal until it ends."""
    from rich.live import Live

    from finetune.report import read_run

    with Live(panel(record, console.width), console=console, auto_refresh=False) as live:
        while record.is_running:
            time.sleep(POLL_SEC)
            record = read_run(record.path)
            live.update(panel(record, console.width), refresh=True)
    return record


def follow_lines(record: RunRecord) -> RunRecord:
    """Print the lines of the log and the events as they come, until the run ends."""
    from finetune.report import read_run

    num_lines = num_events = 0
    while True:
        for line in record.log[num_lines:]:
            click.echo(line_of(record, line))
        for event in record.events[num_events:]:
            click.echo(f"{event.get('nimg', 0) / 1000:8.2f} kimg  {event.get('what') or event.get('event')}")
        num_lines, num_events = len(record.log), len(record.events)
        if not record.is_running:
            return record
        time.sleep(POLL_SEC)
        record = read_run(record.path)


def line_of(record: RunRecord, line: dict[str, Any]) -> str:
    """Return a line of the log as text, shorter than training prints it."""
    from finetune.report.status import duration, losses, rate

    return (
        f"{line['kimg']:8.2f} kimg  {rate(line.get('img_per_sec', 0.0)):>12}  "
        f"{duration(line['sec'])} elapsed  {losses(line)}"
    )


def panel(record: RunRecord, width: int) -> Any:
    """Return what the terminal shows: bar, newest numbers with their history, newest events."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    from finetune.report.status import duration, metrics, rate

    left = duration((record.total_kimg - record.kimg) * record.seconds_per_kimg) if record.log else "?"
    state = "finished" if record.is_finished else f"{left} left" if record.is_running else "stopped"
    speed = f" · {rate(1000 / record.seconds_per_kimg)}" if record.seconds_per_kimg else ""
    head = f"{record.path.name}: {record.kimg:g} of {record.total_kimg:g} kimg · {state}{speed}"
    table = Table(box=None, pad_edge=False, show_header=False)
    for name, key in CURVES.items():
        values = [line[key] for line in record.log if isinstance(line.get(key), (int, float))]
        if values:
            table.add_row(name, f"{values[-1]:.4g}", sparkline(values, max(10, min(60, width - 36))))
    texts = [
        f"metrics at {line['kimg']:g} kimg: {metrics(line)}" for line in record.log if line.get("metrics")
    ][-1:]
    texts += [
        f"{event.get('nimg', 0) / 1000:g} kimg: {event.get('what') or event.get('event')}"
        for event in record.events[-4:]
    ]
    texts.append(f"page: {record.path / 'report.html'}")
    # Padding ends the line, which a bar does not.
    bar = Padding(ProgressBar(record.total_kimg or 1, record.kimg, width=min(60, width)), 0)
    return Group(Text(head), bar, table, *(Text(text, overflow="fold") for text in texts))


def sparkline(values: Sequence[float], width: int) -> str:
    """Return a curve as at most `width` block characters, averages if there are more values."""
    size = -(-len(values) // width)
    means = [sum(part) / len(part) for i in range(0, len(values), size) if (part := values[i : i + size])]
    low, high = min(means), max(means)
    scale = (len(SPARK) - 1) / (high - low) if high > low else 0.0
    return "".join(SPARK[round((value - low) * scale)] for value in means)
