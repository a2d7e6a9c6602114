"""Sets that people bring: each is used as it is meant, or refused with the next step."""

from __future__ import annotations

import io
import json
import re
import shlex
import unicodedata
import zlib
from struct import pack

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from finetune.cli import cli
from finetune.data import ImageSet, scan
from finetune.data.problems import (
    BAD_LABEL,
    BLACK,
    DUPLICATE,
    LOW_RANGE,
    NO_IMAGE,
    NO_RULE,
    TOO_LONG,
    UNIFORM,
)
from finetune.errors import DataError


def kinds(problems) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for problem in problems:
        found.setdefault(problem.kind, []).append(problem.name)
    return found


def run(*words):
    return CliRunner().invoke(cli, [str(word) for word in words])


# ---- Values of 10 and 12 bits in files of 16


def blob(highest: int, size: int = 16) -> np.ndarray:
    """A bright spot whose values reach from 0 to `highest`."""
    y, x = np.mgrid[:size, :size] - size / 2
    spot = np.exp(-(x**2 + y**2) / 20)
    return (spot / spot.max() * highest).round().astype(np.uint16)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("highest, bits", [(255, 8), (200, 8), (1023, 10), (600, 10), (4095, 12), (1024, 12)])
def test_scan_refuses_unused_upper_bits(write_set, encode, tmp_path, kind, highest, bits):
    suffix = {"PNG": "png", "TIFF": "tif"}[kind]
    path = write_set({f"{i}.{suffix}": encode(blob(highest >> i), kind) for i in range(3)})
    found = scan(path, resolution=16)
    assert kinds(found.problems) == {LOW_RANGE: [f"0.{suffix}", f"1.{suffix}", f"2.{suffix}"]}
    with pytest.raises(DataError) as caught:
        found.raise_for_problems()
    assert f"({bits} bits)" in str(caught.value)
    assert f"finetune dataset prepare {shlex.quote(str(path))} OUT.zip --bits {bits}" in str(caught.value)

    refused = run("dataset", "prepare", path, tmp_path / "out.zip", "--channels", "1")
    assert refused.exit_code == 2 and f"({bits} bits)" in refused.stderr
    made = run("dataset", "prepare", path, tmp_path / "out.zip", "--channels", "1", "--bits", bits)
    assert made.exit_code == 0, made.output
    pixels = ImageSet(tmp_path / "out.zip", resolution=16, channels=1)[0][0][0]
    assert np.array_equal(pixels, blob(highest) >> (bits - 8)) and pixels.max() >= 64


def test_bits_refuses_larger_values(write_set, encode, tmp_path):
    path = write_set({"a.png": encode(blob(4095)), "b.png": encode(blob(1023))})
    result = run("dataset", "prepare", path, tmp_path / "out.zip", "--bits", "10")
    assert (
        result.exit_code == 2 and "a.png: a value of 4095, which takes more than --bits 10" in result.stderr
    )
    assert "b.png" not in result.stderr.split("pixel values")[1].split("The 1 others")[0]


def deep_png(values: np.ndarray) -> bytes:
    """A PNG of 16 bits a channel: gray with alpha, RGB or RGBA. Pillow writes none."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return pack(">I", len(data)) + name + data + pack(">I", zlib.crc32(name + data))

    height, width, channels = values.shape
    rows = zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in values))
    head = pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def deep_tiff(values: np.ndarray, order: str, *, compress: bool) -> bytes:
    """A TIFF of 16-bit RGB in the byte order `<` or `>`."""
    height, width, _ = values.shape
    data = values.astype(f"{order}u2").tobytes()
    data = zlib.compress(data) if compress else data
    data += b"\0" * (len(data) % 2)
    fields = {256: width, 257: height, 259: 8 if compress else 1, 262: 2, 273: 14, 277: 3, 278: height}
    fields[279] = len(data)
    entries = [pack(f"{order}HHII", tag, 4, 1, value) for tag, value in fields.items()]
    entries.insert(2, pack(f"{order}HHII", 258, 3, 3, 8))
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + pack(f"{order}I", 14 + len(data))
    table = pack(f"{order}H", len(entries)) + b"".join(entries) + pack(f"{order}I", 0)
    return head + pack(f"{order}HHH", 16, 16, 16) + data + table


COLOR = {
    "png": deep_png,
    "little.tif": lambda values: deep_tiff(values, "<", compress=False),
    "big.tif": lambda values: deep_tiff(values, ">", compress=False),
    "little-packed.tif": lambda values: deep_tiff(values, "<", compress=True),
    "big-packed.tif": lambda values: deep_tiff(values, ">", compress=True),
}


@pytest.mark.parametrize("kind", COLOR)
@pytest.mark.parametrize("bits", [8, 10, 12])
def test_prepare_rescales_16_bit_color(write_set, tmp_path, kind, bits):
    values = np.random.default_rng(0).integers(0, 1 << bits, (16, 16, 3)).astype(np.uint16)
    values[0, 0] = (1 << bits) - 1
    path = write_set({f"a.{kind}": COLOR[kind](values)})
    assert kinds(scan(path).problems) == {LOW_RANGE: [f"a.{kind}"]}
    assert f"({bits} bits)" in scan(path).problems[0].detail
    made = run("dataset", "prepare", path, tmp_path / "out.zip", "--bits", bits)
    assert made.exit_code == 0 and "no effect" not in made.output, made.output
    image = ImageSet(tmp_path / "out.zip", resolution=16, channels=3)[0][0]
    assert np.array_equal(image.transpose(1, 2, 0), values >> (bits - 8))
    small = run("dataset", "prepare", path, tmp_path / "small.zip", "--bits", bits - 1)
    assert small.exit_code == 2 and f"a value of {(1 << bits) - 1}, which takes more than" in small.stderr


@pytest.mark.parametrize("opaque", [4095, 65535])
def test_prepare_rescales_16_bit_color_with_alpha(write_set, tmp_path, opaque):
    values = np.random.default_rng(0).integers(0, 4096, (16, 16, 4)).astype(np.uint16)
    values[:, :, 3] = opaque
    path = write_set({"a.png": deep_png(values), "gray.png": deep_png(values[:, :, 2:])})
    words = ("dataset", "prepare", path, tmp_path / "out.zip", "--bits", "12", "--channels", "4")
    assert "gray.png: 16-bit color in a kind of file that --bits 12 cannot rescale" in run(*words).stderr
    assert run(*words, "--skip-bad").exit_code == 0
    image = ImageSet(tmp_path / "out.zip", resolution=16, channels=4)[0][0].transpose(1, 2, 0)
    assert np.array_equal(image[:, :, :3], values[:, :, :3] >> 4) and (image[:, :, 3] == 255).all()


def test_prepare_bits_without_effect(write_set, encode, noise, tmp_path):
    path = write_set({"a.png": encode(noise(8, 8, 3))})
    said = run("dataset", "prepare", path, tmp_path / "out.zip", "--bits", "12").stdout
    assert "--bits 12 has no effect: no image has 16 bits a channel." in said


def test_scan_range_is_that_of_the_set(write_set, encode):
    files = {"a.png": encode(blob(4095)), "b.png": encode(blob(65535))}
    assert scan(write_set(files)).problems == []


@pytest.mark.parametrize("highest", [8191, 16383, 40_000, 65535])
def test_scan_accepts_used_upper_bits(write_set, encode, highest):
    assert scan(write_set({"a.png": encode(blob(highest)), "b.png": encode(blob(900))})).problems == []


def test_scan_low_range_beside_8_bit_images(write_set, encode, noise):
    path = write_set({"a.png": encode(blob(1023)), "b.png": encode(noise(16, 16, 3))})
    assert kinds(scan(path).problems) == {LOW_RANGE: ["a.png"]}
    assert NO_RULE not in kinds(scan(path).problems)


# ---- Images that show nothing, or the same


def test_scan_counts_black_and_uniform_images(write_set, encode, noise):
    stamped = np.zeros((64, 64, 3), np.uint8)
    stamped[:2, :4] = 255  # a date in a corner
    white = Image.new("RGB", (64, 64), (250, 251, 252))
    dark = np.random.RandomState(0).randint(0, 90, (64, 64, 3), np.uint8)
    clear = Image.new("RGBA", (64, 64), (255, 255, 255, 0))
    files = {
        "black.png": encode(np.zeros((64, 64), np.uint8)),
        "clear.png": encode(clear),
        "dark.png": encode(dark),
        "good.png": encode(noise(64, 64, 3)),
        "stamped.png": encode(stamped),
        "twin.bmp": encode(noise(64, 64, 3), "BMP"),
        "white.png": encode(white),
    }
    path = write_set(files)
    found = kinds(scan(path, resolution=64, thorough=True).remarks)
    assert found[BLACK] == ["black.png", "stamped.png"] and found[UNIFORM] == ["clear.png", "white.png"]
    assert found[DUPLICATE] == ["twin.bmp"]
    assert scan(path, resolution=64).notes == [
        "Check these: 2 nearly black, 2 of nearly one color, 1 equal to another one. "
        "`finetune dataset check` lists their names."
    ]
    listed = run("dataset", "check", path, "--resolution", 64).stdout
    assert "is nearly black: 2\n    black.png" in listed and "Check these" not in listed


# ---- Sizes and shapes


def test_prepare_crops_by_default(write_set, encode, noise):
    path = write_set(
        {
            "a.jpg": encode(noise(48, 64, 3), "JPEG"),
            "b.png": encode(noise(40, 20, 3)),
            "c.png": encode(noise(60, 8, 3)),
        }
    )
    result = run("dataset", "check", path, "--resolution", 16)
    assert result.exit_code == 0 and "3 images of another size will be center-cropped" in result.stdout
    found = scan(path, resolution=16, fit="crop", thorough=True)
    assert kinds(found.remarks)[TOO_LONG] == ["c.png"]


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("size", [(32, 16), (16, 32), (8, 24)])
def test_fit_non_square_network(write_set, encode, fit, size):
    height, width = size
    image = np.zeros((2 * height, 2 * width, 3), np.uint8)
    image[:height] = 255
    exact = np.random.RandomState(0).randint(0, 256, (*size, 3), np.uint8)
    files = {"double.png": encode(image), "exact.png": encode(exact), "square.png": encode(exact[:8, :8])}
    images = ImageSet(write_set(files), resolution=size, channels=3, fit=fit)
    double, same, square = (images[i][0] for i in range(3))
    assert double.shape == (3, height, width) and square.shape == (3, height, width)
    assert np.array_equal(same, exact.transpose(2, 0, 1))
    assert double[:, : height // 2 - 2].min() > 250 and double[:, height // 2 + 2 :].max() < 5
    assert images.preload() and np.array_equal(images[1][0], same)
    found = scan(images.path, resolution=size, fit=fit, thorough=True)
    assert "other-aspect" not in str(found) and not found.problems
    assert len(scan(images.path, resolution=size).problems) == 2


def test_fit_crop_keeps_center(write_set, encode, noise):
    pixels = noise(8, 40, 3)
    images = ImageSet(write_set({"a.png": encode(pixels)}), resolution=(8, 16), channels=3, fit="crop")
    assert np.array_equal(images[0][0], pixels[:, 12:28].transpose(2, 0, 1))


# ---- Names in dataset.json

NAMES = ["Müller.png", "sub/Jäger.png", "é1.png", "plain.png"]


@pytest.mark.parametrize(
    "on_disk, in_json", [("NFD", "NFC"), ("NFC", "NFD"), ("NFC", "NFC"), ("NFKD", "NFC")]
)
@pytest.mark.parametrize("kind", ["set", "set.zip"])
@pytest.mark.parametrize("prefix", ["", "./", "/", "sub/../"])
def test_labels_match_other_unicode_forms(write_set, encode, noise, on_disk, in_json, kind, prefix):
    files: dict = {
        unicodedata.normalize(on_disk, name): encode(noise(8, 8, 3, seed=i)) for i, name in enumerate(NAMES)
    }
    entries = [[prefix + unicodedata.normalize(in_json, name), i % 2] for i, name in enumerate(NAMES)]
    path = write_set({**files, "dataset.json": {"labels": entries}}, kind)
    found = scan(path, use_labels=True, thorough=True)
    assert found.problems == [] and NO_IMAGE not in kinds(found.remarks)
    images = ImageSet(path, resolution=8, channels=3, use_labels=True)
    expected = {unicodedata.normalize("NFC", name): i % 2 for i, name in enumerate(NAMES)}
    labels = {
        unicodedata.normalize("NFC", name): images[i][1].argmax() for i, name in enumerate(images.names)
    }
    assert labels == expected


def test_labels_prefer_equal_spelling(write_set, encode, noise):
    composed, decomposed = "é.png", unicodedata.normalize("NFD", "é.png")
    files: dict = {composed: encode(noise(8, 8)), decomposed: encode(noise(8, 8, seed=1))}
    path = write_set({**files, "dataset.json": {"labels": [[composed, 0], [decomposed, 1]]}}, "set.zip")
    images = ImageSet(path, resolution=8, channels=1, use_labels=True)
    assert {name: int(images[i][1].argmax()) for i, name in enumerate(images.names)} == {
        composed: 0,
        decomposed: 1,
    }


def test_labels_ambiguous_spelling_is_refused(write_set, encode, noise):
    composed, decomposed = "é.png", unicodedata.normalize("NFD", "é.png")
    files: dict = {composed: encode(noise(8, 8)), decomposed: encode(noise(8, 8, seed=1))}
    path = write_set({**files, "dataset.json": {"labels": [["./é.png", 0]]}}, "set.zip")
    assert kinds(scan(path, use_labels=True).problems)[BAD_LABEL] == sorted(files)


# ---- Class folders


def folders(write_set, encode, noise, names, kind="set"):
    return write_set({name: encode(noise(8, 8, 3, seed=i)) for i, name in enumerate(names)}, kind)


@pytest.mark.parametrize("kind", ["set", "set.zip"])
def test_labels_folders_on_request(write_set, encode, noise, kind):
    names = ["1/a.png", "2/a.png", "10/a.png", "10/b.png"]
    path = folders(write_set, encode, noise, names, kind)
    images = ImageSet(path, resolution=8, channels=3, use_labels=True, labels_from="folders")
    labels = {name: int(images[i][1].argmax()) for i, name in enumerate(images.names)}
    assert labels == {"1/a.png": 0, "2/a.png": 1, "10/a.png": 2, "10/b.png": 2} and images.num_classes == 3
    found = scan(path, use_labels=True, labels_from="folders")
    assert found.class_counts == [1, 1, 2] and found.problems == []


@pytest.mark.parametrize(
    "names, order",
    [
        (["class10", "class9", "class1"], ["class1", "class9", "class10"]),
        (["b", "a", "A"], ["A", "a", "b"]),
        (["007", "7", "08"], ["007", "7", "08"]),
        (["2x10", "2x9", "10x1"], ["2x9", "2x10", "10x1"]),
        (["x", "1", "x1"], ["1", "x", "x1"]),
    ],
)
def test_labels_folders_sort_naturally(write_set, encode, noise, tmp_path, names, order):
    path = folders(write_set, encode, noise, [f"{name}/a.png" for name in names], "set.zip")
    made = run("dataset", "prepare", path, tmp_path / "out file.zip", "--labels", "folders")
    assert made.exit_code == 0, made.output
    assert re.findall(r"class \d: (\S+)", made.stdout) == order
    assert f"finetune train --resume CHECKPOINT --data '{tmp_path / 'out file.zip'}' --cond\n" in made.stdout


@pytest.mark.parametrize(
    "names",
    [
        ["train/cat/1.png", "train/dog/1.png", "test/cat/1.png", "test/dog/1.png"],
        ["all/train/cat/1.png", "all/train/dog/1.png", "all/val/cat/1.png"],
        ["a/0/1.png", "b/0/1.png"],
    ],
)
def test_labels_folders_refuse_splits(write_set, encode, noise, tmp_path, names):
    path = folders(write_set, encode, noise, names)
    for words in (
        ("check", path, "--labels", "folders"),
        ("prepare", path, tmp_path / "out.zip", "--labels", "folders"),
    ):
        result = run("dataset", *words)
        assert result.exit_code == 2 and "have the same subfolders" in result.output, result.output
        assert "pass one folder as the data set" in result.output
    for words in (("check", path), ("check", path, "--cond")):
        said = " ".join(run("dataset", *words).output.split())
        assert "The folders can serve as classes (--labels folders), but: The folders" in said
        assert "pass one folder as the data set" in said


@pytest.mark.parametrize(
    "names", [["a/x/1.png", "b/y/1.png"], ["a/x/1.png", "b/1.png"], ["a/1.png", "b/2.png"]]
)
def test_labels_folders_accept_other_subfolders(write_set, encode, noise, names):
    path = folders(write_set, encode, noise, names)
    assert scan(path, use_labels=True, labels_from="folders").class_counts == [1, 1]


def test_labels_errors_name_option(write_set, encode, noise, golden_dir):
    path = folders(write_set, encode, noise, ["cat/1.png", "dog/2.png"])
    for words in (
        ("dataset", "check", path, "--cond"),
        ("train", "--resume", golden_dir / "stylegan2-64-cond.pkl", "--data", path, "--sd-weight", "0", "-n"),
    ):
        result = run(*words)
        assert result.exit_code == 2 and "--labels folders" in result.output, result.output
    assert "--labels folders" in run("dataset", "check", path).stdout
    assert "--labels" not in run("dataset", "check", path / "cat").stdout


def test_train_labels_folders(write_set, encode, noise, golden_dir, tmp_path):
    path = folders(write_set, encode, noise, ["cat/1.png", "dog/2.png", "dog/3.png"])
    words = ("train", "--data", path, "--labels", "folders", "--outdir", tmp_path, "--sd-weight", "0", "-n")
    for network in ("stylegan2-64-cond.pkl", "stylegan2-32.pkl"):
        result = run(*words, "--resume", golden_dir / network)
        assert result.exit_code == 0, result.output
        assert "2 classes" in result.output or "classes" in result.output
        assert "center-cropped" in result.output
    result = run(*words, "--resume", golden_dir / "stylegan2-32.pkl", "--no-cond")
    assert result.exit_code == 2 and "--labels folders: has no effect" in result.output


def test_labels_more_folders_than_classes(write_set, encode, noise):
    path = folders(write_set, encode, noise, ["a/1.png", "b/1.png", "c/1.png"])
    found = scan(path, use_labels=True, labels_from="folders", num_classes=2)
    assert [(each.name, each.kind) for each in found.problems] == [("c/1.png", BAD_LABEL)]


# ---- Names


def test_prepare_very_long_name(tmp_path, encode, noise):
    folder = tmp_path / ("long" * 60)
    folder.mkdir()
    (folder / "a.png").write_bytes(encode(noise(8, 8)))
    assert len(ImageSet(folder, resolution=8, channels=1).name) == 64
    stream = io.StringIO(json.dumps({"labels": [["a.png", 0]]}))
    (folder / "dataset.json").write_text(stream.read())
    assert scan(folder, use_labels=True).problems == []
