"""A run that is stopped goes on as if nothing had happened: bit for bit; and what it says where it cannot."""

import dataclasses
import io
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import zipfile
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from tiny_runs import after_each_step, options, quiet

from finetune.cli import cli
from finetune.errors import CheckpointError, ConfigError, ExportError, TrainingError
from finetune.options import OPTIONS, TrainOptions
from finetune.resolve import newest_snapshot
from finetune.train import checkpointing, prepare, run
from finetune.train.divergence import DivergenceMonitor
from finetune.train.prepare import show
from finetune.train.run_dir import RunDir
from finetune.train.stats import Stats
from finetune.train.train import start

# Everything that has a memory: ADA with its statistics, style mixing and path length (StyleGAN2), R1 and path
# length every few steps, distillation every other step with a warm-up, labels of classes, a weight by ratio.
ALL = dict(
    batch=4, kimg=0.096, tick=0.016, snap=100, aug="ada", target=0.0, augpipe="blit", sd_interval=2,
    sd_weight="auto:0.2", save_every_min=0, ema_kimg=0.02, mirror=True,
    lr_warmup_kimg=0.03,
)  # fmt: skip


def run_until(config, nimg, monkeypatch):
    """Run, be asked to stop after `nimg` images, and return the run folder."""

    def stop(state):
        if state.nimg >= nimg:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        after_each_step(patch, stop)
        return run(config, console=quiet()).run_dir


def state_of(run_dir):
    return checkpointing.read_state(checkpointing.states_of(run_dir)[0])


def differences(a, b, name=""):
    """Where two nested values are not equal, bit by bit."""
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [name]
    if isinstance(a, dict):
        assert a.keys() == b.keys(), name
        return [found for key in a for found in differences(a[key], b[key], f"{name}.{key}")]
    if isinstance(a, list):
        return [
            found
            for i, pair in enumerate(zip(a, b, strict=True))
            for found in differences(*pair, f"{name}{i}")
        ]
    return [] if a == b else [f"{name}: {a} {b}"]


def future(content):
    """What of a state decides what comes; seconds do not."""
    kept = ("networks", "opt_G", "opt_D", "ada", "path_mean", "sd_norms", "nimg", "step", "random", "sampler")
    return {name: content[name] for name in kept}


# StyleGAN3 has averages of magnitudes besides, and none of the lazy path length.
@pytest.mark.parametrize(
    "family, kimg, stops",
    [("stylegan2", 0.096, (20, 52)), pytest.param("stylegan3-t", 0.04, (20,), marks=pytest.mark.slow)],
)
def test_resume_is_bit_exact(family, kimg, stops, images, tmp_path, monkeypatch):
    monkeypatch.setattr("finetune.data.image_set.ImageSet.preload", lambda self, *args, **kwargs: False)
    config = options(images, tmp_path, family, **ALL | {"kimg": kimg}, workers=2)
    whole = run(config, console=quiet()).run_dir
    assert multiprocessing.active_children() == []  # left to the garbage collector, each would take 5 s
    assert state_of(whole)["ada"]["p"] > 0 and float(state_of(whole)["sd_norms"][1]) > 0

    # 20 images are 5 steps: inside the intervals of R1 (16), path length (4), ADA (4) and a tick (4).
    run_dir = run_until(config, stops[0], monkeypatch)
    assert state_of(run_dir)["nimg"] == 20
    again = TrainOptions(resume=str(run_dir))
    for nimg in stops[1:]:
        run_until(again, nimg, monkeypatch)
    result = run(again, console=quiet())
    assert result.run_dir == run_dir and result.nimg == 1000 * kimg
    assert differences(future(state_of(whole)), future(state_of(run_dir))) == []

    first, second = (
        [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        for folder in (whole, run_dir)
    )
    ticks = {*range(16, result.nimg, 16), result.nimg}
    assert [line["nimg"] for line in first] == sorted(ticks)
    assert [line["nimg"] for line in second] == sorted(ticks | set(stops))
    assert first[-1]["loss_G"] == second[-1]["loss_G"]
    assert all(a["sec"] < b["sec"] for a, b in itertools.pairwise(second))


def test_resume_with_own_teacher_and_changed_rates(images, tmp_path, monkeypatch):
    config = options(images, tmp_path, kimg=0.032, sd_teacher_kimg=0.1)
    run_dir = run_until(config, 8, monkeypatch)
    content = state_of(run_dir)
    assert "teacher" in content["networks"]
    console = Console(file=io.StringIO(), width=200)
    asked = TrainOptions(resume=str(run_dir), glr=0.001, kimg=0.04, batch_gpu="auto", outdir="a b")
    prepared = prepare(dataclasses.replace(asked, recipe="custom"))
    show(prepared, console)
    said = console.file.getvalue()
    assert "Resuming after 0.008 kimg" in said
    assert "Changed: --kimg: 0.032 -> 0.04; --batch-gpu: 4 -> auto; --glr: 0.002 -> 0.001" in said
    assert "--outdir a b has no effect on a resumed run" in said and "--recipe custom has no effect" in said
    assert prepared.state.teacher is not prepared.state.G_ema
    assert prepared.state.opt_G.param_groups[0]["lr"] == pytest.approx(0.001 * 4 / 5)
    assert prepared.state.opt_D.param_groups[0]["lr"] == content["opt_D"]["param_groups"][0]["lr"]
    assert prepared.plan.total_nimg == 40


def test_resume_earlier_state_sets_later_files_aside(finished_dir, monkeypatch):
    newest, before = checkpointing.states_of(finished_dir)
    shutil.copy(finished_dir / "network-snapshot-000000.032.pkl", finished_dir / "network-best.pkl")
    left = {
        name: (finished_dir / name).read_bytes()
        for name in (newest.name, "network-best.pkl", "network-snapshot-000000.032.pkl",
                     "averages-000000.032.safetensors", "fakes000000.032.png")
    }  # fmt: skip
    kept = (finished_dir / "network-snapshot-000000.016.pkl").read_bytes()
    (finished_dir / f"{newest.name}.abandoned").touch()  # of an earlier time
    run_until(TrainOptions(resume=str(before), glr=0.0001), 20, monkeypatch)
    assert checkpointing.find_state(finished_dir).nimg == 20
    assert newest_snapshot(finished_dir).name == "network-snapshot-000000.020.pkl"
    assert (finished_dir / "network-snapshot-000000.016.pkl").read_bytes() == kept
    aside = {path.name: path.read_bytes() for path in finished_dir.glob("*.abandoned*")}
    assert aside.pop(f"{newest.name}.abandoned") == b""
    assert {name.removesuffix("1").removesuffix(".abandoned"): each for name, each in aside.items()} == left


def test_set_aside_looks_up_names_in_whole_kimg(tmp_path):
    folder = object.__new__(RunDir)
    folder.path, folder.written = tmp_path, {"network-snapshot-000001.pkl": 1004}
    names = ["fakes000001.png", "fakes000002.png", "memorization-000001.005.png", "reals.png"]
    for name in (*names, "averages-000001.safetensors", "network-snapshot-000000.pkl"):
        (tmp_path / name).touch()
    assert folder.set_aside_later(1004) == ["fakes000002.png", "memorization-000001.005.png"]


@pytest.mark.parametrize(
    "asked, backbone, interval", [({}, "lpips-vgg", 4), ({"sd_backbone": "l2", "sd_interval": 2}, "l2", 2)]
)
def test_resume_that_switches_distillation_on(asked, backbone, interval, finished_dir):
    content = state_of(finished_dir)
    off = {"sd_weight": 0.0, "sd_backbone": "ms-ssim", "sd_interval": 64}
    content["config"] = json.dumps(json.loads(content["config"]) | off)
    checkpointing.write_state(checkpointing.states_of(finished_dir)[0], content)
    again = TrainOptions(resume=str(finished_dir), kimg=0.036)
    before = prepare(again).config
    assert (before.sd_backbone, before.sd_interval) == ("ms-ssim", 64)
    with pytest.raises(ConfigError, match="--sd-backbone l2: an exact resume cannot change this"):
        prepare(dataclasses.replace(again, sd_backbone="l2"))
    prepared = prepare(dataclasses.replace(again, sd_weight="auto:1", **asked), dry_run=True)
    assert (prepared.config.sd_backbone, prepared.config.sd_interval) == (backbone, interval)
    said = " ".join((*prepared.notes, *prepared.origin.lines))
    assert f"--sd-backbone {backbone}: " in said or f"--sd-backbone: ms-ssim -> {backbone}" in said


def test_resume_classifies_every_option():
    lists = (checkpointing.CHANGEABLE, checkpointing.FIXED, checkpointing.IGNORED_ON_RESUME)
    assert sorted(itertools.chain(*lists)) == sorted(OPTIONS)


class TestRefused:
    def test_resume_refuses_changed_options(self, parent):
        asked = TrainOptions(resume=str(parent.run_dir), batch=8, seed=5)
        with pytest.raises(ConfigError, match=r"(?s)--batch 8: .*4 in the run.*--seed 5: .*0 in the run"):
            prepare(asked)

    def test_resume_finished_run(self, parent, finished_dir):
        again = ["train", "--resume", str(finished_dir)]
        for words in (again, [*again, "--dry-run"]):
            finished = CliRunner().invoke(cli, words)
            assert finished.exit_code == 0, finished.output
            assert "the run has reached its 0.032 kimg. To continue, use a larger --kimg." in finished.output
        assert run(TrainOptions(resume=str(parent.run_dir)), console=quiet()) == parent
        more = TrainOptions(resume=str(finished_dir), kimg=0.036)
        assert run(more, console=quiet()).nimg == 36

    @pytest.mark.parametrize(
        ("changed", "why"),
        [("missing", "11 items, mirrored"), ("renamed", "names, file"), ("edited", "names, file")],
    )
    def test_resume_refuses_other_images(self, changed, why, images, tmp_path, finished_dir):
        other = tmp_path / "other.zip"
        with zipfile.ZipFile(images(16)) as archive, zipfile.ZipFile(other, "w") as copy:
            first, *others = archive.namelist()
            for name in others:
                copy.writestr(name, archive.read(name))
            if changed != "missing":
                name = "new.png" if changed == "renamed" else first
                copy.writestr(name, archive.read(others[0] if changed == "edited" else first))
        asked = TrainOptions(resume=str(finished_dir), data=str(other), kimg=0.036)
        before = {path.name: path.stat().st_mtime_ns for path in finished_dir.iterdir()}
        with pytest.raises(ConfigError, match=f"{why}.*Pass the images of the run"):
            run(asked, console=quiet())
        assert {path.name: path.stat().st_mtime_ns for path in finished_dir.iterdir()} == before


class TestDamage:
    def test_resume_newest_intact_state(self, finished_dir):
        newest, before = checkpointing.states_of(finished_dir)
        newest.write_bytes(newest.read_bytes()[:-2000])
        found = checkpointing.find_state(finished_dir)
        assert found.path == before and newest.name in found.skipped[0] and "damaged" in found.skipped[0]
        before.write_bytes(b"")
        with pytest.raises(CheckpointError, match="has no valid training state"):
            checkpointing.find_state(finished_dir)

    def test_load_detects_truncation_and_bit_flips(self, finished_dir):
        path = checkpointing.states_of(finished_dir)[0]
        content = path.read_bytes()
        for size in range(0, len(content), 1000):
            path.write_bytes(content[:size])
            with pytest.raises(CheckpointError):
                checkpointing.read_state(path)
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            largest = max(archive.infolist(), key=lambda info: info.file_size)
        middle = largest.header_offset + largest.file_size // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        with pytest.raises(CheckpointError, match="checksum"):
            checkpointing.read_state(path)
        path.write_bytes(content)
        assert checkpointing.read_state(path)["nimg"] == 32

    def test_load_refuses_other_file(self, tmp_path):
        path = tmp_path / "training-state-000001.000.pt"
        torch.save({"format": 99}, path)
        with pytest.raises(CheckpointError, match="its format is 99, not 3"):
            checkpointing.find_state(path)
        torch.save([torch.nn.Linear(1, 1)], path)  # which weights_only refuses
        with pytest.raises(CheckpointError, match="damaged"):
            checkpointing.find_state(path)


class TestSaving:
    def test_save_at_start_and_keep_two_states(self, images, tmp_path, monkeypatch):
        seen = []

        def look(state):
            (run_dir,) = (tmp_path / "runs").iterdir()
            seen.append([path.name for path in checkpointing.states_of(run_dir)])

        after_each_step(monkeypatch, look)
        run(options(images, tmp_path, kimg=0.04), console=quiet())
        assert seen[0] == ["training-state-000000.000.pt"]
        assert seen[4] == ["training-state-000000.016.pt", "training-state-000000.000.pt"]
        assert all(len(names) == 2 for names in seen[4:]) and len(seen) == 10

    def test_save_full_disk_is_a_warning(self, images, tmp_path, monkeypatch):
        write = checkpointing.write_state

        def full(path, content):
            if content["nimg"] == 16:
                raise ExportError("No space left to write it.")
            return write(path, content)

        monkeypatch.setattr(checkpointing, "write_state", full)
        console = Console(file=io.StringIO(), width=200)
        result = run(options(images, tmp_path), console=console)
        assert "0.016 kimg: not saved, and training continues: No space left" in console.file.getvalue()
        assert [path.name for path in checkpointing.states_of(result.run_dir)][
            -1
        ] == "training-state-000000.000.pt"
        events = [json.loads(line) for line in (result.run_dir / "events.jsonl").read_text().splitlines()]
        assert [event["event"] for event in events] == ["not-saved"]

    def test_check_place_refuses_full_disk(self, images, tmp_path, monkeypatch):
        prepared = prepare(options(images, tmp_path))
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        with pytest.raises(TrainingError, match=r"cannot be saved: Not enough space in .* 0 MiB free"):
            start(prepared, console=quiet())
        assert not list((tmp_path / "runs").glob("*/network-snapshot-*"))
        assert len(list((tmp_path / "runs").glob("*/training-state-*"))) == 1

    def test_save_every_min(self, images, tmp_path, monkeypatch):
        now = iter(range(0, 10**9, 61))
        monkeypatch.setattr(checkpointing.time, "monotonic", lambda: next(now))
        saves = []
        monkeypatch.setattr(
            checkpointing.Checkpointer,
            "save_state",
            lambda self, is_last=False: saves.append(self.state.nimg),
        )
        run(options(images, tmp_path, save_every_min=1, snap=100, kimg=0.016), console=quiet())
        assert saves[0] == 0 and {4, 8, 12} <= set(saves)

    def test_save_every_min_waits_for_no_device_on_other_ranks(self):
        stats = Mock(is_finite=Mock(return_value=False))
        config, folder = Mock(save_every_min=1e-9), Mock(is_writable=False)
        other = checkpointing.Checkpointer(config, *[Mock()] * 4, stats, folder, Mock())
        other.save_by_the_clock()
        stats.is_finite.assert_not_called()
        folder.is_writable = True
        other.save_by_the_clock()
        stats.is_finite.assert_called_once()

    def test_save_every_min_skips_non_finite_state(self, images, tmp_path, monkeypatch):
        now = iter(range(0, 10**9, 61))
        monkeypatch.setattr(checkpointing.time, "monotonic", lambda: next(now))
        monkeypatch.setattr(Stats, "is_finite", lambda self: False)
        result = run(options(images, tmp_path, save_every_min=1, snap=100, kimg=0.016), console=quiet())
        assert [path.name for path in checkpointing.states_of(result.run_dir)] == [
            "training-state-000000.016.pt",
            "training-state-000000.000.pt",
        ]

    def test_keep_newest_and_best_snapshots(self, images, tmp_path, monkeypatch):
        monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
        metrics = dict(metrics="random-fid", metrics_num=4)
        short = dict(kimg=0.016, tick=0.004, keep=2)
        result = run(options(images, tmp_path, **short, **metrics), console=quiet())
        names = sorted(path.name for path in result.run_dir.glob("*.pkl"))
        assert names == ["network-best.pkl"] + [f"network-snapshot-000000.0{n}.pkl" for n in (12, 16)]
        best = state_of(result.run_dir)["counters"]["best"]
        lines = [json.loads(line) for line in (result.run_dir / "log.jsonl").read_text().splitlines()]
        values = {line["nimg"]: line["metrics"]["random-fid"] for line in lines}
        assert best["nimg"] == min(values, key=values.get)


class TestDivergence:
    def poisoned(self, nimg, monkeypatch, times=1):
        """The generator gets a weight that is not a number after so many images, so many times."""
        left = [times]

        def poison(state):
            if state.nimg >= nimg and left[0]:
                left[0] -= 1
                next(state.G.parameters()).data.fill_(float("nan"))

        after_each_step(monkeypatch, poison)

    def events(self, tmp_path):
        (path,) = (tmp_path / "runs").glob("*/events.jsonl")
        return [json.loads(line) for line in path.read_text().splitlines()]

    def test_divergence_stop_keeps_last_state(self, images, tmp_path, monkeypatch):
        self.poisoned(20, monkeypatch)
        with pytest.raises(TrainingError, match=r"became nan in G?D?main at 0\.024 kimg"):
            run(options(images, tmp_path), console=quiet())
        (run_dir,) = (tmp_path / "runs").iterdir()
        assert state_of(run_dir)["nimg"] == 16
        assert self.events(tmp_path)[0]["event"] == "not-finite"

    def test_divergence_rollback_halves_rates(self, images, tmp_path, monkeypatch):
        self.poisoned(28, monkeypatch)  # after another tick
        changes = dict(on_divergence="rollback", tick=0.008, snap=2)
        result = run(options(images, tmp_path, **changes), console=quiet())
        assert result.nimg == 32
        rollback = self.events(tmp_path)[1]
        assert (rollback["event"], rollback["nimg"], rollback["lr_D"]) == (
            "rollback",
            16,
            pytest.approx(0.001 * 16 / 17),
        )
        content = state_of(result.run_dir)
        assert content["counters"]["rollbacks"] == 1
        lines = (result.run_dir / "log.jsonl").read_text().splitlines()
        assert all(json.loads(line)["path_per_kimg_G"] > 0 for line in lines)
        assert content["opt_D"]["param_groups"][0]["lr"] == pytest.approx(0.001 * 16 / 17)

    def test_divergence_rollbacks_are_limited(self, images, tmp_path, monkeypatch):
        self.poisoned(4, monkeypatch, times=99)
        with pytest.raises(TrainingError, match="3 rollbacks did not help"):
            run(options(images, tmp_path, on_divergence="rollback"), console=quiet())
        assert self.events(tmp_path)[-2]["lr_D"] == pytest.approx(0.002 / 8 * 16 / 17)

    def test_divergence_ignore_never_saves_non_finite(self, images, tmp_path, monkeypatch):
        self.poisoned(20, monkeypatch)
        with pytest.raises(TrainingError, match="has non-finite weights"):
            run(options(images, tmp_path, on_divergence="ignore"), console=quiet())
        assert {event["event"] for event in self.events(tmp_path)} == {"not-finite"}


class TestDivergenceMonitor:
    def state(self, p=0.0):
        class Ada:
            target = 0.6

        class State:
            augment_pipe, ada, nimg = object(), Ada(), 100

        State.ada.p = p
        return State()

    def kinds(self, monitor, numbers, p=0.0):
        return [alarm.kind for alarm in monitor.check(self.state(p), numbers)]

    def test_monitor_score_explosion(self):
        assert self.kinds(DivergenceMonitor(), {"score_real": 30.0, "score_fake": -40.0}) == []
        assert self.kinds(DivergenceMonitor(), {"score_real": 30.0, "score_fake": -600.0}) == [
            "score-explosion"
        ]

    def test_monitor_student_left_teacher(self):
        monitor = DivergenceMonitor()
        for _ in range(5):
            assert self.kinds(monitor, {"loss_sd": 0.1}) == []
        assert self.kinds(monitor, {"loss_sd": 0.9}) == []
        assert self.kinds(monitor, {"loss_sd": 9.2}) == ["student-left-teacher"]

    def test_monitor_accepts_initial_drift(self):
        monitor = DivergenceMonitor(ema_nimg=101 / 3)
        for power in range(12):
            assert self.kinds(monitor, {"loss_sd": 10.0**power}) == []

    def test_monitor_reports_overpowering_d_once(self):
        monitor, won = DivergenceMonitor(), {"sign_real": 1.0, "sign_fake": -1.0}
        assert [self.kinds(monitor, won) for _ in range(5)] == [[], [], ["d-overpowers-g"], [], []]
        self.kinds(monitor, {"sign_real": 0.5, "sign_fake": -0.5})
        assert [self.kinds(monitor, won) for _ in range(3)][-1] == ["d-overpowers-g"]

    def test_monitor_overflow(self):
        assert self.kinds(DivergenceMonitor(), {"overflow_G": 0.0, "overflow_D": 0.0}) == []
        for share, is_the_end in ((0.01, False), (0.2, True)):
            (alarm,) = DivergenceMonitor().check(self.state(), {"overflow_G": 0.0, "overflow_D": share})
            assert alarm.kind == "overflow" and alarm.is_divergence is is_the_end
            assert f"{share:.1%} of the steps of D" in alarm.what and "of G" not in alarm.what

    def test_monitor_ada_at_cap(self):
        assert self.kinds(DivergenceMonitor(), {}, p=0.5) == [] and self.kinds(
            DivergenceMonitor(), {}, p=1.0
        ) == ["ada-at-cap"]
