"""The lock between processes, and the write that leaves a whole file or the one of before."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from torch_utils.files import WriteError, atomic_write, cache_folder, lack_of_space, lock

ROOT = Path(__file__).parents[2]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_atomic_write_replaces_content(tmp_path):
    path = tmp_path / "net.pkl"
    path.write_bytes(b"old")
    with atomic_write(path) as stream:
        stream.write(b"new")
        stream.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["net.pkl"]


def test_atomic_write_creates_folders(tmp_path):
    with atomic_write(tmp_path / "a" / "b" / "net.pkl") as stream:
        stream.write(b"x")
    assert (tmp_path / "a" / "b" / "net.pkl").read_bytes() == b"x"


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MemoryError])
def test_atomic_write_interrupted_changes_nothing(tmp_path, error):
    path = tmp_path / "net.pkl"
    path.write_bytes(b"old")
    with pytest.raises(error), atomic_write(path) as stream:
        stream.write(b"half of the n")
        raise error
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["net.pkl"]


@pytest.mark.parametrize("existed", [True, False])
@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_atomic_write_full_disk(tmp_path, monkeypatch, step, existed):
    """Wherever the system runs out of space, the message says so and the folder looks as before."""
    path = tmp_path / "net.pkl"
    if existed:
        path.write_bytes(b"old")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if step != "write":
        monkeypatch.setattr(os, step, full)
    with pytest.raises(WriteError) as caught, atomic_write(path) as stream:
        stream.write(b"new")
        if step == "write":
            full()
    message = str(caught.value)
    assert "No space left" in message and "net.pkl" in message
    assert ("previous file is untouched" in message) == existed
    assert names(tmp_path) == (["net.pkl"] if existed else [])
    assert not existed or path.read_bytes() == b"old"


def test_lack_of_space_states_sizes(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=3 * 2**20 - 1))
    assert lack_of_space(tmp_path, 3 * 2**20 - 1, "a run") is None
    needed = lack_of_space(tmp_path, 3 * 2**20, "a run")
    assert needed == f"Not enough space in {tmp_path} for a run: 3 MiB needed, 2 MiB free."


@pytest.mark.parametrize("letter", ["a", "ü", "\U00020000"])
def test_atomic_write_longest_name(tmp_path, letter):
    target = tmp_path / (letter * (250 // len(letter.encode())) + ".pkl")
    with atomic_write(target) as stream:
        stream.write(b"x")
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


def test_atomic_write_target_is_folder(tmp_path):
    with pytest.raises(WriteError, match="is a folder"), atomic_write(tmp_path):
        raise AssertionError("never reached")


def test_atomic_write_parent_is_file(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    with (
        pytest.raises(WriteError, match=r"file.net\.pkl: .* is a file"),
        atomic_write(tmp_path / "file" / "net.pkl"),
    ):
        raise AssertionError("never reached")


def test_atomic_write_without_permission(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "replace", refuse)
    with (
        pytest.raises(WriteError, match="Not allowed to write"),
        atomic_write(tmp_path / "net.pkl") as stream,
    ):
        stream.write(b"x")
    assert names(tmp_path) == []


def test_atomic_write_keeps_link(tmp_path):
    target, link = tmp_path / "target.pkl", tmp_path / "link.pkl"
    target.write_bytes(b"old")
    link.symlink_to(target)
    with atomic_write(link) as stream:
        stream.write(b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"


def test_atomic_write_permissions_follow_umask(tmp_path):
    with atomic_write(tmp_path / "net.pkl") as stream:
        stream.write(b"x")
    (tmp_path / "plain").write_bytes(b"x")
    assert (tmp_path / "net.pkl").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_lock_excludes_and_is_released(tmp_path):
    path, waited = tmp_path / "locks" / "a.lock", []
    with lock(path, on_wait=lambda: waited.append(1)) as first:
        with lock(path, timeout_sec=0.1, on_wait=lambda: waited.append(2)) as second:
            assert first and not second
    with pytest.raises(KeyError), lock(path) as third:
        assert third
        raise KeyError
    with lock(path) as fourth:
        assert fourth
    assert waited == [2]


def test_lock_released_by_killed_process(tmp_path):
    program = "from pathlib import Path; import sys, time; from torch_utils.files import lock\n"
    program += "with lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    path = tmp_path / "a.lock"
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path)], cwd=ROOT, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout.readline() == b"held\n"
        with lock(path, timeout_sec=0.1) as held:
            assert not held
        holder.kill()
    with lock(path, timeout_sec=10) as held:
        assert held


def test_lock_in_read_only_folder(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with lock(tmp_path / "file" / "a.lock") as held:
        assert not held


def test_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("FINETUNE_CACHE")
    assert cache_folder().name == "stylegan-finetune"
