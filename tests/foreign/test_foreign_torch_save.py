"""Exports of torch.save in stand-ins for the code that reads them, with golden numbers."""

from __future__ import annotations

import dataclasses
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from foreign.rosinality_port import discriminator, generator
from tolerances import NETWORK_F32, assert_close

import finetune
from finetune.checkpoint.rebuild import tensors_of
from finetune.export import rosinality, state_dict, stylegan_pickle
from finetune.models import stylegan2


@pytest.fixture(scope="module")
def numbers(golden_dir):
    with np.load(golden_dir / "rosinality-32.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def check(content, numbers):
    mean = content["latent_avg"]
    assert_close(generator(content["g_ema"], numbers["z"]), numbers["img"], NETWORK_F32, "img")
    truncated = generator(content["g_ema"], numbers["z"], mean, psi=0.7)
    assert_close(truncated, numbers["img_trunc07"], NETWORK_F32, "img_trunc07")
    assert_close(generator(content["g_ema"], numbers["z"], noise=0), numbers["img_nonoise"], NETWORK_F32)


def test_stand_in_of_the_port_computes_its_golden_numbers(golden_dir, numbers):
    check(torch.load(golden_dir / "rosinality-32.pt", weights_only=True), numbers)


def test_rosinality_export_gives_back_the_golden_tensors(golden_dir, numbers, tmp_path):
    """Golden file -> our network -> pickle -> our network -> file of the port."""
    mean = torch.load(golden_dir / "rosinality-32.pt", weights_only=True)["latent_avg"]
    checkpoint = finetune.load(golden_dir / "rosinality-32-train.pt")
    for G in (checkpoint.G_ema, checkpoint.G):
        G.mapping.w_avg.copy_(mean)
    stylegan_pickle.write(tmp_path / "net.pkl", checkpoint)
    rosinality.write(tmp_path / "net.pt", finetune.load(tmp_path / "net.pkl"))
    content = torch.load(tmp_path / "net.pt", weights_only=True)
    golden = torch.load(golden_dir / "rosinality-32-train.pt", weights_only=False)
    for name in ("g", "d", "g_ema"):
        assert content[name].keys() == golden[name].keys()
        assert all(torch.equal(content[name][key], golden[name][key]) for key in golden[name])
    check(content, numbers)
    assert_close(discriminator(content["d"], numbers["img"]), numbers["logits"], NETWORK_F32, "logits")


@pytest.mark.parametrize("half", [False, True])
def test_rosinality_export_of_official_network(golden_dir, golden_network, tmp_path, half):
    _, golden = golden_network("stylegan2-32")
    z = torch.from_numpy(golden["z"])
    finetune.save(finetune.load(golden_dir / "stylegan2-32.pkl"), tmp_path / "net.pt", half=half)
    content = torch.load(tmp_path / "net.pt", weights_only=True)
    assert content.keys() == {"g_ema", "latent_avg", "training_set_kwargs", "finetune"}
    img = generator(content["g_ema"], z)
    assert_close(img, golden["img"], 2e-2 if half else NETWORK_F32, "img")


def test_state_dict_export_loads_strictly(golden_dir, tmp_path):
    source = finetune.load(golden_dir / "stylegan2-64-cond.pkl")
    state_dict.write(tmp_path / "net.pth", source)
    content = torch.load(tmp_path / "net.pth", weights_only=True)
    G = stylegan2.Generator(**content["finetune"]["networks"]["G_ema"]["init_kwargs"])
    G.load_state_dict(content["G_ema"], strict=True)
    assert all(map(torch.equal, tensors_of(G).values(), tensors_of(source.G_ema).values()))
    assert dataclasses.asdict(finetune.load(tmp_path / "net.pth").provenance)["parent"]["generation"] == "sg3"


@pytest.mark.slow
def test_rosinality_export_in_oldest_torch(golden_dir, numbers, tmp_path):
    """With the interpreter $FOREIGN_PYTHON, of Python 3.8 and torch 1.9 for example."""
    if not (python := os.environ.get("FOREIGN_PYTHON")):
        pytest.skip("FOREIGN_PYTHON does not name a Python with an old torch")
    finetune.save(finetune.load(golden_dir / "rosinality-32.pt"), tmp_path / "net.pt")
    np.save(tmp_path / "z.npy", numbers["z"].numpy())
    program = (
        "import numpy, torch\nfrom rosinality_port import generator\n"
        "z, content = torch.from_numpy(numpy.load('z.npy')), torch.load('net.pt')\n"
        "numpy.save('img.npy', generator(content['g_ema'], z, content['latent_avg'], 0.7).numpy())"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([python, "-c", program], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_close(np.load(tmp_path / "img.npy"), numbers["img_trunc07"], NETWORK_F32, "img_trunc07")
