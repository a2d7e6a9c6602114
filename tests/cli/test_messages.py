"""The likeliest mistakes: each message says what happened, the value seen, and what to do."""

import json
import os
import pickle
import re
import shutil
import signal
import sys
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from tiny_runs import after_each_step, options, quiet

from finetune.cli import cli
from finetune.export.stylegan_pickle import save_stylegan_pickle
from finetune.models import stylegan2
from finetune.run_lock import NAME as LOCK
from finetune.train import divergence, run, steps

SHAPE = {"img_resolution": 16, "img_channels": 3, "channel_base": 128, "channel_max": 8}


class Command:
    """A name that a hostile pickle would call."""

    def __reduce__(self):
        return (eval, ("1 + 1",))


def write_images(folder, count=6, size=(16, 16), mode="RGB", start=0):
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        pixels = np.random.default_rng(start + index).integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(pixels).convert(mode).save(folder / f"{index:03d}.png")
    return folder


def write_network(path, c_dim=0, **which):
    G = stylegan2.Generator(8, c_dim, 8, mapping_kwargs={"num_layers": 2}, **SHAPE)
    networks = {
        "G": G,
        "D": stylegan2.Discriminator(c_dim, **SHAPE),
        "G_ema": G,
        "augment_pipe": None,
    } | which
    save_stylegan_pickle(path, training_set_kwargs={}, provenance={}, **networks)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with good and bad networks, data sets and runs."""
    place = tmp_path_factory.mktemp("mistakes")
    write_network(place / "net.pkl")
    write_network(place / "classes.pkl", c_dim=3)
    write_network(place / "no-d.pkl", D=None)
    write_network(place / "only-d.pkl", G=None, G_ema=None)
    (place / "page.pkl").write_text("<!DOCTYPE html><html><body>Sign in to Google Drive</body></html>")
    (place / "empty.pkl").write_bytes(b"")
    (place / "cut.pkl").write_bytes((place / "net.pkl").read_bytes()[:20_000])
    (place / "hostile.pkl").write_bytes(pickle.dumps(Command()))
    torch.save({"weight": torch.zeros(2)}, place / "weights.pt")
    images = write_images(place / "images")
    write_images(place / "gray", mode="L")
    (place / "none").mkdir()
    (write_images(place / "broken") / "001.png").write_bytes(b"\x89PNG\r\n\x1a\nhalf")
    labeled = write_images(place / "labeled", 4)
    labels = [[f"{index:03d}.png", index] for index in range(4)]
    (labeled / "dataset.json").write_text(json.dumps({"labels": labels}))
    with zipfile.ZipFile(place / "images.zip", "w") as archive:
        for path in images.iterdir():
            archive.write(path, path.name)
    (place / "a-file").write_text("")
    ended = run(options(lambda _: images, place, kimg=0.004, tick=0.004), console=quiet())
    shutil.copytree(ended.run_dir, place / "run")
    shutil.copytree(ended.run_dir, place / "used")
    (place / "used" / LOCK).write_text(json.dumps({"host": "other", "pid": 7, "started": "today"}))
    (place / "no-state").mkdir()
    shutil.copy(ended.snapshot, place / "no-state")
    return place


TRAIN = "train --resume net.pkl --data images"
WITH = "train --data images --resume"
# mistake: command, and what the message says: what happened with the value seen, and what to do.
MISTAKES = {
    # Checkpoints.
    "wrong path": (f"{WITH} nope.pkl", "nope.pkl does not exist", "`finetune checkpoints list`"),
    "misspelled name": (f"{WITH} ffhq-256-stylegan", "not in the catalog", "Did you mean ffhq-256-stylegan2"),
    "login page": (f"{WITH} page.pkl", "it is a web page: 'Sign in to Google Drive'", "get the file again"),
    "empty file": (f"{WITH} empty.pkl", "empty.pkl is empty", "Download or copy it again"),
    "cut download": (f"{WITH} cut.pkl", "the file may be cut off (at byte 2)", "download it again"),
    "hostile pickle": (f"{WITH} hostile.pkl", "refers to builtins.eval", "nothing was executed"),
    "torch.save": (f"{WITH} weights.pt", "a state dict of an unknown network (weight", "can be opened"),
    "no discriminator": (f"{WITH} no-d.pkl", "the file has G, G_ema, but no discriminator D", "--new-d"),
    "only a discriminator": (f"{WITH} only-d.pkl", "has no generator, only D", "Use a file with G or G_ema"),
    "folder without snapshots": (f"{WITH} images", "this folder has no snapshots", "Pass a file"),
    "run without state": (
        f"{WITH} no-state", "has no training state", "--resume no-state/network-snapshot-"),
    "offline": (f"{WITH} ffhq-256-stylegan2", "is not on this machine", "finetune checkpoints add-file"),
    # Images and labels.
    "no such data": ("train --resume net.pkl --data nope", "nope: no such folder or zip", "Check the path"),
    "no images": ("train --resume net.pkl --data none", "none: no image found", "recognized by suffix: .png"),
    "no folder": ("train --resume net.pkl --data a-file", "neither a folder nor a zip", "a zip of them"),
    "damaged image": ("train --resume net.pkl --data broken", "001.png: damaged", "or remove them"),
    "no labels": (f"{TRAIN} --cond --classes fresh", "dataset.json is missing", "or train without labels"),
    "labels are needed": (f"{WITH} classes.pkl", "dataset.json is missing", "--no-cond"),
    "wrong class count": (
        "train --resume classes.pkl --data labeled", "class 3, but the classes are 0 to 2", "--classes keep"),
    "gray images": (
        "train --resume net.pkl --data gray --sd-backbone l2 --dry-run", "All images are gray",
        "--channels 1"),
    # Options.
    "nothing to start from": ("train --data images", "Use either --resume PICKLE", "or --scratch FAMILY"),
    "no data": ("train --resume net.pkl", "--data: missing", "Pass the folder or zip"),
    "misspelled run": ("train --resume runs/00009-x", "is not a run folder", "Pass the folder or zip"),
    "frozen and converted": (
        f"{TRAIN} --channels 4 --freezed 2 --sd-backbone l2", "--freezed 2", "Use --freezed 0"),
    "odd resolution": (f"{TRAIN} --resolution 20", "--resolution 20", "must be a power of two"),
    "micro-batch": (f"{TRAIN} --batch 6 --batch-gpu 4", "--batch 6", "multiple of --batch-gpu 4"),
    "groups of D": (
        f"{TRAIN} --batch 6 --batch-gpu 6 --sd-backbone l2", "groups of 4", "Use a multiple of 4"),
    "no effect": (f"{TRAIN} --p 0.2", "--p 0.2: has no effect", "Use --aug fixed"),
    "no number": (f"{TRAIN} --sd-weight much", "--sd-weight much", "such as auto:0.1"),
    "zero length": (f"{TRAIN} --kimg 0", "--kimg 0.0", "must be greater than 0"),
    "misspelled option": (f"{TRAIN} --kimgs 3", "No such option '--kimgs'", "'--kimg'"),
    "misspelled metric": (f"{TRAIN} --metrics fid5k", "unknown metric (fid5k)", "Choose from random-fid"),
    # The machine.
    "float16 on a CPU": (f"{TRAIN} --precision fp16", "the device is cpu", "Use --precision auto"),
    "no GPU": (f"{TRAIN} --device cuda:7", "--device cuda:7: torch sees", "Use --device auto"),
    "no weights": (
        f"{TRAIN} --recipe adapt", "no weights for it", "that need no download: efficientnet-lite0"),
    "no metric weights": (
        f"{TRAIN} --sd-backbone l2 --metrics fid", "pytorch-fid-inception is not on", "checkpoints add-file"),
    "outdir is a file": (f"{TRAIN} --sd-backbone l2 --outdir a-file", "a-file is a file", "Choose a folder"),
    # Runs.
    "fixed option": (
        "train --resume run --kimg 1 --batch 8", "cannot change this (4 in the run)", "Start a new run"),
    "run in use": ("train --resume used --kimg 1", "by process 7 on other", "Stop that process first"),
    "not a run": ("report images", "not a run folder", "Name a folder that `finetune train` wrote"),
    # Images from networks.
    "class without classes": (
        "generate --network net.pkl --seeds 0 --outdir out --class 1", "no classes", "Omit"),
    "class is missing": ("generate --network classes.pkl --seeds 0 --outdir out", "3 classes", "from 0 to 2"),
    "no seed": ("generate --network net.pkl --seeds one --outdir out", "'one' is not a seed", "like 0-15,42"),
    "own file": (
        "export --network net.pkl --out net.pkl", "net.pkl: this is the checkpoint itself", "another name"),
    "wrong ending": (
        "export --network net.pkl --out x.safetensors --format stylegan-pkl",
        "--format is stylegan-pkl", "--format safetensors"),
}  # fmt: skip


@pytest.fixture
def invoke(place, monkeypatch):
    """Call with a command line: its result, offline and in the folder of the mistakes."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("FINETUNE_OFFLINE", "1")
    monkeypatch.setenv("TORCH_HOME", str(place / "torch-home"))
    monkeypatch.setenv("FINETUNE_CACHE", str(place / "cache"))
    return lambda command: CliRunner().invoke(cli, command.split())


@pytest.mark.parametrize("mistake", MISTAKES)
def test_message_says_what_happened_and_what_to_do(mistake, invoke):
    command, *words = MISTAKES[mistake]
    result = invoke(command)
    assert result.exit_code == (0 if "--dry-run" in command else 2)
    text = " ".join(result.output.split())
    assert [each for each in words if each not in text] == []
    assert "Traceback" not in text and "Internal error" not in text


def test_catalog_of_messages_is_long_enough():
    assert len(MISTAKES) >= 40


QUICK = f"{TRAIN} --sd-backbone l2 --kimg 0.008 --batch 4 --metrics none"


def fail_with(error):
    def fail(*args, **settings):
        raise error

    return fail


def test_message_of_too_little_memory_names_a_size_that_works(invoke, monkeypatch):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore.")
    with monkeypatch.context() as patch:
        patch.setattr(steps, "generator_step", fail_with(error))
        result = invoke(f"{QUICK} --outdir step")
    assert result.exit_code == 2
    for words in (
        "--batch-gpu 4: out of memory on the GPU (CUDA out of memory. Tried to allocate 2 GiB.).",
        "--batch-gpu 2\n",
        "Measured for stylegan2: 256 px with --batch-gpu 32 takes 6.2 GiB (docs/performance.md)",
    ):
        assert words in result.output, words
    line = next(line for line in result.output.splitlines() if "finetune train --resume" in line)
    assert "Done: " in invoke(line.split("finetune ")[-1]).output


@pytest.mark.parametrize(
    "error, words",
    [
        (RuntimeError("CUDA error: no kernel image is available for execution on the device"), "too old"),
        (MemoryError(), "Use a smaller batch"),
    ],
)
def test_message_of_a_machine_that_is_too_small(error, words, invoke, monkeypatch):
    monkeypatch.setattr(sys.modules["finetune.train.prepare"], "find_origin", fail_with(error))
    result = invoke(QUICK)
    assert result.exit_code == 2 and words in result.output


def test_message_of_a_diverged_run_names_remedies(invoke, monkeypatch):
    monkeypatch.setattr(divergence, "MAX_SCORE", 0.0)
    result = invoke(f"{QUICK} --outdir diverged")
    assert result.exit_code == 2
    for words in (
        "The scores of D exploded",
        "Try a smaller --glr and --dlr",
        "The last saved state is intact",
    ):
        assert words in result.output, words


def test_message_of_a_stopped_run_is_how_to_resume(invoke, monkeypatch):
    after_each_step(monkeypatch, lambda state: os.kill(os.getpid(), signal.SIGTERM))
    result = invoke(f"{QUICK} --outdir stopped --kimg 4")
    assert result.exit_code == 0
    last = result.output.splitlines()[-1]
    assert last.startswith("Stopped by SIGTERM after 0.004 kimg. To resume: finetune train --resume stopped")


def test_message_at_the_end_recommends_a_snapshot_and_what_next(invoke):
    result = invoke(f"{QUICK} --outdir ended")
    assert result.exit_code == 0
    run_dir = "ended/00000-images-stylegan2-16"
    done, recommended, _, generate, export, further = result.output.splitlines()[-6:]
    assert done.startswith("Done: 0.008 kimg in 0:0") and done.endswith(f"{run_dir}/report.html")
    assert recommended.startswith("Recommended: network-snapshot-000000.008.pkl, the last snapshot")
    assert generate.startswith(f"  finetune generate --network {run_dir}/network-snapshot-000000.008.pkl ")
    assert export.endswith(" --out fine-tuned-00000.pkl")
    assert further == f"  finetune train --resume {run_dir} --kimg 0.016"


def test_message_of_a_full_disk_names_the_sizes(invoke, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
    result = invoke(f"{TRAIN} --sd-backbone l2 --snap 1")
    assert result.exit_code == 2
    for words in ("Not enough space in", "1 MiB free", "another --outdir, save less often"):
        assert words in result.output, words


def test_dry_run_states_downloads_and_settings_without_a_network(invoke):
    result = invoke(f"{WITH} ffhq-256-stylegan2 --recipe adapt --metrics fid --dry-run")
    assert result.exit_code == 0
    for words in ("checkpoint stylegan2-ffhq-256x256, of a size", "lpips-vgg, 528 MB", "Inception, 96 MB"):
        assert words in result.output, words
    assert "6 images from images." in result.output and "--gamma " in result.output


def test_dry_run_without_the_checkpoint_has_its_published_settings(invoke):
    result = invoke(f"{WITH} ffhq-256-stylegan2 --recipe few-shot --dry-run")
    for row in (
        r"--gamma +4 +as this checkpoint is fine-tuned",
        r"--glr +0\.0025 ",
        r"--freezed +40 % ",
    ):
        assert re.search(row, result.output), result.output


def test_dry_run_refuses_an_architecture_before_a_download(invoke):
    result = invoke(f"{WITH} tf-stylegan2-ffhq-config-a --dry-run")
    assert result.exit_code == 2 and "architecture stylegan1 cannot be used here" in result.output


def test_dry_run_of_a_url_checks_options_and_images(invoke):
    result = invoke(f"{WITH} https://example.org/net.pkl --dry-run")
    assert result.exit_code == 0 and "checkpoint https://example.org/net.pkl, of a size" in result.output
    assert invoke("train --resume https://example.org/net.pkl --data none --dry-run").exit_code == 2


def test_dry_run_needs_no_weights(invoke):
    result = invoke(f"{TRAIN} --recipe adapt --metrics fid --dry-run")
    assert result.exit_code == 0
    assert "weights of lpips-vgg, 528 MB" in result.output and "weights of Inception, 96 MB" in result.output
    assert "Dry run: all checks passed" in result.output
