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

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.config import TrainOptions
from torch_utils.ops import bias_act, filtered_lrelu, upfirdn2d

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def modules():
    sys.path.insert(0, str(FOLDER))
    try:
        names = ("naive", "bench_ops", "bench_step", "ab_report", "ab_distillation", "make_sets")
        names += ("measuring",)
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
def test_benchmarks_yardstick_is_right_in_value_and_gradient(modules, op, options, fu, fd):
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


def test_benchmarks_work_counted_is_the_work_that_cannot_be_left_out(modules):
    bench = modules["bench_ops"]
    # 4 of the 16 taps meet a pixel when every second one is a zero.
    up = bench.fir("", (1, 1, 8, 8), up=2, padding=[2, 1, 2, 1])
    assert bench.work(up, torch.Size([1, 1, 16, 16]), 4) == ((64 + 256) * 4, 2 * 256 * 4)
    # 8 rows of 18 columns, 18 x 18 of the grid, 18 x 8 back, 8 x 8 outputs; 2 and 4 taps meet a pixel.
    both = bench.lrelu("", (1, 1, 8, 8), 2, 2, 0, fu=4, fd=4)
    grid = 18
    macs = 8 * grid * 2 + grid * grid * 2 + grid * grid + grid * 8 * 4 + 8 * 8 * 4
    assert bench.work(both, torch.Size([1, 1, 8, 8]), 4) == ((64 + 64) * 4, 2 * macs)


def test_benchmarks_inside_the_block_the_networks_call_the_yardstick(modules):
    naive, x = modules["naive"], torch.ones(1, 1, 4, 4)
    f = upfirdn2d.setup_filter([1, 3, 3, 1])
    before = upfirdn2d.upfirdn2d
    with naive.instead_of_ours():
        assert upfirdn2d.upfirdn2d is naive.upfirdn2d
        got = upfirdn2d.upsample2d(x, f)
    assert upfirdn2d.upfirdn2d is before
    torch.testing.assert_close(got, upfirdn2d.upsample2d(x, f))


def record(last, *before, distillation=0.5, **metrics):
    """What ab_distillation keeps of a run, in part."""
    points = [{"kimg": i, "num": 8, "sec": 1.0, "fd": value, "fd_spread": 0.1, "recall": 0.5, **metrics}
              for i, value in enumerate((*before, last))]  # fmt: skip
    return {
        "points": points,
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
        ("differences", "name", "says"),
        [
            ([-3.0, -3.1, -2.9], "fd", "better"),
            ([3.0, 3.1, 2.9], "fd", "worse"),
            ([3.0, 3.1, 2.9], "recall-effnet", "better"),
            ([-3.0, 1.0, -2.9], "fd", "within the spread"),
            ([-3.0], "fd", "one seed"),
        ],
    )
    def test_benchmarks_verdicts(self, modules, differences, name, says):
        assert modules["ab_report"].verdict(differences, name) == says

    def test_benchmarks_rows_pair_the_seeds(self, modules):
        report = modules["ab_report"]
        records = {}
        for seed, (plain, ours) in enumerate([(10.0, 9.0), (20.0, 19.1), (30.0, 28.9)]):
            records["plain", seed], records["sd", seed] = record(plain, 5.0), record(ours, 4.0)
        rows = report.rows_of(records, ["plain", "sd"], [0, 1, 2], {"fd": 40.0, "recall": 0.1})
        assert all(len(row) == len(report.HEADER) for row in rows)
        by_arm = {(row[0], row[1]): dict(zip(report.HEADER, row, strict=True)) for row in rows}
        ours = by_arm["fd", "sd"]
        assert ours["start"] == "40" and ours["last"] == "19 ± 10" and ours["best"] == "4 ± 0"
        assert (
            ours["last, difference"] == "-1 ± 0.1" and ours["better"] == "3 of 3" and ours["says"] == "better"
        )
        assert ours["best, difference"] == "-1 ± 0"
        assert by_arm["recall", "sd"]["better"] == "0 of 3"  # equal is not better
        assert by_arm["fd", "plain"]["says"] == "–"

    def test_benchmarks_costs_are_by_phase(self, modules):
        records = {("plain", 0): record(1.0, distillation=0.0), ("sd", 0): record(1.0)}
        rows = modules["ab_report"].costs_of(records, ["plain", "sd"], [0])
        assert rows[1] == ["sd", "4.50", "1.125×", "11.1%", "+12.5%"]

    def test_benchmarks_every_run_is_shown(self, modules):
        records = {("plain", 0): record(10.0, 12.0), ("plain", 1): record(11.0, 13.0)}
        for each in records.values():
            each["diagnostics"] = [{"sd_weight": 0.25}, {}]
        rows = modules["ab_report"].seeds_of(records, ["plain"], [0, 1])
        assert rows == [
            ["metric", "arm", "seed 0", "seed 1"],
            ["fd", "plain", "12, 10", "13, 11"],
            ["recall", "plain", "0.5, 0.5", "0.5, 0.5"],
            ["sd_weight", "plain", "0.25", "0.25"],
        ]


class TestAB:
    def test_benchmarks_arms(self, modules):
        arm = modules["ab_distillation"].parse_arm("a:sd-weight=auto:0.1,sd_interval=4")
        assert arm.options == {"sd_weight": "auto:0.1", "sd_interval": 4}
        with pytest.raises(SystemExit, match="--arm a:sd_wait=1: 'sd_wait=1' is no option=value"):
            modules["ab_distillation"].parse_arm("a:sd_wait=1")

    def test_benchmarks_records_of_other_defaults_are_not_used(self, modules, monkeypatch):
        ab = modules["ab_distillation"]
        now = TrainOptions(data="d", resume="r", sd_weight=0.1, sd_interval=2)
        monkeypatch.setattr(ab, "prepare", lambda config: types.SimpleNamespace(config=config))
        then = now.to_dict() | {"sd_interval": 4, "outdir": "elsewhere"}
        ab.check_same(Path("x"), now.to_dict() | {"outdir": "elsewhere"}, now)
        with pytest.raises(SystemExit, match=r"other defaults \(sd_interval 4 → 2\)"):
            ab.check_same(Path("x"), then, now)
        plain = dataclasses.replace(now, sd_weight=0)
        ab.check_same(Path("x"), then | {"sd_weight": 0}, plain)

    def test_benchmarks_runs_that_were_ended_early_are_not_kept(self, modules):
        ab, config = modules["ab_distillation"], TrainOptions(data="d", resume="r", kimg=3.0)
        result = types.SimpleNamespace(nimg=1504)
        with pytest.raises(SystemExit, match=r"runs/a ended after 1\.504 of 3 kimg; it is not kept"):
            ab.check_whole(result, config, Path("runs/a"))
        result.nimg = 3000
        ab.check_whole(result, config, Path("runs/a"))

    def test_benchmarks_from_nothing_to_a_report(self, modules, tmp_path, monkeypatch, capsys):
        """A checkpoint is made, both arms run once in two calls, a table and a plot are written."""
        ab = modules["ab_distillation"]
        monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            for i in range(6):
                with archive.open(f"{i}.png", "w") as stream:
                    Image.new("RGB", (16, 16), (40 * i, 0, 0)).save(stream, "PNG")
        arms = " ".join(
            f"--arm {arm},batch=4,sd_backbone=l2" for arm in ("plain:sd_weight=0", "sd:sd_weight=1")
        )
        words = f"""ab --pretrain stylegan2:kimg=0.016,cbase=64,cmax=4,z_dim=4,map_depth=1,batch=4
            --improve {tmp_path}/a.zip --adapt {tmp_path}/a.zip --jobs improve --kimg 0.016 --num 4
            --measurements 1 --metrics random-fid --threads 1 --device cpu --seeds 3
            --work {tmp_path}/work --out {tmp_path}/report.md {arms}"""
        monkeypatch.setattr(sys, "argv", words.split())
        ab.main()
        first = capsys.readouterr().out
        assert "improve, sd, seed 3" in first and "| random-fid | sd |" in first
        report = (tmp_path / "report.md").read_text(encoding="utf-8")
        assert "| random-fid | sd |" in report and "| seed 3 |" in report
        assert str(tmp_path) not in report.replace(f"python {' '.join(sys.argv)}", "")
        assert (tmp_path / "report.png").stat().st_size > 10_000
        assert not list((tmp_path / "work").rglob("training-state*"))
        ab.main()
        assert "seed 3 …" not in capsys.readouterr().out


def test_benchmarks_whole_sets_are_made_without_tones_and_flags(modules, tmp_path):
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

    def test_benchmarks_rotating_generator_has_twice_the_channels_and_no_more(self, modules):
        plain, rotating = (
            modules["bench_step"].build(family, self.options(modules)).state
            for family in ("stylegan3-t", "stylegan3-r")
        )
        assert rotating.G.init_kwargs["channel_max"] == 2 * plain.G.init_kwargs["channel_max"] == 16
        assert [p.shape for p in rotating.D.parameters()] == [p.shape for p in plain.D.parameters()]

    def test_benchmarks_cycle_of_the_real_loop_is_measured(self, modules, monkeypatch, capsys, tmp_path):
        words = "--families stylegan2 --sd-weight auto:1 --sd-backbone l2 --resolution 16 --cbase 64 --cmax 8"
        words += f" --batch 4 --warmup 0 --cycles 1 --arms auto --out {tmp_path}/step.md"
        monkeypatch.setattr(sys, "argv", ["bench_step.py", *words.split()])
        modules["bench_step"].main()
        said = capsys.readouterr().out
        assert said == (tmp_path / "step.md").read_text() + "\n" and "; seed 0; " in said
        header, _, row = [line.split(" | ") for line in said.splitlines() if line.startswith("|")]
        found = dict(zip(header, row, strict=True))
        assert all(
            float(found[f"{name} (s/kimg)"]) > 0 for name in ("Gmain", "Greg", "Gdistill", "Dmain", "Dreg")
        )

    def test_benchmarks_kernels_are_counted_and_what_they_cover_too(self, modules):
        events = [
            {"cat": "kernel", "name": "a", "ts": 10.0, "dur": 5.0},
            {"cat": "kernel", "name": "a", "ts": 12.0, "dur": 5.0},  # on another stream
            {"cat": "gpu_memcpy", "name": "copy", "ts": 30.0, "dur": 1.0},
            {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 0.0, "dur": 50.0},
        ]
        kernels, covered = modules["bench_step"].kernels_in(events)
        assert kernels == {"a": (2, pytest.approx(1e-5)), "copy": (1, pytest.approx(1e-6))}
        assert covered == pytest.approx(8e-6)


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
