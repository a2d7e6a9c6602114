"""Tables and plots of an A/B comparison: paired differences, values by seed, costs, trajectories.

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

from finetune.metrics.evaluate import HIGHER_IS_BETTER

Records = dict[tuple[str, int], dict[str, Any]]

# The 97.5 % quantile of Student's t with 1, 2, … 10 degrees of freedom; more are counted as 10.
T975 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
RELATED = "†"  # the metric's features are those of the arm's loss
COSTS = ["arm", "seconds per kimg", "Gdistill, of all", "Gdistill, on top of the rest"]
TRAJECTORY = ["arm", "path per kimg", "straightness", "update cosine", "distance to the teacher", "weight"]
# Names in the log, in the order of TRAJECTORY.
OF_THE_LOG = ("path_per_kimg_G", "straightness_G", "update_cosine_G", "loss_sd", "sd_weight")
FEW_ARMS = 4  # of which a report has all metrics by seed, below 100 lines


def is_higher_better(name: str) -> bool:
    """Return whether a metric is one of those that should grow."""
    return name.startswith(HIGHER_IS_BETTER)


def is_related(name: str, record: dict[str, Any]) -> bool:
    """Return whether a metric uses the network, or a relative, of the loss of a run."""
    families = {"effnet": "efficientnet", "memorization": "efficientnet", "stlpips": "st-lpips"}
    family = families.get(name.rpartition("-")[2])
    config = record["config"]
    return bool(config["sd_weight"] and family and config["sd_backbone"].startswith(family))


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


def difference(differences: list[float]) -> str:
    """Return the mean of paired differences with its interval, bold if that excludes 0."""
    middle, found = f"{statistics.fmean(differences):+.3g}", interval(differences)
    if found is None:
        return middle
    text = f"{middle} ({found[0]:.3g} … {found[1]:.3g})"
    return text if found[0] <= 0 <= found[1] else f"**{text}**"


def results_of(
    records: Records, arms: list[str], seeds: list[int], start: dict[str, float]
) -> list[list[str]]:
    """Return a table of the metrics at the end, header first: a column for each metric, a row for each arm.

    The first arm in full, the others as differences to it.
    """
    names = list(start)
    directions = [f"{name} ({'↑' if is_higher_better(name) else '↓'})" for name in names]
    rows = [["arm", *directions], ["start", *(f"{value:.4g}" for value in start.values())]]
    values = {
        (arm, name): [records[arm, seed]["final"][name] for seed in seeds] for arm in arms for name in names
    }
    rows.append([arms[0], *(shown(values[arms[0], name]) for name in names)])
    for arm in arms[1:]:
        cells = []
        for name in names:
            pairs = zip(values[arm, name], values[arms[0], name], strict=True)
            mark = f" {RELATED}" if is_related(name, records[arm, seeds[0]]) else ""
            cells.append(difference([ours - theirs for ours, theirs in pairs]) + mark)
        rows.append([arm, *cells])
    return rows


def seeds_of(records: Records, arms: list[str], seeds: list[int]) -> list[list[str]]:
    """Return the values of each metric for every run, header first; of two metrics if there are many arms."""
    names = list(records[arms[0], seeds[0]]["final"])
    if len(arms) > FEW_ARMS:
        names = [name for name in names if not name.startswith("kid")][:2]
    rows = [["metric", "arm", *(f"seed {seed}" for seed in seeds)]]
    for name in names:
        for arm in arms:
            rows.append([name, arm, *(f"{records[arm, seed]['final'][name]:.4g}" for seed in seeds)])
    return rows


def distillation_fraction(record: dict[str, Any]) -> float:
    """Return seconds of the phase Gdistill as a fraction of all phases."""
    return record["sec_per_phase"].get("Gdistill", 0.0) / sum(record["sec_per_phase"].values())


def costs_of(records: Records, arms: list[str], seeds: list[int]) -> list[list[str]]:
    """Return seconds per kimg of each arm, without measurements, and the part of distillation, under COSTS.

    Fractions are those of one run, so that what else the machine does hits both sides of them alike; totals
    of runs that did not run side by side compare only on a machine that does nothing else.
    """
    rows = []
    for arm in arms:
        found = [records[arm, seed] for seed in seeds]
        seconds = statistics.median(record["sec_per_kimg"] for record in found)
        fraction = statistics.median(distillation_fraction(record) for record in found)
        rows.append([arm, f"{seconds:.2f}", f"{fraction:.1%}", f"+{fraction / (1 - fraction):.1%}"])
    return rows


def trajectories_of(records: Records, arms: list[str], seeds: list[int]) -> list[list[str]]:
    """Return means over ticks of the trajectory of G and of the distance, over seeds, under TRAJECTORY.

    straightness: at the end. Distances compare between arms with the same backbone.
    """
    rows = []
    for arm in arms:
        cells = [arm]
        for name in OF_THE_LOG:
            found = [
                [line[name] for line in records[arm, seed]["diagnostics"] if name in line] for seed in seeds
            ]
            means = [run[-1] if name == "straightness_G" else statistics.fmean(run) for run in found if run]
            cells.append(shown(means) if means else "–")
        rows.append(cells)
    return rows


def half_lives_table(records: Records, arms: list[str], seeds: list[int]) -> list[list[str]]:
    """Return a metric by the half-life of G_ema, mean ± deviation over seeds, header first."""
    names = list(records[arms[0], seeds[0]]["half_lives"])
    rows = [["arm", *names]]
    for arm in arms:
        rows.append([arm, *(shown([records[arm, seed]["half_lives"][n] for seed in seeds]) for n in names)])
    return rows


def plot(path: Path, records: Records, arms: list[str], seeds: list[int], name: str) -> None:
    """Plot a metric over images seen: a line for each arm, its band the deviation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 4))
    for arm in arms:
        found = [records[arm, seed]["points"] for seed in seeds]
        columns = list(zip(*([point[name] for point in points] for points in found), strict=True))
        mean = [statistics.fmean(column) for column in columns]
        spread = [statistics.stdev(column) if len(seeds) > 1 else 0.0 for column in columns]
        kimg = [point["kimg"] for point in found[0]]
        axis.plot(kimg, mean, marker="o", markersize=3, label=arm)
        low, high = ([m + sign * s for m, s in zip(mean, spread, strict=True)] for sign in (-1, 1))
        axis.fill_between(kimg, low, high, alpha=0.15)
    axis.set(xlabel="kimg", ylabel=f"{name} ({'higher' if is_higher_better(name) else 'lower'} is better)")
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)
