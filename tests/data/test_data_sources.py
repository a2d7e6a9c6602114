"""Folders and zips: what counts as an image, what is passed over, what is said when there is none."""

from __future__ import annotations

import os
import pickle
import zipfile

import pytest

from finetune.data.problems import UNREADABLE, Unusable
from finetune.data.sources import MAX_FILE_BYTES, ZipSource, is_hidden, open_source
from finetune.errors import DataError

FILES = {
    "b.PNG": b"1",
    "a/deep/er/c.jpeg": b"2",
    "a/d.webp": b"3",
    "notes.txt": b"",
    ".hidden.png": b"",
    "a/.cache/x.png": b"",
    "__MACOSX/b.png": b"",
    "a/._d.webp": b"",
    "a/Thumbs.db": b"",
}


@pytest.mark.parametrize("name", ["set", "set.zip"])
def test_source_names_sorted_without_hidden_files(write_set, name):
    source = open_source(write_set(FILES, name))
    assert source.names == ["a/d.webp", "a/deep/er/c.jpeg", "b.PNG"]
    assert [source.read(image) for image in source.names] == [b"3", b"2", b"1"]
    assert source.ignored == {".txt": 1, ".db": 1} and source.labels_name is None


def test_source_checksums_of_folder_and_zip_agree(write_set):
    folder, archive = open_source(write_set(FILES)), open_source(write_set(FILES, "set.zip"))
    assert folder.names == archive.names
    for name in folder.names:
        assert folder.checksum(name) == archive.checksum(name)


def test_source_accepts_hidden_folder(write_set):
    assert open_source(write_set({"a.png": b""}, ".images")).names == ["a.png"]


def test_source_follows_links_without_loops(write_set, tmp_path):
    folder = write_set({"a.png": b"1"})
    other = write_set({"b.png": b"2"}, "other")
    (folder / "link").symlink_to(other, target_is_directory=True)
    (other / "back").symlink_to(folder, target_is_directory=True)
    assert open_source(folder).names == ["a.png", "link/b.png"]


@pytest.mark.parametrize(
    "files, word",
    [
        ({}, "empty"),
        ({"a.txt": b"", "b.txt": b""}, "2 × .txt"),
        ({"images.zip": b""}, "zip file itself"),
        ({"ffhq-r08.tfrecords": b""}, "TFRecords"),
        ({"data.mdb": b""}, "LMDB"),
    ],
)
def test_source_without_images_lists_content(write_set, files, word):
    with pytest.raises(DataError, match=word):
        open_source(write_set(files))


def test_open_source_refuses_other_paths(write_set, tmp_path):
    with pytest.raises(DataError, match="no such folder or zip"):
        open_source(tmp_path / "nowhere")
    path = write_set({"a.png": b"x"}) / "a.png"
    with pytest.raises(DataError, match="neither a folder nor a zip"):
        open_source(path)
    broken = write_set({"a.png": b"x" * 100}, "broken.zip")
    data = bytearray(broken.read_bytes())
    data[data.index(b"PK\x01\x02") : data.index(b"PK\x01\x02") + 4] = b"KP\x01\x02"
    broken.write_bytes(bytes(data))
    with pytest.raises(DataError, match="cannot be opened"):
        open_source(broken)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="needs a user whom permissions bind")
def test_source_unlistable_folder(write_set):
    folder = write_set({"a.png": b"x", "locked/b.png": b"y"})
    (folder / "locked").chmod(0)
    try:
        with pytest.raises(DataError, match=r"locked.*cannot be listed"):
            open_source(folder)
    finally:
        (folder / "locked").chmod(0o700)


def test_source_missing_or_damaged_files_are_unusable(write_set):
    folder = write_set({"a.png": b"x"})
    source = open_source(folder)
    (folder / "a.png").unlink()
    with pytest.raises(Unusable, match="No such file"):
        source.read("a.png")
    archive = write_set({"a.png": bytes(range(256)) * 9}, "set.zip")
    data = bytearray(archive.read_bytes())
    data[60] ^= 0xFF
    archive.write_bytes(bytes(data))
    with pytest.raises(Unusable) as caught:
        open_source(archive).read("a.png")
    assert caught.value.kind == UNREADABLE and "damaged inside the zip" in caught.value.detail


def test_source_encrypted_and_huge_members_are_unusable(write_set):
    archive = write_set({"a.png": b"x"}, "set.zip")
    source = open_source(archive)
    entry = source.archive.getinfo("a.png")
    entry.file_size = MAX_FILE_BYTES + 1
    with pytest.raises(Unusable, match="larger than 1024 MiB"):
        source.read("a.png")
    data = bytearray(archive.read_bytes())
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(mark) + offset] |= 1  # the flag "encrypted" in both headers
    archive.write_bytes(bytes(data))
    with pytest.raises(Unusable, match="encrypted"):
        open_source(archive).read("a.png")


def test_source_member_larger_than_declared_is_unusable(write_set):
    archive = write_set({"a.png": bytes(1 << 20)}, "set.zip")
    data = bytearray(archive.read_bytes())
    place = data.index(b"PK\x01\x02") + 24  # unpacked size in the directory
    data[place : place + 4] = (100).to_bytes(4, "little")
    archive.write_bytes(bytes(data))
    with pytest.raises(Unusable):
        open_source(archive).read("a.png")


def test_source_zip_handle_per_process(write_set, monkeypatch):
    source = open_source(write_set({"a.png": b"1"}, "set.zip"))
    assert isinstance(source, ZipSource)
    first = source.archive
    assert source.archive is first
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert source.archive is not first and source.read("a.png") == b"1"
    assert pickle.loads(pickle.dumps(source)).read("a.png") == b"1"


def test_source_duplicate_name_counts_once(tmp_path):
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.png", b"1")
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("a.png", b"2")
    assert open_source(path).names == ["a.png"]


@pytest.mark.parametrize("name", ["set", "set.zip"])
@pytest.mark.parametrize("top", ["", "faces/", "faces/small/"])
def test_source_finds_labels_in_common_folder(write_set, name, top):
    source = open_source(
        write_set({f"{top}0/a.png": b"", f"{top}1/b.png": b"", f"{top}dataset.json": {}}, name)
    )
    assert source.labels_name == f"{top}dataset.json"
    assert [source.label_key(image) for image in source.names] == ["0/a.png", "1/b.png"]


def test_source_ignores_labels_of_subfolder(write_set):
    assert open_source(write_set({"0/a.png": b"", "0/dataset.json": {}, "1/b.png": b""})).labels_name is None


@pytest.mark.parametrize("name", ["a/.b.png", ".a/b.png", "__MACOSX/a/b.png", "a\\.b.png"])
def test_is_hidden(name):
    assert is_hidden(name)
    assert not is_hidden(name.replace(".b", "b").replace(".a", "a").replace("__MACOSX", "MACOSX.."))
