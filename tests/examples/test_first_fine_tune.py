"""The notebook runs from a checkpoint to a page."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_notebook_runs(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="needs nbclient (the extra `dev`)")
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient (the extra `dev`)")
    pytest.importorskip("ipykernel", reason="needs ipykernel (the extra `dev`)")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("FINETUNE_OFFLINE", "1")
    notebook = nbformat.read(ROOT / "examples/first_fine_tune.ipynb", as_version=4)
    assert all(not cell.outputs for cell in notebook.cells if cell.cell_type == "code")
    client = nbclient.NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    texts = [output.text for output in outputs if "text" in output]
    images = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(images) == 2 and any("better.pkl, read again" in text for text in texts)
    assert (tmp_path / "morph.webp").stat().st_size > 1000 and (tmp_path / "better.pkl").exists()
    assert len(list(tmp_path.glob("runs/*/report.html"))) == 1
