"""Progress bars, for a number of things and for downloads, on terminals and in notebooks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


@contextlib.contextmanager
def progress_bar(what: str, total: int, *, is_shown: bool = True) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on stderr and give the function `(done, total)` that moves it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    is_disabled = not (is_shown and is_live(console))
    with Progress(*columns, console=console, transient=True, disable=is_disabled) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def is_live(console: Console) -> bool:
    """Return whether a bar can move: on a terminal, or in a notebook with ipywidgets."""
    return console.is_terminal or (console.is_jupyter and find_spec("ipywidgets") is not None)


@contextlib.contextmanager
def download_bar() -> Iterator[tuple[Callable[[str], None], Callable[[int, int | None], None]]]:
    """Give the functions `on_message(sentence)` and `progress(bytes, bytes in all or None)` of a download.

    Nothing is shown, and rich is not loaded, before one of them is called.
    """
    import click

    bar = None

    def on_message(sentence: str) -> None:
        if bar is not None and bar.live.is_started:
            bar.console.print(sentence, highlight=False, markup=False, soft_wrap=True)
        else:
            click.echo(sentence, err=True)

    def progress(done: int, total: int | None) -> None:
        nonlocal bar
        if bar is None:
            bar = _bytes_bar()
            bar.add_task("", total=total)
            bar.start()
        bar.update(bar.task_ids[0], completed=done, total=total)

    try:
        yield on_message, progress
    finally:
        if bar is not None:
            bar.stop()


def _bytes_bar():
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
