"""Sets as they come: strange paths, loops, pipes, bombs; and training whose data workers are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finetune.data import ImageSet, scan, workers
from finetune.data.preparing import prepare
from finetune.data.problems import TOO_LARGE, UNREADABLE
from finetune.errors import DataError

ROOT = Path(__file__).parents[2]


def three(folder: Path) -> Path:
    """Three gray images in a new folder."""
    try:
        folder.mkdir(parents=True)
    except (OSError, UnicodeError):
        pytest.skip("the file system takes only other names")
    for i in range(3):
        Image.fromarray(np.full((8, 8), 10 * i, np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.mark.parametrize(
    "name", ["with spaces ", "中文 ünï", "e\u0301", "a\udcff", "new\nline", "-", "%s{}[bold]"]
)
def test_source_arbitrary_paths(tmp_path, name):
    folder = three(tmp_path / name)
    scan(folder, resolution=8).raise_for_problems()
    assert [int(ImageSet(folder, resolution=8, channels=1)[i][0][0, 0, 0]) for i in range(3)] == [0, 10, 20]
    # The zip is named after the folder, and so is the folder in it.
    made = prepare(folder.parent, folder.with_name(f"{name}.zip"), workers=0)
    assert scan(made.path, resolution=8).sizes == {(8, 8): 3}
    (folder / "3.png").write_bytes(b"")
    with pytest.raises(DataError) as caught:
        scan(folder).raise_for_problems()
    str(caught.value).encode("utf-8", "backslashreplace")


@pytest.mark.slow
def test_command_escapes_invalid_paths(tmp_path):
    folder = three(tmp_path / "a\udcff")
    (folder / "b\udcfe.png").write_bytes(b"")
    words = [sys.executable, "-m", "finetune", "dataset", "check", os.fsencode(folder)]
    said = subprocess.run([os.fsencode(word) for word in words], capture_output=True, cwd=ROOT)
    assert said.returncode == 2 and b"Traceback" not in said.stderr
    assert rb"b\udcfe.png: is empty" in said.stdout


def test_source_circular_links(tmp_path):
    folder = three(tmp_path / "set")
    (folder / "sub").mkdir()
    (folder / "sub" / "up").symlink_to(folder)
    (folder / "self").symlink_to(folder / "self")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    found = scan(folder)
    assert {problem.name: problem.kind for problem in found.problems} == dict.fromkeys(
        ["loop.png", "gone.png"], UNREADABLE
    )
    assert found.num_images == 5


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a system without pipes that have names")
def test_source_does_not_block_on_pipe(tmp_path):
    folder = three(tmp_path / "set")
    os.mkfifo(folder / "pipe.png")
    (problem,) = scan(folder).problems
    assert (problem.name, problem.detail) == ("pipe.png", "not a regular file")
    with pytest.raises(DataError, match=r"pipe\.png cannot be read: not a regular file"):
        ImageSet(folder, resolution=8, channels=3).content_hash()


def test_decode_refuses_decompression_bomb(tmp_path):
    folder = three(tmp_path / "set")
    # 60,000×60,000 pixels, of which the file says so and holds a few kilobytes.
    header = (60_000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1 << 20))), (b"IEND", b"")]
    parts = [len(d).to_bytes(4, "big") + t + d + zlib.crc32(t + d).to_bytes(4, "big") for t, d in chunks]
    (folder / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    (problem,) = scan(folder).problems
    assert (problem.name, problem.kind) == ("bomb.png", TOO_LARGE)
    assert "3,600,000,000 pixels" in problem.detail


def test_source_refuses_zip_bomb(tmp_path):
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a.png", "w") as file:
        for _ in range(1 << 6):
            file.write(bytes(1 << 20))
    data = bytearray(path.read_bytes())
    place = data.rindex(b"PK\x01\x02") + 24  # it promises 2 GiB
    data[place : place + 4] = (1 << 31).to_bytes(4, "little")
    path.write_bytes(bytes(data))
    (problem,) = scan(path).problems
    assert "larger than 1024 MiB" in problem.detail


@pytest.mark.slow
def test_scan_ten_thousand_files(tmp_path, monkeypatch, capsys):
    for i in range(10_000):
        Image.fromarray(np.full((16, 16, 3), i % 256, np.uint8)).save(tmp_path / f"{i:05}.png")
    started = time.perf_counter()
    found = scan(tmp_path, resolution=16)
    seconds = time.perf_counter() - started
    assert found.sizes == {(16, 16): 10_000} and not found.problems
    with capsys.disabled():
        cores = workers.available_cores()
        print(f"\n10,000 files of 16×16 looked at in {seconds:.1f} s by {cores} processes")


TRAIN = (
    "--scratch stylegan2 --resolution 16 --cbase 128 --cmax 8 --z-dim 8 --map-depth 2 --batch 4 "
    "--sd-backbone l2 --device cpu --workers 2 --tick 0.02 --snap 1 --metrics none"
).split()
# `finetune train`, with the workers that a set of this size would not get.
PROGRAM = (
    "import finetune.data.loader as loader; loader.build_loader.__kwdefaults__['cache_bytes'] = 0; "
    "loader.available_cores = lambda: 2; from finetune.cli import main; main()"
)


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    rng = np.random.RandomState(0)
    for i in range(40):
        Image.fromarray(rng.randint(0, 256, (16, 16, 3), np.uint8)).save(folder / f"{i:02}.png")
    return folder


def train(images, outdir, kimg, **options):
    words = [sys.executable, "-c", PROGRAM, "train", "--data", str(images), "--outdir", str(outdir)]
    return subprocess.Popen(
        [*words, *TRAIN, "--kimg", str(kimg)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=ROOT,
        text=True,
        **options,
    )


def children(pid):
    return [int(found) for found in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def last_state(outdir):
    from finetune.train import checkpointing

    (run_dir,) = outdir.iterdir()
    return checkpointing.read_state(checkpointing.states_of(run_dir)[0])


def log_of(outdir):
    return [json.loads(line) for line in (next(outdir.iterdir()) / "log.jsonl").read_text().splitlines()]


def wait_for_a_tick(process, outdir, nimg=0):
    """Until the log says that more than `nimg` images were seen."""
    for _ in range(600):
        found = list(outdir.glob("*/log.jsonl"))
        lines = found[0].read_text().splitlines() if found else []
        if lines and json.loads(lines[-1])["nimg"] > nimg:
            return
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.1)
    raise AssertionError("no tick in a minute")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks for processes in /proc")
def test_train_survives_killed_workers(images, tmp_path):
    import torch

    process = train(images, tmp_path / "killed", 0.4)
    for nimg in (0, 100):
        wait_for_a_tick(process, tmp_path / "killed", nimg)
        os.kill(children(process.pid)[0], signal.SIGKILL)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert said.count("A data worker died") == 2 and "Traceback" not in said
    whole = train(images, tmp_path / "whole", 0.4)
    assert whole.communicate(timeout=120) and whole.returncode == 0
    a, b = (last_state(tmp_path / name)["networks"]["G"]["tensors"] for name in ("killed", "whole"))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks for processes in /proc")
def test_train_survives_missing_images(images, tmp_path):
    process = train(images, tmp_path / "runs", 0.4)
    wait_for_a_tick(process, tmp_path / "runs")
    (images / "07.png").unlink()
    (images / "08.png").write_bytes(b"")
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert said.count("Another image replaces it") == 1
    assert log_of(tmp_path / "runs")[-1]["unreadable"] > 2


@pytest.mark.slow
def test_train_stops_if_all_images_are_gone(images, tmp_path):
    process = train(images, tmp_path / "runs", 40)
    wait_for_a_tick(process, tmp_path / "runs")
    images.rename(tmp_path / "elsewhere")
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 2, said
    assert "A disk or network drive may be disconnected" in said and "--resume the run folder" in said
    assert last_state(tmp_path / "runs")["nimg"] > 0


@pytest.mark.slow
def test_train_without_stdin(images, tmp_path):
    outdir = tmp_path / "runs"
    words = [sys.executable, "-c", PROGRAM, "train", "--data", str(images), "--outdir", str(outdir), *TRAIN]
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" <&-', "sh", *words, "--kimg", "0.08"],
        capture_output=True,
        cwd=ROOT,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert last_state(outdir)["nimg"] == 80
