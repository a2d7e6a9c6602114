"""The run folder: options, log, events, image sheets, snapshots."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import logging
import math
import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from finetune.checkpoint.load import load
from finetune.config import TrainConfig
from finetune.data import images_to_float
from finetune.errors import ConfigError, FinetuneError, TrainingError
from finetune.export.stylegan_pickle import save_stylegan_pickle
from finetune.models import Network
from finetune.sampling import run_network_chunked, save_grid, z_from_seeds
from finetune.train.allocator import freed_at_once
from finetune.train.ema import num_updates
from finetune.train.posthoc_ema import averages_beside, write_averages
from finetune.train.state import TrainState
from finetune.train.tensorboard import Board
from torch_utils.files import atomic_write, lack_of_space

if TYPE_CHECKING:
    from finetune.data import ImageSet

log = logging.getLogger("finetune.train")

BEST = "network-best.pkl"
ABANDONED = ".abandoned"  # after the names of files that are later than the state that a run goes on from
DATED = re.compile(
    r"(?:training-state|network-snapshot|averages|memorization|fakes)-?"
    r"(?P<stem>\d{6,}(?:\.\d{3})?)\.(?:pt|pkl|safetensors|png)"
)


def check_place(place: Path, config: TrainConfig, networks: Iterable[torch.nn.Module], nimg: int) -> None:
    """Raise ConfigError if `place` (`--outdir`, or the run folder) cannot take the snapshots after `nimg`."""
    what = f"--outdir {config.outdir}" if nimg == 0 else f"--resume {place}"
    place = place.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise ConfigError(f"{what}: {place} is a file. Choose a folder.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f"{what}: {place} is not writable. Choose another folder.")
    size = size_of(networks)
    between = config.tick * config.snap  # kimg
    count = max(1, math.ceil((config.kimg - nimg / 1000) / between))
    if config.keep:
        count = min(count, config.keep + 1)  # the oldest is deleted after the newest is written
    needed = size * count
    if lack := lack_of_space(place, needed, f"the snapshots of this run, {size / 2**20:.4g} MiB each"):
        raise ConfigError(
            lack,
            hint="Free some space, choose another --outdir, save less often with a larger --snap, or keep "
            "fewer snapshots with --keep.",
        )


def size_of(networks: Iterable[torch.nn.Module]) -> int:
    """Return the bytes of all parameters and buffers."""
    return sum(each.numel() * each.element_size() for net in networks for each in net.state_dict().values())


def make_run_dir(outdir: str | Path, desc: str) -> Path:
    """Make and return the next run folder, `outdir/00000-desc`, `outdir/00001-desc`, …"""
    outdir = Path(outdir)
    outdir.mkdir(parents=True, exist_ok=True)
    # Five digits: a date at the start of a name is no run number.
    numbers = [int(found[1]) for path in outdir.iterdir() if (found := re.match(r"(\d{5})(-|$)", path.name))]
    name = re.sub(r"[^\w.+-]+", "-", desc).strip("-")
    for number in range(max(numbers, default=-1) + 1, 10**5):
        try:
            run_dir = outdir / f"{number:05d}-{name}"
            run_dir.mkdir()
            return run_dir
        except FileExistsError:
            continue  # another run took the number a moment ago
    raise TrainingError(f"--outdir {outdir}: no run number is free. Choose another folder.")


def grid_size(size: tuple[int, int], num_images: int) -> tuple[int, int]:
    """Return columns and rows of a sheet of about 1024×768 pixels with at most `num_images` images.

    size: (height, width) of an image.
    """
    height, width = size
    columns, rows = (min(12, max(2, most // side)) for most, side in ((1024, width), (768, height)))
    columns = min(columns, num_images)
    return columns, min(rows, max(1, num_images // columns))


def exact_kimg(nimg: int) -> str:
    """Return kimg with three decimals, as in the names of files: `000123.456`."""
    return f"{nimg // 1000:06d}.{nimg % 1000:03d}"


@dataclass(eq=False)
class RunDir:
    """Writes everything into the run folder. All sheets show the same latents.

    source: provenance of the checkpoint that the run first started from. chunk: images made at a time.
    """

    path: Path
    config: TrainConfig
    image_set: ImageSet
    source: dict | None
    chunk: int
    device: torch.device
    seconds_before: float = 0.0  # of the run before it was resumed
    written: dict[str, int] = field(default_factory=dict)  # snapshot -> images seen
    is_writable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.started = time.monotonic()
        spacing = self.config.tick * self.config.snap
        self.has_decimals = spacing < 1 or not float(self.config.kimg).is_integer()
        self.board = Board(None, {})

    def open(self) -> None:
        """Write the options and `reals.png`, and begin a record for TensorBoard."""
        with atomic_write(self.path / "config.json") as stream:
            stream.write(self.config.to_json().encode())
        self.board = Board(self.path, self.config.to_dict())
        self.write_reals()

    def state_dict(self) -> dict[str, Any]:
        """Return the time that the run has taken and the snapshots that it has written."""
        return {"sec": self.seconds(), "written": dict(self.written)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned; nothing of a later state is forgotten (rollback)."""
        self.seconds_before, self.started = max(self.seconds(), state["sec"]), time.monotonic()
        self.written = {**state["written"], **self.written}

    def seconds(self) -> float:
        """Return how long the run has taken so far, times before a resume included."""
        return self.seconds_before + time.monotonic() - self.started

    def stem(self, nimg: int) -> str:
        """Return kimg as in file names: `000123`, or `000001.500` in runs too short for whole numbers."""
        return exact_kimg(nimg) if self.has_decimals else f"{nimg // 1000:06d}"

    def write_reals(self) -> None:
        """Write `reals.png`: images as D sees them before augmentation. Sets the labels of all sheets."""
        rng = np.random.default_rng(self.config.seed)
        columns, rows = self.grid = grid_size(self.image_set.size, len(self.image_set))
        chosen = rng.permutation(len(self.image_set))[: columns * rows]
        items = [self.image_set[int(index)] for index in chosen]
        images = images_to_float(torch.from_numpy(np.stack([image for image, _ in items])))
        self.labels = torch.from_numpy(np.stack([label for _, label in items]))
        save_grid(images, self.path / "reals.png", grid=self.grid)

    @freed_at_once()
    def write_fakes(self, G_ema: Network, stem: str) -> None:
        """Write `fakes{stem}.png`: images of G_ema."""
        z = z_from_seeds(range(len(self.labels)), G_ema.z_dim, self.device)
        labels = self.labels.to(self.device)[:, : G_ema.c_dim]
        images = run_network_chunked(G_ema, z, labels, chunk=self.chunk, noise_mode="const")
        save_grid(images, self.path / f"fakes{stem}.png", grid=self.grid)

    def write_snapshot(self, state: TrainState) -> Path:
        """Write `network-snapshot-….pkl`. Raises TrainingError if a weight is not finite."""
        for name, network in (("G", state.G), ("D", state.D), ("G_ema", state.G_ema)):
            if not all(bool(torch.isfinite(tensor).all()) for tensor in network.state_dict().values()):
                raise TrainingError(
                    f"{name} has non-finite weights at {state.nimg / 1000:g} kimg; not saved."
                )
        path = self.path / f"network-snapshot-{self.stem(state.nimg)}.pkl"
        if path.exists() and self.written.get(path.name) != state.nimg:
            # Stopped between two whole kimg: never write over an earlier snapshot.
            path = path.with_name(f"network-snapshot-{exact_kimg(state.nimg)}.pkl")
        self._write(path, state)
        updates = num_updates(state.nimg, self.config.batch, self.config.d_warmup_kimg * 1000)
        if self.is_writable and updates:
            write_averages(path, state, updates)
        self.written[path.name] = state.nimg
        return path

    def write_best(self, state: TrainState) -> None:
        """Write `network-best.pkl`, replacing the previous one."""
        self._write(self.path / BEST, state)

    def keep_newest(self, count: int) -> None:
        """Delete the oldest snapshots of this run, and their sheets, until there are `count` (0: all).

        One that cannot be deleted is a warning, and the next call tries again.
        """
        for name in sorted(self.written, key=lambda name: -self.written[name])[count:] if count else ():
            stem = name.removeprefix("network-snapshot-").removesuffix(".pkl")
            snapshot = self.path / name
            try:
                for path in (averages_beside(snapshot), self.path / f"fakes{stem}.png", snapshot):
                    path.unlink(missing_ok=True)
            except OSError as error:
                log.warning("--keep %d: %s cannot be deleted: %s", count, path, error.strerror or error)
            else:
                del self.written[name]

    @freed_at_once()
    def _write(self, path: Path, state: TrainState) -> None:
        if state.augment_pipe is not None:
            state.augment_pipe.p.fill_(state.ada.p)
        images = self.image_set
        save_stylegan_pickle(
            path,
            G=state.G,
            D=state.D,
            G_ema=state.G_ema,
            augment_pipe=state.augment_pipe,
            training_set_kwargs={
                "path": Path(self.config.data).name,
                "resolution": images.resolution,
                "use_labels": images.num_classes > 0,
                "labels": images.label_kind,
                "classes": list(images.class_names),
                "max_size": len(images),
                "xflip": self.config.mirror,
            },
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
        """Append a line. A full disk costs the line, not the run."""
        try:
            with open(self.path / name, "a", encoding="utf-8") as file:
                file.write(json.dumps(_rounded(line)) + "\n")
        except OSError as error:
            log.warning("%s: a line could not be written: %s", self.path / name, error.strerror or error)

    def set_aside_later(self, nimg: int) -> list[str]:
        """Rename states, snapshots and what belongs to them after `nimg` images; return their names.

        Training continues from there, and they would be taken for newer ones. Raises TrainingError.
        """
        later = [path for path in self.path.iterdir() if self._is_later(path.name, nimg)]
        if later and _nimg_of(self.path / BEST) > nimg:
            later.append(self.path / BEST)
        for path in later:
            names = (f"{path.name}{ABANDONED}{number or ''}" for number in itertools.count())
            target = next(each for name in names if not (each := path.with_name(name)).exists())
            try:
                path.rename(target)
            except OSError as error:
                raise TrainingError(
                    f"{path} is later than {nimg / 1000:g} kimg, where training continues, and cannot be "
                    f"renamed to {target.name}: {error.strerror or error}. Move it to another folder."
                ) from None
        return sorted(path.name for path in later)

    def _is_later(self, name: str, nimg: int) -> bool:
        """Return whether a file is of after `nimg` images; names in whole kimg are looked up."""
        if (found := DATED.fullmatch(name)) is None:
            return False
        kimg, _, rest = found["stem"].partition(".")
        latest = int(kimg) * 1000 + int(rest or 999)
        return self.written.get(f"network-snapshot-{found['stem']}.pkl", latest) > nimg

    def drop_later_lines(self, nimg: int) -> None:
        """Remove the lines after `nimg` images, and a half-written one, from `log.jsonl`: they come again."""
        path = self.path / "log.jsonl"
        if not path.is_file():
            return
        kept = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
            with contextlib.suppress(ValueError, KeyError, TypeError):
                if line.endswith("\n") and json.loads(line)["nimg"] <= nimg:
                    kept.append(line)
        with atomic_write(path) as stream:
            stream.write("".join(kept).encode())


class NullRunDir(RunDir):
    """The run folder on ranks other than 0: nothing is written."""

    is_writable = False

    def open(self) -> None:
        pass

    def write_fakes(self, G_ema: Network, stem: str) -> None:
        pass

    def keep_newest(self, count: int) -> None:
        pass

    def set_aside_later(self, nimg: int) -> list[str]:
        return []

    def drop_later_lines(self, nimg: int) -> None:
        pass

    def _write(self, path: Path, state: TrainState) -> None:
        pass

    def _append(self, name: str, line: dict) -> None:
        pass


def public_options(config: TrainConfig) -> dict:
    """Return the options stored in a checkpoint; paths are reduced to their basename."""
    options = config.to_dict()
    del options["outdir"]
    return options | {name: Path(options[name]).name for name in ("data", "resume") if options[name]}


def _nimg_of(path: Path) -> int:
    """Return the images seen at a snapshot, 0 if it cannot be read."""
    try:
        return load(path).provenance.nimg or 0
    except (FinetuneError, OSError):
        return 0


def _rounded(value):
    """Round to six significant digits, more than any of these numbers carries."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) and math.isfinite(value) else value
