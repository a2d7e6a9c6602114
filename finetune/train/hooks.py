"""What a run leaves behind and shows: the run folder, the picture sheets, the log, the progress display."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import logging
import math
import os
import re
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from finetune.config import TrainConfig
from finetune.data import images_to_float
from finetune.errors import ConfigError, TrainingError
from finetune.export.stylegan_pickle import save_stylegan_pickle
from finetune.recipes import Reason
from finetune.sampling import run_network_chunked, save_grid, z_from_seeds
from finetune.train.allocator import freed_at_once
from finetune.train.board import Board
from finetune.train.state import TrainState
from torch_utils.files import atomic_write

if TYPE_CHECKING:
    from finetune.data import ImageSet

log = logging.getLogger("finetune.train")


def check_outdir(config: TrainConfig, networks: list[torch.nn.Module]) -> None:
    """Raise ConfigError where `--outdir` cannot be written to, or the snapshots of the run do not fit."""
    place = Path(config.outdir).absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise ConfigError(f"--outdir {config.outdir}: {place} is a file, not a folder.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(
            f"--outdir {config.outdir}: nothing can be written to {place}; choose another folder."
        )
    tensors = [tensor for network in networks for tensor in network.state_dict().values()]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    between = (config.tick or 1) * (config.snap or 1)  # kimg
    needed = size * max(1, math.ceil((config.kimg or 0) / between))
    free = shutil.disk_usage(place).free
    if needed > free:
        raise ConfigError(
            f"--outdir {config.outdir}: the snapshots of this run take about {needed / 2**30:.2g} GiB "
            f"({size / 2**20:.4g} MiB each), and {free / 2**30:.2g} GiB are free there.",
            hint="Make room, choose another folder, or save less often with a larger --snap.",
        )


def make_run_dir(outdir: str | Path, desc: str) -> Path:
    """Make and return the next run folder, `outdir/00000-desc`, `outdir/00001-desc`, …"""
    outdir = Path(outdir)
    outdir.mkdir(parents=True, exist_ok=True)
    numbers = [int(found[1]) for path in outdir.iterdir() if (found := re.match(r"(\d{5,})(-|$)", path.name))]
    name = re.sub(r"[^\w.+-]+", "-", desc).strip("-")
    for number in range(max(numbers, default=-1) + 1, 10**6):
        try:
            run_dir = outdir / f"{number:05d}-{name}"
            run_dir.mkdir()
            return run_dir
        except FileExistsError:
            continue  # another run took the number a moment ago
    raise TrainingError(f"{outdir} has no free run number.")


def grid_size(resolution: int, num_images: int) -> tuple[int, int]:
    """Columns and rows of a sheet of about 1024×768 pixels with at most `num_images` pictures."""
    columns, rows = (min(12, max(2, side // resolution)) for side in (1024, 768))
    columns = min(columns, num_images)
    return columns, min(rows, max(1, num_images // columns))


class RunFolder:
    """Writes everything that a run leaves behind. All sheets show the same latents."""

    def __init__(
        self,
        path: Path,
        config: TrainConfig,
        image_set: ImageSet,
        *,
        source: dict | None,
        chunk: int,
        device: torch.device,
    ) -> None:
        self.path = path
        self.config = config
        self.image_set = image_set
        self.source = source
        self.chunk = chunk
        self.device = device
        self.started = time.monotonic()
        self.seconds_before = 0.0  # of the processes that the run had before this one
        self.written: dict[str, int] = {}  # snapshot -> images seen
        self.last_snapshot: Path | None = None
        spacing = (config.tick or 0) * (config.snap or 0)
        self.decimals = 0 if spacing >= 1 and float(config.kimg or 0).is_integer() else 3
        self.board = Board(path if type(self) is RunFolder else None)
        if type(self) is RunFolder:
            (path / "config.json").write_text(config.to_json(), encoding="utf-8")

    def seconds(self) -> float:
        """How long the run has taken so far, all its processes together."""
        return self.seconds_before + time.monotonic() - self.started

    def stem(self, nimg: int) -> str:
        """kimg as it stands in file names: `000123`, or `000001.500` in runs too short for whole numbers."""
        if self.decimals:
            return f"{nimg // 1000:06d}.{nimg % 1000:03d}"
        return f"{nimg // 1000:06d}"

    def write_reals(self) -> None:
        """`reals.png`: pictures as D sees them before augmentation. Settles the labels of all sheets."""
        rng = np.random.default_rng(self.config.seed)
        columns, rows = self.grid = grid_size(self.image_set.resolution, len(self.image_set))
        chosen = rng.permutation(len(self.image_set))[: columns * rows]
        items = [self.image_set[int(index)] for index in chosen]
        pictures = images_to_float(torch.from_numpy(np.stack([picture for picture, _ in items])))
        self.labels = torch.from_numpy(np.stack([label for _, label in items]))
        save_grid(pictures, self.path / "reals.png", grid=self.grid)

    @freed_at_once()
    def write_fakes(self, G_ema: torch.nn.Module, stem: str) -> None:
        """`fakes{stem}.png`: pictures of the average generator."""
        z = z_from_seeds(range(len(self.labels)), G_ema.z_dim, self.device)
        labels = self.labels.to(self.device)[:, : G_ema.c_dim]
        pictures = run_network_chunked(G_ema, z, labels, chunk=self.chunk, noise_mode="const")
        save_grid(pictures, self.path / f"fakes{stem}.png", grid=self.grid)

    def write_snapshot(self, state: TrainState) -> Path:
        """`network-snapshot-….pkl`, refused where a weight is not finite."""
        for name, network in (("G", state.G), ("D", state.D), ("G_ema", state.G_ema)):
            if not all(bool(torch.isfinite(tensor).all()) for tensor in network.state_dict().values()):
                raise TrainingError(
                    f"{name} has weights that are not finite at {state.nimg / 1000:g} kimg; not saved."
                )
        path = self.path / f"network-snapshot-{self.stem(state.nimg)}.pkl"
        if path.exists() and self.written.get(path.name) != state.nimg:
            # Stopped between two whole kimg: never write over an earlier snapshot.
            path = path.with_name(f"network-snapshot-{state.nimg // 1000:06d}.{state.nimg % 1000:03d}.pkl")
        self._write(path, state)
        self.written[path.name] = state.nimg
        self.last_snapshot = path
        return path

    def write_best(self, state: TrainState) -> Path:
        """`network-best.pkl`, in the place of the one before."""
        path = self.path / "network-best.pkl"
        self._write(path, state)
        return path

    def keep_newest(self, count: int | None) -> None:
        """Delete the oldest snapshots of this run, and their sheets, until there are `count` (None: all)."""
        for name in sorted(self.written, key=lambda name: -self.written[name])[count:] if count else ():
            stem = name.removeprefix("network-snapshot-").removesuffix(".pkl")
            for path in (self.path / name, self.path / f"fakes{stem}.png"):
                path.unlink(missing_ok=True)
            del self.written[name]

    @freed_at_once()
    def _write(self, path: Path, state: TrainState) -> None:
        if state.augment_pipe is not None:
            state.augment_pipe.p.fill_(state.ada.p)
        save_stylegan_pickle(
            path,
            G=state.G,
            D=state.D,
            G_ema=state.G_ema,
            augment_pipe=state.augment_pipe,
            training_set_kwargs=self._training_set_kwargs(),
            provenance={
                "source": self.source,
                "training": public_options(self.config),
                "nimg": state.nimg,
            },
        )

    def log(self, state: TrainState, numbers: dict) -> None:
        """Append one line to `log.jsonl`."""
        line = {"nimg": state.nimg, "kimg": state.nimg / 1000, "step": state.step}
        line |= {"sec": self.seconds(), "p": state.ada.p, **numbers}
        self._append("log.jsonl", line)
        self.board.add(state.nimg, line)

    def event(self, kind: str, state: TrainState, **numbers: object) -> None:
        """Append one line to `events.jsonl`: what happened, when, and the numbers that go with it."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._append(
            "events.jsonl", {"event": kind, "time": now, "nimg": state.nimg, "step": state.step, **numbers}
        )

    def _append(self, name: str, line: dict) -> None:
        """One line more. A disk that is full costs the line, not the run."""
        try:
            with open(self.path / name, "a", encoding="utf-8") as file:
                file.write(json.dumps(_rounded(line)) + "\n")
        except OSError as error:
            log.warning("%s: a line is lost: %s", self.path / name, error.strerror or error)

    def drop_later_lines(self, nimg: int) -> None:
        """Take out of `log.jsonl` what came after `nimg` images, and a half-written line: it comes again."""
        path = self.path / "log.jsonl"
        if not path.is_file():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            with contextlib.suppress(ValueError, KeyError, TypeError):
                if line.endswith("\n") and json.loads(line)["nimg"] <= nimg:
                    kept.append(line)
        with atomic_write(path) as stream:
            stream.write("".join(kept).encode())

    def _training_set_kwargs(self) -> dict:
        images = self.image_set
        return {
            "path": Path(self.config.data).name,
            "resolution": images.resolution,
            "use_labels": images.num_classes > 0,
            "max_size": len(images),
            "xflip": self.config.mirror,
        }


class NoFolder(RunFolder):
    """What processes other than the first have in the place of a run folder: nothing is written."""

    def write_reals(self) -> None:
        pass

    def write_fakes(self, G_ema: torch.nn.Module, stem: str) -> None:
        pass

    def keep_newest(self, count: int | None) -> None:
        pass

    def drop_later_lines(self, nimg: int) -> None:
        pass

    def log(self, state: TrainState, numbers: dict) -> None:
        pass

    def _write(self, path: Path, state: TrainState) -> None:
        pass

    def _append(self, name: str, line: dict) -> None:
        pass


def public_options(config: TrainConfig) -> dict:
    """The options as they travel with a checkpoint: of paths only the last part, which names nobody."""
    options = dataclasses.asdict(config)
    del options["outdir"]
    return options | {name: Path(options[name]).name for name in ("data", "resume") if options[name]}


def _rounded(value):
    """Six significant digits are more than any of these numbers mean."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) and math.isfinite(value) else value


class Display:
    """A progress bar on a terminal, one plain line a tick elsewhere."""

    def __init__(self, console: Console, total_nimg: int, nimg: int = 0) -> None:
        self.console = console
        self.first_nimg = nimg
        self.total_nimg = total_nimg
        self.started = time.perf_counter()
        self.losses = ""
        self.progress: Progress | None = None
        if console.is_terminal and not console.quiet:
            # One text column, so that a narrow terminal cuts off its end and not a piece of each number.
            columns = (TextColumn("{task.description}"), BarColumn(10), TextColumn("{task.fields[note]}"))
            self.progress = Progress(*columns, console=console)
            self.task = self.progress.add_task(
                f"{nimg / 1000:g} kimg", total=total_nimg, completed=nimg, note="starting"
            )

    def __enter__(self) -> Display:
        if self.progress is not None:
            self.progress.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self.progress is not None:
            self.progress.stop()

    def step(self, state: TrainState) -> None:
        """Move the bar."""
        if self.progress is not None:
            seconds = time.perf_counter() - self.started
            note = (
                f"{(state.nimg - self.first_nimg) / seconds:.1f} img/s · {self._left(state)} · {self.losses}"
            )
            kimg = f"{state.nimg / 1000:.2f}/{self.total_nimg / 1000:g} kimg"
            self.progress.update(self.task, completed=state.nimg, description=kimg, note=note)

    def tick(self, state: TrainState, numbers: dict) -> None:
        """Show the averages of a tick."""
        self.losses = _losses(numbers, state)
        if self.progress is None:
            self.say(
                f"{state.nimg / 1000:8.2f} kimg  {numbers['img_per_sec']:6.1f} img/s  "
                f"{_duration(time.perf_counter() - self.started)} gone, {self._left(state)}  {self.losses}"
            )

    def _left(self, state: TrainState) -> str:
        seconds = time.perf_counter() - self.started
        done = max(1, state.nimg - self.first_nimg)
        return _duration(seconds / done * max(0, self.total_nimg - state.nimg)) + " left"

    def say(self, text: str) -> None:
        """Print one line above the bar."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def _losses(numbers: dict, state: TrainState) -> str:
    shown = {"G": "loss_G", "D": "loss_D", "SD": "loss_sd"}
    parts = [f"{name} {numbers[key]:.3f}" for name, key in shown.items() if key in numbers]
    metrics = numbers.get("metrics", {})
    parts += [
        f"{name}@{metrics['num']} {value:.4g}"
        for name, value in metrics.items()
        if name not in ("num", "sec") and not name.endswith("_spread")
    ]
    return " ".join([*parts, f"p {state.ada.p:.3f}"] if state.augment_pipe is not None else parts)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def print_reasons(console: Console, title: str, reasons: list[Reason]) -> None:
    """The table "option · value · why"."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in ("option", "value", "why"):
        table.add_column(column, overflow="fold")
    for reason in reasons:
        value = f"{reason.value:g}" if isinstance(reason.value, float) else str(reason.value)
        table.add_row("--" + reason.name.replace("_", "-"), value, reason.why)
    console.print(table)
