"""The benchmarks' yardstick computes what the ops compute, and their counts of work are right."""

from __future__ import annotations

import dataclasses
import importlib
import json
import subprocess
import sys
import types
import zipfile
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from cuda_emulator import emulated as emulated
from PIL import Image

from finetune.metrics import evaluate
from finetune.options import TrainOptions
from torch_utils.ops import bias_act, filtered_lrelu, upfirdn2d
from torch_utils.ops.native import cuda, library
from torch_utils.ops.native.params import ACTIVATE, GATE, RECORD

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def modules():
    sys.path.insert(0, str(FOLDER))
    try:
        names = ("naive", "bench_ops", "bench_step", "ab_jobs", "ab_report", "ab_distillation", "make_sets")
        names += ("measuring", "kernel_trace", "bench_against", "bench_tiles")
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(FOLDER))


CASES = (
    ("upfirdn2d", dict(up=2, padding=[2, 1, 2, 1], gain=4), (4, 4), None),
    ("upfirdn2d", dict(down=2, padding=[-1, 2, 3, -2], flip_filter=True), 6, None),
    ("filtered_lrelu", dict(up=2, down=2, padding=[9, 8, 9, 8], clamp=0.9), 12, (12, 12)),
    ("filtered_lrelu", dict(up=4, down=2, padding=[-3, -2, -3, -2], slope=0.1), 24, 12),
    ("bias_act", dict(act="lrelu", clamp=0.5), None, None),
    ("bias_act", dict(act="swish"), None, None),
)


@pytest.mark.parametrize(("op", "options", "fu", "fd"), CASES)
def test_benchmarks_naive_ops_agree_with_reference(modules, op, options, fu, fd):
    case = modules["bench_ops"].Case(op, "", (2, 3, 14, 14), options, fu, fd)
    settings = type("Settings", (), dict(channels_last=False, device="cpu", dtype=torch.float64))
    made = modules["bench_ops"].tensors(case, settings, torch.Generator().manual_seed(0))
    made["x"].requires_grad_(True)
    made = {name: value for name, value in made.items() if value is not None}
    ours = {"bias_act": bias_act.bias_act, "upfirdn2d": upfirdn2d.upfirdn2d}
    ours["filtered_lrelu"] = filtered_lrelu.filtered_lrelu
    want = ours[op](**made, **options, impl="ref")
    got = getattr(modules["naive"], op)(**made, **options)
    torch.testing.assert_close(got, want)
    dy = torch.randn(want.shape, dtype=want.dtype, generator=torch.Generator().manual_seed(1))
    (want,) = torch.autograd.grad(want, made["x"], dy)
    (got,) = torch.autograd.grad(got, made["x"], dy)
    torch.testing.assert_close(got, want)


def test_benchmarks_work_counts_necessary_operations(modules):
    bench = modules["bench_ops"]
    # 4 of the 16 taps meet a pixel when every second one is a zero.
    up = bench.fir("", (1, 1, 8, 8), up=2, padding=[2, 1, 2, 1])
    assert bench.work(up, torch.Size([1, 1, 16, 16]), 4) == ((64 + 256) * 4, 2 * 256 * 4)
    # 8 rows of 18 columns, 18 x 18 of the grid, 18 x 8 back, 8 x 8 outputs; 2 and 4 taps meet a pixel.
    both = bench.lrelu("", (1, 1, 8, 8), 2, 2, 0, fu=4, fd=4)
    grid = 18
    macs = 8 * grid * 2 + grid * grid * 2 + grid * grid + grid * 8 * 4 + 8 * 8 * 4
    assert bench.work(both, torch.Size([1, 1, 8, 8]), 4) == ((64 + 64) * 4, 2 * macs)


def test_benchmarks_networks_use_naive_ops_in_block(modules):
    naive, x = modules["naive"], torch.ones(1, 1, 4, 4)
    f = upfirdn2d.setup_filter([1, 3, 3, 1])
    before = upfirdn2d.upfirdn2d
    with naive.instead_of_ours():
        assert upfirdn2d.upfirdn2d is naive.upfirdn2d
        got = upfirdn2d.upsample2d(x, f)
    assert upfirdn2d.upfirdn2d is before
    torch.testing.assert_close(got, upfirdn2d.upsample2d(x, f))


def record(fd, recall=0.5, distillation=0.5, backbone="efficientnet-lite0", weight=1.0):
    """What ab_distillation keeps of a run, in part."""
    return {
        "config": {"sd_backbone": backbone, "sd_weight": weight},
        "final": {"fd": fd, "recall-effnet": recall},
        "diagnostics": [{"path_per_kimg_G": 0.1, "straightness_G": 0.5}, {"straightness_G": 0.25}],
        "sec_per_phase": {"Gmain": 4.0, "Gdistill": distillation},
        "sec_per_kimg": 4 + distillation,
    }


class TestWhatAnABSays:
    def test_benchmarks_intervals_are_student_s(self, modules):
        from scipy import stats

        report = modules["ab_report"]
        for count in (2, 3, 5, 11):
            values = np.random.RandomState(count).randn(count)
            want = stats.t.interval(0.95, count - 1, values.mean(), stats.sem(values))
            assert report.interval(list(values)) == pytest.approx(want, rel=1e-4)
        assert report.interval([1.0]) is None

    @pytest.mark.parametrize(
        ("differences", "text"),
        [
            ([-3.0, -3.1, -2.9], "**-3 (-3.25 … -2.75)**"),
            ([-3.0, 1.0, -2.9], "-1.63 (-7.3 … 4.03)"),
            ([-3.0], "-3"),
        ],
    )
    def test_benchmarks_differences_beyond_the_spread_are_bold(self, modules, differences, text):
        assert modules["ab_report"].difference(differences) == text

    def test_benchmarks_results_pair_the_seeds_and_mark_related_metrics(self, modules):
        records = {}
        for seed, (plain, ours) in enumerate([(10.0, 9.0), (20.0, 19.1), (30.0, 28.9)]):
            records["plain", seed], records["sd", seed] = record(plain, weight=0.0), record(ours)
        names = ["plain", "sd"]
        rows = modules["ab_report"].results_of(records, names, [0, 1, 2], {"fd": 40.0, "recall-effnet": 0.1})
        assert rows == [
            ["arm", "fd (↓)", "recall-effnet (↑)"],
            ["start", "40", "0.1"],
            ["plain", "20 ± 10", "0.5 ± 0"],
            ["sd", "**-1 (-1.25 … -0.752)**", "+0 (0 … 0) †"],
        ]

    @pytest.mark.parametrize(
        ("name", "backbone", "related"),
        [
            ("fd-effnet", "efficientnet-lite0", True),
            ("memorization", "efficientnet-lite0", True),
            ("prc-stlpips", "st-lpips-alex", True),
            ("fd-stlpips", "efficientnet-lite0", False),
            ("random-fid", "l2", False),
        ],
    )
    def test_benchmarks_related_metrics(self, modules, name, backbone, related):
        is_related = modules["ab_report"].is_related
        assert is_related(name, record(1.0, backbone=backbone)) == related
        assert not is_related(name, record(1.0, backbone=backbone, weight=0.0))

    def test_benchmarks_costs_are_by_phase(self, modules):
        records = {("plain", 0): record(1.0, distillation=0.0), ("sd", 0): record(1.0)}
        rows = modules["ab_report"].costs_of(records, ["plain", "sd"], [0])
        assert rows[1] == ["sd", "4.50", "11.1%", "+12.5%"]

    def test_benchmarks_every_run_is_shown(self, modules):
        records = {("plain", 0): record(10.0), ("plain", 1): record(11.0)}
        report = modules["ab_report"]
        assert report.seeds_of(records, ["plain"], [0, 1]) == [
            ["metric", "arm", "seed 0", "seed 1"],
            ["fd", "plain", "10", "11"],
            ["recall-effnet", "plain", "0.5", "0.5"],
        ]
        (row,) = report.trajectories_of(records, ["plain"], [0, 1])
        assert row == ["plain", "0.1 ± 0", "0.25 ± 0", "–", "–", "–"]


class TestAB:
    def test_benchmarks_arms(self, modules):
        arm = modules["ab_distillation"].parse_arm("a:sd-weight=auto:0.1,sd_interval=4")
        assert arm.options == {"sd_weight": "auto:0.1", "sd_interval": 4}
        with pytest.raises(SystemExit, match="--arm a:sd_wait=1: 'sd_wait=1' is no option=value"):
            modules["ab_distillation"].parse_arm("a:sd_wait=1")

    def test_benchmarks_jobs_are_valid(self, modules):
        """Every arm of every job is a run that `finetune train` accepts."""
        ab, jobs = modules["ab_distillation"], modules["ab_jobs"]
        for name, job in jobs.JOBS.items():
            assert job.base in jobs.BASES and job.data.rpartition("-")[0] in modules["make_sets"].PHOTO_SETS
            task = ab.Task(name, job, Path("a.pkl"), Path("b.zip"), 4, "cpu", Path("w"))
            arms = [ab.parse_arm(text) for text in job.arms]
            assert len({arm.name for arm in arms}) == len(arms) and arms[0].options == {"sd_weight": 0}
            for arm in arms:
                ab.config_of(task, 0, arm).validate()
            judges = job.judges.split(",")
            assert evaluate.check_names(judges) == tuple(judges)

    def test_benchmarks_records_of_other_defaults_are_not_used(self, modules, monkeypatch):
        ab = modules["ab_distillation"]
        now = TrainOptions(data="d", resume="r", sd_weight=0.1, sd_interval=2)

        def resolved(options):
            return options.given() | {"sd_weight": options.sd_weight.to_json()}

        monkeypatch.setattr(ab, "prepare", lambda asked: Mock(**{"config.to_dict": lambda: resolved(asked)}))
        then = resolved(now) | {"sd_interval": 4, "outdir": "elsewhere"}
        ab.check_same(Path("x"), resolved(now) | {"outdir": "elsewhere"}, now)
        with pytest.raises(SystemExit, match=r"other defaults \(sd_interval 4 → 2\)"):
            ab.check_same(Path("x"), then, now)
        plain = dataclasses.replace(now, sd_weight=0)
        ab.check_same(Path("x"), then | {"sd_weight": 0}, plain)

    def test_benchmarks_interrupted_runs_are_resumed(self, modules, monkeypatch, tmp_path):
        ab, config = modules["ab_distillation"], TrainOptions(data="d", resume="r", kimg=3.0)
        asked = []

        def run(options, console):
            asked.append(options)
            (tmp_path / "a" / "00000-x").mkdir(parents=True, exist_ok=True)
            (tmp_path / "a" / "00000-x" / "training-state-000001.504.pt").touch()
            return types.SimpleNamespace(nimg=1504 if len(asked) == 1 else 3000)

        monkeypatch.setattr(ab, "run", run)
        with pytest.raises(SystemExit, match=r"a ended after 1\.504 of 3 kimg. Call again to resume"):
            ab.run_or_resume(config, tmp_path / "a")
        assert ab.run_or_resume(config, tmp_path / "a").nimg == 3000
        assert asked[0].resume == "r" and asked[1].resume == str(tmp_path / "a" / "00000-x")

    def test_benchmarks_from_photographs_to_a_report(self, modules, tmp_path, monkeypatch, capsys):
        """A checkpoint is made, both arms run once in two calls, a table and a plot are written."""
        ab, jobs = modules["ab_distillation"], modules["ab_jobs"]
        monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("FINETUNE_OPS", "ref")
        monkeypatch.setattr(ab, "CHECKPOINTS", tmp_path / "checkpoints")
        monkeypatch.setattr(ab, "RESULTS", tmp_path)
        tiny = dict(scratch="stylegan2", kimg=0.008, cbase=64, cmax=4, z_dim=4, map_depth=1, batch=4)
        tiny |= dict(metrics="none", metrics_num=None)
        monkeypatch.setitem(ab.BASES, "clothing-16-tiny", tiny)
        arms = ("plain:sd_weight=0", "ours:sd_weight=1,sd_backbone=l2")
        settings = dict(batch=4, sd_backbone="ms-ssim")
        job = jobs.Job("Why?", arms, "clothing-16-tiny", "hats-16", "few-shot", settings, 0.008, (3,), 4)
        job = dataclasses.replace(job, judges="random-fid", half_lives=True)
        monkeypatch.setitem(ab.JOBS, "tiny", job)
        with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
            for i in range(8):
                with archive.open(f"{'Hat' if i % 2 else 'Shirt'}/{i}.png", "w") as stream:
                    Image.new("RGB", (20, 20), (30 * i, 0, 0)).save(stream, "PNG")
        shared = f"--photos {tmp_path}/photos.zip --threads 1 --device cpu --work {tmp_path}/work".split()

        def call(*words):
            monkeypatch.setattr(sys, "argv", ["ab", *words, *shared, "--measurements", "1"])
            ab.main()
            return capsys.readouterr().out

        with pytest.raises(SystemExit, match="Make it with --make-base clothing-16-tiny"):
            call("--job", "tiny")
        assert "0.008 kimg" in call("--make-base", "clothing-16-tiny")
        assert len((tmp_path / "checkpoints" / "clothing-16-tiny.jsonl").read_text().splitlines()) > 1
        first = call("--job", "tiny")
        assert "tiny, ours, seed 3 …" in first and "| plain | " in first
        (path,) = tmp_path.glob("ab_tiny-photos_*.md")
        report = path.read_text(encoding="utf-8")
        assert "Why?" in report and "| ours | " in report and "| seed 3 |" in report
        assert "random-fid by the half-life of G_ema" in report
        assert str(tmp_path) not in report and "--photos photos.zip" in report
        assert path.with_suffix(".png").stat().st_size > 5_000
        left = {path.suffix for path in (tmp_path / "work").glob("tiny-*/*/*")}
        assert not left & {".pkl", ".pt", ".safetensors"}
        assert "seed 3 …" not in call("--job", "tiny")


def test_benchmarks_sets_of_photographs(modules, tmp_path):
    make_sets = modules["make_sets"]
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for i in range(103):
            with archive.open(f"{'Hat' if i < 101 else 'Shoes'}/{i:03}.jpg", "w") as stream:
                Image.new("RGB", (24, 24), (2 * i, 0, 0)).save(stream, "JPEG")
    sets = {name: make_sets.photos(tmp_path / "a.zip", name, 16) for name in ("clothing", "hats", "hats-10")}
    assert list(sets["clothing"]) == ["Shoes-101.png", "Shoes-102.png"] and len(sets["hats"]) == 101
    assert list(sets["hats-10"]) == [f"Hat-{i:03}.png" for i in range(0, 100, 10)]
    assert sets["hats"]["Hat-000.png"].size == (16, 16)
    with pytest.raises(ValueError, match=r"no images for the set dresses \(folders Dress\)"):
        make_sets.photos(tmp_path / "a.zip", "dresses", 16)


def test_benchmarks_sets_without_tones_and_flags(modules, tmp_path):
    make_sets = modules["make_sets"]
    (tmp_path / "f" / "assets").mkdir(parents=True)
    for name in ("1f600", "1f44d", "1f44d-1f3fb"):
        Image.new("RGBA", (64, 64), (255, 0, 0, 0)).save(tmp_path / "f" / "assets" / f"{name}.webp")
    (tmp_path / "g" / "img" / "google" / "64").mkdir(parents=True)
    entries = []
    for name, category in (("1f600", "Faces"), ("1f1e6", "Flags"), ("1f34e", "Food")):
        Image.new("RGB", (64, 64), (0, 9, 0)).save(tmp_path / "g" / "img" / "google" / "64" / f"{name}.png")
        entries.append({"image": f"{name}.png", "category": category, "has_img_google": True})
    (tmp_path / "g" / "emoji.json").write_text(json.dumps(entries))
    assert make_sets.fluent(tmp_path / "f", 32).keys() == {"1f600.png", "1f44d.png"}
    images, labels = make_sets.google(tmp_path / "g", 32)
    assert labels == {"1f600.png": 0, "1f34e.png": 1}
    make_sets.write_zip(tmp_path / "a.zip", images, labels)
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert archive.namelist() == ["1f34e.png", "1f600.png", "dataset.json"]
        with archive.open("1f600.png") as stream, Image.open(stream) as image:
            assert image.size == (32, 32) and image.getpixel((0, 0)) == (255, 255, 255)


class TestSteps:
    def options(self, modules, *words):
        tiny = "--resolution 16 --cbase 64 --cmax 8 --batch 4 --warmup 0 --cycles 1 --arms auto".split()
        return modules["bench_step"].parser_of_steps().parse_args([*tiny, *words])

    def test_benchmarks_stylegan3_r_has_twice_the_channels(self, modules):
        plain, rotating = (
            modules["bench_step"].build(family, self.options(modules)).state
            for family in ("stylegan3-t", "stylegan3-r")
        )
        assert rotating.G.init_kwargs["channel_max"] == 2 * plain.G.init_kwargs["channel_max"] == 16
        assert [p.shape for p in rotating.D.parameters()] == [p.shape for p in plain.D.parameters()]

    @pytest.mark.slow
    def test_benchmarks_cycle_of_the_real_loop_is_measured(self, modules, monkeypatch, capsys, tmp_path):
        words = "--families stylegan2 --distances none l2 --resolution 16 --cbase 64 --cmax 8 --batch 4"
        words += f" --warmup 0 --cycles 1 --arms auto --out {tmp_path}/step.md"
        monkeypatch.setattr(sys, "argv", ["bench_step.py", *words.split()])
        modules["bench_step"].main()
        said = capsys.readouterr().out
        assert said == (tmp_path / "step.md").read_text() + "\n" and "; seed 0; " in said
        header, _, *rows = [line.split(" | ") for line in said.splitlines() if line.startswith("|")]
        plain, distilled = [dict(zip(header, row, strict=True)) for row in rows]
        assert (plain["distance"], distilled["distance"]) == ("none", "l2")
        assert all(
            float(distilled[f"{name} (s/kimg)"]) > 0
            for name in ("Gmain", "Greg", "Gdistill", "Dmain", "Dreg")
        )


class TestAgainst:
    def against(self, modules, monkeypatch, *words):
        monkeypatch.setattr(sys, "argv", ["bench_against.py", *map(str, words)])
        modules["bench_against"].main()

    @pytest.mark.parametrize("clock", [(), ("--cpu-time",)])
    def test_benchmarks_compare_checkouts(self, modules, monkeypatch, capsys, tmp_path, clock):
        """Two checkouts with a rate in a package of theirs, which each start of their program doubles."""
        sides = (("this", 30, "images/s", "--cycles"), ("other", 20, "images a second", "--no-memory"))
        for name, rate, column, option in sides:
            (folder := tmp_path / name / "benchmarks").mkdir(parents=True)
            (tmp_path / name / "rates.py").write_text(f"RATE = {rate}")
            (folder / "helper.py").touch()
            (folder / "bench_step.py").write_text(
                "import sys, time, pathlib, helper, rates\n"
                f"assert (time.perf_counter is time.process_time) == {bool(clock)}\n"
                f"assert {option!r} in sys.argv and {'--batch 3 --threads 1'!r} in ' '.join(sys.argv)\n"
                "count = pathlib.Path(__file__).with_name('count')\n"
                "text = count.read_text() if count.exists() else ''\n"
                "count.write_text(text + 'x')\n"
                f"print('| family | {column} |\\n| --- | --- |')\n"
                "print('| f |', rates.RATE * 2 ** len(text), '|')\n"
            )
        monkeypatch.chdir(tmp_path / "this")
        monkeypatch.setattr(modules["bench_against"]._checkout, "ROOT", tmp_path / "this")
        words = "--families stylegan2 --rounds 3 --batch 3 --threads 1 --out found.md".split()
        self.against(modules, monkeypatch, "../other", *words, *clock)
        text = Path("found.md").read_text(encoding="utf-8")
        assert capsys.readouterr().out == text + "\n" and "bench_against.py ../other" in text
        header, _, row = [line for line in text.splitlines() if line.startswith("|")]
        assert row == "| stylegan2 | 60 (30; 60; 120) | 40 (20; 40; 80) | 1.50 |"
        assert ("processor second" in header) == bool(clock)

    def test_benchmarks_refuse_what_cannot_be_compared(self, modules, monkeypatch, capsys, tmp_path):
        for words, message in (
            ([tmp_path], f"{tmp_path}: no benchmarks/bench_step.py in it"),
            ([FOLDER.parent, "--cpu-time", "--device", "cuda"], "a GPU's work takes no CPU time"),
        ):
            with pytest.raises(SystemExit, match="2"):
                self.against(modules, monkeypatch, *words)
            assert message in capsys.readouterr().err
        (tmp_path / "benchmarks").mkdir()
        (tmp_path / "benchmarks" / "bench_step.py").write_text("raise SystemExit(3)")
        monkeypatch.setattr(modules["bench_against"]._checkout, "ROOT", tmp_path)
        with pytest.raises(SystemExit, match=r"bench_step.py failed with exit code 3"):
            self.against(modules, monkeypatch, tmp_path, "--families", "stylegan2")


@pytest.mark.slow
def test_benchmarks_tiles_are_tried_in_turn(modules, emulated, monkeypatch):
    bench, ops = modules["bench_tiles"], modules["bench_ops"]
    monkeypatch.setattr(bench.plan, "WARPS", (2,))  # each width is a program to compile
    monkeypatch.setattr(library, "kernels", lambda x: cuda)
    monkeypatch.setattr(bench, "interleaved", lambda calls, *args, **more: {"": calls[""]() is None})
    case = ops.lrelu("", (1, 1, 30, 30), 2, 2, [9, 8, 9, 8])
    settings = type("Settings", (), dict(channels_last=False, device="cpu", dtype=torch.float32))
    for mode, number in zip(bench.MODES, (ACTIVATE, RECORD, GATE), strict=True):
        call = bench.call_of(case, ops.tensors(case, settings, torch.Generator().manual_seed(0)), mode)
        emulated.clear()
        chosen, times = bench.times_of(call, torch.device("cpu"))
        assert chosen in times and len(times) == len(emulated) - 1 >= 3
        assert all(("SG_MODE", number) in each.defines for each in emulated)
        assert [each.shared_bytes for each in emulated] == [tile[2] for tile in (chosen, *times)]


def test_benchmarks_kernels_and_busy_time(modules):
    events = [
        {"cat": "kernel", "name": "a", "ts": 10.0, "dur": 5.0},
        {"cat": "kernel", "name": "a", "ts": 12.0, "dur": 5.0},  # on another stream
        {"cat": "gpu_memcpy", "name": "copy", "ts": 30.0, "dur": 1.0},
        {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 0.0, "dur": 50.0},
    ]
    trace = modules["kernel_trace"]
    kernels, covered = trace.kernels_in(events)
    assert kernels == {"a": (2, pytest.approx(1e-5)), "copy": (1, pytest.approx(1e-6))}
    assert covered == pytest.approx(8e-6)
    rows = trace.kernel_table("a step", kernels, covered, 0.1, 0.2).splitlines()[-2:]
    assert rows == ["| 0.01 | 90.9% | 2 | `a` |", "| 0.00 | 9.1% | 1 | `copy` |"]


def test_benchmarks_programs_use_this_checkout_installed_or_not(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(FOLDER)!r})\nimport _checkout, finetune as f\nprint(f.__file__)"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert Path(done.stdout.strip()).parent.parent == FOLDER.parent, done.stderr
    for path in FOLDER.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        if "\nfrom finetune" in text or "\nfrom torch_utils" in text or "\nfrom measuring" in text:
            assert "\nimport _checkout" in text or "\nfrom _checkout" in text, path.name
