"""Choose the curves of the page from the lines of the log."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from finetune.report.charts import Line, line_chart
from finetune.report.read import RunRecord
from finetune.report.status import is_metric

NUM_COLORS = 8


@dataclass(frozen=True)
class Chart:
    """A chart of the page: its legend as (name, color, dash), and a sentence on how to read it."""

    title: str
    note: str
    svg: Markup
    legend: list[tuple[str, int, int]]
    values: list[str]


# title, keys of the log with their names, how to read it
CURVES: tuple[tuple[str, dict[str, str], str], ...] = (
    (
        "Losses",
        {"loss_G": "G", "loss_D": "D"},
        "They level off in a good run; they do not measure image quality.",
    ),
    (
        "Scores of D",
        {"score_real": "real", "score_fake": "fake"},
        "Lines that keep drifting apart: D overfits or overpowers G.",
    ),
    (
        "Mean sign of D",
        {"sign_real": "real", "sign_fake": "fake"},
        "1 and -1: D separates real and fake perfectly and G learns little.",
    ),
    (
        "Augmentation probability p",
        {"p": "p"},
        "ADA raises p while D overfits; 1 is its limit.",
    ),
    ("R1 penalty", {"r1_penalty": "R1"}, "If it keeps growing, use a larger --gamma."),
    ("Path length", {"path_length": "path length"}, "Levels off early; jumps indicate divergence."),
    (
        "Distance to the teacher",
        {"loss_sd": "distance"},
        "Rises and levels off; ten times the largest of the last ten ticks is divergence.",
    ),
    (
        "Distillation weight λ",
        {"sd_weight": "λ"},
        "Set by --sd-weight auto:; follows the two gradient norms.",
    ),
    (
        "Gradient cosine",
        {"sd_cosine": "cosine"},
        "Distillation against adversarial gradient: below 0 they oppose each other.",
    ),
    (
        "Distance of G from G_ema",
        {"weight_distance": "relative distance"},
        "Of the weights. Falls as learning slows; grows if --glr is too large.",
    ),
)
METRIC_NOTES = {
    "precision": "Higher is better: images look like the data.",
    "recall": "Higher is better: the data is covered.",
}
LOWER = "Lower is better."
SHARED = "Compare only runs with equal --metrics-num."


def charts_of(runs: Sequence[RunRecord]) -> list[Chart]:
    """Return the charts for which the logs have numbers: metrics first, then training, then the machine."""
    names = {name: None for run in runs for line in run.log for name in line.get("metrics", {})}
    charts = []
    for name in names:
        if not is_metric(name):
            continue
        note = METRIC_NOTES.get(name.split("-")[0], LOWER)
        lines = [_metric(run, name, color) for color, run in enumerate(runs)]
        note += " Band: 95 % interval." if any(line.spread for line in lines) else ""
        note += f" {SHARED}" if len(runs) > 1 else ""
        charts.append(_chart(name, note, runs, [[line] for line in lines]))
    for title, keys, note in CURVES:
        lines_of = [[_line(run, key, name) for key, name in keys.items()] for run in runs]
        charts.append(_chart(title, note, runs, lines_of))
    note = "All phases together." if len(runs) > 1 else "By phase of a step."
    charts.append(_chart("Seconds per kimg", note, runs, [_phases(run, len(runs)) for run in runs]))
    rates = [[_line(run, "img_per_sec", "rate")] for run in runs]
    charts.append(_chart("Images per second", "Without metrics, snapshots and previews.", runs, rates))
    note = "Peak so far: of the GPU, or of the process on a CPU."
    charts.append(_chart("Memory (GiB)", note, runs, [[_line(run, "memory_gib", "memory")] for run in runs]))
    return [chart for chart in charts if chart is not None]


def _chart(title: str, note: str, runs: Sequence[RunRecord], lines_of: list[list[Line]]) -> Chart | None:
    """Give lines their colors: by line in one run, by run among several."""
    lines = []
    for number, (run, own) in enumerate(zip(runs, lines_of, strict=True)):
        for index, line in enumerate(own):
            if not line.points:
                continue
            if len(runs) == 1:
                lines.append(Line(line.name, line.points, line.spread, index % NUM_COLORS, 0))
            else:
                name = label_of(run, number) + (f" · {line.name}" if len(own) > 1 else "")
                lines.append(Line(name, line.points, line.spread, number % NUM_COLORS, index % 4))
    if not lines:
        return None
    legend = [(line.name, line.color, line.dash) for line in lines]
    return Chart(title, note, line_chart(title, lines), legend, [line.summary() for line in lines])


def label_of(run: RunRecord, number: int) -> str:
    """Return a short name for a run among several: its letter and the number of its folder."""
    return f"{chr(ord('A') + number % 26)} ({run.path.resolve().name.split('-')[0]})"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _line(run: RunRecord, key: str, name: str) -> Line:
    return Line(name, [(line["kimg"], line[key]) for line in run.log if _is_number(line.get(key))])


def _metric(run: RunRecord, name: str, color: int) -> Line:
    """Return a metric with its 95 % interval (two standard errors), if its error is known."""
    found = [
        (line["kimg"], line["metrics"]) for line in run.log if _is_number(line.get("metrics", {}).get(name))
    ]
    points = [(kimg, metrics[name]) for kimg, metrics in found]
    spread = [2 * metrics.get(f"{name}_error", 0.0) for _, metrics in found]
    return Line(name, points, spread if any(spread) else ())


def _phases(run: RunRecord, num_runs: int) -> list[Line]:
    """Return seconds per kimg of each phase; among several runs, of all phases together."""
    seconds: dict[str, list[tuple[float, float]]] = {}
    before = 0.0
    for line in run.log:
        phases, kimg = line.get("sec_per_phase", {}), line["kimg"] - before
        before = line["kimg"]
        if kimg <= 0:
            continue
        if num_runs > 1:
            phases = {"all phases": sum(phases.values())}
        for name, value in phases.items():
            seconds.setdefault(name, []).append((line["kimg"], value / kimg))
    return [Line(name, points) for name, points in seconds.items()]
