"""`finetune dataset` as a person types it."""

import io
import json
import signal
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from finetune.cli import cli, dataset_report
from finetune.data import preparing
from finetune.data.scanning import Scan


def call(*arguments):
    return CliRunner().invoke(cli, ["dataset", *map(str, arguments)])


def png(*shape, seed=0):
    stream = io.BytesIO()
    Image.fromarray(np.random.RandomState(seed).randint(0, 256, shape, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Six images of 16×16 in two folders, labeled."""
    files = {f"{'ab'[i % 2]}/{i}.png": png(16, 16, 3, seed=i) for i in range(6)}
    files["dataset.json"] = json.dumps({"labels": [[name, i % 2] for i, name in enumerate(files)]}).encode()
    for name, data in files.items():
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "set"


def test_check_clean_set(folder):
    result = call("check", folder, "--resolution", 16)
    assert result.exit_code == 0, result.output
    for words in (
        f"{folder}: 6 images\n",
        "16×16: 6",
        "RGB: 6",
        "2 (0: 3, 1: 3)",
        "at 16×16: 6 as they are; 0 MiB decoded, read into memory once",
        "Training accepts this data set.",
    ):
        assert words in result.stdout
    assert result.stderr == ""


def test_check_lists_all_problems_and_exits_2(folder):
    for i in range(130):
        (folder / f"bad{i:03}.png").write_bytes(b"")
    (folder / "a/wide.png").write_bytes(png(8, 20, 3))
    result = call("check", folder, "--resolution", 16, "--no-cond")
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert result.stdout.count(": is empty\n") == 130 and "… and" not in result.stdout
    assert "1 of other sizes (1 enlarged, 1 cropped)" in result.stdout
    assert "differs in aspect ratio by more than a factor of 2: 1\n    20×8: 1 (a/wide.png)" in result.stdout
    assert result.stderr.startswith(f"Error: {folder}: training would refuse this data set (130 problems).\n")
    fitted = call("check", folder, "--resolution", 16, "--no-cond", "--fit", "pad")
    assert "1 of other sizes (1 shrunk, 1 padded)" in fitted.stdout and "131" not in fitted.stderr


def test_check_counts_problems_and_names_skipped_suffixes(tmp_path):
    for name in ("a.png", "b.heic", "c.heic", "README"):
        (tmp_path / name).touch()
    result = call("check", tmp_path)
    assert f"{tmp_path}: 1 image, 3 other files skipped (.heic: 2, no ending: 1)\n" in result.stdout
    assert "(1 problem)." in result.stderr and "--no-cond" not in result.stderr


def test_check_and_prepare_count_one_image(folder, tmp_path):
    counts = Scan(folder, 41, num_classes=21, class_counts=[2] * 20 + [1])
    assert "classes     21, from 1 image (class 20) to 2 (0)\n" in dataset_report.as_text(counts, {})
    for name in ("a/2.png", "a/4.png", "b/1.png", "b/3.png", "b/5.png"):
        (folder / name).unlink()
    result = call("prepare", folder, tmp_path / "one.zip", "--resolution", 8, "--labels", "none")
    assert result.stdout.startswith(f"{tmp_path / 'one.zip'}: 1 image of 8×8, 0.0 MiB\n")


def test_check_json_is_complete(folder):
    (folder / "bad.png").write_bytes(b"")
    (folder / "a/copy.png").write_bytes((folder / "a/0.png").read_bytes())
    result = call("check", folder, "--resolution", 8, "--fit", "crop", "--json", "--workers", 0)
    assert result.exit_code == 2
    values = json.loads(result.stdout)
    assert values["ok"] is False and values["num_images"] == 8 and values["sizes"] == {"16x16": 7}
    assert values["problem_counts"] == {"unreadable": 1, "bad-label": 2}
    assert values["remark_counts"] == {"duplicate": 1}
    assert {"name": "bad.png", "kind": "unreadable", "detail": "is empty"} in values["problems"]
    assert values["remarks"] == [{"name": "a/copy.png", "kind": "duplicate", "detail": "as a/0.png"}]
    assert values["training"] == {
        "resolution": 8, "width": 8, "height": 8, "fit": "crop", "as_they_are": 0, "other_aspect": 0,
        "enlarged": 0, "shrunk": 7,
        "other_sizes": 7, "decoded_mib": 0.0, "in_memory": True,
    }  # fmt: skip
    clean = json.loads(call("check", folder / "a", "--json").stdout)
    assert clean["ok"] and clean["training"] is None and clean["labels_checked"] is False
    assert clean["problems"] == []


def test_check_labels_if_present(folder):
    (folder / "c.png").write_bytes(png(16, 16, 3, seed=9))
    assert "c.png: not in dataset.json" in call("check", folder).stdout
    assert call("check", folder, "--no-cond").exit_code == 0
    result = call("check", folder / "a", "--cond")
    assert result.exit_code == 2 and "is missing, and labels are needed" in result.stdout


def test_check_uses_network_size(folder, golden_dir):
    result = call("check", folder, "--network", golden_dir / "stylegan2-64-cond.pkl", "--fit", "stretch")
    assert result.exit_code == 0 and "at 64×64: 0 as they are, 6 of other sizes (6 enlarged)" in result.stdout
    Image.new("P", (64, 64)).save(folder / "a/0.png", transparency=0)
    result = call("check", folder, "--network", golden_dir / "stylegan2-64-cond.pkl")
    assert "1 transparent image will be put on white: the network has 3 channels." in result.stdout
    (folder / "dataset.json").write_text(
        json.dumps({"labels": [[f"{'ab'[i % 2]}/{i}.png", 999] for i in range(6)]})
    )
    result = call("check", folder, "--network", golden_dir / "stylegan2-64-cond.pkl", "--fit", "stretch")
    assert result.exit_code == 2 and "class 999, but the classes are 0 to" in result.stdout
    assert "(6 problems)" in result.stderr and "without labels: --no-cond" in result.stderr


@pytest.mark.parametrize(
    "options, words",
    [
        (("--fit", "crop"), "--fit crop: the size is unknown"),
        (("--network", "nothing.pkl", "--resolution", 8), "already given by --network"),
        (("--network", "nothing.pkl"), "nothing.pkl"),
        (("--resolution", 2), "'2' is not a size"),
        (("--network", ""), "The name of the network is empty"),
        (("--resolution", "63x40"), "--resolution 63: the longer side must be a power of two"),
    ],
)
def test_check_refuses_options(folder, options, words):
    result = call("check", folder, *options)
    assert result.exit_code == 2 and words in result.stderr and "Traceback" not in result.output


def test_check_refuses_networks_of_other_channels(folder, golden_dir, monkeypatch):
    G = SimpleNamespace(img_resolution=16, img_channels=2, c_dim=0, base_shape=(4, 4))
    monkeypatch.setattr("finetune.resolve.load", lambda network: SimpleNamespace(generator=G))
    result = call("check", folder, "--network", golden_dir / "stylegan2-ada-32.pkl")
    assert result.exit_code == 2 and "The network has 2 image channels" in result.stderr


@pytest.mark.parametrize("command", [("check",), ("prepare", "OUT")])
def test_check_refuses_other_paths(tmp_path, command):
    def refused(path):
        more = [tmp_path / "out.zip"] if len(command) > 1 else []
        result = call(command[0], path, *more)
        assert result.exit_code == 2 and "Traceback" not in result.output
        return result.stderr

    assert "no such folder or zip" in refused(tmp_path / "nothing")
    assert "the path is empty" in refused("")
    (tmp_path / "empty").mkdir()
    assert "no image found (it is empty)" in refused(tmp_path / "empty")
    (tmp_path / "empty/a.HEIC").touch()
    assert "Convert HEIC images to JPEG first." in refused(tmp_path / "empty")
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        for i in range(20):
            archive.writestr(f"{i}.png", b"x" * 100)
    cut = tmp_path / "cut.zip"
    cut.write_bytes(whole.getvalue()[:-200])
    assert "the zip is truncated" in refused(cut)
    cut.write_bytes(whole.getvalue()[:1000])
    assert "the zip is truncated" in refused(cut)


def test_prepare_command(folder, tmp_path):
    out = tmp_path / "out.zip"
    result = call("prepare", folder, out, "--resolution", 8, "--fit", "crop", "--labels", "folders")
    assert result.exit_code == 0, result.output
    assert result.stdout == (
        f"{out}: 6 images of 8×8, 0.0 MiB\nclass 0: a\nclass 1: b\n"
        f"To train on them: finetune train --resume CHECKPOINT --data {out} --cond\n"
    )
    again = call("prepare", folder, out, "--resolution", 8)
    assert again.exit_code == 2 and "use --force to replace it" in again.stderr
    forced = call(
        "prepare",
        folder,
        out,
        "--resolution",
        8,
        "--fit",
        "crop",
        "--force",
        "--format",
        "png",
        "--channels",
        1,
    )
    assert forced.exit_code == 0 and "class" not in forced.stdout
    found = json.loads(call("check", out, "--resolution", 8, "--json").stdout)
    assert found["ok"] and found["modes"] == {"L": 6} and found["class_counts"] == [3, 3]
    with zipfile.ZipFile(out) as archive:
        assert sorted(archive.namelist())[0] == "a/0.png"


def test_prepare_skip_bad(folder, tmp_path):
    (folder / "a/0.png").write_bytes(b"")
    refused = call("prepare", folder, tmp_path / "out.zip")
    assert refused.exit_code == 2 and "a/0.png: is empty" in refused.stderr
    assert "--skip-bad" in refused.stderr and not (tmp_path / "out.zip").exists()
    made = call("prepare", folder, tmp_path / "out.zip", "--skip-bad")
    assert made.exit_code == 0 and "left out: a/0.png cannot be read: is empty\n" in made.stdout
    assert "5 images of 16×16, 5 of them by an earlier call" in made.stdout


def test_prepare_interrupt_prints_how_to_resume(folder, tmp_path, monkeypatch):
    original = preparing.Draft.add

    def add(self, *words):
        original(self, *words)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(preparing.Draft, "add", add)
        result = call("prepare", folder, tmp_path / "out.zip")
    assert result.exit_code == 130 and "run the same command to resume" in result.stderr
    assert "1 of them by an earlier call" in call("prepare", folder, tmp_path / "out.zip").stdout
