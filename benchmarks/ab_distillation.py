"""Does self-distillation help? The same checkpoint, data, seeds and images seen, with different options.

    python benchmarks/ab_distillation.py --preset cpu-quick
    python benchmarks/ab_distillation.py --preset cpu --out benchmarks/results/ab_<machine>_<yyyymm>.md
    python benchmarks/ab_distillation.py --preset gpu --checkpoint ffhq-256-stylegan2 --improve ffhq.zip \\
        --adapt art.zip
    python benchmarks/ab_distillation.py --arm plain:sd_weight=0 --arm half:sd_weight=0.5 --jobs improve
    python benchmarks/ab_distillation.py --preset cpu --pretrain stylegan3-t:kimg=30,cbase=512,cmax=32

Jobs: `improve` continues on the checkpoint's own images, `adapt` trains on others. Every arm is a set of
option overrides (`NAME:option=value,option=value`); the first one is what the others are compared with. Runs
are identified by their options: what is finished in --work is not run again, so more arms or seeds can be
added later, and an interrupted call resumes. `--pretrain` makes the checkpoint first, from random weights on
the images of `improve` (seed 0, no self-distillation), and keeps it in --work.

The table holds, for each metric, the value at the start, at the end and at its best (mean ± deviation over
seeds), and the differences to the first arm, seed by seed, with Student's 95 % interval of their mean: what
holds 0 is within the spread. Where the arms are equal, one comparison in twenty leaves 0 out by chance. Costs
are given by phase: `Gdistill` in parts of the other phases of the same run, which other work on the machine
does not change.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import _checkout  # noqa: F401
import torch
from ab_report import COSTS, HEADER, Records, costs_of, plot, rows_of, seeds_of
from measuring import ROOT, machine, table, write_report
from rich.console import Console

from finetune.config import TrainOptions
from finetune.data import ImageSet
from finetune.data.decode import open_image
from finetune.data.sources import open_source
from finetune.device import resolve_device
from finetune.errors import FinetuneError
from finetune.metrics.evaluate import Evaluation
from finetune.models import image_size
from finetune.resolve import load, resolve_network
from finetune.train import RunResult, prepare, run

DEMO = ROOT / "finetune" / "demo"
SMALL: dict[str, Any] = dict(
    batch=8, mirror=True, augpipe="color", workers=0, sd_backbone="efficientnet-lite0"
)
OFFLINE = "fd-effnet,random-fid,kid-effnet,prc-effnet"
ARMS = ("plain:sd_weight=0", "sd:sd_weight=auto:1", "sd-weak:sd_weight=auto:0.2")
PRESETS: dict[str, dict[str, Any]] = {
    "cpu-quick": dict(kimg=0.8, seeds=[0], num=256, measurements=2, options=SMALL),
    "cpu": dict(kimg=8.0, seeds=[0, 1, 2], num=1000, measurements=4, options=SMALL),
    "gpu": dict(
        kimg=1000.0, seeds=[0, 1, 2], num=10_000, measurements=5, options={}, metrics="fid,random-fid,kid,prc"
    ),
}
# What the bundled checkpoint was trained with, and what its demo uses for other images.
OF_THE_DEMO: dict[str, dict[str, Any]] = {
    "improve": dict(recipe="improve", gamma=0.4, glr=0.0025, dlr=0.0025, ema_kimg=2.5),
    "adapt": dict(recipe="adapt", gamma=0.2, glr=0.0025, dlr=0.0025, ema_kimg=1.0, freezed=0),
}
# The size of the bundled checkpoint, for --pretrain on CPUs.
PRETRAINED: dict[str, Any] = dict(
    cbase=1024,
    cmax=96,
    z_dim=64,
    map_depth=4,
    gamma=0.4,
    glr=0.0025,
    dlr=0.0025,
    aug="ada",
    **SMALL,
)
# Fields that depend on the machine, not on the result.
NOT_COMPARED = ("outdir", "data", "resume", "device", "workers")


@dataclasses.dataclass(frozen=True)
class Arm:
    """A named set of option overrides."""

    name: str
    options: dict[str, Any]


def parse_arm(text: str, flag: str = "--arm") -> Arm:
    """Parse `NAME:option=value,…`; values are JSON if possible, else text. Exit for an unknown option."""
    name, _, rest = text.partition(":")
    options = {}
    for pair in filter(None, rest.split(",")):
        key, _, value = pair.partition("=")
        key = key.strip().replace("-", "_")
        if key not in TrainOptions.__dataclass_fields__ or not value:
            sys.exit(f"{flag} {text}: {pair!r} is no option=value of finetune train.")
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    return Arm(name, options)


def config_of(options: argparse.Namespace, job: str, seed: int, arm: Arm) -> TrainOptions:
    """Return all options of one run."""
    preset = PRESETS[options.preset]
    settings = {
        "data": str(options.improve if job == "improve" else options.adapt),
        "resume": str(options.checkpoint),
        "kimg": options.kimg,
        "tick": options.kimg / options.measurements,
        "snap": 1,  # metrics are computed at snapshots
        "keep": 1,
        "metrics": options.metrics,
        "metrics_num": options.num,
        "device": options.device,
        "seed": seed,
        **preset["options"],
        **(OF_THE_DEMO[job] if is_like_the_demo(options) else {"recipe": job}),
    }
    return TrainOptions(**(settings | arm.options))


def is_like_the_demo(options: argparse.Namespace) -> bool:
    """Return whether the checkpoint was trained with the settings of the demo's."""
    made_small = options.pretrain is not None and options.preset != "gpu"
    return made_small or options.checkpoint.name == "faces-3d-64.pkl"


def pretrained(options: argparse.Namespace) -> Path:
    """Return the checkpoint of --pretrain, from --work or trained there from random weights."""
    family, changes = options.pretrain.name, options.pretrain.options
    if "kimg" not in changes:
        sys.exit(f"--pretrain {family}: duration missing. Give it as in {family}:kimg=30.")
    source = open_source(options.improve)
    config = TrainOptions(
        **{
            "data": str(options.improve),
            "scratch": family,
            "resolution": open_image(source.read(source.names[0])).width,
            "sd_weight": 0,
            "device": options.device,
            **(PRETRAINED if options.preset != "gpu" else {}),
            **changes,
        }
    )
    key = hashlib.sha256(config.to_json().encode()).hexdigest()[:10]
    checkpoint = (
        options.work / f"pretrained-{family}-{options.improve.stem}-{changes['kimg']:g}kimg-{key}.pkl"
    )
    if not checkpoint.is_file():
        folder = options.work / checkpoint.stem
        shutil.rmtree(folder, ignore_errors=True)
        print(f"training {checkpoint.name} …", flush=True)
        result = run(dataclasses.replace(config, outdir=str(folder)), console=Console(stderr=True))
        check_whole(result, config, folder)
        shutil.move(result.snapshot, checkpoint)
        shutil.rmtree(folder)
    return checkpoint


def check_whole(result: RunResult, config: TrainOptions, folder: Path) -> None:
    """Exit if a run was ended early, by a signal."""
    assert config.kimg is not None
    if result.nimg < round(config.kimg * 1000):
        sys.exit(f"{folder} ended after {result.nimg / 1000:g} of {config.kimg:g} kimg; it is not kept.")


def check_same(folder: Path, then: dict[str, Any], config: TrainOptions) -> None:
    """Exit if a kept record was made with defaults other than today's."""
    now = prepare(config).config.to_dict()
    is_plain = now["sd_weight"] == 0  # then the other options of self-distillation decide nothing
    changed = [
        f"{name} {then[name]} → {now[name]}"
        for name in sorted(then.keys() & now.keys())
        if then[name] != now[name] and name not in NOT_COMPARED and not (is_plain and name.startswith("sd_"))
    ]
    if changed:
        found = ", ".join(changed)
        sys.exit(f"{folder} was run with other defaults ({found}); delete it, or name them in the arm.")


def run_one(options: argparse.Namespace, job: str, seed: int, arm: Arm) -> dict[str, Any]:
    """Return the record of one run, from --work if it is there; its snapshot is deleted."""
    config = config_of(options, job, seed, arm)
    key = hashlib.sha256(config.to_json().encode()).hexdigest()[:10]
    folder = options.work / f"{job}-{arm.name}-seed{seed}-{key}"
    record = folder / "record.json"
    if record.is_file():
        found = json.loads(record.read_text(encoding="utf-8"))
        check_same(folder, found["config"], config)
        return found
    shutil.rmtree(folder, ignore_errors=True)  # what an interrupted call has left
    print(f"{job}, {arm.name}, seed {seed} …", flush=True)
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        result = run(dataclasses.replace(config, outdir=str(folder)), console=Console(file=nowhere))
    check_whole(result, config, folder)
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
    for left in (*result.run_dir.glob("*.pkl"), *result.run_dir.glob("training-state-*")):
        left.unlink()
    return found


def start_of(options: argparse.Namespace, job: str) -> dict[str, float]:
    """Return the metrics of the checkpoint itself."""
    config = config_of(options, job, 0, Arm("", {}))
    place = options.work / f"start-{job}-{hashlib.sha256(config.to_json().encode()).hexdigest()[:10]}.json"
    if place.is_file():
        return json.loads(place.read_text(encoding="utf-8"))
    device = resolve_device(options.device)
    G: Any = load(options.checkpoint, device=device).best
    images = ImageSet(
        config.data,
        resolution=image_size(G),
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


def parse() -> argparse.Namespace:
    """Parse the command line; the preset fills in missing options."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--preset", default="cpu-quick", choices=PRESETS)
    parser.add_argument("--jobs", nargs="+", default=["improve", "adapt"], choices=["improve", "adapt"])
    parser.add_argument("--arm", action="append", dest="arms", metavar="NAME:OPTION=VALUE,…")
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--kimg", type=float)
    parser.add_argument("--num", type=int, help="generated images for a measurement")
    parser.add_argument("--measurements", type=int, help="in each run")
    parser.add_argument("--metrics")
    parser.add_argument("--checkpoint", help="file, name or URL (default: the bundled one)")
    parser.add_argument(
        "--pretrain", metavar="FAMILY:kimg=N,…", help="make the checkpoint first: stylegan2, stylegan3-t, -r"
    )
    parser.add_argument(
        "--improve", type=Path, default=DEMO / "faces-3d.zip", help="the checkpoint's own images"
    )
    parser.add_argument("--adapt", type=Path, default=DEMO / "faces-flat.zip", help="other images")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--work", type=Path, default=Path("ab-work"), help="where runs and their records are kept"
    )
    parser.add_argument(
        "--out", type=Path, help="write tables and a plot to this Markdown file and beside it"
    )
    options = parser.parse_args()
    preset = {"metrics": OFFLINE, **PRESETS[options.preset]}
    for name in ("seeds", "kimg", "num", "measurements", "metrics"):
        if getattr(options, name) is None:
            setattr(options, name, preset[name])
    torch.set_num_threads(options.threads)
    if options.pretrain and options.checkpoint:
        sys.exit("--pretrain makes the checkpoint that --checkpoint names: give one of them.")
    options.arms = [parse_arm(text) for text in options.arms or ARMS]
    if options.pretrain:
        options.pretrain = parse_arm(options.pretrain, "--pretrain")
        options.checkpoint = pretrained(options)
    else:
        options.checkpoint = resolve_network(options.checkpoint or str(DEMO / "faces-3d-64.pkl"))
    return options


def main() -> None:
    try:
        options = parse()
        compare(options)
    except FinetuneError as error:
        sys.exit(str(error))


def compare(options: argparse.Namespace) -> None:
    """Run what is missing, print the tables, and write the report."""
    arms, seeds = options.arms, options.seeds
    names = [arm.name for arm in arms]
    texts: list[str] = []
    jobs: dict[str, Records] = {}
    starts: dict[str, dict[str, float]] = {}
    for job in options.jobs:
        starts[job] = start_of(options, job)
        # Seed by seed, so that an interrupted call leaves whole comparisons.
        records = {(arm.name, seed): run_one(options, job, seed, arm) for seed in seeds for arm in arms}
        jobs[job] = records
        texts += [f"## {job}", table(HEADER, rows_of(records, names, seeds, starts[job]))]
        by_seed, *rows = seeds_of(records, names, seeds)
        texts += [table(by_seed, rows), table(COSTS, costs_of(records, names, seeds))]
    print("\n\n".join(texts))
    if options.out:
        image = options.out.with_suffix(".png")
        plot(image, jobs, names, seeds, starts)
        texts.append(f"![metrics over images seen]({image.name})")
        write_report(
            options.out,
            "Self-distillation against plain training",
            f"python {' '.join(sys.argv)}",
            texts,
            {"machine": machine(resolve_device(options.device)), "settings": public(options)},
        )


def public(options: argparse.Namespace) -> dict[str, Any]:
    """Return the command line without folders."""
    settings = {
        name: str(value)
        for name, value in vars(options).items()
        if name not in ("arms", "pretrain", "out", "work", "checkpoint", "improve", "adapt")
    }
    for name in ("checkpoint", "improve", "adapt"):
        settings[name] = Path(getattr(options, name)).name
    settings["arms"] = [dataclasses.asdict(arm) for arm in options.arms]
    settings["pretrain"] = dataclasses.asdict(options.pretrain) if options.pretrain else None
    return settings


if __name__ == "__main__":
    main()
