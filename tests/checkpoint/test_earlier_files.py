"""Keys inside files keep their spelling: what commit 55a9cab wrote opens with license, lineage and options.

The files are of `finetune train --scratch stylegan2` (8 px), `finetune export --licence "CC0 1.0"`, `finetune
train --resume` of that, and `finetune export --format safetensors` of the snapshot.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import safetensors
import torch

import finetune
from finetune.checkpoint.rebuild import tensors_of
from finetune.checkpoint.unpickle.files import read_pickle
from finetune.export.save import save

FILES = Path(__file__).parent / "files"
PICKLE, TENSORS = FILES / "run-of-55a9cab.pkl", FILES / "run-of-55a9cab.safetensors"
BASE = "258ca9398cb522a48c5043f54b3558b56d956bdbde8caecaba62cd17c866c4ac"  # that the run started from


@pytest.mark.parametrize("path", [PICKLE, TENSORS], ids=["pickle", "safetensors"])
def test_load_earlier_files_provenance(path):
    checkpoint = finetune.load(path)
    origin = checkpoint.provenance
    assert (origin.generation, origin.licence, origin.nimg) == ("finetune", "CC0 1.0", 24)
    assert origin.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (origin.training["resume"], origin.training["kimg"]) == ("base.pkl", 0.024)
    assert (origin.training["sd_weight"], origin.training["gamma"]) == ("auto:1", 0.5)
    parent = origin.parent
    assert (parent["source"], parent["sha256"], parent["size"]) == ("base.pkl", BASE, 129694)
    assert (parent["licence"], parent["nimg"], parent["parent"]) == ("CC0 1.0", 16, None)
    assert parent["training"]["scratch"] == "stylegan2" and len(parent["training"]) == 53
    assert checkpoint.training_set_kwargs["resolution"] == 8
    assert checkpoint.missing == []


def test_load_earlier_files_have_equal_networks():
    one, other = finetune.load(PICKLE), finetune.load(TENSORS)
    for name in ("G", "D", "G_ema"):
        ours, theirs = tensors_of(getattr(one, name)), tensors_of(getattr(other, name))
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name


def keys(value):
    """The keys of nested dicts, except those of training options, which come and go."""
    if not isinstance(value, dict):
        return None
    return {key: None if key == "training" else keys(inner) for key, inner in value.items()}


def test_export_keeps_keys_of_earlier_files(tmp_path):
    checkpoint = finetune.load(TENSORS)
    save(checkpoint, tmp_path / "a.pkl")
    save(checkpoint, tmp_path / "a.safetensors")
    before, today = (keys(read_pickle(path).root["finetune"]) for path in (PICKLE, tmp_path / "a.pkl"))
    assert before == {key: today[key] for key in before}
    assert today.keys() - before.keys() == {"licence", "exported_from"}
    headers = []
    for path in (TENSORS, tmp_path / "a.safetensors"):
        with safetensors.safe_open(path, framework="numpy") as file:
            headers.append(file.metadata())
    before, today = headers
    assert before.keys() == today.keys() and before["licence"] == today["licence"] == "CC0 1.0"
    assert before["networks"] == today["networks"] and before["format"] == today["format"]
