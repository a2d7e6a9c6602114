"""Everything that is wrong with a set is told at once, before training."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from PIL import Image

from finetune.data import scan, workers
from finetune.data.problems import (
    BAD_LABEL,
    DUPLICATE,
    FRAMES,
    NO_IMAGE,
    OTHER_ASPECT,
    SAME_NAME,
    SHOWN_PER_KIND,
    TOO_SMALL,
    UNREADABLE,
    UNUSUAL,
    WRONG_SIZE,
)
from finetune.data.scanning import Scan
from finetune.errors import DataError


def message(found) -> str:
    with pytest.raises(DataError) as caught:
        found.raise_for_problems()
    return str(caught.value)


@pytest.mark.parametrize("name", ["set", "set.zip"])
def test_scan_describes_good_set(write_set, encode, noise, name):
    path = write_set(
        {
            "a.png": encode(noise(8, 8, 3)),
            "b.png": encode(noise(8, 8)),
            "c.png": encode(noise(8, 6, 3)),
            "d.txt": b"",
        },
        name,
    )
    found = scan(path)
    found.raise_for_problems()
    assert (found.num_images, found.num_ignored) == (3, 1)
    assert found.sizes == {(8, 8): 2, (6, 8): 1} and found.modes == {"RGB": 2, "L": 1}
    cropped = scan(path, resolution=16, fit="crop")
    cropped.raise_for_problems()
    others = "3 images of another size will be"
    assert cropped.notes == [
        f"{others} center-cropped and resized to 16×16. Alternatives: --fit pad, --fit stretch.",
        "1 image will be enlarged more than 2× and look blurred.",
    ]
    assert scan(path, resolution=16, fit="pad").notes == [
        f"{others} resized, with white margins, to 16×16. Alternatives: --fit crop, --fit stretch."
    ]


def test_scan_lists_all_problems(write_set, encode, noise, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    good = encode(noise(8, 8, 3))
    path = write_set(
        {
            "good.png": good,
            "sub/cut.png": good[:60],
            "empty.jpg": b"",
            "page.webp": b"<html>404</html>",
            "bomb.png": encode(noise(40, 40)),
            "depth.tif": encode(noise(8, 8).astype("float32"), "TIFF"),
            "big1.png": encode(noise(16, 16, 3)),
            "big2.png": encode(noise(16, 16, 3)),
            "wide.png": encode(noise(8, 12, 3)),
        }
    )
    text = message(scan(path, resolution=8))
    assert text.splitlines()[0] == f"{path}: 8 of 9 images cannot be used."
    for expected in (
        "  cannot be read: 2\n",
        "  is cut short: 1\n",
        "    empty.jpg: is empty\n",
        "    page.webp: is a web page",
        "    sub/cut.png: damaged: ",
        "  has too many pixels: 1\n    bomb.png: 1,600 pixels, 1,000 are allowed\n",
        "  has pixel values without a rule: 1\n    depth.tif: 32-bit",
        "  has another size: 3\n",
        "    16×16 instead of 8×8: 2 (big1.png, big2.png)\n",
        "    12×8 instead of 8×8: 1 (wide.png)\n",
        "--fit crop",
        "Repair or remove",
        "Copy or download truncated files again",
    ):
        assert expected in text
    assert "good.png" not in text

    assert scan(path, resolution=8).remarks == [], "only of a thorough scan"
    fitted = message(scan(path, resolution=8, fit="pad"))
    assert "5 of 9 images" in fitted and "size" not in fitted and "--fit" not in fitted


def test_scan_only_sizes_differ(write_set, encode, noise):
    path = write_set({f"{i}.png": encode(noise(16, 16, 3)) for i in range(5)})
    text = message(scan(path, resolution=8))
    assert "5 of 5" in text and "16×16 instead of 8×8: 5 (0.png, 1.png, 2.png, …)" in text
    assert text.count("\n") == 3 and "Repair" not in text


def test_listed_truncates_long_lists(write_set):
    path = write_set({f"{i:03}.png": b"" for i in range(SHOWN_PER_KIND + 7)})
    found = scan(path)
    assert len(found.problems) == SHOWN_PER_KIND + 7
    text = message(found)
    assert (
        f"cannot be read: {SHOWN_PER_KIND + 7}" in text and "… and 7 more" in text and "106.png" not in text
    )


def test_scan_escapes_unprintable_names(tmp_path):
    bad = tmp_path / "set" / "a\udcff.png"
    bad.parent.mkdir()
    try:
        bad.write_bytes(b"")
    except OSError:
        pytest.skip("the file system takes only valid names")
    message(scan(tmp_path / "set")).encode("utf-8")


def test_scan_escapes_control_characters(tmp_path):
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.writestr("a\x1b[31m\n\xa0.png", b"")
    assert r"a\x1b[31m\n\xa0.png: " in message(scan(tmp_path / "set.zip"))


@pytest.mark.parametrize("kind", ["", ".zip"])
def test_scan_workers_give_equal_result(eight, kind, monkeypatch):
    monkeypatch.setattr(workers, "PARALLEL_FROM", 1)
    monkeypatch.setattr(workers, "available_cores", lambda: 2)
    seen = []
    path = eight(kind)
    parallel = scan(path, resolution=4, workers=2, progress=lambda done, total: seen.append((done, total)))
    assert parallel == scan(path, resolution=4, workers=0) and len(parallel.problems) == 8
    assert seen == [(i, 8) for i in range(1, 9)]


def test_scan_unknown_fit_raises_value_error(eight):
    with pytest.raises(ValueError, match="squash"):
        scan(eight(), fit="squash")


def kinds_of(found) -> dict[str, list[str]]:
    """Kind -> names, of problems and remarks together."""
    kinds: dict[str, list[str]] = {}
    for problem in [*found.problems, *found.remarks]:
        kinds.setdefault(problem.kind, []).append(problem.name)
    return kinds


@pytest.fixture
def odd_set(write_set, encode, noise, request):
    """One of everything that is worth knowing; a folder, or a zip with a param of ".zip"."""
    good, other = encode(noise(8, 8, 3)), encode(noise(8, 8, 3, seed=1))
    palette = Image.fromarray(noise(8, 8, seed=2), "L").convert("P")
    palette.putpalette(bytes(range(256)) * 3)
    files = {
        "a/good.png": good,
        "a/again.bmp": encode(noise(8, 8, 3), "BMP"),
        "a/Good.png": other,
        "a/wide.png": encode(noise(10, 20, 3)),
        "a/tiny.png": encode(noise(4, 4, 3)),
        "b/palette.png": encode(palette),
        "b/deep.png": encode(noise(8, 8, seed=3).astype("uint16") * 257),
        "b/cmyk.jpg": encode(Image.fromarray(noise(8, 8, 4, seed=4), "CMYK"), "JPEG"),
        "b/clear.png": encode(noise(8, 8, 4, seed=5)),
        "b/moving.gif": encode(
            noise(8, 8, seed=6), "GIF", save_all=True, append_images=[Image.fromarray(noise(8, 8, seed=7))]
        ),
    }
    files["dataset.json"] = {"labels": [[name, 0] for name in files] + [["a/gone.png", 1]]}
    return write_set(files, f"odd{getattr(request, 'param', '')}")


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated:DeprecationWarning")
@pytest.mark.parametrize("odd_set", ["", ".zip"], indirect=True)
def test_scan_thorough_lists_remarks(odd_set):
    found = scan(odd_set, resolution=8, fit="pad", use_labels=True, thorough=True)
    assert found.problems == [] and found.class_counts == [10]
    assert kinds_of(found) == {
        SAME_NAME: ["a/good.png"],
        NO_IMAGE: ["a/gone.png"],
        OTHER_ASPECT: ["a/wide.png"],
        TOO_SMALL: ["a/tiny.png"],
        UNUSUAL: ["b/clear.png", "b/cmyk.jpg", "b/deep.png", "b/moving.gif", "b/palette.png"],
        FRAMES: ["b/moving.gif"],
        DUPLICATE: ["a/good.png"],
    }
    details = {(each.name, each.kind): each.detail for each in found.remarks}
    assert details["a/good.png", DUPLICATE] == "as a/again.bmp"
    assert details["a/good.png", SAME_NAME] == "that of a/Good.png"
    assert details["b/deep.png", UNUSUAL] == "16 bits a channel"
    refused = kinds_of(scan(odd_set, resolution=8, thorough=True))
    assert refused[WRONG_SIZE] == ["a/tiny.png", "a/wide.png"] and OTHER_ASPECT not in refused
    assert TOO_SMALL not in refused and NO_IMAGE not in refused


def test_scan_thorough_continues_without_labels(write_set, encode, noise):
    path = write_set({"a.png": encode(noise(8, 8)), "b.png": b"", "dataset.json": b"{"})
    with pytest.raises(DataError, match="not valid JSON"):
        scan(path, use_labels=True)
    found = scan(path, use_labels=True, thorough=True)
    assert kinds_of(found) == {BAD_LABEL: ["dataset.json"], UNREADABLE: ["b.png"]}
    assert found.problems[0].detail.startswith("not valid JSON")


def test_scan_duplicate_name_in_zip(tmp_path, encode, noise):
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.png", encode(noise(8, 8)))
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("a.png", encode(noise(8, 8)))
    found = scan(path, thorough=True)
    assert [(each.name, each.kind, each.detail) for each in found.remarks] == [
        ("a.png", SAME_NAME, "is in the zip more than once")
    ]


@pytest.mark.parametrize(
    "modes, channels, said",
    [
        ({"RGB": 3}, 3, []),
        ({"RGBA": 2, "RGB": 1}, 3, ["2 transparent images will", "--channels 4"]),
        ({"RGBA": 2, "RGB": 1}, 4, []),
        ({"L": 2, "RGB": 1}, 3, []),
        ({"L": 2, "1": 1}, 3, ["All images are gray", "--channels 1"]),
        ({"L": 2, "RGB": 1}, 1, ["1 color image will", "--channels 3"]),
    ],
)
def test_scan_against_other_channels(modes, channels, said):
    found = Scan(Path("set.zip"), 3, modes=modes, num_transparent=modes.get("RGBA", 0))
    notes = "\n".join(found.against(channels))
    assert all(words in notes for words in said) and bool(notes) == bool(said)
