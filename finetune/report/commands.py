"""Suggest commands for a finished run, quoted for a shell."""

from __future__ import annotations

import shlex
from pathlib import Path

from finetune.report.read import RunRecord, read_run
from finetune.report.status import duration, metrics


def continue_command(run_dir: Path, kimg: float | None = None) -> str:
    """Return the command that resumes a run; kimg: a new length."""
    length = ["--kimg", f"{kimg:g}"] if kimg else []
    return shlex.join(["finetune", "train", "--resume", str(run_dir), *length])


def snapshot_commands(run: RunRecord, snapshot: Path) -> list[str]:
    """Return the commands that generate images from a snapshot of a run and that export it."""
    number = run.path.resolve().name.split("-")[0]
    labels = run.about.get("labels") or {}
    network, size = ["--network", str(snapshot)], labels.get("size") or 0
    label = ["--class", "0"] if size else []
    if labels.get("kind") == "vectors":
        label = ["--label", ",".join("0" * size)]
    return [
        shlex.join(["finetune", "generate", *network, *label, "--seeds", "0-15", "--outdir", "images"]),
        shlex.join(["finetune", "export", *network, "--out", f"fine-tuned-{number}.pkl"]),
    ]


def end_message(run_dir: Path, snapshot: Path, nimg: int, why: str) -> str:
    """Return the last lines of a run: the recommended snapshot, its metrics, and what to do next.

    nimg: images seen at the snapshot; why: the reason for it.
    """
    run = read_run(run_dir)
    taken = f" in {duration(run.log[-1]['sec'])}" if run.log else ""
    measured = [metrics(line) for line in run.log if line["nimg"] == nimg and line.get("metrics")]
    return "\n".join(
        [
            f"Done: {run.kimg:g} kimg{taken}. Page of the run: {run_dir / 'report.html'}",
            f"Recommended: {snapshot.name}, {why}.",
            *(f"Its metrics: {each}" for each in measured),
            "To generate images, to export the network, to train further:",
            *(f"  {command}" for command in snapshot_commands(run, snapshot)),
            f"  {continue_command(run_dir, 2 * run.total_kimg)}",
        ]
    )
