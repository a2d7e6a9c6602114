"""Put what several reports of ab_distillation.py say into one Markdown table.

    python benchmarks/summarise.py benchmarks/results/ab_*.md --metrics fd-effnet random-fid

One row for each job, checkpoint, pictures, length and arm. A cell holds the mean ± deviation of the last
measurement over all seeds, and in brackets the difference to the first arm of its reports, seed by seed, with
Student's 95 % interval. Reports that differ only in their seeds or arms are taken together; a run that stands
in several is counted once.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from ab_report import as_text, distillation_share, interval, is_higher_better, last_of, names_of, shown
from measuring import table

Key = tuple[str, str, str, float, int]  # job, checkpoint, pictures, kimg, generated pictures


def read(path: Path) -> dict[str, Any]:
    """The JSON of a report. Exits where there is none of an A/B."""
    try:
        text = path.read_text(encoding="utf-8")
        found = re.search(r"```json\n(.*)\n```", text, re.DOTALL)
        report = json.loads(found[1] if found else text)
        report["results"], report["settings"]["arms"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"{path} is no report of ab_distillation.py: {error}")
    return report


def groups_of(reports: list[dict[str, Any]]) -> dict[Key, dict[str, dict[int, dict[str, Any]]]]:
    """What can be compared -> arm -> seed -> record; arms in the order in which they are first met."""
    groups: dict[Key, dict[str, dict[int, dict[str, Any]]]] = {}
    for report in reports:
        for job, found in report["results"].items():
            for run in found["runs"]:
                config = run["config"]
                key = (job, config["resume"], config["data"], config["kimg"], config["metrics_num"])
                groups.setdefault(key, {}).setdefault(run["arm"], {})[run["seed"]] = run
    return groups


def cell(name: str, ours: dict[int, dict[str, Any]], base: dict[int, dict[str, Any]] | None) -> str:
    """A metric of an arm, and its difference to the first one where both have a seed."""
    text = shown([last_of(record, name) for record in ours.values()])
    if base is None or not (seeds := sorted(ours.keys() & base.keys())):
        return text
    differences = [last_of(ours[seed], name) - last_of(base[seed], name) for seed in seeds]
    better = sum((each > 0) == is_higher_better(name) for each in differences if each)
    mean = f"{statistics.fmean(differences):+.3g}"
    return f"{text} ({mean}; {as_text(interval(differences))}; better in {better} of {len(seeds)})"


def rows_of(
    reports: list[dict[str, Any]], metrics: list[str] | None, arms: list[str] | None
) -> list[list[str]]:
    """The table, its header first."""
    groups = groups_of(reports)
    any_record = next(iter(next(iter(next(iter(groups.values())).values())).values()))
    names = metrics or names_of({("", 0): any_record})
    rows = [["job", "checkpoint", "pictures", "kimg", "seeds", "arm", *names, "distillation, on top"]]
    for (job, checkpoint, pictures, kimg, num), group in groups.items():
        first = next(iter(group))
        for arm, records in group.items():
            if arms is not None and arm not in arms:
                continue
            base = None if arm == first else group[first]
            cells = [cell(name, records, base) for name in names]
            share = statistics.median(distillation_share(record) for record in records.values())
            where = [job, checkpoint, f"{pictures}, {num} generated", f"{kimg:g}", str(len(records))]
            rows.append([*where, arm, *cells, f"+{share / (1 - share):.1%}"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("reports", nargs="+", type=Path, help="Markdown files with their JSON, or JSON")
    parser.add_argument("--metrics", nargs="+", help="columns (default: all)")
    parser.add_argument("--arms", nargs="+", help="rows (default: all)")
    options = parser.parse_args()
    reports = [read(path) for path in options.reports]
    known = names_of({("", 0): next(iter(reports[0]["results"].values()))["runs"][0]})
    if unknown := [name for name in options.metrics or () if name not in known]:
        sys.exit(f"--metrics {' '.join(unknown)}: the reports hold {', '.join(known)}.")
    header, *rows = rows_of(reports, options.metrics, options.arms)
    print(table(header, rows))


if __name__ == "__main__":
    main()
