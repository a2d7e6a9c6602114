"""The state file of a run: everything that influences its future, so that a run goes on as if never stopped.

A plain file of torch.save that `torch.load(..., weights_only=True)` opens; each part of it carries a CRC-32,
which is checked before anything is believed.
"""

from __future__ import annotations

import importlib
import logging
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from finetune.errors import CheckpointError
from finetune.train.allocator import freed_at_once
from finetune.train.state import TrainState
from finetune.version import __version__
from torch_utils.files import atomic_write

FORMAT = 1
NAME = re.compile(r"training-state-(\d{6,}\.\d{3})\.pt")
KEPT = 2  # the newest, and one before it in case that is damaged
MODELS = ("finetune.models.stylegan2", "finetune.models.stylegan3")

log = logging.getLogger("finetune.train")


@dataclass(frozen=True)
class Saved:
    """A state file that was read: its path, its content, and what is wrong with newer ones."""

    path: Path
    content: dict[str, Any]
    skipped: tuple[str, ...] = ()

    @property
    def nimg(self) -> int:
        """Images that had been seen."""
        return self.content["nimg"]


def path_for(run_dir: Path, nimg: int) -> Path:
    """Where the state after `nimg` images is kept."""
    return run_dir / f"training-state-{nimg // 1000:06d}.{nimg % 1000:03d}.pt"


@freed_at_once()
def write_state(path: Path, state: TrainState, **more: Any) -> Path:
    """Write a state, whole or not at all, and delete those before the last but one.

    more: plain values and tensors, such as the config and the position in the data. Raises WriteError where
    it cannot be written; older states are untouched then.
    """
    content = {"format": FORMAT, "finetune": __version__, **capture(state), **more}
    with atomic_write(path) as stream:
        watched = _Watched(stream)
        try:
            torch.save(content, watched)
        except RuntimeError:  # torch's words for a write that failed
            if watched.error is not None:
                raise watched.error from None
            raise
    for old in states_of(path.parent)[KEPT:]:
        if old != path:
            old.unlink(missing_ok=True)
    return path


def states_of(run_dir: Path) -> list[Path]:
    """The state files of a run folder, the newest first."""
    found = [path for path in run_dir.iterdir() if NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: float(NAME.fullmatch(path.name)[1]), reverse=True)  # type: ignore[index]


def read_state(path: Path) -> dict[str, Any]:
    """The content of a state file. Raises CheckpointError where it is damaged, or of another format."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken is not None:
            raise CheckpointError(f"{path} is damaged: {broken} in it does not have its checksum")
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
            hint="To start from the weights alone, give --resume a network-snapshot-*.pkl of the run.",
        )
    return content


def find_state(place: Path) -> Saved | None:
    """The state that `--resume PLACE` means: that file, or the newest whole one of a run folder.

    None where PLACE is no state file and no folder with state files. Raises CheckpointError where all of them
    are damaged, or the file is.
    """
    if place.is_file():
        return Saved(place, read_state(place)) if NAME.fullmatch(place.name) else None
    if not place.is_dir() or not (paths := states_of(place)):
        return None
    skipped: list[str] = []
    for path in paths:
        try:
            return Saved(path, read_state(path), tuple(skipped))
        except CheckpointError as error:
            skipped.append(f"{error.what}; skipped.")
    raise CheckpointError(
        f"{place} holds no training state that is whole:\n" + "\n".join(f"  {line}" for line in skipped),
        hint="To start from the weights of its newest snapshot, give --resume that file.",
    )


def capture(state: TrainState) -> dict[str, Any]:
    """Everything in a TrainState as tensors and plain values."""
    networks = {"G": state.G, "D": state.D, "G_ema": state.G_ema}
    if state.teacher is not state.G_ema:
        networks["teacher"] = state.teacher
    random = {"torch": torch.get_rng_state(), "labels": state.label_generator.get_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        random["cuda"] = torch.cuda.get_rng_state_all()  # type: ignore[assignment]
    return {
        "networks": {name: describe(network) for name, network in networks.items()},
        "opt_G": state.opt_G.state_dict(),
        "opt_D": state.opt_D.state_dict(),
        "ada": {"p": state.ada.p, "sign_sum": float(state.ada.sign_sum), "count": state.ada.count},
        "path_mean": state.path_mean,
        "sd_norms": state.sd_norms,
        "nimg": state.nimg,
        "step": state.step,
        "random": random,
    }


def restore(state: TrainState, content: dict[str, Any]) -> None:
    """Put everything but the networks and the random state back; those come with `networks_of` and
    `restore_random`. Raises CheckpointError where the optimisers are not those of the networks.
    """
    try:
        state.opt_G.load_state_dict(content["opt_G"])
        state.opt_D.load_state_dict(content["opt_D"])
    except ValueError as error:
        raise CheckpointError(f"the training state does not fit its networks: {error}") from None
    state.ada.p, state.ada.count = float(content["ada"]["p"]), int(content["ada"]["count"])
    state.ada.sign_sum = float(content["ada"]["sign_sum"])
    state.path_mean = content["path_mean"].to(state.path_mean.device)
    state.sd_norms.copy_(content["sd_norms"])
    state.nimg, state.step = int(content["nimg"]), int(content["step"])
    state.label_generator.set_state(content["random"]["labels"])


def restore_random(content: dict[str, Any]) -> None:
    """Put torch's random states back: the last thing before the loop."""
    torch.set_rng_state(content["random"]["torch"])
    cuda = content["random"].get("cuda")
    if cuda and torch.cuda.is_available():
        for index, each in enumerate(cuda[: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(each, index)


def describe(network: torch.nn.Module) -> dict[str, Any]:
    """A network as its class, the arguments of its constructor, and its tensors."""
    kind: Any = type(network)
    made: Any = network
    return {
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "args": _plain(list(made.init_args)),
        "kwargs": _plain(made.init_kwargs),
        "tensors": network.state_dict(),
    }


def networks_of(content: dict[str, Any]) -> dict[str, torch.nn.Module]:
    """The networks of a state by name. Raises CheckpointError where one is none of ours."""
    networks = {}
    for name, values in content["networks"].items():
        module, _, kind = values["class"].rpartition(".")
        if module not in MODELS or kind not in ("Generator", "Discriminator"):
            raise CheckpointError(f"the training state names a network that is not known: {values['class']}")
        network = getattr(importlib.import_module(module), kind)(*values["args"], **values["kwargs"])
        network.load_state_dict(values["tensors"])
        networks[name] = network
    return networks


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(item) for item in value) if type(value) in (list, tuple) else list(value)
    return value


class _Watched:
    """A stream that remembers the error of a write, which torch replaces by words of its own."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.stream.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.stream.flush()
