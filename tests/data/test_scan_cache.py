"""A scan decodes only what is new or has changed since the last one."""

from __future__ import annotations

import os
import sqlite3
import zipfile

import numpy as np
import pytest
from PIL import Image

from finetune.data import image_info, scan, scan_cache, workers
from finetune.data.problems import UNREADABLE
from finetune.data.sources import open_source


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache folder, in which even the smallest set is kept."""
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(scan_cache, "WORTH_SEC", -1.0)
    return tmp_path / "cache"


@pytest.fixture
def decoded(monkeypatch):
    """Counts what is decoded in this process."""
    count: list[int] = []
    original = image_info.open_image
    monkeypatch.setattr(image_info, "open_image", lambda data: count.append(1) or original(data))

    def since_last_time() -> int:
        number = len(count)
        count.clear()
        return number

    return since_last_time


def rescan(path, **options):
    return scan(path, resolution=8, use_labels=True, workers=0, thorough=True, **options)


@pytest.mark.parametrize("kind", ["", ".zip"])
def test_scan_cache_decodes_once(eight, decoded, kind):
    path = eight(kind)
    first = rescan(path)
    assert (decoded(), first.num_known) == (8, 0)
    second = rescan(path)
    assert (decoded(), second.num_known) == (0, 8) and second == first
    assert rescan(path, fresh=True) == first and decoded() == 8
    assert scan(path, resolution=4, fit="pad", workers=0).sizes == {(8, 8): 8} and decoded() == 0


def test_scan_cache_decodes_changed_images(eight, decoded, encode, noise):
    path = eight()
    rescan(path)
    decoded()
    (path / "a/1.png").write_bytes(encode(noise(9, 9, 3)))  # another size in bytes
    status = (path / "b/5.png").stat()
    os.utime(path / "b/5.png", ns=(status.st_atime_ns, status.st_mtime_ns + 1))  # another time
    (path / "b/7.png").unlink()
    (path / "b/8.png").write_bytes(encode(noise(8, 8, 3)))
    found = scan(path, workers=0)
    assert found.sizes == {(8, 8): 7, (9, 9): 1} and found.num_known == 5 and decoded() == 3
    with sqlite3.connect(scan_cache.path_of(open_source(path))) as table:
        names = {name for (name,) in table.execute("SELECT name FROM looks")}
    assert b"b/7.png" not in names and len(names) == 8


def test_scan_cache_zip_keyed_by_checksums(eight, decoded, encode, noise):
    path = eight(".zip")
    rescan(path)
    decoded()
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    files["a/1.png"] = encode(noise(8, 8, 3, seed=77))
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    assert rescan(path).num_known == 7 and decoded() == 1


def test_scan_cache_shared_by_workers(eight, monkeypatch):
    monkeypatch.setattr(workers, "PARALLEL_FROM", 1)
    monkeypatch.setattr("finetune.data.workers.available_cores", lambda: 2)
    path = eight()
    parallel = scan(path, workers=2)
    assert parallel.num_known == 0
    again = scan(path, workers=2)
    assert again.num_known == 8 and again == parallel


def test_scan_cache_skips_unreadable(eight, decoded):
    path = eight()
    (path / "a/0.png").write_bytes(b"junk")
    assert [each.kind for each in rescan(path).problems] == [UNREADABLE]
    decoded()
    assert [each.kind for each in rescan(path).problems] == [UNREADABLE] and decoded() == 1


def test_scan_cache_resumes_interrupted_scan(eight, decoded):
    path = eight()

    def interrupt(done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rescan(path, progress=interrupt)
    assert decoded() == 3
    assert rescan(path).num_known == 3 and decoded() == 5


def test_scan_cache_progress(eight, encode, noise):
    path, seen = eight(), []
    rescan(path)
    (path / "a/1.png").write_bytes(encode(noise(9, 9, 3)))
    rescan(path, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 8), (8, 8)]


@pytest.mark.parametrize("damage", ["junk", "empty", "cut"])
def test_scan_cache_damaged_file_is_ignored(eight, decoded, damage):
    path = eight()
    expected = rescan(path)
    file = scan_cache.path_of(open_source(path))
    data = file.read_bytes()
    file.write_bytes({"junk": os.urandom(5000), "empty": b"", "cut": data[: len(data) // 2]}[damage])
    decoded()
    assert rescan(path) == expected and decoded() == 8
    assert rescan(path) == expected and decoded() == 0


def test_scan_cache_read_only_or_locked(eight, decoded, cache, monkeypatch):
    path = eight()
    cache.write_text("a file in the way")
    expected = rescan(path)
    assert rescan(path) == expected and decoded() == 16
    cache.unlink()
    rescan(path)
    decoded()
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda file, timeout: connect(file, timeout=0.0))
    other = connect(scan_cache.path_of(open_source(path)))
    other.execute("BEGIN EXCLUSIVE")
    assert rescan(path) == expected and decoded() == 8
    other.close()
    assert rescan(path).num_known == 8


def test_scan_cache_other_pillow_decodes_again(eight, decoded, monkeypatch):
    path = eight()
    rescan(path)
    monkeypatch.setattr("PIL.__version__", "0.0")
    assert rescan(path).num_known == 0 and rescan(path).num_known == 8
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    decoded()
    assert len(rescan(path).problems) == 8 and decoded() == 8


def test_scan_cache_small_set_writes_nothing(eight, cache, monkeypatch):
    monkeypatch.setattr(scan_cache, "WORTH_SEC", 1e9)
    rescan(eight())
    assert not cache.exists()


def test_scan_cache_keeps_invalid_names(tmp_path, encode, noise):
    folder = tmp_path / "set\udcff"
    try:
        folder.mkdir()
        (folder / "a\udcff.png").write_bytes(encode(noise(8, 8)))
    except OSError:
        pytest.skip("the file system takes only valid names")
    scan(folder, workers=0)
    assert scan(folder, workers=0).num_known == 1


def test_scan_cache_round_trip(tmp_path, encode, noise):
    odd = {
        "deep.png": encode(np.full((4, 4), 40_000, np.uint16)),
        "black.png": encode(np.zeros((4, 4), np.uint8)),
        "moving.gif": encode(noise(4, 4), "GIF", save_all=True, append_images=[Image.fromarray(noise(4, 5))]),
    }
    for name, data in odd.items():
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / "set" / name).write_bytes(data)
    source = open_source(tmp_path / "set")
    first = list(scan_cache.inspect_all(source, source.names, 0))
    second = list(scan_cache.inspect_all(source, source.names, 0))
    assert [known for _, known in second] == [True] * 3
    assert [each for each, _ in first] == [each for each, _ in second]
    assert {type(each) for each, _ in second} == {image_info.ImageInfo}
