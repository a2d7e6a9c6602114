"""Publishing on, and loading from, a stand-in for the Hugging Face Hub."""

from __future__ import annotations

import dataclasses
import importlib
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hub.hub_server import HubServer
from PIL import Image

import finetune
from finetune.cli import cli
from finetune.cli.export import with_license
from finetune.errors import CheckpointError, ConfigError
from finetune.export.publish import model_card, push
from finetune.hub import huggingface
from finetune.hub.huggingface import Address, choose, parse
from finetune.sampling import generate
from finetune.train.downloads import missing_checkpoint

pytest.importorskip("huggingface_hub", reason="needs huggingface_hub (extra hub)")


@pytest.fixture
def server(monkeypatch, tmp_path):
    """The server, which huggingface_hub takes for the Hub, with a cache of this test's own."""
    server = HubServer()
    for module in [name for name in sys.modules if name.split(".")[0] == "huggingface_hub"]:
        monkeypatch.delitem(sys.modules, module)  # it reads the variables once
    for name, value in {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_TOKEN": "hf_test",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    importlib.import_module("huggingface_hub")
    yield server
    server.shutdown()
    server.server_close()


def run(*args, code=0):
    result = CliRunner().invoke(cli, [*map(str, args)], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture
def run_dir(golden_dir, tmp_path):
    """A folder as a run leaves it: a snapshot, and a log that measured it."""
    checkpoint = finetune.load(golden_dir / "stylegan2-32.pkl")
    folder = tmp_path / "run"
    folder.mkdir()
    from finetune.export.stylegan_pickle import save_stylegan_pickle

    save_stylegan_pickle(
        folder / "network-snapshot-000002.pkl",
        G=None,
        D=None,
        G_ema=checkpoint.G_ema,
        provenance={"source": None, "training": {"data": "cats|<b>.zip"}, "nimg": 2000},
    )
    line = {"nimg": 2000, "metrics": {"num": 500, "fd-effnet": 123.456, "fd-effnet_spread": 1.0}}
    (folder / "log.jsonl").write_text(json.dumps(line) + "\n")
    return folder


def test_push_and_load_again(server, run_dir, tmp_path, monkeypatch):
    words = ("hub", "push", run_dir, "me/cats", "--license", "CC-BY-4.0, https://example.org/license")
    output = run(*words, "--accept-license")
    assert "License: CC-BY-4.0, https://example.org/license" in output and "(private): " in output
    repo = server.repos["me/cats"]
    assert repo["private"] and set(repo["files"]) == {"README.md", "model.safetensors", "samples.png"}
    card = repo["files"]["README.md"].decode()
    for text in (
        "license: cc-by-4.0",
        "stylegan2 at 32 x 32 px, trained for 2 kimg.",
        'finetune.load("hf://me/cats")',
        "cats  b .zip",
        "with 500 generated images",
        "| fd-effnet | 123.5 |",
        "![16 images: seeds 0 to 15",
    ):
        assert text in card, text
    assert "_spread" not in card

    again = finetune.load("hf://me/cats")
    source = finetune.load(run_dir)
    assert all(map(lambda a, b: a.equal(b), source.G_ema.parameters(), again.G_ema.parameters()))
    assert again.provenance.licence == "CC-BY-4.0, https://example.org/license"
    monkeypatch.setenv("FINETUNE_OFFLINE", "1")
    before = len(server.requests)
    assert finetune.load("hf://me/cats/model.safetensors").missing == ["G", "D"]
    assert finetune.load(Path("hf://me/cats")).missing == ["G", "D"] and len(server.requests) == before
    with pytest.raises(CheckpointError, match=r"hf://me/cats/other\.pkl is not on this machine, and"):
        finetune.load("hf://me/cats/other.pkl")
    with pytest.raises(CheckpointError, match="hf://me/dogs: finding it on this machine failed"):
        finetune.load("hf://me/dogs")
    assert missing_checkpoint("hf://me/cats") is None
    assert missing_checkpoint("hf://me/dogs") == "checkpoint hf://me/dogs"
    assert "forbids it" in run("hub", "push", run_dir, "me/x", "--license", "MIT", "--accept-license", code=2)


def test_push_refusals(server, run_dir):
    assert "license is not known. State it with --license" in run("hub", "push", run_dir, "me/cats", code=2)
    output = run("hub", "push", run_dir, "me/cats", "--license", "MIT", code=2)
    assert "License: MIT" in output and "use --accept-license" in output
    assert "not a repository" in run("hub", "push", run_dir, "cats", "--license", "MIT", code=2)
    assert server.requests == []
    server.repos["me/seen"] = {"private": False, "files": {}}
    words = ("hub", "push", run_dir, "me/seen", "--license", "House rules", "--accept-license")
    assert "this repository is public. Use --public" in run(*words, code=2)
    assert server.repos["me/seen"]["files"] == {}
    assert "(public)" in run(*words, "--public")
    card = server.repos["me/seen"]["files"]["README.md"].decode()
    assert "license: other" in card and "license_name: House rules" in card


@pytest.mark.parametrize(
    ("license", "word"),
    [
        ("MIT License", "mit"),
        ("cc-by-nc-4.0 (stated by hf://you/cats)", "cc-by-nc-4.0"),
        ("MIT-0", "other"),
        ("MIT; NVIDIA Source Code License (non-commercial)", "other"),
        ("not known; MIT", None),
        ("CC0-1.0 (recognized by the file name alone); MIT", None),
    ],
)
def test_model_card_states_a_license_that_is_certain(golden_dir, license, word):
    checkpoint = finetune.load(golden_dir / "stylegan2-32.pkl")
    origin = dataclasses.replace(checkpoint.provenance, licence=license)
    checkpoint = dataclasses.replace(checkpoint, provenance=origin)
    if word is not None:
        assert f"\nlicense: {word}\n" in model_card(checkpoint, "me/cats")
        return
    with pytest.raises(ConfigError, match="license is not certain"):
        model_card(checkpoint, "me/cats")
    assert with_license(checkpoint, "House rules").provenance.licence == "House rules"


def test_model_card_names_both_parents_of_a_blend(golden_dir):
    checkpoint = finetune.load(golden_dir / "stylegan2-32.pkl")
    base, second = ({"source": f"{name}.pkl", "sha256": name * 64} for name in "ab")
    blended = {**second, "sha256": "c" * 64, "source": "second.pkl", "parent": base}
    origin = dataclasses.replace(
        checkpoint.provenance, source="blend.pkl", licence="MIT", parent=base, blended_with=blended
    )
    card = model_card(dataclasses.replace(checkpoint, provenance=origin), "me/blend")
    listed = [line for line in card.split("## Origin")[1].splitlines() if line]
    names = ["- blend.pkl", "  blended with:", "  - second.pkl", "  - a.pkl", "- a.pkl"]
    assert all(line.startswith(name) for line, name in zip(listed, names, strict=True))


def test_push_with_labels(server, golden_dir):
    checkpoint = finetune.load(golden_dir / "stylegan2-64-cond.pkl")
    checkpoint = dataclasses.replace(
        checkpoint, provenance=dataclasses.replace(checkpoint.provenance, licence="MIT")
    )
    number = checkpoint.network.c_dim
    push(checkpoint, "me/classes", which="G_ema")
    files = server.repos["me/classes"]["files"]
    card = files["README.md"].decode()
    assert f"class = seed mod {number}](samples.png)" in card and "--class 0 --outdir" in card
    sheet = np.asarray(Image.open(io.BytesIO(files["samples.png"])))
    first = next(generate(checkpoint.G_ema, [1], class_index=1 % number, truncation_psi=0.7))
    assert np.array_equal(sheet[:64, 64:128], first[1])
    vectors = dataclasses.replace(checkpoint, training_set_kwargs={"labels": "vectors"})
    card = model_card(vectors, "me/vectors")
    assert "samples.png" not in card and f"--label {','.join('0' * number)} --outdir" in card


def test_foreign_repository_has_the_license_of_its_card(server, golden_dir, run_dir, tmp_path):
    card = "---\nlicense: cc-by-nc-4.0\n---\n# cats\n"
    content = (golden_dir / "rosinality-32.pt").read_bytes()
    server.repos["you/cats"] = {"private": False, "files": {"README.md": card.encode(), "a/cats.pt": content}}
    output = run("export", "--network", "hf://you/cats", "--out", tmp_path / "cats.pkl")
    assert "Fetching hf://you/cats/a/cats.pt" in output
    assert output.count("cc-by-nc-4.0 (stated by hf://you/cats)") == 2
    assert finetune.load(tmp_path / "cats.pkl").provenance.licence == "cc-by-nc-4.0 (stated by hf://you/cats)"
    ours = (run_dir / "network-snapshot-000002.pkl").read_bytes()  # states no license
    server.repos["you/ours"] = {"private": False, "files": {"README.md": card.encode(), "x.pkl": ours}}
    assert finetune.load("hf://you/ours").provenance.licence == "cc-by-nc-4.0 (stated by hf://you/ours)"


def test_path_in_the_cache_needs_neither_library_nor_network(server, golden_dir, tmp_path, monkeypatch):
    folder = tmp_path / "hub" / "models--you--cats" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    path = folder / "net.pkl"
    path.write_bytes((golden_dir / "stylegan2-ada-32.pkl").read_bytes())
    assert finetune.load(path).provenance.licence is None and server.requests == []
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert finetune.load(path).provenance.licence is None


def test_load_refusals(server):
    server.repos["you/two"] = {"private": False, "files": {"a.pkl": b"", "b.pkl": b"", "c.txt": b""}}
    for network, words in (
        ("hf://you/none", "hf://you/none: downloading failed"),
        ("hf://you/two", r"has 2 checkpoints \(checkpoints: a.pkl, b.pkl\)"),
        ("hf://you/two/d.pkl", "hf://you/two/d.pkl: downloading failed"),
        ("hf://you", "hf://you is not an address"),
    ):
        with pytest.raises(CheckpointError, match=words):
            finetune.load(network)


def test_address_parse_and_choose():
    assert parse("hf://a/b") == Address("a/b")
    assert parse("hf:/a/b@v1/c/d.pt") == Address("a/b", "v1", "c/d.pt")
    assert str(parse("hf://a/b@v1/c/d.pt")) == "hf://a/b@v1/c/d.pt"
    assert parse("a/b") is None and parse("https://example.org/hf:/a/b") is None
    assert choose(Address("a/b"), ["README.md", "x.pkl", "y.safetensors", "z.PT"]) == "y.safetensors"
    assert choose(Address("a/b"), ["z.PT", "README.md"]) == "z.PT"


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match="needs the package huggingface_hub") as caught:
        huggingface.library()
    assert "stylegan-finetune[hub]" in caught.value.hint
    with pytest.raises(CheckpointError, match="needs the package"):
        finetune.load("hf://a/b")


def test_push_in_python_needs_a_license(golden_dir):
    with pytest.raises(ConfigError, match="license is not known"):
        push(finetune.load(golden_dir / "stylegan2-32.pkl"), "me/cats")
