"""Saving, resuming and rolling back: every component that changes has `state_dict` and `load_state_dict`.

A state file is a plain file of `torch.save` that `torch.load(..., weights_only=True)` opens; each part of it
carries a CRC-32, which is checked before anything is used.
"""

from __future__ import annotations

import contextlib
import re
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from finetune import run_lock
from finetune.config import TrainConfig
from finetune.data import ImageSet, InfiniteLoader
from finetune.errors import CheckpointError, ConfigError, ExportError, FinetuneError, TrainingError
from finetune.options import AUTO, TrainOptions, flag
from finetune.train.allocator import freed_at_once
from finetune.train.diagnostics import Diagnostics
from finetune.train.divergence import Alarm, Diverged
from finetune.train.progress import Display
from finetune.train.run_dir import RunDir, exact_kimg, size_of
from finetune.train.state import Plan, RunCounters, TrainState
from finetune.train.stats import Stats
from finetune.version import __version__
from torch_utils.files import atomic_write, lack_of_space

FORMAT = 3
NAME = re.compile(r"training-state-(\d{6,}\.\d{3})\.pt")
KEPT = 2  # the newest, and the one before it in case that is damaged
MAX_ROLLBACKS = 3  # in one run

# On resume, options may change that change neither a network nor a batch; the others make another run.
CHANGEABLE = (
    "data", "kimg", "gamma", "glr", "dlr", "lr_warmup_kimg", "ema_kimg", "target", "sd_weight", "sd_interval",
    "sd_augment", "batch_gpu", "device", "graphs", "deterministic", "workers", "tick", "snap",
    "keep", "save_every_min", "on_divergence", "metrics", "metrics_num",
)  # fmt: skip
FIXED = (
    "mirror", "fit", "cond", "labels", "scratch", "resolution", "channels", "classes", "new_d",
    "d_warmup_kimg", "cbase", "cmax", "map_depth", "z_dim", "batch", "freezed", "aug", "p", "augpipe",
    "sd_preset", "sd_backbone", "sd_teacher", "sd_teacher_kimg", "precision", "seed",
)  # fmt: skip
IGNORED_ON_RESUME = ("resume", "outdir", "recipe")


@dataclass(frozen=True)
class SavedState:
    """A state file that was read: its path, its content, and what is wrong with newer ones.

    seen: the state files in its folder at that time.
    """

    path: Path
    content: dict[str, Any]
    seen: list[Path]
    skipped: tuple[str, ...] = ()

    @property
    def nimg(self) -> int:
        """Images that had been seen."""
        return self.content["nimg"]

    def check_images(self, image_set: ImageSet) -> None:
        """Raise ConfigError unless these are, by number, names, sizes and labels, the images of the run."""
        count, listing = self.content["sampler"]["num_items"], image_set.listing_hash
        difference = ""
        if count != len(image_set):
            difference = f"{len(image_set)} items, mirrored ones included; the run has {count}"
        elif self.content.get("listing", listing) != listing:  # older states have none
            difference = "names, file sizes or labels of images differ from those of the run"
        if difference:
            raise ConfigError(
                f"--data {image_set.path}: {difference}. Pass the images of the run.",
                hint="To train on other images, start a new run from a snapshot: --resume SNAPSHOT.pkl.",
            )

    def check_unchanged(self) -> None:
        """Raise ConfigError if another process has continued the run since this state was read."""
        if states_of(self.path.parent) != self.seen:
            raise ConfigError(
                f"--resume {self.path.parent}: another process continued this run while this one started. "
                "Run the same command again."
            )


class RunFinished(FinetuneError):
    """A run has reached its length; resuming it is not an error."""

    exit_code = 0

    def __init__(self, saved: SavedState, config: TrainConfig, kimg: float) -> None:
        super().__init__(
            f"{saved.path.parent}: the run has reached its {kimg:g} kimg. To continue, use a larger --kimg."
        )
        self.saved, self.config = saved, config


@dataclass(eq=False)
class Checkpointer:
    """Saves and loads all components of a run, and decides when.

    unreadable_elsewhere: items that other ranks had to replace, as of the last tick.
    """

    config: TrainConfig
    plan: Plan
    state: TrainState
    counters: RunCounters
    batches: InfiniteLoader
    stats: Stats
    run_dir: RunDir
    display: Display
    unreadable_elsewhere: int = 0

    def __post_init__(self) -> None:
        self.last_save = time.monotonic()  # not affected by changes of the system clock

    def state_dict(self) -> dict[str, Any]:
        """Return the state of every component."""
        sampler = self.batches.state_dict()
        sampler["unreadable"] += self.unreadable_elsewhere
        return {
            **self.state.state_dict(),
            "sampler": sampler,
            "listing": self.run_dir.image_set.listing_hash,
            "counters": self.counters.state_dict(),
            "stats": self.stats.state_dict(),
            "run_dir": self.run_dir.state_dict(),
        }

    def load_state_dict(self, content: dict[str, Any]) -> None:
        """Load the state of every component. Raises ConfigError if the data is not that of the run."""
        try:
            self.batches.load_state_dict(content["sampler"])
        except ValueError as error:
            raise ConfigError(f"--data {self.config.data}: not the images of the run ({error}).") from None
        self.unreadable_elsewhere = 0
        if not self.plan.group.is_first:
            self.batches.unreadable = 0  # rank 0 has what all ranks had counted
        self.counters.load_state_dict(content["counters"])
        self.run_dir.load_state_dict(content["run_dir"])
        self.stats.load_state_dict(content["stats"])
        self.stats.restart(content["nimg"])
        self.plan.graphs.clear()
        self.state.load_state_dict(content)
        if self.stats.diagnostics is not None:  # a rollback: they compare with the weights of the last tick
            self.stats.diagnostics = Diagnostics(self.state)

    def count_unreadable(self) -> int:
        """Return how many items all ranks had to replace so far."""
        own = self.batches.unreadable
        total = self.plan.group.all_reduce_total(own, f"the log (step {self.state.step})")
        self.unreadable_elsewhere = total - own
        return total

    def save(self, *, is_last: bool = False) -> Path | None:
        """Write a snapshot, its sheet of images, and the state; return the snapshot.

        A failure is a warning, but for the last save. Raises TrainingError.
        """
        if self.run_dir.is_writable:
            run_lock.confirm(self.run_dir.path)
        try:
            self._check_space()
            self.run_dir.write_fakes(self.state.G_ema, self.run_dir.stem(self.state.nimg))
            snapshot = self.run_dir.write_snapshot(self.state)
        except (ExportError, OSError) as error:
            self._report_failure(error, is_last)
            return None
        self.save_state(is_last=is_last)
        self.run_dir.keep_newest(self.config.keep)
        return snapshot

    def save_state(self, *, is_last: bool = False) -> None:
        """Write the state alone, on rank 0."""
        if not self.run_dir.is_writable:
            return
        run_lock.confirm(self.run_dir.path)
        self.last_save = time.monotonic()
        content = {**self.state_dict(), "config": self.config.to_json(), "source": self.run_dir.source}
        try:
            write_state(self.run_dir.path / f"training-state-{exact_kimg(self.state.nimg)}.pt", content)
        except (ExportError, OSError) as error:
            self._report_failure(error, is_last)

    def save_by_the_clock(self) -> None:
        """Write the state if the last save was `save_every_min` ago, and never one that is not finite."""
        minutes = self.config.save_every_min if self.run_dir.is_writable else 0
        if minutes and time.monotonic() - self.last_save > minutes * 60 and self.stats.is_finite():
            self.save_state()

    def save_best(self, found: dict[str, Any]) -> None:
        """Keep this generator as `network-best.pkl`: its measurement is the best so far."""
        self.counters.best = self.counters.last = found
        self.counters.worse = 0
        try:
            self.run_dir.write_best(self.state)
        except (ExportError, OSError) as error:
            self._report_failure(error, is_last=False)

    def roll_back(self, alarm: Alarm) -> None:
        """Return to the newest valid state with half the learning rates, as `--on-divergence` asks.

        Raises Diverged if it does not, after too many rollbacks, and without a saved state.
        """
        error = Diverged(f"{alarm.what.rstrip('.')} at {self.state.nimg / 1000:g} kimg.")
        if self.config.on_divergence != "rollback":
            raise error
        rollbacks = self.counters.rollbacks + 1
        if rollbacks > MAX_ROLLBACKS:
            error.what += f" {MAX_ROLLBACKS} rollbacks did not help."
            raise error
        saved = find_state(self.run_dir.path)
        if saved is None:  # nothing was saved yet
            raise error
        self.load_state_dict(saved.content)
        self.counters.rollbacks = rollbacks
        rates = [rate.full(rollbacks) for rate in (self.plan.rate_G, self.plan.rate_D)]
        self.run_dir.event("rollback", self.state, number=rollbacks, lr_G=rates[0], lr_D=rates[1])
        in_warmup = self.plan.rate_G.warmup(self.state.nimg) < 1
        self.display.print_line(
            f"Rolled back to {self.state.nimg / 1000:g} kimg (rollback {rollbacks} of {MAX_ROLLBACKS}), "
            f"rates now {rates[0]:.3g} and {rates[1]:.3g}{' after the warm-up' if in_warmup else ''}."
        )

    def _report_failure(self, error: Exception, is_last: bool) -> None:
        what = getattr(error, "what", None) or str(error)
        with contextlib.suppress(OSError):
            self.run_dir.event("not-saved", self.state, what=what)
        if is_last:
            raise TrainingError(
                f"The end of the run cannot be saved: {what}",
                hint="Earlier saves are intact. Free some space, and --resume the run folder for the rest.",
            ) from error
        self.display.print_line(f"{self.state.nimg / 1000:g} kimg: not saved, and training continues: {what}")

    def _check_space(self) -> None:
        """Raise ExportError if the disk has no room for a snapshot and a state."""
        if not self.run_dir.is_writable:
            return
        # The snapshot, and the state: the networks again with two moments for G and D. Averages in both.
        averages = self.state.power_averages.values()
        needed = 4 * size_of((self.state.G, self.state.D, self.state.G_ema)) + 2 * size_of(averages)
        if lack := lack_of_space(self.run_dir.path, needed, "a snapshot and a state"):
            raise ExportError(lack)


def merge_options(asked: TrainOptions, saved: SavedState) -> tuple[TrainOptions, list[str]]:
    """Return the options of the run with those asked for now, and lines on what changed.

    Options that are to be chosen as for a new run are None: those of a distillation that is switched on.
    Raises ConfigError that lists what cannot be changed; RunFinished if the run has reached its length.
    """
    before = TrainConfig.from_json(saved.content["config"])
    # At weight 0, sd_backbone and sd_interval were chosen for logging only; choose them again for the loss.
    reset = ("sd_backbone", "sd_interval") if asked.sd_weight and not before.sd_weight else ()
    new = {name: value for name, value in asked.given().items() if value != getattr(before, name)}
    if problems := [
        f"{flag(name)} {value}: an exact resume cannot change this ({getattr(before, name)} in the run). "
        "Start a new run from its snapshot instead."
        for name, value in new.items()
        if name in FIXED and name not in reset
    ]:
        raise ConfigError(problems)
    changes = {name: value for name, value in new.items() if name in CHANGEABLE or name in reset}
    kimg = changes.get("kimg", before.kimg)
    if saved.nimg >= round(kimg * 1000):
        raise RunFinished(saved, before, kimg)
    shown = changes | ({"batch_gpu": AUTO} if changes.get("batch_gpu") == 0 else {})
    changed = [f"{flag(name)}: {getattr(before, name)} -> {value}" for name, value in shown.items()]
    lines = [f"Changed: {'; '.join(changed)}" if changed else "All options as before."]
    ignored = {name: value for name, value in new.items() if name in ("outdir", "recipe")}
    lines += [f"{flag(name)} {value} has no effect on a resumed run." for name, value in ignored.items()]
    return before.as_options(**{name: getattr(asked, name) for name in reset} | changes), lines


@freed_at_once()
def write_state(path: Path, content: dict[str, Any]) -> None:
    """Write a state, whole or not at all, and delete those before the last but one.

    Raises WriteError if it cannot be written; older states are untouched then.
    """
    with atomic_write(path) as stream:
        writer = _ErrorKeeper(stream)
        try:
            torch.save({"format": FORMAT, "finetune": __version__, **content}, writer)  # type: ignore[arg-type]
        except RuntimeError:  # torch's message for a write that failed
            if writer.error is not None:
                raise writer.error from None
            raise
    for old in states_of(path.parent)[KEPT:]:
        if old != path:
            old.unlink(missing_ok=True)


def states_of(run_dir: Path) -> list[Path]:
    """Return the state files of a run folder, the newest first."""
    found = [path for path in run_dir.iterdir() if NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: float(NAME.fullmatch(path.name)[1]), reverse=True)  # type: ignore[index]


def read_state(path: Path) -> dict[str, Any]:
    """Return the content of a state file. Raises CheckpointError if it is damaged or of another format."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken is not None:
            raise CheckpointError(f"{path} is damaged: wrong checksum of {broken}")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # what zipfile and torch raise for damaged files is not documented
        raise CheckpointError(f"{path} is damaged: {str(error).splitlines()[0][:200] or 'cut off'}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else None
        raise CheckpointError(
            f"{path} is no training state of this version: its format is {found}, not {FORMAT}",
            hint="To start from the weights alone, --resume a network-snapshot-*.pkl of the run.",
        )
    return content


def find_state(place: Path) -> SavedState | None:
    """Return the state that `--resume PLACE` means: that file, or the newest valid one of a run folder.

    None if PLACE is neither. Raises CheckpointError if the file, or all in the folder, are damaged.
    """
    if place.is_file():
        if not NAME.fullmatch(place.name):
            return None
        seen = states_of(place.parent)
        return SavedState(place, read_state(place), seen)
    if not place.is_dir() or not (seen := states_of(place)):
        return None
    skipped: list[str] = []
    for path in seen:
        try:
            return SavedState(path, read_state(path), seen, tuple(skipped))
        except CheckpointError as error:
            skipped.append(f"{error.what}; skipped.")
    raise CheckpointError(
        f"{place} has no valid training state:\n" + "\n".join(f"  {line}" for line in skipped),
        hint="To start from the weights of its newest snapshot, --resume that file.",
    )


@dataclass
class _ErrorKeeper:
    """A stream that keeps the error of a failed write, which torch replaces by another message."""

    stream: BinaryIO
    error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.stream.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.stream.flush()
