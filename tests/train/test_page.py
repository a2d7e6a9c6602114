"""Previews and the page that training writes into its run folder."""

import json
import logging
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image
from tiny_runs import options, quiet, read

from finetune.options import TrainOptions
from finetune.train import page, run


def test_train_writes_previews_reasons_and_page(images, tmp_path):
    result = run(options(images, tmp_path, gamma=2.0), console=quiet())
    previews = sorted(path.name for path in (result.run_dir / "preview").iterdir())
    assert previews == [
        f"{kind}-{kimg}.webp"
        for kind in ("samples", "strip")
        for kimg in ("000000.000", "000000.016", "000000.032")
    ]
    with Image.open(result.run_dir / "preview" / "strip-000000.032.webp") as strip:
        assert strip.size == (8 * 16, 16)
    sheet = read(result.run_dir / "fakes-init.png")[:16, : 4 * 16]  # the same latents
    with Image.open(result.run_dir / "preview" / "samples-000000.000.webp") as preview:
        seen = np.asarray(preview.convert("RGB"))[:16]
    assert np.abs(seen.astype(int) - sheet).mean() < 12  # lossy
    about = json.loads((result.run_dir / "about.json").read_text())
    assert about["reasons"]["gamma"] == {"value": 2.0, "why": "user-specified"}
    assert about["data"]["images"] == "12" and about["data"]["sizes"] == "16×16: 12"
    text = (result.run_dir / "report.html").read_text()
    assert "<strong>Finished</strong>: 0.032 of 0.032 kimg" in text and 'data-reload="0"' in text

    run(TrainOptions(resume=str(result.run_dir), kimg=0.048, gamma=1.0), console=quiet())
    text = (result.run_dir / "report.html").read_text()
    assert "--gamma: 2.0 -&gt; 1.0" in text and "changed on resume" in text
    assert (result.run_dir / "preview" / "samples-000000.048.webp").is_file()


def test_rollback_deletes_later_previews(images, tmp_path, monkeypatch):
    result = run(options(images, tmp_path, kimg=0.016, tick=0.008), console=quiet())
    written = page.RunPage(Mock(path=result.run_dir, is_writable=True), result.config)
    written.drop_later_previews(8)
    names = sorted(path.name for path in (result.run_dir / "preview").glob("samples-*"))
    assert names == ["samples-000000.000.webp", "samples-000000.008.webp"]
    assert written.last_nimg == 8


def test_train_continues_if_the_page_fails(images, tmp_path, monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise RuntimeError("no page today")

    monkeypatch.setattr(page, "write_report", fail)
    monkeypatch.setattr(page, "save_small", fail)
    with caplog.at_level(logging.WARNING, "finetune.train"):
        assert run(options(images, tmp_path, kimg=0.004), console=quiet()).nimg == 4
    assert "training continues: no page today" in caplog.text


@pytest.mark.parametrize("kimg, tick, interval", [(200, 4, 4000), (1000, 4, 20_000), (3, 0.15, 150)])
def test_previews_are_about_fifty(kimg, tick, interval):
    assert page.RunPage(Mock(), Mock(kimg=kimg, tick=tick)).interval_nimg == interval
