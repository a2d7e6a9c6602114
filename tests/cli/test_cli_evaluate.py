"""`finetune evaluate`: numbers, JSON, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile

import pytest
from click.testing import CliRunner
from PIL import Image

from finetune.cli import cli


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "dots.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(6):
            with archive.open(f"{i}.png", "w") as stream:
                Image.new("RGB", (32, 32), (40 * i, 0, 0)).save(stream, "PNG")
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FINETUNE_OPS", "ref")


def call(images, golden_dir, *arguments, network="stylegan2-ada-32"):
    words = ["evaluate", "--network", golden_dir / f"{network}.pkl", "--data", images, "--workers", 0]
    return CliRunner().invoke(cli, [str(word) for word in (*words, *arguments)])


def test_evaluate_json_and_text(images, golden_dir, tmp_path):
    options = ("--metrics", "fd-effnet,prc-effnet,random-fid", "--num", 8)
    first = call(images, golden_dir, *options, "--json")
    assert first.exit_code == 0, first.output
    facts = json.loads(first.stdout)
    assert (facts["real"], facts["generated"]) == (6, 8)
    metrics = facts["metrics"]
    assert list(metrics) == ["fd-effnet", "precision-effnet", "recall-effnet", "random-fid"]
    assert metrics["random-fid"]["spread"] > 0
    text = call(images, golden_dir, *options).stdout  # with what is kept of the images
    assert len(list((tmp_path / "cache" / "metrics").iterdir())) == 4
    assert "8 generated against 6 real images" in text and "recall-effnet" in text


def test_evaluate_every_option_has_effect(images, golden_dir, tmp_path):
    def facts(*arguments):
        result = call(images, golden_dir, "--metrics", "random-fid", "--num", 4, "--json", *arguments)
        assert result.exit_code == 0, result.output
        found = json.loads(result.stdout)
        return found, found["metrics"]["random-fid"]["value"]

    cache = tmp_path / "cache" / "metrics"
    plain, value = facts("--no-cache")
    assert not cache.exists()
    assert facts("--seed", 1)[1] != value and len(list(cache.iterdir())) == 3
    assert facts("--workers", 1, "--no-cache")[1] == value
    mirrored, _ = facts("--mirror")
    assert (plain["real"], mirrored["real"]) == (6, 12) and len(list(cache.iterdir())) == 6
    large = tmp_path / "large"
    large.mkdir()
    for i in range(3):
        Image.new("RGB", (48, 40), (9, 70 * i, 0)).save(large / f"{i}.png")
    refused = call(large, golden_dir, "--metrics", "random-fid", "--num", 4)
    assert refused.exit_code == 2 and "3 of 3 images cannot be used" in refused.stderr
    assert "48×40 instead of 32×32: 3 (0.png, 1.png, 2.png)" in refused.stderr
    cropped, padded = (facts("--data", large, "--fit", fit)[1] for fit in ("crop", "pad"))
    assert cropped != padded


def test_evaluate_memorization_writes_pairs(images, golden_dir, tmp_path):
    options = ("--metrics", "memorization", "--num", 8, "--pairs", tmp_path / "new" / "pairs.png")
    result = call(images, golden_dir, *options)
    assert result.exit_code == 0 and "memorization      0\n" in result.output, result.output
    assert result.stderr.endswith(f"Wrote {options[-1]}.\n")
    with Image.open(tmp_path / "new" / "pairs.png") as sheet:
        assert sheet.size == (8 * 32, 2 * 32)
    (tmp_path / "file").write_text("")
    result = call(images, golden_dir, *options[:-1], tmp_path / "file" / "pairs.png")
    assert result.exit_code == 2 and "part of its path is a file" in result.stderr
    assert "memorization      0\n" in result.stdout  # the measurement is not lost


@pytest.mark.slow  # three processes load torch
def test_evaluate_two_ranks_equal_one(images, golden_dir, tmp_path):
    command = [sys.executable, "-m", "finetune", "evaluate", "--network", golden_dir / "stylegan2-ada-32.pkl"]
    command += [
        "--data",
        images,
        "--workers",
        "0",
        "--metrics",
        "fd-effnet,kid-effnet,random-fid,ppl-effnet",
    ]
    command += ["--num", "10", "--batch", "3", "--device", "cpu", "--no-cache", "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    found = []
    for gpus in ("1", "2"):
        words = [*map(str, command), "--gpus", gpus]
        done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    assert [each["processes"] for each in found] == [1, 2]
    assert found[0]["metrics"] == found[1]["metrics"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--metrics", "fd"), "Choose from random-fid"),
        (("--metrics", " ,"), "--metrics: the list is empty"),
        (("--pairs", "a.png", "--num", 4), "has no effect without --metrics memorization"),
        (("--inception", "w.pth", "--num", 4), "has no effect without --metrics fid, kid or prc"),
        (("--metrics", "fid", "--offline"), "is not on this machine"),
        (("--metrics", "prc-effnet", "--num", 2), "need more than 3 real"),
        (("--labels", "folders"), "has no effect on a network without classes"),
        (("--data", "nowhere", "--network", "ffhq-256-stylegan2", "--offline"), "nowhere: no such folder"),
        (("--seed", 1 << 32), "0<=x<=4294967295"),
    ],
)
def test_evaluate_mistakes(arguments, words, images, golden_dir):
    result = call(images, golden_dir, "--num", 4, *arguments)
    assert result.exit_code == 2, result.output
    assert words in result.stderr and "Traceback" not in result.output
