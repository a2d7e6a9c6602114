"""`finetune inspect`: the facts as text and as JSON, and what it says about files that it refuses."""

from __future__ import annotations

import json
import os
import pickle

import pytest
from checkpoint import forge
from click.testing import CliRunner

import finetune
from finetune.checkpoint.unpickle.files import read_pickle
from finetune.cli import cli
from finetune.export.save import save


@pytest.fixture
def inspect():
    return lambda *args: CliRunner().invoke(cli, ["inspect", *map(str, args)])


def test_inspect_json(inspect, golden_dir):
    path = golden_dir / "stylegan2-64-cond.pkl"
    result = inspect(path, "--json")
    assert result.exit_code == 0
    facts = json.loads(result.stdout)
    provenance = facts.pop("provenance")
    options = facts.pop("training_set_kwargs")
    assert facts == {
        "file": str(path),
        "generation": "sg3",
        "architecture": "stylegan2",
        "variant": "skip",
        "resolution": 64,
        "width": 64,
        "height": 64,
        "channels": 3,
        "classes": 5,
        "labels": None,
        "class_names": [],
        "z_dim": 32,
        "w_dim": 32,
        "num_ws": 10,
        "parameters": {"G": 72880, "D": 84072, "G_ema": 72880},
        "precision": {"weights": "float32", "num_fp16_res": 4, "conv_clamp": 256},
        "augment_pipe": False,
        "missing": [],
        "notes": [],
    }
    assert provenance["generation"] == "sg3" and provenance["size"] == path.stat().st_size
    assert len(provenance["sha256"]) == 64 and provenance["licence"] is None
    assert options["resolution"] == 64


def test_inspect_text(inspect, golden_dir):
    result = inspect(golden_dir / "stylegan2-tf-32.pkl")
    assert result.exit_code == 0
    lines = dict(line.split(None, 1) for line in result.stdout.splitlines())
    assert lines["generation"].startswith("tf: written by TensorFlow")
    assert lines["architecture"] == "stylegan2 skip"
    assert lines["resolution"] == "32 x 32"
    assert lines["classes"] == "none (unconditional)"
    assert lines["latents"] == "z 32, w 32, 8 ws"
    assert lines["parameters"] == "G 67,779, D 72,561, G_ema 67,779"
    assert lines["precision"] == "float32 weights; all layers run in float32; no clamping"
    assert lines["missing"] == "nothing" and lines["license"] == "not known"


def test_inspect_lineage(inspect, golden_dir, tmp_path):
    root = read_pickle(golden_dir / "stylegan2-ada-32.pkl").root
    first = {"source": "ffhq.pkl", "sha256": "ab" * 32, "licence": "non-commercial", "parent": None}
    entry = {"format": 1, "source": {**first, "source": "run-1.pkl", "parent": first}, "nimg": 12500}
    data = forge.dumps({"G_ema": root["G_ema"], "finetune": entry, "odd": 1})
    (tmp_path / "network-snapshot-000012.pkl").write_bytes(data)
    result = inspect(tmp_path)
    assert result.exit_code == 0
    for words in (
        "network-snapshot-000012.pkl",
        "finetune: written by finetune",
        "trained for   12.5 kimg",
        "started from  run-1.pkl (sha256 abab",
        "before that   ffhq.pkl (sha256 abab",
        "license       non-commercial",
        "missing       G, D",
        "note          unknown entries ignored: odd",
        "the 4 highest resolutions run in float16 on CUDA; clamped at 256",
    ):
        assert words in result.stdout, words
    facts = json.loads(inspect(tmp_path, "--json").stdout)
    assert facts["missing"] == ["G", "D"] and facts["parameters"]["D"] is None
    assert facts["provenance"]["parent"]["parent"]["source"] == "ffhq.pkl"


def test_inspect_discriminator_alone(inspect, golden_dir, tmp_path):
    root = read_pickle(golden_dir / "stylegan2-ada-32.pkl").root
    (tmp_path / "D.pkl").write_bytes(forge.dumps({"D": root["D"]}))
    result = inspect(tmp_path / "D.pkl")
    assert result.exit_code == 0
    assert "missing       G, G_ema" in result.stdout and "none (no generator)" in result.stdout


def test_inspect_safetensors(inspect, golden_dir, tmp_path):
    path = tmp_path / "net.safetensors"
    save(finetune.load(golden_dir / "stylegan3-t-32.pkl"), path)
    result = inspect(path)
    assert result.exit_code == 0
    assert "architecture  stylegan3-t" in result.stdout
    assert "started from  stylegan3-t-32.pkl (sha256 " in result.stdout


def test_inspect_escapes_text(inspect, golden_dir, tmp_path):
    root = read_pickle(golden_dir / "stylegan2-ada-32.pkl").root
    entry = {"source": {"source": "\x1b[31m\nlicense       free", "parent": [1]}}
    data = {"G_ema": root["G_ema"], "finetune": entry, "training_set_kwargs": {"path": "\ud800\x1b"}}
    (tmp_path / "net.pkl").write_bytes(forge.dumps(data))
    result = inspect(tmp_path / "net.pkl")
    assert "started from  ?[31m?license       free (sha256 not known)\n" in result.stdout
    assert json.loads(inspect(tmp_path / "net.pkl", "--json").stdout)["training_set_kwargs"] == {
        "path": "\ud800\x1b"
    }


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_inspect_refuses_pipe(inspect, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    result = inspect(tmp_path / "pipe")
    assert result.exit_code == 2 and "is not a file" in result.stderr


class Runs:
    def __reduce__(self):
        return os.system, ("exit 3",)


def test_inspect_hostile_file(inspect, tmp_path):
    path = tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps({"G_ema": Runs()}))
    result = inspect(path)
    assert result.exit_code == 2 and result.stdout == ""
    name = f"{os.system.__module__}.system"
    assert f"Error: {path} refers to {name} (at byte " in result.stderr
    assert "nothing was executed" in result.stderr and "Traceback" not in result.stderr


def test_inspect_missing_file(inspect, tmp_path):
    result = inspect(tmp_path / "missing.pkl")
    assert result.exit_code == 2 and "missing.pkl does not exist" in result.stderr
