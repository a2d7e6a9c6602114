"""Read a run folder, also while a run writes to it, after a crash, and of older versions."""

from __future__ import annotations

import contextlib
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune import run_lock
from finetune.errors import ConfigError
from finetune.resolve import SNAPSHOT
from torch_utils.files import expand_home

PREVIEWS = "preview"
FRAME = re.compile(r"samples-(\d+\.\d{3})\.webp")
SHEET = re.compile(r"fakes(?:-init|(\d{6,}(?:\.\d{3})?))\.png")


@dataclass(frozen=True)
class Frame:
    """Images of the same latents after `kimg`: a sheet of samples and an interpolation strip (or None)."""

    kimg: float
    samples: Path
    strip: Path | None = None


@dataclass(frozen=True)
class RunRecord:
    """The content of a run folder. `about`: data, reasons and origin, as training wrote them at the start."""

    path: Path
    config: dict[str, Any]
    about: dict[str, Any] = field(default_factory=dict)
    log: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    frames: list[Frame] = field(default_factory=list)
    snapshots: dict[float, Path] = field(default_factory=dict)

    @property
    def kimg(self) -> float:
        """Thousands of images seen, as of the last line of the log."""
        return self.log[-1]["kimg"] if self.log else 0.0

    @property
    def total_kimg(self) -> float:
        """Thousands of images of the whole run."""
        return float(self.config.get("kimg") or self.kimg)

    @property
    def is_finished(self) -> bool:
        """Whether all images were seen."""
        return bool(self.log) and self.kimg >= self.total_kimg

    @property
    def seconds_per_kimg(self) -> float:
        """Seconds per thousand images in the last ticks, 0 if nothing was logged."""
        recent = self.log[-6:]
        if len(recent) > 1 and recent[-1]["kimg"] > recent[0]["kimg"]:
            return max(0.0, recent[-1]["sec"] - recent[0]["sec"]) / (recent[-1]["kimg"] - recent[0]["kimg"])
        return 1000 / self.log[-1]["img_per_sec"] if self.log else 0.0

    @property
    def is_running(self) -> bool:
        """Whether a process trains in this folder: its lock file has a heartbeat, and it has not ended."""
        return run_lock.is_held(self.path)


def read_run(path: str | Path) -> RunRecord:
    """Read a run folder. Raises ConfigError if it is none."""
    path = expand_home(path)
    if not path.is_dir():
        what = "is a file, not a run folder" if path.exists() else "no such folder"
        raise ConfigError(f"{path}: {what}. Name a folder that `finetune train` wrote, such as runs/00000-….")
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError
    except (OSError, ValueError):
        inner = sorted(each.parent for each in path.glob("*/config.json"))
        hint = "Name a folder that `finetune train` wrote."
        if inner:
            hint = f"Run folders in it: {', '.join(map(str, inner[-3:]))}"
        raise ConfigError(f"{path}: not a run folder (no readable config.json).", hint=hint) from None
    about: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        about = json.loads((path / "about.json").read_text(encoding="utf-8"))
    snapshots = {float(found[1]): each for each in path.iterdir() if (found := SNAPSHOT.fullmatch(each.name))}
    return RunRecord(
        path,
        config,
        about,
        log=[line for line in read_lines(path / "log.jsonl") if _is_complete(line)],
        events=read_lines(path / "events.jsonl"),
        frames=_frames(path),
        snapshots=dict(sorted(snapshots.items())),
    )


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a JSONL file; without those that are damaged or half-written, [] without a file."""
    lines = []
    with contextlib.suppress(OSError):
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                if isinstance(line := json.loads(text), dict):
                    lines.append(line)
    return lines


def _is_complete(line: dict[str, Any]) -> bool:
    """Return whether a line of the log has the numbers that all curves need."""
    numbers = [line.get(key) for key in ("nimg", "kimg", "sec", "img_per_sec")]
    return all(isinstance(each, (int, float)) and math.isfinite(each) for each in numbers)


def _frames(path: Path) -> list[Frame]:
    """Return the previews of a run, or its image sheets if it has none (runs of older versions)."""
    previews = path / PREVIEWS
    frames = []
    for each in previews.iterdir() if previews.is_dir() else ():
        if found := FRAME.fullmatch(each.name):
            strip = previews / f"strip-{found[1]}.webp"
            frames.append(Frame(float(found[1]), each, strip if strip.is_file() else None))
    if not frames:
        for each in path.iterdir():
            if found := SHEET.fullmatch(each.name):
                frames.append(Frame(float(found[1] or 0), each))
    return sorted(frames, key=lambda frame: frame.kimg)
