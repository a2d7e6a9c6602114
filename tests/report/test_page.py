"""`finetune report`: what is on the page, that it is self-contained, small and quick to build."""

import base64
import io
import json
import re
import shlex
import time
from html.parser import HTMLParser

import pytest
from click.testing import CliRunner
from PIL import Image

from finetune.cli import cli
from finetune.errors import ConfigError
from finetune.report import charts, read_run, write_report
from finetune.report.charts import Line, line_chart, thin, ticks
from finetune.report.commands import snapshot_commands
from finetune.report.read import RunRecord

STRANGE = "00001-dogs & 'cats' <b>"
VOID = ("meta", "link", "img", "input", "br")


class Page(HTMLParser):
    """Elements and text of a page; checks that every element is closed."""

    def __init__(self, path):
        super().__init__()
        self.open, self.elements, self.text = [], [], ""
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text += data

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


def test_report_shows_all_parts_of_a_run(make_run):
    page = Page(write_report([make_run()]))
    titles = [attrs["aria-label"].split(".")[0] for attrs in page.all("svg") if attrs.get("role") == "img"]
    assert titles == [
        "random-fid", "Losses", "Augmentation probability p", "Distance to the teacher", "Seconds per kimg",
        "Images per second", "Memory (GiB)",
    ]  # fmt: skip
    for words in (
        "Finished: 200 of 200 kimg", "random-fid@1000 0.12", "ADA is at <its> limit.", "Resumed.",
        "published <rate>",
        "All images are gray & small.", "Some License 1.0", "ffhq.pkl", "finetune export --network",
        "finetune generate --network", "--kimg 400",
    ):  # fmt: skip
        assert words in page.text, words


def test_report_shows_newest_sheets(make_run):
    folder = make_run()
    Image.new("RGB", (8, 8), "red").save(folder / "fakes000200.500.png")
    images = {attrs["alt"]: attrs["src"] for attrs in Page(write_report([folder])).all("img")}
    assert {"Real images", "Generated images", "Near copies of real images"} <= images.keys()
    with Image.open(io.BytesIO(base64.b64decode(images["Generated images"].split(",")[1]))) as shown:
        assert shown.size == (8, 8)


def test_report_is_self_contained_and_accessible(make_run):
    page = Page(write_report([make_run(), make_run(STRANGE)], make_run("out") / "page.html"))
    for _, attrs in page.elements:
        for name in ("src", "href"):
            assert attrs.get(name, "#").startswith(("#", "data:")), attrs
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert all(attrs.get("alt") for attrs in page.all("img")) and page.all("img")
    assert {attrs["id"] for attrs in page.all("input")} <= {attrs["for"] for attrs in page.all("label")}
    assert all(attrs["href"][1:] in ids for attrs in page.all("a"))


def test_report_compares_runs_and_marks_different_options(make_run):
    path = write_report([make_run(), make_run(STRANGE, kimg=100.0, glr=0.001)], make_run("out") / "page.html")
    page = Page(path)
    rows = path.read_text().split('<tr class="differs">')
    assert len(rows) == 2 and "--glr" in rows[1] and "0.001" in rows[1].split("</tr>")[0]
    assert "A (00000)" in page.text and "B (00001)" in page.text and STRANGE in page.text
    commands = [line for line in page.text.splitlines() if line.startswith("finetune ")]
    assert any(STRANGE in word for line in commands for word in shlex.split(line))


@pytest.mark.parametrize("num_frames, shown", [(1, 1), (3, 3), (120, 50)])
def test_report_frames_are_spread_evenly(num_frames, shown, make_run):
    text = write_report([make_run(num_frames=num_frames)]).read_text()
    frames = json.loads(text.split('id="frames">')[1].split("</script>")[0])[0]
    assert len(frames) == shown
    if shown == 50:
        assert (frames[0]["kimg"], frames[-1]["kimg"]) == (0, 200)


def test_report_of_fifty_previews_is_small_and_quick(make_run):
    folder = make_run(num_frames=2, tile=(512, 384))  # noise: the most bytes that an image can have
    for kind in ("samples", "strip"):
        image = (folder / "preview" / f"{kind}-000200.000.webp").read_bytes()
        for kimg in range(4, 200, 4):
            (folder / "preview" / f"{kind}-{kimg:06d}.000.webp").write_bytes(image)
    started = time.process_time()
    page = write_report([folder])
    assert time.process_time() - started < 5
    assert 3e6 < page.stat().st_size < 5e6


def test_report_reads_sheets_of_older_runs(make_run):
    folder = make_run(num_frames=0)
    (folder / "about.json").unlink()
    page = Page(write_report([folder]))
    assert next(attrs["alt"] for attrs in page.all("img")) == "Samples at the chosen time"
    assert "No checkpoint is recorded" in page.text


def test_report_survives_damaged_files(make_run):
    folder = make_run()
    with open(folder / "log.jsonl", "a") as file:
        file.write('{"nimg": 9, "kimg": NaN, "sec": 1, "img_per_sec": 1}\n{"half')
    (folder / "events.jsonl").write_text("[]\n\x00")
    (folder / "about.json").write_text("{")
    (folder / "reals.png").write_bytes(b"PNG")
    assert "Losses" in Page(write_report([folder])).text


def test_report_of_a_run_without_a_tick(make_run):
    folder = make_run(kimg=0.0, num_frames=1)
    (folder / "network-snapshot-000200.pkl").unlink()
    page = Page(write_report([folder]))
    assert "Nothing is logged before the first tick" in page.text and "finetune train --resume" in page.text


@pytest.mark.parametrize("kimg, running", [(200.0, False), (100.0, True)])
def test_report_reloads_while_the_run_goes_on(kimg, running, make_run):
    page = Page(write_report([make_run(kimg=kimg)]))
    (body,) = page.all("body")
    assert body["data-reload"] == ("30" if running else "0")


def test_report_command_prints_the_page(make_run):
    folder = make_run(STRANGE)
    result = CliRunner().invoke(cli, ["report", str(folder)])
    assert result.exit_code == 0 and f"{folder / 'report.html'}: 0." in result.output
    assert "file:///" in result.output


@pytest.mark.parametrize("what", ["missing", "file", "empty"])
def test_read_run_refuses_other_places(what, tmp_path, make_run):
    make_run("inner/00000-x")
    place = {"missing": tmp_path / "no", "file": tmp_path / "file", "empty": tmp_path / "inner"}[what]
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"no such folder|is a file|not a run folder(.|\n)*00000-x"):
        read_run(place)


def test_line_chart_draws_log_scale_bands_and_single_points():
    svg = line_chart("T", [Line("a", [(0, 1e-3), (1, 10.0)])])
    assert 'data-log="1"' in svg and "0.01</text>" in svg
    svg = line_chart("T", [Line("a", [(0, 1.0), (1, 2.0)], [0.1, 0.2]), Line("b", [(5, 3.0)], color=1)])
    assert 'data-log="0"' in svg and svg.count("<polygon") == 1 and svg.count("<circle") == 3
    assert "a: first 1, last 2, lowest 1, highest 2" in svg


def test_line_chart_begins_again_after_a_rollback():
    svg = line_chart("T", [Line("a", [(0, 1.0), (1, 2.0), (2, 9.0), (1, 2.0), (2, 1.0)])])
    (path,) = re.findall(r'class="line c0 d0" d="([^"]*)"', svg)
    assert re.findall("[ML]", path) == ["M", "L", "L", "M", "L"]


def test_thin_keeps_peaks():
    points = [(float(x), 0.0) for x in range(10_000)]
    points[4321] = (4321.0, 9.0)
    kept = thin(points)
    assert len(kept) <= charts.MAX_POINTS and (4321.0, 9.0) in kept


@pytest.mark.parametrize("low, high", [(0, 1), (-3.2, 7e4), (1e-7, 2e-7), (5, 5.001)])
def test_ticks_are_round_and_inside(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 6 and all(low - 1e-9 <= each <= high + 1e-9 for each in found)


@pytest.mark.parametrize(
    "labels, words",
    [
        ({}, "net.pkl --seeds"),
        ({"kind": "classes", "size": 3}, "--class 0 "),
        ({"kind": "vectors", "size": 2}, "--label 0,0"),
    ],
)
def test_snapshot_commands_name_a_label(tmp_path, labels, words):
    run = RunRecord(tmp_path / "00007-a", {}, {"labels": labels})
    generate, export = snapshot_commands(run, tmp_path / "net.pkl")
    assert words in generate and export.endswith("fine-tuned-00007.pkl")
