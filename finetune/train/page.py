"""Previews and the page `report.html` during a run. A failure is only a warning."""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from finetune.config import TrainConfig
from finetune.models import Network
from finetune.report import write_report
from finetune.report.read import PREVIEWS
from finetune.sampling import image_grid, run_network_chunked, to_uint8, z_from_seeds
from finetune.train.allocator import freed_at_once
from finetune.train.run_dir import RunDir, exact_kimg
from finetune.train.state import TrainState
from finetune.version import __version__
from torch_utils.files import atomic_write

if TYPE_CHECKING:
    from finetune.train.prepare import Prepared
    from finetune.train.selection import Recommendation

NUM_PREVIEWS = 50  # about, in a run
GRID = (4, 3)  # columns and rows of a preview
STRIP = 8  # images of the interpolation
MAX_TILE = 128  # pixels of an image in a preview
MIN_PAGE_SEC = 10.0  # between two pages
MAX_PAGE_COST = 0.02  # fraction of the time of a run spent on pages

log = logging.getLogger("finetune.train")


class RunPage:
    """Writes previews, `about.json` and the page into a run folder; does nothing on ranks other than 0.

    A preview takes 20 images of G_ema at most once a tick, about fifty times in a run.
    """

    def __init__(self, run_dir: RunDir, config: TrainConfig) -> None:
        self.run_dir = run_dir
        self.interval_nimg = 1000 * max(config.tick, config.kimg / NUM_PREVIEWS)
        self.last_nimg = -1
        self.next_page = 0.0
        self.warned = ""

    def start(self, prepared: Prepared) -> None:
        """Record what the run folder would not show otherwise, and write the first preview and page."""
        if not self.run_dir.is_writable:
            return
        with self._warning():
            write_about(self.run_dir.path, prepared, self.run_dir.source)
        self.drop_later_previews(prepared.state.nimg)
        self.last_nimg = -1  # a preview is due
        self.update(prepared.state)

    def drop_later_previews(self, nimg: int) -> None:
        """Delete previews after `nimg` images: training continues from there."""
        if not self.run_dir.is_writable:
            return
        with self._warning():
            for path in (self.run_dir.path / PREVIEWS).glob("*.webp"):
                if float(path.stem.rpartition("-")[2]) > nimg / 1000:
                    path.unlink(missing_ok=True)
        self.last_nimg = nimg

    def update(self, state: TrainState) -> None:
        """Write a preview and the page if they are due; called at the end of each tick."""
        if not self.run_dir.is_writable:
            return
        with self._warning():
            if self.last_nimg < 0 or state.nimg // self.interval_nimg > self.last_nimg // self.interval_nimg:
                self.write_preview(state.G_ema, state.nimg)
        if time.monotonic() >= self.next_page:
            self.write(is_running=True)

    def finish(self, state: TrainState, recommended: Recommendation | None) -> None:
        """Write the last preview and a page that does not reload, however the run ended."""
        if not self.run_dir.is_writable:
            return
        with self._warning():
            is_new = state.nimg != self.last_nimg
            if is_new and all(bool(torch.isfinite(each).all()) for each in state.G_ema.parameters()):
                self.write_preview(state.G_ema, state.nimg)
            if recommended is not None:
                path = self.run_dir.path / "about.json"
                found = {"file": recommended.path.name, "nimg": recommended.nimg, "why": recommended.why}
                replace_about(path, json.loads(path.read_text(encoding="utf-8")) | {"recommended": found})
        self.write(is_running=False)

    def write(self, *, is_running: bool) -> None:
        """Write the page."""
        started = time.monotonic()
        with self._warning():
            write_report([self.run_dir.path], is_running=is_running)
        taken = time.monotonic() - started
        self.next_page = time.monotonic() + max(MIN_PAGE_SEC, taken / MAX_PAGE_COST)

    @freed_at_once()
    def write_preview(self, G_ema: Network, nimg: int) -> None:
        """Write images of the first latents of the sheets, and those on an arc between two latents.

        cos(t) z_0 + sin(t) z_1 is distributed as z for every t.
        """
        run_dir = self.run_dir
        labels = run_dir.labels[: GRID[0] * GRID[1]].to(run_dir.device)[:, : G_ema.c_dim]
        z = z_from_seeds(range(len(labels)), G_ema.z_dim, run_dir.device)
        angles = torch.linspace(0, math.pi / 2, STRIP, device=z.device)[:, None]
        ends = z_from_seeds([0, 1], G_ema.z_dim, z.device)
        arc = angles.cos() * ends[:1] + angles.sin() * ends[1:]
        images = run_network_chunked(
            G_ema,
            torch.cat([z, arc]),
            torch.cat([labels, labels[:1].expand(STRIP, -1)]),
            chunk=run_dir.chunk,
            noise_mode="const",
        )
        kimg, folder = exact_kimg(nimg), run_dir.path / PREVIEWS
        save_small(images[: len(z)], GRID[0], folder / f"samples-{kimg}.webp")
        save_small(images[len(z) :], STRIP, folder / f"strip-{kimg}.webp")
        run_dir.board.add_images(nimg, images[: len(z)])
        self.last_nimg = nimg

    @contextlib.contextmanager
    def _warning(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever it is, training continues
            if (what := str(error).split("\n")[0]) != self.warned:  # a full disk is one warning
                log.warning("The page of the run was not written, and training continues: %s", what)
                self.warned = what


def save_small(images: torch.Tensor, columns: int, path: Path) -> None:
    """Write images `[N, C, H, W]`, -1 to 1, as a WebP sheet with at most `MAX_TILE` pixels a side of each."""
    sheet = image_grid(list(to_uint8(images)), columns)
    sheet = sheet.reduce(max(1, math.ceil(max(images.shape[2:]) / MAX_TILE)))
    sheet = sheet if sheet.mode == "RGBA" else sheet.convert("RGB")
    with atomic_write(path) as stream:
        sheet.save(stream, "WEBP", quality=75, method=4)


def write_about(folder: Path, prepared: Prepared, source: dict[str, Any] | None) -> None:
    """Write `about.json`: data, device, origin, and the reason for each option."""
    path = folder / "about.json"
    about: dict[str, Any]
    if path.is_file():
        about = json.loads(path.read_text(encoding="utf-8")) | {"recommended": None}
    else:
        values = prepared.config.to_dict()
        reasons = {each.name: {"value": values[each.name], "why": each.why} for each in prepared.reasons}
        about = {
            "finetune": __version__,
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "device": device_name(prepared.plan.device),
            "reasons": reasons,
            "data": prepared.overview,
            "notes": prepared.notes,
            "labels": {"kind": prepared.image_set.label_kind, "size": prepared.facts.c_dim},
            "source": source,
        }
    replace_about(path, about)


def replace_about(path: Path, about: dict[str, Any]) -> None:
    """Replace `about.json`."""
    with atomic_write(path) as stream:
        stream.write((json.dumps(about, indent=2) + "\n").encode())


def device_name(device: torch.device) -> str:
    """Return the name of a device for people: `cuda (NVIDIA H100)`."""
    return f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type
