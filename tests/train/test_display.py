"""The console output of a run."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from finetune.report.status import duration, losses, rate
from finetune.train.progress import Display

NUMBERS = {
    "loss_G": 1.25,
    "memory_gib": 3.21,
    "img_per_sec": 0.4,
    "metrics": {"num": 1000, "fid": 12.5, "fid_error": 1},
}


def state_at(nimg):
    return SimpleNamespace(nimg=nimg, augment_pipe=None)


def display_after(seconds, monkeypatch, **settings):
    console = Console(file=io.StringIO(), width=120, color_system=None, **settings)
    now = [0.0]
    monkeypatch.setattr("finetune.train.progress.time.perf_counter", lambda: now[0])
    display = Display(console, 1000, snap_nimg=300)
    display.start_at(0)
    now[0] = seconds
    return display


def test_display_shows_rate_memory_and_next_snapshot(monkeypatch):
    display = display_after(50.0, monkeypatch, force_terminal=True)
    display.tick(state_at(100), NUMBERS)
    display.step(state_at(100))
    expected = "2.0 img/s · 7:30 left · 3.2 GiB · snapshot in 1:40 · G 1.250 fid@1000 12.5"
    assert display.note.plain.strip() == expected
    display.step(state_at(950))  # the end comes first
    assert "snapshot in" not in display.note.plain


def test_display_without_terminal_prints_a_line(monkeypatch):
    display = display_after(250.0, monkeypatch)
    display.tick(state_at(100), NUMBERS)
    line = display.console.file.getvalue()
    assert line == "    0.10 kimg     2.5 s/img  3.2 GiB  4:10 elapsed, 37:30 left  G 1.250 fid@1000 12.5\n"


@pytest.mark.parametrize(
    "value, text", [(0.0, "0.0 img/s"), (0.5, "2.0 s/img"), (1.0, "1.0 img/s"), (812.34, "812.3 img/s")]
)
def test_rate_is_in_seconds_below_one(value, text):
    assert rate(value) == text


@pytest.mark.parametrize(
    "seconds, text", [(0.4, "0:00"), (61, "1:01"), (3661, "1:01:01"), (360_000, "100:00:00")]
)
def test_duration_has_hours_if_needed(seconds, text):
    assert duration(seconds) == text


def test_losses_names_what_is_there():
    assert losses({"loss_D": 0.5, "loss_sd": 0.25}) == "D 0.500 SD 0.250"


def test_display_measures_again_after_a_rollback(monkeypatch):
    display = display_after(50.0, monkeypatch)
    display.start_at(0)
    monkeypatch.setattr("finetune.train.progress.time.perf_counter", lambda: 60.0)
    display.tick(state_at(100), NUMBERS)
    assert "1:00 elapsed, 1:30 left" in display.console.file.getvalue()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), BrokenPipeError()])
def test_display_prints_nothing_more_once_that_fails(error):
    class Full(io.StringIO):
        writes = 0

        def write(self, text):
            Full.writes += 1
            raise error

    display = Display(Console(file=Full()), 1000)
    for _ in range(3):
        display.print_line("0.10 kimg")
    assert Full.writes == 1 and display.console.quiet
