"""Tables and plots of an A/B comparison: paired differences, values by seed, costs by phase.

A record (see ab_distillation.run_one) stands under (arm, seed). The other arms are compared with the first
one, seed by seed: the two runs of a seed share checkpoint, images, latents and order, and their difference
varies less than either. Intervals are Student's, at 95 %; an interval that contains 0 is within the spread.
They assume normally distributed differences, treat every metric by itself, and need two seeds.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import _checkout  # noqa: F401

from finetune.metrics.evaluate import HIGHER_IS_BETTER, names_in

Records = dict[tuple[str, int], dict[str, Any]]

# The 97.5 % quantile of Student's t with 1, 2, … 10 degrees of freedom; more are counted as 10.
T975 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
HEADER = ["metric", "arm", "start", "last", "best", "last, difference", "95 %", "better", "says"]
HEADER += ["best, difference", "95 %"]
COSTS = ["arm", "seconds per kimg", "against the first", "Gdistill, of all", "Gdistill, on top of the rest"]


def is_higher_better(name: str) -> bool:
    """Return whether a metric is one of those that should grow."""
    return name.startswith(HIGHER_IS_BETTER)


def names_of(records: Records) -> list[str]:
    """Return the metrics that were measured."""
    return names_in(next(iter(records.values()))["points"][-1])


def last_of(record: dict[str, Any], name: str) -> float:
    """Return a metric at the end of a run."""
    return record["points"][-1][name]


def best_of(record: dict[str, Any], name: str) -> float:
    """Return a metric at its best in a run."""
    values = [point[name] for point in record["points"]]
    return max(values) if is_higher_better(name) else min(values)


def shown(values: list[float]) -> str:
    """Return mean ± deviation."""
    spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4g}{spread}"


def interval(differences: list[float]) -> tuple[float, float] | None:
    """Return the 95 % interval of the mean of paired differences; None for a single one."""
    count = len(differences)
    if count < 2:
        return None
    half = T975[min(count - 1, len(T975)) - 1] * statistics.stdev(differences) / count**0.5
    middle = statistics.fmean(differences)
    return middle - half, middle + half


def verdict(differences: list[float], name: str) -> str:
    """Return `better` or `worse` if the interval excludes 0, else `within the spread`."""
    found = interval(differences)
    if found is None:
        return "one seed"
    if found[0] <= 0 <= found[1]:
        return "within the spread"
    return "better" if (found[0] > 0) == is_higher_better(name) else "worse"


def as_text(found: tuple[float, float] | None) -> str:
    """Return `low … high`."""
    return "–" if found is None else f"{found[0]:.3g} … {found[1]:.3g}"


def rows_of(records: Records, arms: list[str], seeds: list[int], start: dict[str, float]) -> list[list[str]]:
    """Return one row for each metric and arm, under HEADER."""
    rows = []
    for name in names_of(records):
        for arm in arms:
            last, best = ([of(records[arm, seed], name) for seed in seeds] for of in (last_of, best_of))
            row = [name, arm, f"{start[name]:.4g}", shown(last), shown(best)]
            if arm == arms[0]:
                rows.append([*row, *["–"] * 6])
                base = {"last": last, "best": best}
                continue
            at_last, at_best = (
                [ours - theirs for ours, theirs in zip(values, base[kind], strict=True)]
                for kind, values in (("last", last), ("best", best))
            )
            better = sum((each > 0) == is_higher_better(name) for each in at_last if each)
            row += [shown(at_last), as_text(interval(at_last)), f"{better} of {len(seeds)}"]
            rows.append([*row, verdict(at_last, name), shown(at_best), as_text(interval(at_best))])
    return rows


def seeds_of(records: Records, arms: list[str], seeds: list[int]) -> list[list[str]]:
    """List two metrics and the weight of `auto:` for every run, measurements in order; header first."""
    rows = [["metric", "arm", *(f"seed {seed}" for seed in seeds)]]
    for name in names_of(records)[:2]:
        for arm in arms:
            runs = [[point[name] for point in records[arm, seed]["points"]] for seed in seeds]
            rows.append([name, arm, *(", ".join(f"{value:.4g}" for value in run) for run in runs)])
    for arm in arms:
        runs = [[line.get("sd_weight") for line in records[arm, seed]["diagnostics"]] for seed in seeds]
        if any(filter(None, runs[0])):
            cells = (", ".join(f"{value:.3g}" for value in run if value) for run in runs)
            rows.append(["sd_weight", arm, *cells])
    return rows


def distillation_share(record: dict[str, Any]) -> float:
    """Return seconds of the phase Gdistill in parts of all phases."""
    return record["sec_per_phase"].get("Gdistill", 0.0) / sum(record["sec_per_phase"].values())


def costs_of(records: Records, arms: list[str], seeds: list[int]) -> list[list[str]]:
    """Return seconds per kimg of each arm, without measurements, and the share of distillation, under COSTS.

    Shares are taken inside one run, so that what else the machine does hits both sides of them alike; totals
    of runs that did not run side by side compare only on a machine that does nothing else.
    """
    base = statistics.median(records[arms[0], seed]["sec_per_kimg"] for seed in seeds)
    rows = []
    for arm in arms:
        found = [records[arm, seed] for seed in seeds]
        seconds = statistics.median(record["sec_per_kimg"] for record in found)
        share = statistics.median(distillation_share(record) for record in found)
        rows.append(
            [arm, f"{seconds:.2f}", f"{seconds / base:.3f}×", f"{share:.1%}", f"+{share / (1 - share):.1%}"]
        )
    return rows


def plot(
    path: Path,
    jobs: dict[str, Records],
    arms: list[str],
    seeds: list[int],
    starts: dict[str, dict[str, float]],
) -> None:
    """Plot every metric over images seen, a row for each job: a line for each arm, its band the deviation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = names_of(next(iter(jobs.values())))
    size = (3.6 * len(names), 3.2 * len(jobs))
    figure, grid = pyplot.subplots(len(jobs), len(names), figsize=size, squeeze=False)
    for axes, (job, records) in zip(grid, jobs.items(), strict=True):
        for axis, name in zip(axes, names, strict=True):
            for arm in arms:
                found = [records[arm, seed]["points"] for seed in seeds]
                kimg = [0.0, *(point["kimg"] for point in found[0])]
                values = [[starts[job][name], *(point[name] for point in points)] for points in found]
                columns = list(zip(*values, strict=True))
                mean = [statistics.fmean(column) for column in columns]
                spread = [statistics.stdev(column) if len(seeds) > 1 else 0.0 for column in columns]
                axis.plot(kimg, mean, marker="o", markersize=3, label=arm)
                low, high = ([m + sign * s for m, s in zip(mean, spread, strict=True)] for sign in (-1, 1))
                axis.fill_between(kimg, low, high, alpha=0.15)
            direction = "higher" if is_higher_better(name) else "lower"
            axis.set_title(f"{name} ({direction} is better)", fontsize=9)
            axis.set_xlabel("kimg")
        axes[0].set_ylabel(job)
    grid[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)
