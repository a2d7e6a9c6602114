from __future__ import annotations

import dataclasses
import errno
import os

import pytest
from click.testing import CliRunner

import finetune
from finetune.cli import cli
from finetune.export.stylegan_pickle import save_stylegan_pickle

NAME = "stylegan2-64-cond"


@pytest.fixture
def source(golden_dir):
    return golden_dir / f"{NAME}.pkl"


def run(*args, code=0):
    result = CliRunner().invoke(cli, ["export", *map(str, args)], catch_exceptions=False)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.output


@pytest.mark.parametrize(("file_format", "ending"), [("stylegan-pkl", "pkl"), ("safetensors", "safetensors")])
def test_export_command(source, tmp_path, file_format, ending):
    out = tmp_path / f"net.{ending}"
    output = run("--network", source, "--format", file_format, "--out", out)
    again = finetune.load(out)
    sha256 = finetune.load(source).provenance.sha256
    assert again.missing == [] and again.provenance.parent["sha256"] == sha256
    assert "264 tensors equal, 16 images, largest difference 0" in output
    assert f"Source: {source.name} (sha256 {sha256})" in output
    assert "License: not known" in output


def test_export_prints_lineage_and_license(source, tmp_path):
    checkpoint = finetune.load(source)
    parent = {
        "generation": "sg3",
        "source": "ffhq.pkl",
        "sha256": "ab" * 32,
        "size": 1,
        "licence": "CC-BY-NC-4.0",
    }
    snapshot = tmp_path / "snapshot.pkl"
    save_stylegan_pickle(
        snapshot,
        G=None,
        D=None,
        G_ema=checkpoint.G_ema,
        provenance={"source": parent, "training": {}, "nimg": 2500},
    )
    output = run("--network", snapshot, "--out", tmp_path / "out.pkl")
    assert "trained for 2.5 kimg" in output
    assert f"from: ffhq.pkl (sha256 {'ab' * 32})" in output
    assert "License: CC-BY-NC-4.0" in output
    assert "The source has no G and no D" in output and "Loaders that require G, D and G_ema" in output
    assert finetune.load(tmp_path / "out.pkl").provenance.licence == "CC-BY-NC-4.0"


@pytest.mark.parametrize("word", ["recognized", "recognised"])  # codespell:ignore recognised
def test_export_license_replaces_one_found_by_file_name(source, tmp_path, word):
    license = f"L1 ({word} by the file name alone)"
    parent = {"generation": "sg3", "source": "a.pkl", "sha256": "ab" * 32, "size": 1, "licence": license}
    snapshot = tmp_path / "snapshot.pkl"
    G_ema = finetune.load(source).G_ema
    save_stylegan_pickle(snapshot, G=None, D=None, G_ema=G_ema, provenance={"source": parent})
    run("--network", snapshot, "--out", tmp_path / "out.pkl", "--license", "MIT")
    assert finetune.load(tmp_path / "out.pkl").provenance.licence == "MIT"


def test_export_round_trip_of_formats(source, tmp_path):
    run("--network", source, "--format", "safetensors", "--out", tmp_path / "a.safetensors")
    run("--network", tmp_path / "a.safetensors", "--out", tmp_path / "b.pkl")
    ours, theirs = (finetune.load(path).G_ema.state_dict() for path in (source, tmp_path / "b.pkl"))
    assert all(ours[key].equal(theirs[key]) for key in ours)
    assert finetune.load(tmp_path / "b.pkl").provenance.parent["source"] == source.name


@pytest.mark.parametrize("way", ["same", "relative", "link"])
def test_export_refuses_to_overwrite_input(source, tmp_path, monkeypatch, way):
    copy = tmp_path / "net.pkl"
    copy.write_bytes(source.read_bytes())
    link = tmp_path / "link.pkl"
    link.symlink_to(copy)
    monkeypatch.chdir(tmp_path)
    out = {"same": copy, "relative": "./net.pkl", "link": link}[way]
    output = run("--network", copy, "--out", out, code=2)
    assert "this is the checkpoint itself" in output
    assert copy.read_bytes() == source.read_bytes()


def test_export_refuses_to_overwrite_snapshot(source, tmp_path):
    snapshot = tmp_path / "network-snapshot-000001.pkl"
    snapshot.write_bytes(source.read_bytes())
    output = run("--network", tmp_path, "--out", snapshot, code=2)
    assert "this is the checkpoint itself" in output


def test_export_replaces_only_with_force(source, tmp_path):
    out = tmp_path / "net.pkl"
    out.write_bytes(b"old")
    output = run("--network", source, "--out", out, code=2)
    assert "--force" in output and out.read_bytes() == b"old"
    run("--network", source, "--out", out, "--force")
    assert finetune.load(out).missing == []


def test_export_escapes_lineage_of_file(source, tmp_path):
    """Values of other types count as not said, and no text of a file can pass for a line of ours."""
    entry = {"source": "x\x1b[2J\nLicense: MIT", "sha256": 5, "nimg": "many", "parent": ["x"]}
    snapshot = tmp_path / "snapshot.pkl"
    checkpoint = finetune.load(source)
    save_stylegan_pickle(snapshot, G=None, D=None, G_ema=checkpoint.G_ema, provenance={"source": entry})
    output = run("--network", snapshot, "--out", tmp_path / "out.pkl")
    assert "from: x?[2J?License: MIT (sha256 not known)\n" in output
    assert output.splitlines()[-1].startswith("License: not known")


def test_export_full_disk(source, tmp_path, monkeypatch):
    out = tmp_path / "net.pkl"
    out.write_bytes(b"old")

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    output = run("--network", source, "--out", out, "--force", code=2)
    assert "No space left" in output and "previous file is untouched" in output
    assert out.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["net.pkl"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--network", "absent.pkl", "--out", "x.pkl"], "absent.pkl does not exist"),
        (["--network", "{source}", "--out", "."], "is a folder"),
        (["--network", "{source}", "--out", "x.onnx", "--format", "onnx", "--half"], "omit --half"),
        (["--network", "{source}"], "--out"),
        (["--network", "{source}", "--out", "x"], "unknown suffix ''. Use one of .pkl (stylegan-pkl)"),
        (["--network", "{source}", "--out", "x.onnx", "--format", "stylegan-pkl"], "Use --format onnx"),
        (["--network", "{source}", "--out", "x.pkl", "--format", "safetensors"], "ends in .safetensors"),
        (["--network", "{source}", "--out", "x.pkl", "--half"], "stylegan-pkl with --half"),
        (["--network", "{source}", "--out", "x.pkl", "--slim", "--which", "D"], "no effect with --which D"),
        (["--network", "ffhq-256-stylegan2", "--offline", "--out", "x.pickle"], "unknown suffix '.pickle'"),
        (["--network", "/dev/null", "--out", "x.pkl"], "is not a file"),
    ],
)
def test_export_errors(source, tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    output = run(*(arg.format(source=source) for arg in args), code=2)
    assert message in output
    assert list(tmp_path.iterdir()) == []


def test_export_shows_notes_on_what_it_writes(golden_dir, tmp_path, monkeypatch):
    source = golden_dir / "rosinality-32-train.pt"
    output = run("--network", source, "--slim", "--out", tmp_path / "x.safetensors")
    assert "Note: G_ema: " in output and "Note: entry" in output
    assert "Note: G: " not in output and "Note: D: " not in output
    without_D = dataclasses.replace(finetune.load(source), D=None, notes=("D: not opened",))
    monkeypatch.setattr("finetune.resolve.load", lambda *args, **kwargs: without_D)
    assert "Note: D: not opened." in run("--network", source, "--slim", "--out", tmp_path / "y.safetensors")


def test_export_safetensors_without_augment_pipe(golden_dir, tmp_path):
    source = golden_dir / "stylegan2-32.pkl"
    assert finetune.load(source).augment_pipe is not None
    output = run("--network", source, "--format", "safetensors", "--out", tmp_path / "x.safetensors")
    assert "augmentation pipe" in output
    generator = run("--network", source, "--slim", "--out", tmp_path / "slim.safetensors")
    pickle = run("--network", source, "--out", tmp_path / "x.pkl")
    assert "augmentation pipe" not in generator + pickle
    assert finetune.load(tmp_path / "x.pkl").augment_pipe is not None


def test_export_discriminator_alone(source, tmp_path):
    checkpoint = dataclasses.replace(finetune.load(source), G=None, G_ema=None)
    save_stylegan_pickle(tmp_path / "d.pkl", G=None, D=checkpoint.D, G_ema=None)
    output = run("--network", tmp_path / "d.pkl", "--out", tmp_path / "out.pkl")
    assert "0 images" in output and "no G and no G_ema" in output


def test_export_slim(source, tmp_path):
    output = run("--network", source, "--out", tmp_path / "x.pkl", "--slim")
    assert "stylegan-pkl): G_ema." in output
    assert finetune.load(tmp_path / "x.pkl").missing == ["G", "D"]
