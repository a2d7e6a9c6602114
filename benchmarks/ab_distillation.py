"""Does self-distillation help? The same checkpoint, data, seeds and images seen, with different options.

    python benchmarks/ab_distillation.py --preset cpu-quick
    python benchmarks/ab_distillation.py --preset cpu --out benchmarks/results/ab_<machine>_<yyyymm>.md
    python benchmarks/ab_distillation.py --preset gpu --checkpoint ffhq-256-stylegan2 --improve ffhq.zip \\
        --adapt art.zip
    python benchmarks/ab_distillation.py --arm plain:sd_weight=0 --arm half:sd_weight=0.5 --jobs improve

Jobs: `improve` goes on with the checkpoint's own pictures, `adapt` goes to others. Every arm is a set of
option overrides (`NAME:option=value,option=value`); the first one is what the others are compared with. Runs
are told apart by their options: what is finished in --work is not run again, so more arms or seeds can be
added later, and an interrupted call goes on. The table holds, for each metric, the value at the start, at the
end and at its best (mean ± deviation over seeds), and the differences to the first arm, seed by seed. A
difference counts only where it is larger than its deviation; with three seeds even that is weak.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from measuring import ROOT, machine, table, write_report
from rich.console import Console

from finetune.checkpoint import load, resolve_network
from finetune.config import TrainConfig
from finetune.data import ImageSet
from finetune.device import resolve_device
from finetune.metrics.evaluate import HIGHER_IS_BETTER, Evaluation
from finetune.train.run import run

DEMO = ROOT / "finetune" / "demo"
SMALL: dict[str, Any] = dict(
    batch=8, mirror=True, augpipe="color", workers=0, sd_backbone="efficientnet-lite0"
)
OFFLINE = "fd-effnet,random-fid,kid-effnet,prc-effnet"
ARMS = ("plain:sd_weight=0", "sd:sd_weight=0.1", "sd-auto:sd_weight=auto:0.1")
PRESETS: dict[str, dict[str, Any]] = {
    "cpu-quick": dict(kimg=0.8, seeds=[0], num=256, measurements=2, options=SMALL),
    "cpu": dict(kimg=8.0, seeds=[0, 1, 2], num=1000, measurements=4, options=SMALL),
    "gpu": dict(
        kimg=1000.0, seeds=[0, 1, 2], num=10_000, measurements=5, options={}, metrics="fid,random-fid,kid,prc"
    ),
}
# What the bundled checkpoint was trained with, and what its demo uses for other pictures.
OF_THE_DEMO: dict[str, dict[str, Any]] = {
    "improve": dict(recipe="improve", gamma=0.4, glr=0.0025, dlr=0.0025, ema_kimg=2.5),
    "adapt": dict(recipe="adapt", gamma=0.2, glr=0.0025, dlr=0.0025, ema_kimg=1.0, freezed=0),
}


@dataclasses.dataclass(frozen=True)
class Arm:
    """A named set of option overrides."""

    name: str
    options: dict[str, Any]


def parse_arm(text: str) -> Arm:
    """`NAME:option=value,…`; values are JSON where they can be, else text. Exits for an unknown option."""
    name, _, rest = text.partition(":")
    options = {}
    for pair in filter(None, rest.split(",")):
        key, _, value = pair.partition("=")
        key = key.strip().replace("-", "_")
        if key not in TrainConfig.__dataclass_fields__:
            sys.exit(f"--arm {text}: there is no option {key}.")
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    return Arm(name, options)


def config_of(options: argparse.Namespace, job: str, seed: int, arm: Arm) -> TrainConfig:
    """All options of one run."""
    preset = PRESETS[options.preset]
    settings = {
        "data": str(options.improve if job == "improve" else options.adapt),
        "resume": str(options.checkpoint),
        "kimg": options.kimg,
        "tick": options.kimg / options.measurements,
        "snap": options.measurements + 1,  # one snapshot, at the end
        "metrics": options.metrics,
        "metrics_kimg": options.kimg / options.measurements,
        "metrics_num": options.num,
        "device": options.device,
        "seed": seed,
        **preset["options"],
        **(OF_THE_DEMO[job] if options.checkpoint.name == "faces-3d-64.pkl" else {"recipe": job}),
    }
    return TrainConfig(**(settings | arm.options))


def run_one(options: argparse.Namespace, job: str, seed: int, arm: Arm) -> dict[str, Any]:
    """The record of one run, from --work where it is there; its snapshot is deleted."""
    config = config_of(options, job, seed, arm)
    key = hashlib.sha256(config.to_json().encode()).hexdigest()[:10]
    folder = options.work / f"{job}-{arm.name}-seed{seed}-{key}"
    record = folder / "record.json"
    if record.is_file():
        return json.loads(record.read_text(encoding="utf-8"))
    shutil.rmtree(folder, ignore_errors=True)  # what an interrupted call has left
    print(f"{job}, {arm.name}, seed {seed} …", flush=True)
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        result = run(dataclasses.replace(config, outdir=str(folder)), console=Console(file=nowhere))
    log = (result.run_dir / "log.jsonl").read_text(encoding="utf-8").splitlines()
    lines = [json.loads(line) for line in log]
    phases: dict[str, float] = {}
    for line in lines:
        for name, seconds in line["sec_per_phase"].items():
            phases[name] = phases.get(name, 0.0) + seconds
    kept = (
        "sd_cosine",
        "sd_ratio",
        "sd_weight",
        "weight_distance",
        "loss_sd",
        "straightness_G",
        "update_cosine_G",
    )
    found = {
        "config": json.loads(result.config.to_json()),
        "points": [{"kimg": line["kimg"], **line["metrics"]} for line in lines if "metrics" in line],
        "diagnostics": [{name: line[name] for name in kept if name in line} for line in lines],
        "sec_per_phase": phases,
        "sec_per_kimg": sum(phases.values()) / result.nimg * 1000,
    }
    record.write_text(json.dumps(found, indent=1), encoding="utf-8")
    for snapshot in result.run_dir.glob("*.pkl"):
        snapshot.unlink()
    return found


def start_of(options: argparse.Namespace, job: str) -> dict[str, float]:
    """The metrics of the checkpoint itself."""
    config = config_of(options, job, 0, Arm("", {}))
    place = options.work / f"start-{job}-{hashlib.sha256(config.to_json().encode()).hexdigest()[:10]}.json"
    if place.is_file():
        return json.loads(place.read_text(encoding="utf-8"))
    device = resolve_device(options.device)
    G: Any = load(options.checkpoint, device=device).best
    images = ImageSet(
        config.data,
        resolution=G.img_resolution,
        channels=G.img_channels,
        mirror=config.mirror,
        fit=config.fit,
        use_labels=G.c_dim > 0,
        num_classes=G.c_dim or None,
    )
    evaluation = Evaluation(images, options.metrics.split(","), device=device, cache=True)
    found = {name: each.value for name, each in evaluation.distances(G, options.num).items()}
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(found), encoding="utf-8")
    return found


def names_of(records: dict[tuple[str, int], dict[str, Any]]) -> list[str]:
    """The metrics that were measured."""
    first = next(iter(records.values()))["points"][-1]
    return [name for name in first if name not in ("kimg", "num", "sec") and not name.endswith("_spread")]


def best(values: list[float], name: str) -> float:
    """The best of some values of a metric."""
    return max(values) if name.startswith(HIGHER_IS_BETTER) else min(values)


def shown(values: list[float]) -> str:
    """Mean ± deviation."""
    spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4g}{spread}"


def rows_of(
    records: dict[tuple[str, int], dict[str, Any]], arms: list[Arm], seeds: list[int], start: dict[str, float]
) -> list[list[str]]:
    """One row for each metric and arm."""
    rows = []
    for name in names_of(records):
        for arm in arms:
            found = [records[arm.name, seed]["points"] for seed in seeds]
            last = [points[-1][name] for points in found]
            top = [best([point[name] for point in points], name) for points in found]
            row = [name, arm.name, f"{start[name]:.4g}", shown(last), shown(top)]
            if arm is arms[0]:
                rows.append([*row, "–", "–"])
                continue
            base = [records[arms[0].name, seed]["points"][-1][name] for seed in seeds]
            differences = [ours - theirs for ours, theirs in zip(last, base, strict=True)]
            sign = 1 if name.startswith(HIGHER_IS_BETTER) else -1
            better = sum(sign * difference > 0 for difference in differences)
            rows.append([*row, shown(differences), f"{better} of {len(seeds)}"])
    return rows


def costs_of(
    records: dict[tuple[str, int], dict[str, Any]], arms: list[Arm], seeds: list[int]
) -> list[list[str]]:
    """Seconds per kimg of each arm, without the measurements, and what they are of those of the first."""
    base = statistics.median(records[arms[0].name, seed]["sec_per_kimg"] for seed in seeds)
    rows = []
    for arm in arms:
        found = [records[arm.name, seed] for seed in seeds]
        seconds = statistics.median(record["sec_per_kimg"] for record in found)
        share = statistics.median(
            record["sec_per_phase"].get("Gdistill", 0.0) / sum(record["sec_per_phase"].values())
            for record in found
        )
        rows.append([arm.name, f"{seconds:.2f}", f"{seconds / base:.3f}×", f"{share:.1%}"])
    return rows


def plot(
    path: Path,
    job: str,
    records: dict[tuple[str, int], dict[str, Any]],
    arms: list[Arm],
    seeds: list[int],
    start: dict[str, float],
) -> None:
    """Every metric over images seen: one line for each arm, its band the deviation over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = names_of(records)
    figure, axes = pyplot.subplots(1, len(names), figsize=(3.6 * len(names), 3.2), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        for arm in arms:
            found = [records[arm.name, seed]["points"] for seed in seeds]
            kimg = [0.0, *(point["kimg"] for point in found[0])]
            values = [[start[name], *(point[name] for point in points)] for points in found]
            mean = [statistics.fmean(column) for column in zip(*values, strict=True)]
            spread = [
                statistics.stdev(column) if len(seeds) > 1 else 0.0 for column in zip(*values, strict=True)
            ]
            axis.plot(kimg, mean, marker="o", markersize=3, label=arm.name)
            low, high = ([m + sign * s for m, s in zip(mean, spread, strict=True)] for sign in (-1, 1))
            axis.fill_between(kimg, low, high, alpha=0.15)
        axis.set_title(
            f"{name} ({'higher' if name.startswith(HIGHER_IS_BETTER) else 'lower'} is better)", fontsize=9
        )
        axis.set_xlabel("kimg")
    axes[0][0].legend(fontsize=8)
    figure.suptitle(job)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def parse() -> argparse.Namespace:
    """The command line, with what the preset says where nothing else is said."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--preset", default="cpu-quick", choices=PRESETS)
    parser.add_argument("--jobs", nargs="+", default=["improve", "adapt"], choices=["improve", "adapt"])
    parser.add_argument("--arm", action="append", dest="arms", metavar="NAME:OPTION=VALUE,…")
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--kimg", type=float)
    parser.add_argument("--num", type=int, help="generated pictures for a measurement")
    parser.add_argument("--measurements", type=int, help="in each run")
    parser.add_argument("--metrics")
    parser.add_argument("--checkpoint", default=str(DEMO / "faces-3d-64.pkl"), help="file, name or URL")
    parser.add_argument(
        "--improve", type=Path, default=DEMO / "faces-3d.zip", help="the checkpoint's own pictures"
    )
    parser.add_argument("--adapt", type=Path, default=DEMO / "faces-flat.zip", help="other pictures")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--work", type=Path, default=Path("ab-work"), help="where runs and their records are kept"
    )
    parser.add_argument(
        "--out", type=Path, help="write tables, plots and JSON to this Markdown file and beside it"
    )
    options = parser.parse_args()
    preset = {"metrics": OFFLINE, **PRESETS[options.preset]}
    for name in ("seeds", "kimg", "num", "measurements", "metrics"):
        if getattr(options, name) is None:
            setattr(options, name, preset[name])
    options.checkpoint = resolve_network(options.checkpoint)
    options.arms = [parse_arm(text) for text in options.arms or ARMS]
    return options


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    arms, seeds = options.arms, options.seeds
    texts, results = [], {}
    for job in options.jobs:
        start = start_of(options, job)
        # Seed by seed, so that an interrupted call leaves whole comparisons.
        records = {(arm.name, seed): run_one(options, job, seed, arm) for seed in seeds for arm in arms}
        header = ["metric", "arm", "start", "last", "best", f"last, against {arms[0].name}", "better"]
        texts += [f"## {job}", table(header, rows_of(records, arms, seeds, start))]
        costs = ["arm", "seconds per kimg", f"against {arms[0].name}", "of it distillation"]
        texts.append(table(costs, costs_of(records, arms, seeds)))
        if options.out:
            picture = options.out.with_name(f"{options.out.stem}_{job}.png")
            plot(picture, job, records, arms, seeds, start)
            texts.append(f"![{job}]({picture.name})")
        results[job] = {
            "start": start,
            "runs": [{"arm": arm, "seed": seed, **record} for (arm, seed), record in records.items()],
        }
    print("\n\n".join(texts))
    if options.out:
        settings = {
            name: [dataclasses.asdict(arm) for arm in value] if name == "arms" else str(value)
            for name, value in vars(options).items()
            if name not in ("out", "work", "checkpoint", "improve", "adapt")
        }
        for name in ("checkpoint", "improve", "adapt"):
            settings[name] = Path(getattr(options, name)).name
        for job in results.values():
            for each in job["runs"]:
                for name in ("data", "resume", "outdir"):
                    each["config"][name] = Path(each["config"][name]).name
        record = {
            "machine": machine(resolve_device(options.device)),
            "settings": settings,
            "results": results,
        }
        write_report(
            options.out,
            "Self-distillation against plain training",
            f"python {' '.join(sys.argv)}",
            texts,
            record,
        )


if __name__ == "__main__":
    main()
