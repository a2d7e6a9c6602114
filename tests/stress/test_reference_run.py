"""Training computes what the reference commit computed, bit for bit (minutes; see reference_run.py)."""

import importlib.util
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REFERENCE = "55a9cab"  # before training was restructured


@pytest.mark.stress
def test_train_matches_reference_commit(tmp_path):
    checkout = tmp_path / "reference"
    git = ["git", "-C", str(ROOT), "worktree"]
    added = subprocess.run(
        [*git, "add", "--detach", str(checkout), REFERENCE], capture_output=True, text=True
    )
    if added.returncode:
        pytest.skip(f"the history has no {REFERENCE}: {added.stderr.strip()}")
    spec = importlib.util.spec_from_file_location(
        "reference_run", Path(__file__).with_name("reference_run.py")
    )
    reference_run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference_run)
    try:
        assert reference_run.compare(checkout, ROOT) == 0
    finally:
        subprocess.run([*git, "remove", "--force", str(checkout)], check=False)
