"""Only one process trains in a run folder; a second one gets a message that names its owner."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_runs import after_each_step, options, quiet

from finetune import run_lock
from finetune.errors import ConfigError, TrainingError
from finetune.options import TrainOptions
from finetune.train import checkpointing, prepare, run
from finetune.train.train import start
from torch_utils.files import this_process

HOLD = """
import sys, time
from pathlib import Path
from finetune import run_lock
with run_lock.own(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""

ROOT = Path(__file__).parents[2]


@pytest.fixture
def unfinished(finished_dir):
    """A run folder with a state after 32 of 36 images."""
    return TrainOptions(resume=str(finished_dir), kimg=0.036), finished_dir


def write_lock(run_dir, age_sec=0.0, **owner):
    path = run_dir / run_lock.NAME
    path.write_text(json.dumps(owner))
    os.utime(path, (time.time() - age_sec,) * 2)
    return path


def test_run_lock_of_another_process(unfinished):
    asked, run_dir = unfinished
    words = [sys.executable, "-c", HOLD, str(run_dir)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, cwd=ROOT) as other:
        try:
            assert other.stdout.readline() == b"held\n"
            said = f"trained by process {other.pid} on {socket.gethostname()}"
            with pytest.raises(ConfigError, match=said):
                prepare(asked)
            with pytest.raises(ConfigError, match=said), run_lock.own(run_dir):
                pass
        finally:
            other.kill()
    assert (run_dir / run_lock.NAME).exists()  # it was killed
    assert run(asked, console=quiet()).nimg == 36
    assert not (run_dir / run_lock.NAME).exists()


def test_run_lock_of_another_host(unfinished):
    asked, run_dir = unfinished
    path = write_lock(run_dir, 290, host="node7", pid=os.getpid(), started="2026-11-26T10:00:00+00:00")
    with pytest.raises(ConfigError, match=r"process \d+ on node7 \(since 2026-11-26T10:00:00") as refusal:
        prepare(asked)
    assert f"delete {path}" in str(refusal.value) and path.exists()
    os.utime(path, (time.time() - 310,) * 2)
    assert run(asked, console=quiet()).nimg == 36 and not path.exists()


def test_run_lock_of_another_container(tmp_path):
    ours = {name: this_process()[name] for name in ("host", "pid_namespace")}
    write_lock(tmp_path, **ours, pid=2**22 + 1)  # above the largest id: ended
    run_lock.check_free(tmp_path)
    for pid in (2**22 + 1, os.getpid()):
        write_lock(tmp_path, **ours | {"pid_namespace": "pid:[1]"}, pid=pid)
        with pytest.raises(ConfigError, match="is being trained by process"):
            run_lock.check_free(tmp_path)


def test_run_lock_ages_by_the_clock_of_the_file_system(tmp_path, monkeypatch):
    write_lock(tmp_path, host="node7", pid=1)
    monkeypatch.setattr(run_lock.time, "time", lambda: 2e9)  # that of this machine is wrong
    assert run_lock.is_held(tmp_path)

    def refuse(dir):
        raise PermissionError(dir)

    monkeypatch.setattr(run_lock.tempfile, "NamedTemporaryFile", refuse)  # a folder that it cannot write
    assert not run_lock.is_held(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": 3}'])
def test_run_lock_that_is_damaged_counts_until_it_is_stale(tmp_path, content):
    path = tmp_path / run_lock.NAME
    path.write_text(content)
    with pytest.raises(ConfigError, match="trained by process unknown"):
        run_lock.check_free(tmp_path)
    os.utime(path, (time.time() - 310,) * 2)
    with run_lock.own(tmp_path):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_run_lock_heartbeat(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "HEARTBEAT_SEC", 0.01)
    with run_lock.own(tmp_path):
        path = tmp_path / run_lock.NAME
        os.utime(path, (0, 0))
        deadline = time.monotonic() + 30
        while path.stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert path.stat().st_mtime > 0


def test_run_lock_taken_over_stops_saving(unfinished, monkeypatch):
    asked, run_dir = unfinished
    before = checkpointing.states_of(run_dir)
    after_each_step(monkeypatch, lambda state: write_lock(run_dir, host="node7", pid=1))
    with pytest.raises(TrainingError, match="process 1 on node7 has taken over"):
        run(asked, console=quiet())
    assert checkpointing.states_of(run_dir) == before and (run_dir / run_lock.NAME).exists()


def test_resume_refuses_state_that_another_process_continued(unfinished):
    asked, _ = unfinished
    prepared = prepare(asked)
    run(asked, console=quiet())
    with pytest.raises(ConfigError, match="another process continued this run"):
        start(prepared, console=quiet())


def test_run_lock_is_released_after_an_error(images, tmp_path, monkeypatch):
    def fail(state):
        raise ValueError("bug")

    with monkeypatch.context() as patch, pytest.raises(ValueError, match="bug"):
        after_each_step(patch, fail)
        run(options(images, tmp_path), console=quiet())
    assert not list((tmp_path / "runs").glob(f"*/{run_lock.NAME}"))
