"""A pickle of ours opens in other code bases with a plain `pickle.load`, and computes golden numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN_NETWORKS, RECTANGLE
from tolerances import NETWORK_F16, NETWORK_F32, assert_close

import finetune
from finetune.export.provenance import entry_of
from finetune.export.stylegan_pickle import save_stylegan_pickle

HERE = Path(__file__).parent
NAMES = [*GOLDEN_NETWORKS, RECTANGLE]


def open_elsewhere(golden_dir, folder, python: str):
    """Every golden network as loaded here, and what another code base computes with its export."""
    checkpoints, arguments = {}, []
    for name in NAMES:
        checkpoint = checkpoints[name] = finetune.load(golden_dir / f"{name}.pkl")
        networks = {key: getattr(checkpoint, key) for key in ("G", "D", "G_ema", "augment_pipe")}
        save_stylegan_pickle(folder / f"{name}.pkl", **networks, provenance=entry_of(checkpoint))
        arguments += [folder / f"{name}.pkl", golden_dir / f"{name}.npz", folder / f"{name}.npz"]
    command = [python, "-I", HERE / "open_pickles.py", HERE / "tree", *arguments]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return {name: (checkpoints[name], dict(np.load(folder / f"{name}.npz"))) for name in NAMES}


@pytest.fixture(scope="session")
def opened(golden_dir, tmp_path_factory):
    return open_elsewhere(golden_dir, tmp_path_factory.mktemp("foreign"), sys.executable)


def check_golden(found, golden, name):
    tolerance = NETWORK_F16 if name == RECTANGLE else NETWORK_F32
    for key in ("ws", "img", "img_none", "logits_real"):
        assert_close(found[key], golden[key], tolerance, key)
    if "img_trunc" in golden:
        assert_close(found["img_trunc"], golden["img_trunc"], tolerance, "img_trunc")
    for key in ("img_copied", "img_pickled", "img_parts"):
        assert_close(found[key], found["img"], NETWORK_F32, key)


@pytest.mark.parametrize("name", NAMES)
def test_foreign_load_golden_values(opened, golden_network, name):
    check_golden(opened[name][1], golden_network(name)[1], name)


@pytest.mark.slow
def test_foreign_load_oldest_python(golden_dir, golden_network, tmp_path):
    """With the interpreter $FOREIGN_PYTHON, of Python 3.8 and torch 1.9 for example."""
    if not (python := os.environ.get("FOREIGN_PYTHON")):
        pytest.skip("FOREIGN_PYTHON does not name a Python with an old torch")
    for name, (_, found) in open_elsewhere(golden_dir, tmp_path, python).items():
        check_golden(found, golden_network(name)[1], name)
        assert found["trained"].all()


@pytest.mark.parametrize("name", NAMES)
def test_foreign_load_has_all_attributes_and_trains(opened, name):
    checkpoint, found = opened[name]
    G = checkpoint.G_ema
    assert not found["modes"].any()
    assert found["trained"].all()
    assert list(found["sizes"]) == [G.z_dim, G.c_dim, G.w_dim, G.img_resolution, G.img_channels, G.num_ws]
    assert json.loads(str(found["init_kwargs"])) == json.loads(json.dumps(G.init_kwargs))
    sums = [float(parameter.double().sum()) for parameter in checkpoint.G.parameters()]
    assert_close(found["param_sums"], np.array(sums), NETWORK_F32, "G")
    assert json.loads(str(found["entry"]))["source"]["sha256"] == checkpoint.provenance.sha256
    if checkpoint.augment_pipe is not None:
        _check_augmented(checkpoint.augment_pipe, found, name)


def _check_augmented(pipe, found, name):
    with np.load(HERE.parent / "golden" / f"{name}.npz") as golden:
        real = torch.from_numpy(golden["real"])
    pipe.p.fill_(1)
    assert_close(found["augmented"], pipe(real, debug_percentile=0.3), NETWORK_F32, "augmented")
