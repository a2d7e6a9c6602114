"""Format the state of a run for the progress display, `finetune watch` and the page."""

from __future__ import annotations

from typing import Any


def duration(seconds: float) -> str:
    """Return seconds as `h:mm:ss` or `m:ss`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def rate(img_per_sec: float) -> str:
    """Return images per second, or seconds per image below one."""
    return (
        f"{img_per_sec:.1f} img/s" if img_per_sec >= 1 or not img_per_sec else f"{1 / img_per_sec:.1f} s/img"
    )


def losses(line: dict[str, Any]) -> str:
    """Return the losses of a line of the log and, if it has them, metrics."""
    shown = {"G": "loss_G", "D": "loss_D", "SD": "loss_sd"}
    parts = [f"{name} {line[key]:.3f}" for name, key in shown.items() if key in line]
    return " ".join([*parts, *([metrics(line)] if line.get("metrics") else [])])


def metrics(line: dict[str, Any]) -> str:
    """Return the metrics of a line of the log with their number of images: `fd-effnet@1000 432.1`."""
    found = line.get("metrics") or {}
    return " ".join(
        f"{name}@{found.get('num')} {value:.4g}" for name, value in found.items() if is_metric(name)
    )


def is_metric(name: str) -> bool:
    """Return whether an entry of `metrics` in the log is a metric, and not something that belongs to one."""
    return name not in ("kimg", "num", "sec") and not name.endswith(("_spread", "_error"))
