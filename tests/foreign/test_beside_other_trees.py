"""Started beside another StyleGAN tree, with packages called torch_utils and dnnlib of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TREE = Path(__file__).parent / "tree"
FOREIGN_FIRST = os.pathsep.join([str(TREE), str(ROOT)])


def run(*words: str, cwd: Path = ROOT, path: str = FOREIGN_FIRST) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *words], cwd=cwd, env=env, capture_output=True, text=True)


STARTS = {
    "foreign tree on PYTHONPATH": ("-m", "finetune"),
    "console script": ("-c", "import sys; from finetune.cli import main; sys.exit(main())"),
}


@pytest.mark.parametrize(
    ("start", "where"),
    [
        pytest.param(start, where, marks=() if where == "both" else pytest.mark.slow)
        for start in STARTS
        for where in ("path", "cwd", "both")
    ],
)
def test_import_uses_own_packages_in_commands(start, where, golden_dir, tmp_path):
    cwd = tmp_path if where == "path" else TREE
    path = str(ROOT) if where == "cwd" else FOREIGN_FIRST
    words = ("generate", "--network", str(golden_dir / "stylegan2-ada-32.pkl"), "--seeds", "0")
    done = run(*STARTS[start], *words, "--outdir", str(tmp_path / "out"), cwd=cwd, path=path)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "out").glob("*.png"))


def test_import_uses_own_packages_in_workers(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import multiprocessing\n"
        "import finetune\n"
        "def where():\n"
        "    import dnnlib, torch_utils\n"
        "    return dnnlib.__file__, torch_utils.__file__\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print(*pool.apply(where), sep='\\n')\n"
    )
    done = run(str(program), cwd=TREE)
    places = [Path(line) for line in done.stdout.split()]
    assert places == [ROOT / "dnnlib/__init__.py", ROOT / "torch_utils/__init__.py"], done.stderr


@pytest.mark.parametrize("name", ["torch_utils", "dnnlib"])
def test_import_refuses_packages_of_another_tree(name):
    done = run("-c", f"import {name}\nimport finetune", cwd=TREE)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ImportError: finetune needs its own package {name}")
    assert str(TREE) in last and "import finetune first" in last


def test_import_accepts_own_packages():
    done = run("-c", "import torch_utils, dnnlib, finetune; print(finetune.__version__)", path=str(ROOT))
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_import_uses_own_packages_in_background_build(monkeypatch):
    from torch_utils import custom_ops

    started = {}
    monkeypatch.setattr(custom_ops.subprocess, "Popen", lambda words, **options: started.update(options))
    monkeypatch.setenv("PYTHONPATH", str(TREE))
    monkeypatch.chdir(TREE)
    custom_ops._start_detached(["x"])
    monkeypatch.undo()
    where = "import torch_utils; print(torch_utils.__file__)"
    words = [sys.executable, "-P", "-c", where]
    done = subprocess.run(words, env=started["env"], capture_output=True, text=True)
    assert Path(done.stdout.strip()) == ROOT / "torch_utils/__init__.py"


@pytest.mark.slow
def test_import_uses_own_packages_under_torchrun(tmp_path):
    """Two ranks train and save; foreign packages are first on PYTHONPATH and in the current folder."""
    words = "--scratch stylegan2 --resolution 16 --cbase 128 --cmax 8 --z-dim 8 --map-depth 2 --kimg 0.008"
    data = ROOT / "finetune/demo/faces-flat.zip"
    done = run(
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "finetune", "train"),
        *(*words.split(), "--batch", "4", "--sd-weight", "0", "--device", "cpu", "--gpus", "3"),
        *("--data", str(data), "--outdir", str(tmp_path)),
        cwd=TREE,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Done: 0.008 kimg") == 1 and list(tmp_path.glob("*/network-snapshot-*.pkl"))
    assert done.stderr.count("--gpus 3 has no effect: torchrun has started 2 processes.") == 1


@pytest.mark.slow
def test_import_in_notebook_beside_another_tree(monkeypatch):
    """A kernel whose current folder is another tree."""
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient and ipykernel")
    nbformat = pytest.importorskip("nbformat", reason="needs nbformat")
    pytest.importorskip("ipykernel", reason="needs ipykernel")
    monkeypatch.setenv("PYTHONPATH", FOREIGN_FIRST)

    def run_cells(*cells: str):
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
        place = {"metadata": {"path": TREE}}
        client = nbclient.NotebookClient(notebook, kernel_name="python3", resources=place)
        return client.execute().cells[-1].outputs[0].text

    said = run_cells("import finetune", "import torch_utils; print(torch_utils.__file__)")
    assert Path(said.strip()) == ROOT / "torch_utils/__init__.py"
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="Restart it"):
        run_cells("import torch_utils", "import finetune")
