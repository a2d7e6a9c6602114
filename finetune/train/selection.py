"""Which snapshot of a run to use: the best by a metric, and whether training has passed it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.metrics.evaluate import HIGHER_IS_BETTER
from finetune.report.status import is_metric
from finetune.train.divergence import Alarm
from finetune.train.run_dir import BEST
from finetune.train.state import RunCounters

CLEAR = 2.0  # standard errors of a difference that count as one
PATIENCE = 3  # measurements in a row that are clearly worse than the best


@dataclass(frozen=True)
class Recommendation:
    """The snapshot of a run to use, the images seen at it, and why (printed after its name)."""

    path: Path
    nimg: int
    why: str


def measurement(metrics: dict[str, Any], nimg: int) -> dict[str, Any]:
    """Return the first metric of a measurement with its standard error, as `RunCounters` keeps it."""
    name = next(filter(is_metric, metrics))
    return {"metric": name, "value": metrics[name], "error": metrics.get(f"{name}_error", 0.0), "nimg": nimg}


def is_better(found: dict[str, Any], best: dict[str, Any]) -> bool:
    """Return whether a measurement beats the best so far: any does if there is none of the same metric."""
    return best.get("metric") != found["metric"] or worsening(best, found) > 0


def is_clearly_worse(found: dict[str, Any], best: dict[str, Any]) -> bool:
    """Return whether a measurement is worse than the best by two standard errors of the difference.

    Without standard errors (KID, recall), no measurement is.
    """
    error = math.hypot(found["error"], best["error"])
    return error > 0 and worsening(found, best) > CLEAR * error


def worsening(found: dict[str, Any], than: dict[str, Any]) -> float:
    """Return how much worse one measurement is than another, in units of the metric."""
    difference = found["value"] - than["value"]
    return -difference if found["metric"].startswith(HIGHER_IS_BETTER) else difference


def follow(counters: RunCounters, found: dict[str, Any]) -> list[Alarm]:
    """Count a measurement that is not the best; return an alarm once training has passed its best."""
    best = counters.best
    counters.last = found
    counters.worse = counters.worse + 1 if is_clearly_worse(found, best) else 0
    if counters.worse != PATIENCE:
        return []
    what = (
        f"{_shown(found)}: clearly worse than the best, {_shown(best)}, for {PATIENCE} measurements. "
        f"The best snapshot is kept in {BEST}; training can be stopped."
    )
    return [Alarm("past-best", what, {"value": found["value"], "best": best["value"]})]


def recommend(counters: RunCounters, last: Path, nimg: int) -> Recommendation:
    """Return the snapshot to use at the end of a run: the best if the last is clearly worse, else the last.

    Without standard errors, the best. last, nimg: the last snapshot, and the images seen at it.
    """
    best, final = counters.best, counters.last
    if not best:
        return Recommendation(last, nimg, "the last snapshot: no metric was measured (--metrics)")
    if final.get("nimg") != nimg:
        return Recommendation(last, nimg, f"the last snapshot: it was not measured, {_shown(best)} was best")
    if best["nimg"] == nimg:
        return Recommendation(last, nimg, f"the best snapshot: {_shown(best)}")
    has_error = final["error"] or best["error"]
    if is_clearly_worse(final, best) or (not has_error and worsening(final, best) > 0):
        if (path := last.with_name(BEST)).is_file():
            clearly = "clearly " if has_error else ""
            why = f"the best snapshot: {_shown(best)}. The last one is {clearly}worse: {_shown(final)}"
            return Recommendation(path, best["nimg"], why)
        why = f"the last snapshot: {_shown(final)}. {BEST} is missing, which was better: {_shown(best)}"
        return Recommendation(last, nimg, why)
    why = f"the last snapshot: {_shown(final)}. It is not clearly worse than the best: {_shown(best)}"
    return Recommendation(last, nimg, why)


def _shown(found: dict[str, Any]) -> str:
    error = f" ± {found['error']:.2g}" if found["error"] else ""
    return f"{found['metric']} {found['value']:.4g}{error} at {found['nimg'] / 1000:g} kimg"
