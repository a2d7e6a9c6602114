"""The zip that training reads fastest: its bytes, its names and labels, and calls that were interrupted."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
from PIL import Image

from finetune.data import ImageSet, preparing, scan, stored_zip, workers
from finetune.data.naming import classes_of_folders, target_names
from finetune.data.preparing import prepare
from finetune.data.stored_zip import StoredZip, whole_entries
from finetune.errors import ConfigError, DataError


def zipped(files, entries=None, stream=None):
    stream = stream or io.BytesIO()
    made = StoredZip(stream, entries)
    for name, data in files.items():
        made.add(name, data)
    made.finish()
    return stream


FILES = {"a.bin": b"one", "ä/ö.bin": b"", "c.bin": bytes(range(256))}


def test_stored_zip_is_readable():
    with zipfile.ZipFile(zipped(FILES)) as archive:
        assert archive.testzip() is None and archive.namelist() == list(FILES)
        assert {name: archive.read(name) for name in FILES} == FILES
        assert all(each.compress_type == zipfile.ZIP_STORED for each in archive.infolist())


@pytest.mark.parametrize("limits", [(2, 2**32 - 1), (65535, 40)])
def test_stored_zip_large_uses_zip64(monkeypatch, limits):
    # 65,535 files and 4 GiB are where they begin; here earlier, which readers do not mind.
    monkeypatch.setattr(stored_zip, "MAX_16", limits[0])
    monkeypatch.setattr(stored_zip, "MAX_32", limits[1])
    stream = zipped(FILES)
    data = bytearray(stream.getvalue())
    assert b"PK\x06\x06" in data
    # In the plain end record the limits stand for "see there"; put the real ones.
    end = data.rindex(b"PK\x05\x06")
    data[end + 8 : end + 20] = b"\xff" * 12
    for place in [i for i in range(len(data)) if data[i : i + 4] == b"PK\x01\x02"]:
        if limits[1] == 40 and data[place + 42 : place + 46] == (40).to_bytes(4, "little"):
            data[place + 42 : place + 46] = b"\xff" * 4
    with zipfile.ZipFile(io.BytesIO(bytes(data))) as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == FILES


@pytest.mark.slow
def test_stored_zip_many_files_use_zip64():
    with zipfile.ZipFile(zipped({f"{i}": b"" for i in range(65_600)})) as archive:
        assert len(archive.namelist()) == 65_600


def test_stored_zip_resumes_after_any_truncation():
    whole = zipped(FILES).getvalue()
    for length in range(len(whole)):
        stream = io.BytesIO(whole[:length])
        entries = list(whole_entries(stream))
        assert [each.name for each in entries] == list(FILES)[: len(entries)]
        assert not entries or entries[-1].end <= length
        end = entries[-1].end if entries else 0
        stream.seek(end)
        stream.truncate()
        rest = {name: FILES[name] for name in list(FILES)[len(entries) :]}
        assert zipped(rest, entries, stream).getvalue() == whole


def test_whole_entries_stops_at_damaged_entry():
    whole = zipped(FILES).getvalue()
    for place in range(len(whole)):
        data = bytearray(whole)
        data[place] ^= 0x55
        for each in whole_entries(io.BytesIO(bytes(data))):
            if each.name in FILES:  # a name that is damaged is that of no image
                assert FILES[each.name] == data[each.end - each.size : each.end]


def test_target_names_do_not_collide():
    names = ["a.jpg", "a.png", "a.png.jpg", "A.PNG", "b/a.png", "../../etc/x.png", "/abs.png", "c\\d.png"]
    targets = target_names(names, ".tif")
    assert list(targets.values()) == [
        "a.tif",
        "a.png.tif",
        "a.png.jpg.tif",
        "A.PNG-2.tif",
        "b/a.tif",
        "etc/x.tif",
        "abs.tif",
        "c/d.tif",
    ]
    assert target_names(["é.png", "e\u0301.png"], ".png").keys() == {"é.png", "e\u0301.png"}
    assert len(set(map(str.casefold, targets.values()))) == len(names)
    if os.name != "nt":
        assert target_names(["e\udcff.png"], ".tif") == {"e\udcff.png": "e%ff.tif"}


def test_prepare_classes_from_folders():
    assert classes_of_folders(["dog/1.png", "cat/x/2.png", "cat/3.png"]) == (
        {"dog/1.png": 1, "cat/x/2.png": 0, "cat/3.png": 0},
        ["cat", "dog"],
    )
    around = ["train/dog/1.png", "train/cat/1.png"]
    assert classes_of_folders(around) == ({around[0]: 1, around[1]: 0}, ["cat", "dog"])
    assert classes_of_folders(["all/1.png", "all/2.png"])[0] == {"all/1.png": 0, "all/2.png": 0}
    assert classes_of_folders(["1.png", "cat/2.png"]) == ({"cat/2.png": 0}, ["cat"])


@pytest.fixture
def mixed(write_set, encode, noise):
    """Images of several kinds and sizes in two folders, with labels."""
    files = {
        "cat/a.png": encode(noise(8, 8, 3, seed=1)),
        "cat/b.jpg": encode(noise(12, 8, 3, seed=2), "JPEG"),
        "dog/c.png": encode(noise(9, 9, 4, seed=3)),
        "dog/d.png": encode(noise(16, 16, seed=4)),
        "notes.txt": b"",
    }
    files["dataset.json"] = {"labels": [[name, 5] for name in files if "/" in name]}
    return write_set(files, "mixed")


@pytest.mark.parametrize("encoding", ["tiff", "png"])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_prepare_zip_equals_source_in_training(mixed, tmp_path, encoding, channels, fit):
    made = prepare(
        mixed, tmp_path / "out.zip", resolution=8, fit=fit, channels=channels, encoding=encoding, workers=0
    )
    assert made.num_images == 4 and made.num_bytes == (tmp_path / "out.zip").stat().st_size
    before = ImageSet(mixed, resolution=8, channels=channels, fit=fit, use_labels=True)
    after = ImageSet(tmp_path / "out.zip", resolution=8, channels=channels, use_labels=True)
    assert after.num_classes == 6
    for i in range(4):
        assert all(np.array_equal(a, b) for a, b in zip(before[i], after[i], strict=True))
    scan(tmp_path / "out.zip", resolution=8, use_labels=True).raise_for_problems()
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        assert archive.testzip() is None
        assert {each.compress_type for each in archive.infolist()} == {zipfile.ZIP_STORED}
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["out.zip"], "nothing is left over"


def labels_in(path):
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read("dataset.json"))


def test_prepare_labels(mixed, tmp_path):
    made = prepare(mixed, tmp_path / "1.zip", resolution=8, fit="crop", labels="folders")
    assert made.classes == ["cat", "dog"]
    assert labels_in(tmp_path / "1.zip") == {
        "labels": [["cat/a.tif", 0], ["cat/b.tif", 0], ["dog/c.tif", 1], ["dog/d.tif", 1]],
        "classes": ["cat", "dog"],
    }
    prepare(tmp_path / "1.zip", tmp_path / "again.zip", resolution=8, encoding="png")
    assert labels_in(tmp_path / "again.zip")["classes"] == ["cat", "dog"]
    prepare(mixed, tmp_path / "2.zip", resolution=8, fit="crop", labels="none")
    assert labels_in(tmp_path / "2.zip") == {"labels": None}
    (mixed / "dataset.json").unlink()
    prepare(mixed, tmp_path / "3.zip", resolution=8, fit="crop")
    assert labels_in(tmp_path / "3.zip") == {"labels": None}
    with pytest.raises(DataError, match=r"dataset\.json is missing"):
        prepare(mixed, tmp_path / "4.zip", resolution=8, fit="crop", labels="file")
    with pytest.raises(DataError, match="no image is in a subfolder"):
        prepare(mixed / "cat", tmp_path / "4.zip", resolution=8, fit="crop", labels="folders")
    vectors = {"labels": [["a.png", [0.5, 1.0]], ["b.jpg", [0.25, 0.0]]]}
    (mixed / "cat/dataset.json").write_text(json.dumps(vectors))
    prepare(mixed / "cat", tmp_path / "5.zip", resolution=8, fit="crop")
    assert labels_in(tmp_path / "5.zip") == {"labels": [["a.tif", [0.5, 1.0]], ["b.tif", [0.25, 0.0]]]}


def test_prepare_resolution_of_first_image(eight, mixed, tmp_path):
    assert prepare(eight(".zip"), tmp_path / "out.zip").settings.size == (8, 8)
    with pytest.raises(
        DataError, match=r"(?s)another size: 3\n.*8×12 instead of 8×8: 1 \(cat/b.jpg\).*--fit crop"
    ):
        prepare(mixed, tmp_path / "mixed.zip")
    with pytest.raises(ConfigError, match=r"--fit crop: .* --resolution"):
        prepare(mixed, tmp_path / "mixed.zip", fit="crop")
    with pytest.raises(ConfigError, match=r"first image is 8×12, not square"):
        (mixed / "cat/a.png").unlink()
        prepare(mixed, tmp_path / "mixed.zip", labels="none")


def test_prepare_lists_or_skips_bad_images(mixed, tmp_path):
    (mixed / "cat/a.png").write_bytes(b"")
    (mixed / "dog/e.png").write_bytes((mixed / "dog/c.png").read_bytes())  # has no label
    out = tmp_path / "out.zip"
    with pytest.raises(DataError) as caught:
        prepare(mixed, out, resolution=8, fit="pad")
    text = str(caught.value)
    assert "2 of 5 images cannot be used" in text and "cat/a.png: is empty" in text
    assert "dog/e.png: not in dataset.json" in text and "--skip-bad" in text and ".out.zip.partial" in text
    assert not out.exists()
    made = prepare(mixed, out, resolution=8, fit="pad", skip_bad=True)
    assert (made.num_images, made.num_found_done) == (3, 3)
    assert {problem.name for problem in made.left_out} == {"cat/a.png", "dog/e.png"}
    assert [name for name, _ in labels_in(out)["labels"]] == ["cat/b.tif", "dog/c.tif", "dog/d.tif"]
    for path in mixed.rglob("*.*g"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match="5 of 5 images cannot be used"):
        prepare(mixed, tmp_path / "none.zip", resolution=8, skip_bad=True, labels="none")


def test_prepare_lists_dark_images_among_others(mixed, encode, tmp_path):
    (mixed / "cat/a.png").write_bytes(b"")
    (mixed / "dog/c.png").write_bytes(encode(np.full([8, 8], 4000, np.uint16)))
    for skip_bad in (False, True):
        with pytest.raises(DataError) as caught:
            prepare(mixed, tmp_path / "out.zip", resolution=8, labels="none", skip_bad=skip_bad)
        text = str(caught.value)
        assert "2 of 4 images cannot be used" in text and "cat/a.png: is empty" in text
        assert "--bits 12" in text and "--skip-bad does not leave out such 16-bit images" in text


def test_prepare_refuses_destinations(mixed, tmp_path, eight, monkeypatch):
    options = {"resolution": 8, "fit": "crop"}
    with pytest.raises(ConfigError, match=r"ends in \.zip"):
        prepare(mixed, tmp_path / "out", **options)
    (tmp_path / "folder.zip").mkdir()
    with pytest.raises(ConfigError, match="is a folder"):
        prepare(mixed, tmp_path / "folder.zip", **options)
    source = eight(".zip")
    with pytest.raises(ConfigError, match="this is the input"):
        prepare(source, source, **options)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 100})())
    with pytest.raises(DataError, match=r"Not enough space in .* for full.zip: .* MiB needed, 0 MiB free"):
        prepare(mixed, tmp_path / "full.zip", **options)


def test_prepare_resumes_after_full_disk(mixed, tmp_path, monkeypatch):
    out, again = tmp_path / "out.zip", tmp_path / "again.zip"
    options = {"resolution": 8, "fit": "crop"}
    prepare(mixed, again, **options)
    original = StoredZip.add

    def add(self, name, data):
        if name == "dog/c.tif":
            self.stream.write(b"half of it")
            raise OSError(28, "No space left on device")
        original(self, name, data)

    with monkeypatch.context() as patch:
        patch.setattr(StoredZip, "add", add)
        with pytest.raises(DataError, match=r"No space left on device.*\nFinished images are kept"):
            prepare(mixed, out, **options)
    assert prepare(mixed, out, **options).num_found_done == 2
    assert out.read_bytes() == again.read_bytes()


class Stopped(Exception):
    pass


def stopped_after(count, source, path, **options):
    """Prepare, and be interrupted after so many images."""

    def stop(done, total):
        if done == count:
            raise Stopped

    with pytest.raises(Stopped):
        prepare(source, path, progress=stop, **options)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_prepare_resumes_after_interrupt(eight, tmp_path, monkeypatch, num_workers):
    monkeypatch.setattr(workers, "PARALLEL_FROM", 1)
    monkeypatch.setattr(workers, "available_cores", lambda: 2)
    source = eight()
    (source / "a/2.png").write_bytes(b"junk")
    options = {"resolution": 4, "fit": "stretch", "skip_bad": True, "workers": num_workers}
    decoded: list[int] = []  # in this process
    monkeypatch.setattr(preparing, "open_image", lambda data, bits=16: decoded.append(1) or open_image(data))
    undisturbed = tmp_path / "undisturbed.zip"
    prepare(source, undisturbed, **options)
    for count in (1, 3, 8):
        out = tmp_path / f"{count}.zip"
        stopped_after(count, source, out, **options)
        decoded.clear()
        made = prepare(source, out, **{**options, "workers": 0})
        assert len(decoded) == 8 - count and made.num_found_done == count - (count >= 3)
        assert out.read_bytes() == undisturbed.read_bytes()


open_image = preparing.open_image


def test_prepare_redoes_changed_images(eight, tmp_path, encode, noise):
    source, out, fresh = eight(), tmp_path / "out.zip", tmp_path / "fresh.zip"
    stopped_after(6, source, out, resolution=8)
    (source / "a/3.png").write_bytes(encode(noise(8, 8, 3, seed=99)))
    made = prepare(source, out, resolution=8)
    assert made.num_found_done == 3, "those before the one that changed"
    prepare(source, fresh, resolution=8)
    assert out.read_bytes() == fresh.read_bytes()
    stopped_after(6, source, tmp_path / "other.zip", resolution=8)
    assert prepare(source, tmp_path / "other.zip", resolution=4, fit="crop").num_found_done == 0


def test_prepare_redoes_damaged_part_of_draft(eight, tmp_path):
    source, out, fresh = eight(), tmp_path / "out.zip", tmp_path / "fresh.zip"
    prepare(source, fresh, resolution=8)
    draft, journal = tmp_path / ".out.zip.partial", tmp_path / ".out.zip.partial.jsonl"
    for damage in (
        lambda: draft.write_bytes(draft.read_bytes()[:-30]),
        lambda: journal.write_bytes(journal.read_bytes()[:-10]),
        lambda: journal.write_bytes(b"[]\n"),
        lambda: journal.write_bytes(b"\xff\n" * 9),
        draft.unlink,
        lambda: draft.write_bytes(bytes(1000)),
    ):
        stopped_after(6, source, out, resolution=8)
        damage()
        prepare(source, out, resolution=8)
        assert out.read_bytes() == fresh.read_bytes()
        out.unlink()


def test_prepare_locks_destination(eight, tmp_path):
    if os.name == "nt":
        pytest.skip("Windows locks open files itself")
    source, refused = eight(), []

    def second(done, total):
        if done == 2:
            with pytest.raises(DataError, match="another process is preparing it") as caught:
                prepare(source, tmp_path / "out.zip", resolution=8)
            refused.append(caught)

    prepare(source, tmp_path / "out.zip", resolution=8, progress=second)
    assert refused and len(ImageSet(tmp_path / "out.zip", resolution=8, channels=3)) == 8


@pytest.mark.slow
def test_prepare_survives_repeated_kills(tmp_path):
    source, out, fresh = tmp_path / "set", tmp_path / "out.zip", tmp_path / "fresh.zip"
    source.mkdir()
    rng = np.random.RandomState(0)
    for i in range(300):
        Image.fromarray(rng.randint(0, 256, (96, 96, 3), np.uint8)).save(source / f"{i}.png")
    options = {"resolution": 64, "fit": "crop"}
    prepare(source, fresh, **options)
    words = [sys.executable, "-m", "finetune", "dataset", "prepare", source, out, "--resolution", "64"]
    kills = 0
    while not out.exists():
        process = subprocess.Popen([*words, "--fit", "crop"], stdout=subprocess.DEVNULL)
        before = draft_size(tmp_path)
        while process.poll() is None and draft_size(tmp_path) < before + 80 * 12_000:
            time.sleep(rng.uniform(0.001, 0.01))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills >= 2 and out.read_bytes() == fresh.read_bytes()


def draft_size(folder):
    path = folder / ".out.zip.partial"
    return path.stat().st_size if path.exists() else 0
