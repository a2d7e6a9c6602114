"""Line charts as SVG, without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 400, 190  # with labels, in units of the viewBox
LEFT, RIGHT, TOP, BOTTOM = 50, 14, 8, 24  # margins of the plot area
MAX_POINTS = 400  # drawn of a line; more cannot be told apart at this size
NUM_TICKS = 5  # on an axis
LOG_FROM = 200.0  # largest over smallest value from which a positive quantity is drawn on a log scale

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """One line: x in kimg; `spread` of each point is drawn as a band; `color` and `dash` are indices."""

    name: str
    points: Sequence[Point]
    spread: Sequence[float] = ()
    color: int = 0
    dash: int = 0

    def summary(self) -> str:
        """Describe the line in words, for screen readers and the table below a chart."""
        values = [y for _, y in self.points]
        return (
            f"{self.name}: first {values[0]:.4g}, last {values[-1]:.4g}, "
            f"lowest {min(values):.4g}, highest {max(values):.4g}"
        )


def thin(points: Sequence[Point]) -> list[Point]:
    """Return about MAX_POINTS points at most, with the lowest and highest of each group: peaks stay."""
    if len(points) <= MAX_POINTS:
        return list(points)
    size = math.ceil(len(points) / (MAX_POINTS // 2))
    kept = []
    for start in range(0, len(points), size):
        group = points[start : start + size]
        ends = {group.index(min(group, key=lambda p: p[1])), group.index(max(group, key=lambda p: p[1]))}
        kept += [group[index] for index in sorted(ends)]
    return kept


def ticks(low: float, high: float) -> list[float]:
    """Return round numbers from `low` to `high`, about NUM_TICKS of them."""
    step = 10 ** math.floor(math.log10((high - low) / NUM_TICKS))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= NUM_TICKS)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def line_chart(title: str, lines: Sequence[Line]) -> Markup:
    """Draw lines that have finite points. The script reads the axes from `data-range` and `data-box`."""
    points = [point for line in lines for point in line.points]
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    bands = [(x, y - s, y + s) for line in lines for (x, y), s in zip(line.points, line.spread, strict=False)]
    values = [y for _, y in points] + [each for band in bands for each in band[1:]]
    low, high = min(values), max(values)
    is_log = low > 0 and high / low > LOG_FROM
    if is_log:
        low, high = math.log10(low), math.log10(high)
    if right == left:
        left, right = 0.0, 2 * right or 1.0
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    low, high = low - margin, high + margin

    def at(x: float, y: float) -> tuple[float, float]:
        y = math.log10(max(y, 1e-300)) if is_log else y
        across = LEFT + (x - left) / (right - left) * (WIDTH - LEFT - RIGHT)
        return round(across, 1), round(TOP + (high - y) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    parts = [_axes(left, right, low, high, is_log, at)]
    for line in lines:
        if line.spread:
            band = [(x, y, s) for (x, y), s in zip(line.points, line.spread, strict=True)]
            outline = [at(x, y + s) for x, y, s in band] + [at(x, y - s) for x, y, s in reversed(band)]
            parts.append(f'<polygon class="band c{line.color}" points="{_coordinates(outline)}"/>')
        drawn = [at(x, y) for x, y in thin(line.points)]
        style = f"c{line.color} d{line.dash}"
        if len(drawn) == 1 or line.spread:
            parts += [f'<circle class="{style}" cx="{x}" cy="{y}" r="2.5"/>' for x, y in drawn]
        parts.append(f'<path class="line {style}" d="{_path(drawn)}"/>')
    label = escape(f"{title}. " + "; ".join(line.summary() for line in lines))
    return Markup(
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}" '
        f'data-range="{left:.6g} {right:.6g} {low:.6g} {high:.6g}" data-log="{int(is_log)}" '
        f'data-box="{LEFT} {WIDTH - RIGHT} {HEIGHT - BOTTOM} {TOP} {WIDTH}">' + "".join(parts) + "</svg>"
    )


def _coordinates(points: Sequence[Point]) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in points)


def _path(points: Sequence[Point]) -> str:
    """Return points as the data of a path; it begins again where a rollback went back in time."""
    before = math.inf
    parts = []
    for x, y in points:
        parts.append(f"{'L' if x >= before else 'M'}{x:g},{y:g}")
        before = x
    return "".join(parts)


def _axes(left, right, low, high, is_log, at) -> str:
    """Draw grid lines with their numbers, and the unit of the x axis."""
    if is_log:
        powers = range(math.ceil(low), math.floor(high) + 1)
        across = [10.0**power for power in powers] or [10**low, 10**high]
    else:
        across = ticks(low, high)
    parts = []
    for y in across:
        _, top = at(left, y)
        parts.append(f'<path class="grid" d="M{LEFT} {top}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 4}" y="{top + 3.5}" text-anchor="end">{_number(y)}</text>')
    for x in ticks(left, right):
        along, _ = at(x, 10**low if is_log else low)
        parts.append(f'<text x="{along}" y="{HEIGHT - 8}" text-anchor="middle">{_number(x)}</text>')
    return "".join(parts)


def _number(value: float) -> str:
    return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e")
