"""Compare options of self-distillation with the same checkpoint, data, seeds and images seen.

    python benchmarks/ab_distillation.py --job improve --photos PHOTOS.zip
    python benchmarks/ab_distillation.py --make-base clothing-64-stylegan2 --photos PHOTOS.zip
    python benchmarks/ab_distillation.py --kimg 3 --seeds 0 1 2        # the bundled checkpoint and images
    python benchmarks/ab_distillation.py --checkpoint ffhq-256-stylegan2 --data art.zip --recipe adapt \\
        --kimg 1000 --num 10000 --metrics fid,random-fid,kid,prc --parallel 2 --out ab.md

A job (ab_jobs.py) is one comparison: it writes its report into benchmarks/results. Every arm is a set of
option overrides (`NAME:option=value,option=value`); the first one is what the others are compared with. Runs
are identified by their options: what is finished in --work is not run again, so that arms or seeds can be
added later, and an interrupted run resumes where it was saved. `--make-base` trains the checkpoint of a job
from random weights, without self-distillation, and keeps it with its log in benchmarks/checkpoints; with a
larger --kimg, it trains on.

During a run, random-FID is measured a few times; all metrics are measured on the last snapshot. The table
holds the first arm's values (mean ± deviation over seeds) and the differences of the others to it, seed by
seed, with Student's 95 % interval of their mean. Where the arms are equal, one comparison in twenty leaves 0
out by chance.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import _checkout  # noqa: F401
import torch
from ab_jobs import BASES, JOBS, RATES, SMALL, Job
from ab_report import (
    COSTS,
    RELATED,
    TRAJECTORY,
    Records,
    costs_of,
    half_lives_table,
    plot,
    results_of,
    seeds_of,
    trajectories_of,
)
from make_sets import photos, write_zip
from measuring import ROOT, machine, short_name, table, write_report
from rich.console import Console

from finetune.data import ImageSet
from finetune.device import resolve_device
from finetune.errors import FinetuneError
from finetune.metrics.evaluate import Evaluation
from finetune.models import image_size
from finetune.options import TrainOptions
from finetune.resolve import load, resolve_network
from finetune.train import RunResult, posthoc_ema, prepare, run

DEMO = ROOT / "finetune" / "demo"
CHECKPOINTS, RESULTS = ROOT / "benchmarks" / "checkpoints", ROOT / "benchmarks" / "results"
CURVE, CURVE_NUM = "random-fid", 500  # measured during a run, and so many generated images
OFFLINE = "fd-effnet,random-fid,kid-effnet,prc-effnet"
# What the bundled checkpoint was trained with, and what its demo uses for other images.
OF_THE_DEMO: dict[str, dict[str, Any]] = {
    "improve": dict(gamma=0.4, ema_kimg=2.5),
    "adapt": dict(gamma=0.2, ema_kimg=1.0, freezed=0),
    "few-shot": dict(ema_kimg=1.0),
}
# Fields that depend on the machine, not on the result.
NOT_COMPARED = ("outdir", "data", "resume", "device", "workers")


@dataclasses.dataclass(frozen=True)
class Arm:
    """A named set of option overrides."""

    name: str
    options: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Task:
    """A comparison on this machine: a job, its files, and how long and how often."""

    name: str
    job: Job
    checkpoint: Path
    data: Path
    measurements: int
    device: str
    work: Path


def parse_arm(text: str) -> Arm:
    """Parse `NAME:option=value,…`; values are JSON if possible, else text. Exit for an unknown option."""
    name, _, rest = text.partition(":")
    options = {}
    for pair in filter(None, rest.split(",")):
        key, _, value = pair.partition("=")
        key = key.strip().replace("-", "_")
        if key not in TrainOptions.__dataclass_fields__ or not value:
            sys.exit(f"--arm {text}: {pair!r} is no option=value of finetune train.")
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    return Arm(name, options)


def config_of(task: Task, seed: int, arm: Arm) -> TrainOptions:
    """Return all options of one run."""
    job = task.job
    settings = {
        "data": str(task.data),
        "resume": str(task.checkpoint),
        "recipe": job.recipe,
        "kimg": job.kimg,
        "tick": job.kimg / task.measurements / 4,
        "snap": 4,  # the curve is measured at snapshots
        "metrics": CURVE,
        "metrics_num": min(CURVE_NUM, job.num),
        "save_every_min": 5,
        "device": task.device,
        "seed": seed,
        **job.settings,
    }
    return TrainOptions(**(settings | arm.options))


def run_or_resume(config: TrainOptions, folder: Path) -> RunResult:
    """Train in a folder of its own, from where an earlier call was saved. Exit if the run ends early."""
    states = sorted(folder.glob("*/training-state-*.pt"))
    if states:
        asked = TrainOptions(resume=str(states[-1].parent), kimg=config.kimg)
    else:
        shutil.rmtree(folder, ignore_errors=True)
        asked = dataclasses.replace(config, outdir=str(folder))
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        result = run(asked, console=Console(file=nowhere))
    assert config.kimg is not None
    if result.nimg < round(config.kimg * 1000):
        ended = f"{result.nimg / 1000:g} of {config.kimg:g} kimg"
        sys.exit(f"{folder} ended after {ended}. Call again to resume.")
    return result


def check_same(folder: Path, then: dict[str, Any], config: TrainOptions) -> None:
    """Exit if a kept record was made with defaults other than today's."""
    now = prepare(config).config.to_dict()
    is_plain = now["sd_weight"] == 0  # then the other options of self-distillation change no network
    changed = [
        f"{name} {then[name]} → {now[name]}"
        for name in sorted(then.keys() & now.keys())
        if then[name] != now[name] and name not in NOT_COMPARED and not (is_plain and name.startswith("sd_"))
    ]
    if changed:
        found = ", ".join(changed)
        sys.exit(f"{folder} was run with other defaults ({found}); delete it, or name them in the arm.")


def key_of(config: TrainOptions, job: Job) -> str:
    """Return what identifies a run: its options, and what is measured at its end."""
    return hashlib.sha256(f"{config.given()}{job.judges}{job.num}".encode()).hexdigest()[:10]


def run_one(task: Task, seed: int, arm: Arm, threads: int) -> dict[str, Any]:
    """Return the record of one run, from --work if it is there; its snapshot is deleted."""
    torch.set_num_threads(threads)
    config = config_of(task, seed, arm)
    folder = task.work / f"{task.name}-{arm.name}-seed{seed}-{key_of(config, task.job)}"
    record = folder / "record.json"
    if record.is_file():
        found = json.loads(record.read_text(encoding="utf-8"))
        check_same(folder, found["config"], config)
        return found
    print(f"{task.name}, {arm.name}, seed {seed} …", flush=True)
    result = run_or_resume(config, folder)
    lines = [json.loads(line) for line in (result.run_dir / "log.jsonl").read_text().splitlines()]
    phases: dict[str, float] = {}
    for line in lines:
        for name, seconds in line["sec_per_phase"].items():
            phases[name] = phases.get(name, 0.0) + seconds
    kept = ("sd_cosine", "sd_ratio", "sd_weight", "loss_sd", "weight_distance")
    kept += ("path_per_kimg_G", "straightness_G", "update_cosine_G")
    found = {
        "config": json.loads(result.config.to_json()),
        "final": measure(task, load(result.snapshot, device=resolve_device(task.device)).best),
        "half_lives": half_lives_of(task, result) if task.job.half_lives else {},
        "points": [{"kimg": line["kimg"], **line["metrics"]} for line in lines if "metrics" in line],
        "diagnostics": [{name: line[name] for name in kept if name in line} for line in lines],
        "sec_per_phase": phases,
        "sec_per_kimg": sum(phases.values()) / result.nimg * 1000,
    }
    record.write_text(json.dumps(found, indent=1), encoding="utf-8")
    for pattern in ("*.pkl", "training-state-*", "averages-*"):
        for left in result.run_dir.glob(pattern):
            left.unlink()
    return found


def measure(task: Task, G: Any, judges: str = "", num: int = 0) -> dict[str, float]:
    """Return metrics of a generator, by default those of the job."""
    images = ImageSet(
        task.data,
        resolution=image_size(G),
        channels=G.img_channels,
        mirror=bool(task.job.settings.get("mirror")),
        fit="crop",
        use_labels=G.c_dim > 0,
        num_classes=G.c_dim or None,
    )
    which, device = (judges or task.job.judges).split(","), resolve_device(task.device)
    evaluation = Evaluation(images, which, device=device, cache=True)
    return {name: each.value for name, each in evaluation.distances(G, num or task.job.num).items()}


def half_lives_of(task: Task, result: RunResult) -> dict[str, float]:
    """Return CURVE by the half-life of G_ema in kimg, reconstructed from the averages of a run."""
    G_ema: Any = load(result.snapshot, device=resolve_device(task.device)).G_ema
    saved, found = posthoc_ema.saved_averages(result.snapshot), {}
    for kimg in posthoc_ema.grid(result.config, saved):
        network, _ = posthoc_ema.reconstruct(result.config, saved, kimg, G_ema)
        found[f"{kimg:g}"] = measure(task, network, CURVE, min(CURVE_NUM, task.job.num))[CURVE]
    return found


def start_of(task: Task) -> dict[str, float]:
    """Return the metrics of the checkpoint that all runs start from, from --work if they are there."""
    place = task.work / f"start-{task.name}-{key_of(config_of(task, 0, Arm('', {})), task.job)}.json"
    if not place.is_file():
        found = measure(task, load(task.checkpoint, device=resolve_device(task.device)).best)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(found), encoding="utf-8")
    return json.loads(place.read_text(encoding="utf-8"))


def image_set_of(options: argparse.Namespace, name: str) -> Path:
    """Return a set of the photographs, such as hats-64, made in --work if it is not there."""
    if options.photos is None:
        sys.exit("--photos: name the zip with the photographs that jobs use.")
    path = options.work / "sets" / f"{name}.zip"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        which, _, size = name.rpartition("-")
        partial = path.with_suffix(".part")
        write_zip(partial, photos(options.photos, which, int(size)))
        partial.rename(path)
    return path


def make_base(options: argparse.Namespace, name: str) -> None:
    """Train a checkpoint that jobs start from, and keep it with its log."""
    resolution = int(name.split("-")[1])
    settings = {
        "data": str(image_set_of(options, f"clothing-{resolution}")),
        "resolution": resolution,
        "sd_weight": 0,
        "aug": "ada",
        "snap": 10,
        "keep": 2,
        "metrics": options.metrics or "random-fid,fd-effnet",
        "metrics_num": 1000,
        "device": options.device,
        **RATES,
        **SMALL,
        **BASES[name],
    }
    if options.kimg is not None:
        settings["kimg"] = options.kimg
    result = run_or_resume(TrainOptions(**settings), options.work / f"base-{name}")
    CHECKPOINTS.mkdir(exist_ok=True)
    shutil.copyfile(result.snapshot, CHECKPOINTS / f"{name}.pkl")
    shutil.copyfile(result.run_dir / "log.jsonl", CHECKPOINTS / f"{name}.jsonl")
    print(f"{CHECKPOINTS / name}.pkl: {result.nimg / 1000:g} kimg")


def task_of(options: argparse.Namespace) -> Task:
    """Return the comparison that the command line asks for."""
    changes = {name: getattr(options, name) for name in ("kimg", "num") if getattr(options, name) is not None}
    if options.metrics:
        changes["judges"] = options.metrics
    if options.job:
        job = JOBS[options.job]
        small = SMALL | RATES if job.base != "clothing-128-stylegan2" else {}
        job = dataclasses.replace(job, settings=small | job.settings, **changes)
        checkpoint = CHECKPOINTS / f"{job.base}.pkl"
        if not checkpoint.is_file():
            sys.exit(f"{checkpoint} is missing. Make it with --make-base {job.base}.")
        name, data = options.job, image_set_of(options, job.data)
    else:
        is_bundled = options.checkpoint is None
        checkpoint = resolve_network(options.checkpoint or str(DEMO / "faces-3d-64.pkl"))
        default = DEMO / ("faces-3d.zip" if options.recipe == "improve" else "faces-flat.zip")
        settings = {**SMALL, **RATES, **OF_THE_DEMO[options.recipe]} if is_bundled else {}
        short: dict[str, Any] = {"kimg": 0.8, "num": 256, "seeds": (0,), "judges": OFFLINE}
        arms = ("plain:sd_weight=0", "ours:")
        job = Job("", arms, recipe=options.recipe, settings=settings, **(short | changes))
        name, data = options.recipe, options.data or default
    return Task(name, job, checkpoint, data, options.measurements, options.device, options.work)


def compare(options: argparse.Namespace, task: Task) -> None:
    """Run what is missing, print the tables, and write the report."""
    arms = [parse_arm(text) for text in options.arms or task.job.arms]
    seeds = list(options.seeds or task.job.seeds)
    names, start = [arm.name for arm in arms], start_of(task)
    # Seed by seed, so that an interrupted call leaves whole comparisons.
    runs = [(seed, arm) for seed in seeds for arm in arms]
    one = functools.partial(run_one, task, threads=options.threads)
    if options.parallel > 1:
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(options.parallel, mp_context=context) as pool:
            found = list(pool.map(one, *zip(*runs, strict=True)))
    else:
        found = [one(seed, arm) for seed, arm in runs]
    records: Records = {(arm.name, seed): each for (seed, arm), each in zip(runs, found, strict=True)}
    header, *rows = results_of(records, names, seeds, start)
    by_seed, *values = seeds_of(records, names, seeds)
    notes = f"**Bold**: the interval leaves 0 out. {RELATED}: features related to the loss of the arm."
    texts = [table(header, rows), notes, table(by_seed, values)]
    texts += [table(COSTS, costs_of(records, names, seeds))]
    texts += [table(TRAJECTORY, trajectories_of(records, names, seeds))]
    if task.job.half_lives:
        header, *rows = half_lives_table(records, names, seeds)
        texts += [f"{CURVE} by the half-life of G_ema (kimg), reconstructed after training:"]
        texts += [table(header, rows)]
    texts = [task.job.question, *texts] if task.job.question else texts
    print("\n\n".join(texts))
    device = resolve_device(task.device)
    out = options.out
    if out is None and options.job:
        out = RESULTS / f"ab_{task.name}-photos_{short_name(device)}_{time.strftime('%Y%m')}.md"
    if out is not None:
        image = out.with_suffix(".png")
        plot(image, records, names, seeds, CURVE)
        texts.append(f"![{CURVE} over images seen]({image.name})")
        words = [Path(word).name if os.sep in word else word for word in sys.argv[1:]]
        command = " ".join(["python benchmarks/ab_distillation.py", *words])
        settings = {"kimg": task.job.kimg, "images measured": task.job.num, "seeds": seeds}
        settings |= {"checkpoint": task.checkpoint.name, "data": task.data.name, "recipe": task.job.recipe}
        settings |= {"arms": "; ".join(options.arms or task.job.arms)}
        title = f"Self-distillation against plain training: {task.name}"
        write_report(out, title, command, texts, {"machine": machine(device), "settings": settings})


def parse() -> argparse.Namespace:
    """Parse the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--job", choices=JOBS)
    parser.add_argument("--make-base", choices=BASES, help="train the checkpoint of a job")
    parser.add_argument("--photos", type=Path, help="zip of photographs, one folder for each class, for jobs")
    parser.add_argument("--checkpoint", help="without --job: file, name or URL (default: the bundled one)")
    parser.add_argument("--data", type=Path, help="without --job: images")
    parser.add_argument("--recipe", default="improve", choices=OF_THE_DEMO, help="without --job")
    parser.add_argument("--arm", action="append", dest="arms", metavar="NAME:OPTION=VALUE,…")
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--kimg", type=float)
    parser.add_argument("--num", type=int, help="generated images for the metrics at the end")
    parser.add_argument("--measurements", type=int, default=4, help=f"of {CURVE} in each run")
    parser.add_argument("--metrics", help="at the end of each run; with --make-base, at snapshots")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time, that share a GPU")
    parser.add_argument("--work", type=Path, default=Path("ab-work"), help="where runs and records are kept")
    parser.add_argument("--out", type=Path, help="Markdown file of the report, with a plot beside it")
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    try:
        if options.make_base:
            make_base(options, options.make_base)
        else:
            compare(options, task_of(options))
    except (FinetuneError, ValueError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("Interrupted. Call again to resume.")


if __name__ == "__main__":
    main()
