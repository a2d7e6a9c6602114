"""The commands to continue with after a run, quoted for a shell."""

from __future__ import annotations

import shlex
from pathlib import Path


def continue_command(run_dir: Path, kimg: float | None = None) -> str:
    """Return the command that resumes a run; kimg: a new length."""
    return shlex.join(
        ["finetune", "train", "--resume", str(run_dir), *(["--kimg", f"{kimg:g}"] if kimg else [])]
    )


def next_commands(run_dir: Path, snapshot: Path) -> list[str]:
    """Return the commands that generate images from a snapshot, export it, and show the page of the run."""
    name = run_dir.name[:5] if run_dir.name[:5].isdigit() else "run"
    return [
        shlex.join(
            [*"finetune generate --network".split(), str(snapshot), "--seeds", "0-15", "--outdir", "images"]
        ),
        shlex.join([*"finetune export --network".split(), str(snapshot), "--out", f"fine-tuned-{name}.pkl"]),
        shlex.join(["finetune", "report", str(run_dir)]),
    ]
