"""Build the page of one run, or of several side by side, from a Jinja template."""

from __future__ import annotations

import base64
import functools
import io
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.errors import ConfigError
from finetune.options import OPTIONS
from finetune.report.commands import continue_command, snapshot_commands
from finetune.report.curves import charts_of, label_of
from finetune.report.read import Frame, RunRecord, read_run
from finetune.report.status import duration, metrics
from finetune.version import __version__
from torch_utils.files import atomic_write

MAX_FRAMES = 50  # of a run on the page; more are left out evenly
MAX_FRAME_BYTES = 3_000_000  # of all frames of a run, so that its page stays below 5 MB
MAX_EVENTS = 200
MAX_RUNS = 8
SHEET_SIDE = 1024  # pixels
RELOAD_SECONDS = 30


def write_report(
    folders: Sequence[str | Path], out: str | Path | None = None, *, is_running: bool | None = None
) -> Path:
    """Write the page of the runs in `folders` and return its path, `report.html` in the folder of one run.

    is_running: whether the page reloads itself; by default, if the log of a run is fresh. Raises ConfigError
    if a folder is no run, WriteError if the page cannot be written.
    """
    if not 1 <= len(folders) <= MAX_RUNS:
        raise ConfigError(f"{len(folders)} runs: a page shows 1 to {MAX_RUNS} of them. Name fewer folders.")
    runs = [read_run(folder) for folder in folders]
    path = Path(out) if out else runs[0].path / "report.html" if len(runs) == 1 else Path("report.html")
    if is_running is None:
        is_running = any(run.is_running for run in runs)
    with atomic_write(path) as stream:
        stream.write(render(runs, is_running).encode())
    return path


def render(runs: Sequence[RunRecord], is_running: bool) -> str:
    """Return the page as HTML, with everything it needs inside."""
    template, texts = _template()
    names = list(dict.fromkeys(name for run in runs for name in run.config))
    return template.render(
        title=runs[0].path.resolve().name if len(runs) == 1 else f"{len(runs)} runs",
        runs=[_shown(run, number, len(runs), is_running) for number, run in enumerate(runs)],
        charts=charts_of(runs),
        options=[_option(name, runs) for name in names],
        frames=[[_encoded(frame) for frame in _spread_out(run.frames)] for run in runs],
        reload_seconds=RELOAD_SECONDS if is_running else 0,
        written=int(time.time()),
        written_text=time.strftime("%Y-%m-%d %H:%M"),
        version=__version__,
        **texts,
    )


@functools.cache  # a run keeps its template, even if the package is updated meanwhile
def _template() -> tuple[Any, dict[str, str]]:
    """Return the template of the page, and its style and script by name."""
    import jinja2

    folder = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    texts = {name: (folder / f"page.{name}").read_text(encoding="utf-8") for name in ("css", "js")}
    return environment.get_template("page.html"), texts


def _shown(run: RunRecord, number: int, num_runs: int, is_running: bool) -> dict[str, Any]:
    """Return what the template shows of one run."""
    state = "finished" if run.is_finished else "running" if is_running and run.is_running else "stopped"
    left = (run.total_kimg - run.kimg) * run.seconds_per_kimg
    sheets = {
        "generated": _newest(run.path, "fakes[0-9]*.png") or _newest(run.path, "fakes-init.png"),
        "real": _newest(run.path, "reals.png"),
        "copies": _newest(run.path, "memorization-*.png"),
    }
    recommended = run.about.get("recommended") or {}
    snapshot = run.path / recommended.get("file", "") if recommended else None
    if snapshot is None or not snapshot.is_file():
        snapshot = list(run.snapshots.values())[-1] if run.snapshots else None
    shown = run.path.resolve()
    longer = None if not run.is_finished else 2 * run.total_kimg
    return {
        "label": label_of(run, number) if num_runs > 1 else "",
        "name": shown.name,
        "path": str(shown),
        "state": state,
        "kimg": run.kimg,
        "total_kimg": run.total_kimg,
        "left": duration(left) if state == "running" and run.log else "",
        "taken": duration(run.log[-1]["sec"]) if run.log else "",
        "metrics": next((metrics(line) for line in reversed(run.log) if line.get("metrics")), ""),
        "recommended": recommended,
        "snapshot": snapshot,
        "events": [_event(event) for event in run.events[: -MAX_EVENTS - 1 : -1]],
        "num_events": len(run.events),
        "data": run.about.get("data") or {},
        "notes": run.about.get("notes") or [],
        "lineage": _lineage(run.about.get("source")),
        "device": run.about.get("device", ""),
        "started": run.about.get("started", ""),
        "version": run.about.get("finetune", ""),
        "sheets": {name: _webp(path) if path else "" for name, path in sheets.items()},
        "continue": continue_command(shown, longer),
        "commands": snapshot_commands(run, snapshot.resolve()) if snapshot else [],
    }


def _event(event: dict[str, Any]) -> dict[str, Any]:
    """Return an event with its numbers as text if it has no sentence of its own."""
    rest = {key: value for key, value in event.items() if key not in ("event", "time", "nimg", "step")}
    what = rest.get("what") or ", ".join(f"{key} {value}" for key, value in rest.items())
    kind, kimg = event.get("event", ""), event.get("nimg", 0) / 1000
    return {"kind": kind, "kimg": kimg, "what": what, "time": event.get("time", "")}


def _option(name: str, runs: Sequence[RunRecord]) -> dict[str, Any]:
    """Return an option with its value in each run, and the reason in the first run that has one."""
    values = [run.config.get(name, "–") for run in runs]
    whys = []
    for run in runs:
        reason = run.about.get("reasons", {}).get(name, {})
        is_same = reason.get("value") == run.config.get(name)
        is_default = name in OPTIONS and run.config.get(name) == OPTIONS[name].default
        why = reason.get("why", "default" if is_default else "user-specified")
        whys.append(why if is_same or not reason else "changed on resume")
    return {
        "flag": "--" + name.replace("_", "-"),
        "values": ["–" if value in ("", None) else value for value in values],
        "why": whys[0] if len(set(whys)) == 1 else " / ".join(filter(None, whys)),
        "differs": len({json.dumps(value) for value in values}) > 1,
    }


def _lineage(source: Any) -> list[dict[str, Any]]:
    """Return the checkpoints that a run descends from, the nearest first."""
    lineage = []
    while isinstance(source, dict):
        license = source.get("licence") or "not stated in the file"  # codespell:ignore licence
        lineage.append(
            {
                "source": source.get("source") or "unknown",
                "license": license,
                "sha256": source.get("sha256") or "",
                "nimg": source.get("nimg") or 0,
            }
        )
        source = source.get("parent")
    return lineage


def _spread_out(frames: Sequence[Frame]) -> list[Frame]:
    """Return the frames that a page has room for, evenly spread, the first and the last among them."""
    if len(frames) <= 2:
        return list(frames)
    files = [path for frame in frames for path in (frame.samples, frame.strip) if path]
    total = sum(path.stat().st_size for path in files if path.suffix == ".webp")
    fitting = int(MAX_FRAME_BYTES / (total / len(frames))) if total else MAX_FRAMES
    count = max(2, min(len(frames), MAX_FRAMES, fitting))
    return [frames[round(index * (len(frames) - 1) / (count - 1))] for index in range(count)]


def _encoded(frame: Frame) -> dict[str, Any]:
    is_preview = frame.samples.suffix == ".webp"
    samples = _data_uri(frame.samples.read_bytes()) if is_preview else _webp(frame.samples, 512)
    return {
        "kimg": frame.kimg,
        "samples": samples,
        "strip": _data_uri(frame.strip.read_bytes()) if frame.strip else "",
    }


def _newest(folder: Path, pattern: str) -> Path | None:
    """Return the file of the most kimg among those that match, None without one."""

    def kimg(path: Path) -> list[float]:
        return [float(number) for number in re.findall(r"\d+(?:\.\d+)?", path.stem)]

    return max(folder.glob(pattern), key=kimg, default=None)


def _webp(path: Path, side: int = SHEET_SIDE) -> str:
    """Return an image file as a WebP data URI of at most `side` pixels, '' if it cannot be read."""
    from PIL import Image

    stream = io.BytesIO()
    try:
        with Image.open(path) as image:
            image.thumbnail((side, side))
            image.convert("RGBA" if image.mode == "RGBA" else "RGB").save(
                stream, "WEBP", quality=80, method=3
            )
    except (OSError, ValueError):
        return ""
    return _data_uri(stream.getvalue())


def _data_uri(content: bytes) -> str:
    return "data:image/webp;base64," + base64.b64encode(content).decode("ascii")
