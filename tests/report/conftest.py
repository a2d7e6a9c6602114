"""A run folder as training leaves it, without training."""

from __future__ import annotations

import json
import math

import pytest
from PIL import Image


@pytest.fixture
def make_run(tmp_path):
    """Call with a name and the kimg that were seen (of 200): a run folder with logs, previews and sheets."""

    def make(name="00000-dogs-stylegan2-64", kimg=200.0, num_frames=3, tile=(64, 48), **options):
        path = tmp_path / name
        (path / "preview").mkdir(parents=True)
        config = {"data": "dogs", "kimg": 200.0, "tick": 4.0, "glr": 0.002, "resume": "", **options}
        (path / "config.json").write_text(json.dumps(config))
        about = {
            "device": "cpu",
            "reasons": {"glr": {"value": 0.002, "why": "published <rate>"}},
            "data": {"images": "213"},
            "notes": ["All images are gray & small."],
            "source": {"source": "ffhq.pkl", "licence": "Some License 1.0", "sha256": "ab" * 32},
        }
        (path / "about.json").write_text(json.dumps(about))
        with open(path / "log.jsonl", "w") as file:
            for tick in range(1, int(kimg // 4) + 1):
                line = {"nimg": 4000 * tick, "kimg": 4.0 * tick, "sec": 60.0 * tick, "p": 0.01 * tick}
                line |= {"loss_G": 2 + 0.1 * math.sin(tick), "loss_D": 0.7, "loss_sd": 0.1 + 100 / tick**2}
                line |= {
                    "img_per_sec": 66.7,
                    "memory_gib": 3.1,
                    "sec_per_phase": {"Gmain": 30.0, "data": 1.0},
                }
                if tick % 10 == 0:
                    line["metrics"] = {
                        "num": 1000,
                        "sec": 3,
                        "random-fid": 6 / tick,
                        "random-fid_error": 1 / tick,
                    }
                file.write(json.dumps(line) + "\n")
        event = {
            "event": "ada-at-cap",
            "time": "2026-01-01",
            "nimg": 4000,
            "step": 3,
            "what": "ADA is at <its> limit.",
        }
        resumed = {"event": "resume", "time": "2026-01-02", "nimg": 8000, "what": "Resumed."}
        (path / "events.jsonl").write_text(json.dumps(event) + "\n" + json.dumps(resumed) + "\n")
        noise = Image.effect_noise(tile, 60).convert("RGB")
        for index in range(num_frames):
            stem = f"{index * kimg / max(1, num_frames - 1):010.3f}"
            shade = Image.new("RGB", tile, (index * 250 // num_frames, 90, 120))
            frame = Image.blend(noise, shade, 0.5)
            frame.save(path / "preview" / f"samples-{stem}.webp", quality=75)
            frame.resize((tile[0] * 2, tile[1] // 2)).save(
                path / "preview" / f"strip-{stem}.webp", quality=75
            )
        noise.save(path / "fakes000200.png")
        noise.save(path / "reals.png")
        noise.save(path / "memorization-000200.000.png")
        (path / "network-snapshot-000200.pkl").write_bytes(b"")
        if kimg < 200:
            (path / "run.lock").write_text("{}")
        return path

    return make
