"""Open a checkpoint file: rebuild its networks and put each tensor of the file in exactly one place."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from finetune.checkpoint import rosinality
from finetune.checkpoint.describe import MAX_DEPTH, find_foreign, plain
from finetune.checkpoint.provenance import MAX_ANCESTORS, Provenance, drop_old_ancestors
from finetune.checkpoint.rebuild import Rebuilt, check_growth, fill, rebuild, rebuild_tf
from finetune.checkpoint.state_dict import (
    StateDict,
    check_given,
    is_discriminator,
    is_known,
    rebuild_state,
    tensors_of_state,
)
from finetune.checkpoint.tensor_file import NETWORKS, is_tensor_file, read_tensor_file
from finetune.checkpoint.unpickle.files import PickleFile, read_pickle
from finetune.checkpoint.unpickle.stubs import (
    NOT_OPENED,
    SAVE_AGAIN,
    WRITTEN_BY_DILL,
    PersistentObject,
    Tensor,
    TFNetwork,
    printable,
)
from finetune.checkpoint.unpickle.values import Record, kind
from finetune.errors import CheckpointError, CheckpointMismatch, PickleRefused

ENTRIES = (*NETWORKS, "augment_pipe", "training_set_kwargs", "finetune", *rosinality.ENTRIES)
NAMED_ENTRIES = (
    "Networks are the entries G, D and G_ema, as modules or state dicts. If the file has a StyleGAN2 or "
    "StyleGAN3 network, save it again: torch.save({'G_ema': state_dict}, file)."
)
MAX_METADATA = 100 * MAX_ANCESTORS  # values

Network = Any  # a torch.nn.Module of finetune.models, whose attributes type checkers cannot know


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The networks of a file, in eval mode without gradients; None for those the file does not have.

    `foreign`: class of each network that is not of StyleGAN and was not opened, or the first tensor of a D
    that does not fit. `notes`: one sentence for each other finding in the file.
    """

    G: Network | None = None
    D: Network | None = None
    G_ema: Network | None = None
    augment_pipe: Network | None = None
    training_set_kwargs: dict[str, Any] = field(default_factory=dict)
    provenance: Provenance
    notes: tuple[str, ...] = ()
    foreign: Mapping[str, str] = field(default_factory=dict)

    @property
    def best(self) -> Network | None:
        """The generator for inference: G_ema, G if there is no G_ema, else None."""
        return self.G_ema if self.G_ema is not None else self.G

    @property
    def generator(self) -> Network:
        """`best`; raises CheckpointError if the file has only a discriminator."""
        if self.best is None:
            raise CheckpointError(
                f"{self.provenance.source}: has no generator, only D. Use a file with G or G_ema."
            )
        return self.best

    @property
    def network(self) -> Network:
        """`best`, or D if the file has no generator."""
        return self.best if self.best is not None else self.D

    @property
    def family(self) -> str:
        """'stylegan2', 'stylegan3-t' or 'stylegan3-r'; 'stylegan2' if the file has only a discriminator."""
        if self.best is None or not hasattr(self.best.synthesis, "input"):
            return "stylegan2"
        return "stylegan3-r" if self.best.init_kwargs.get("use_radial_filters") else "stylegan3-t"

    @property
    def label_kind(self) -> str | None:
        """Return 'classes' or 'vectors', None if the network has no labels or the file does not state it."""
        kind = self.training_set_kwargs.get("labels")
        return kind if kind in ("classes", "vectors") and self.network.c_dim else None

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the first classes, or of all, in order; empty if the file does not state them."""
        names = self.training_set_kwargs.get("classes")
        if self.label_kind != "classes" or not isinstance(names, list):
            return ()
        return tuple(map(str, names[: self.network.c_dim]))

    @property
    def missing(self) -> list[str]:
        """Those of G, D and G_ema that the file does not have."""
        return [name for name in NETWORKS if getattr(self, name) is None]


def load(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    architecture: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """Open a pickle of any generation, a file of torch.save, or a safetensors file of `finetune export`.

    The networks are built from the description in the file, and each of its tensors is assigned to exactly
    one of theirs. Nothing in the file is executed, and the network is not accessed. The license is that of
    the file; `finetune.resolve.load` looks it up as well.

    architecture: constructor arguments of state dicts, for those that no tensor determines. Raises
    CheckpointError if the file is not a checkpoint, PickleRefused if it is damaged or hostile,
    CheckpointMismatch with all differences if its tensors are not those of its networks.
    """
    path = Path(path)
    if is_tensor_file(path):
        with _naming(path):
            return _load_tensor_file(path, device, architecture)
    with _naming(path):
        file = read_pickle(path)
        networks, extras = _entries(file)
        if architecture:
            check_given(architecture, [item for item in networks.values() if type(item) is StateDict])
        rebuilt, refused = _rebuild_all(networks, file.size, architecture)
    foreign = {name: _why_foreign(name, error) for name, error in refused.items()}
    notes = [note for item in rebuilt.values() for note in item.notes]
    notes += [_refusal_note(name, error) for name, error in refused.items()]
    notes += _entry_notes({key: value for key, value in extras.items() if key not in networks})
    entry, options = (_metadata(extras, key, notes) for key in ("finetune", "training_set_kwargs"))
    # Last: the values of the file cannot be read any more afterwards.
    fill(rebuilt.values(), file.give_back)
    return Checkpoint(
        **{name: item.module.to(device) for name, item in rebuilt.items()},
        training_set_kwargs=options or {},
        provenance=_provenance(path, file, rebuilt, entry),
        notes=tuple(notes),
        foreign=foreign,
    )


def _load_tensor_file(
    path: Path, device: str | torch.device, architecture: Mapping[str, Any] | None
) -> Checkpoint:
    if architecture:
        check_given(architecture, [])  # the header states how its networks are built
    rebuilt, training_set_kwargs, provenance = read_tensor_file(path)
    return Checkpoint(
        **{name: item.module.to(device) for name, item in rebuilt.items()},
        training_set_kwargs=training_set_kwargs,
        provenance=provenance,
        notes=tuple(note for item in rebuilt.values() for note in item.notes),
    )


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name the file in errors."""
    try:
        yield
    except CheckpointError as error:
        if error.what.startswith("the pickle"):
            error.what = error.what.replace("the pickle", str(path), 1)
        elif not error.what.startswith(str(path)):
            error.what = f"{path}: {error.what}"
        raise


def _entries(file: PickleFile) -> tuple[dict[str, Any], dict[Any, Any]]:
    """Return the networks of a file by name, and its other entries."""
    root = file.root
    if (state := _state_dict("G_ema", root, {})) is not None:  # a single network
        return {"D" if is_discriminator(state.tensors) else "G_ema": state}, {}
    if type(root) is PersistentObject:
        return {"D" if root.class_name == "Discriminator" else "G_ema": root}, {}
    if type(root) is TFNetwork:
        return {"D" if "components" in root.state and not root.state["components"] else "G_ema": root}, {}
    if type(root) is Record:
        raise _foreign("the network", root)
    tf = (TFNetwork, Record, type(None))
    if type(root) in (tuple, list) and len(root) == 3 and all(type(item) in tf for item in root):
        return {name: item for name, item in zip(NETWORKS, root) if item is not None}, {}
    if type(root) is not dict:
        raise _without_networks(kind(root))
    networks = {}
    for name in (*NETWORKS, "augment_pipe"):
        network = root.get(name, root.get(rosinality.NAMES.get(name, "")))
        if network is None or (type(network) is dict and not network):
            continue
        networks[name] = _state_dict(name, network, root) or network
    if not networks.keys() & set(NETWORKS):
        found = ", ".join(printable(str(key)) for key in list(root)[:20]) or "no entries"
        raise _without_networks(f"a dict of {found}")
    return networks, root


def _without_networks(found: str) -> PickleRefused:
    return PickleRefused(
        f"the pickle holds none of G, D and G_ema, but {found}",
        offset=0,
        hint=NAMED_ENTRIES,
    )


def _state_dict(name: str, value: Any, root: dict[Any, Any]) -> StateDict | None:
    """Return a network that is a state dict, or a module of an unknown class with the tensors of one."""
    tensors = tensors_of_state(value)
    is_port = tensors is not None and rosinality.is_port(tensors)
    if tensors is None or (type(value) is Record and not (is_port or is_known(tensors))):
        return None
    stated: Any = root
    for key in ("finetune", "networks", name, "init_kwargs"):
        stated = stated.get(key) if type(stated) is dict else None
    stated = plain(stated, 0) if type(stated) is dict else None
    if not is_port:
        return StateDict(tensors, stated)
    means = (root.get(key) for key in (rosinality.G_LATENT_AVG, rosinality.LATENT_AVG)[name != "G" :])
    mean = next((mean for mean in means if type(mean) is Tensor), None)
    return rosinality.read_state(tensors, mean, stated)


def _rebuild_all(
    networks: dict[str, Any], size: int, architecture: Mapping[str, Any] | None
) -> tuple[dict[str, Rebuilt], dict[str, CheckpointError]]:
    """Return the rebuilt networks by name, and the refusals of others.

    Refused alone, if there is a generator, are networks of foreign classes, entries that are no networks, and
    a discriminator whose tensors do not fit. Raises PickleRefused if no generator of the file can be rebuilt.
    """
    rebuilt: dict[str, Rebuilt] = {}
    refused: dict[str, CheckpointError] = {}
    of_tensors = functools.partial(rebuild_state, given=architecture)
    builders = {PersistentObject: rebuild, TFNetwork: rebuild_tf, StateDict: of_tensors}
    base_shape = None
    for name, network in sorted(networks.items(), key=lambda item: item[0] == "D"):  # as a generator has it
        if type(network) not in (*builders, Record):
            refused[name] = _no_network(name, network)
            continue
        try:
            record = network if type(network) is Record else find_foreign(network)
            if record is not None:
                raise _foreign(name, record)
            build: Any = builders[type(network)]
            rebuilt[name] = build(name, network, base_shape)
            base_shape = base_shape or getattr(rebuilt[name].module, "base_shape", None)
        except CheckpointError as error:
            is_damaged = isinstance(error, PickleRefused) and error.blocked is None
            is_foreign = isinstance(error, PickleRefused) or name in ("D", "augment_pipe")
            if is_damaged or not is_foreign:
                raise
            refused[name] = error
    needed = networks.keys() & {"G", "G_ema"} or {"D"}
    if not needed & rebuilt.keys():
        raise next(refused[name] for name in ("G_ema", "G", "D") if name in refused)
    check_growth(rebuilt.values(), size)
    return {name: rebuilt[name] for name in networks if name in rebuilt}, refused


def _why_foreign(name: str, error: CheckpointError) -> str:
    """Return the foreign class of a refused network, the first tensor that does not fit, or what it is."""
    if isinstance(error, CheckpointMismatch):
        return error.differences[0]
    return str(error.blocked) if isinstance(error, PickleRefused) else error.what.removeprefix(f"{name} is ")


def _refusal_note(name: str, error: CheckpointError) -> str:
    if isinstance(error, PickleRefused):
        return f"{name}: foreign class {error.blocked}, not opened (at byte {error.offset})"
    why = _why_foreign(name, error)
    if isinstance(error, CheckpointMismatch):
        why = f"{len(error.differences)} tensors or settings do not fit, such as: {why}"
    return f"{name}: not opened, {why}"


def _no_network(name: str, value: Any) -> CheckpointError:
    """Return the error for an entry that is neither a network nor the tensors of one."""
    record = find_foreign(value)
    if record is not None:
        return _foreign(name, record)
    found = kind(value)
    if type(value) is dict:
        found = f"a dict of {', '.join(printable(str(key)) for key in list(value)[:5])}"
    return CheckpointError(f"{name} is {found}, not a network", hint=NAMED_ENTRIES)


def _foreign(name: str, record: Record) -> PickleRefused:
    """Return the error for a network that contains an unknown name."""
    hint = f"The file may be harmless. {NOT_OPENED} {SAVE_AGAIN}"
    if record.name.startswith("dill."):
        hint = WRITTEN_BY_DILL
    return PickleRefused(
        f"{name} in the pickle needs {record.name} (at byte {record.offset}), which is unknown here; "
        "nothing was executed",
        offset=record.offset,
        blocked=record.name,
        hint=hint,
    )


def _entry_notes(extras: dict[Any, Any]) -> list[str]:
    """Return notes on ignored entries."""
    unknown, notes = [], []
    seen: set[int] = set()
    for key, value in extras.items():
        shown = printable(str(key))
        record = find_foreign(value, seen)
        if record is not None:
            notes.append(f"entry `{shown}` ignored: foreign class {record.name} (at byte {record.offset})")
        elif key not in ENTRIES:
            unknown.append(shown)
    if unknown:
        notes.append(f"unknown entries ignored: {', '.join(sorted(unknown)[:20])}")
    return notes[-20:]


def _metadata(extras: dict[Any, Any], key: str, notes: list[str]) -> dict[str, Any] | None:
    """Return an entry that no network depends on as plain values; None, with a note, if it is too large."""
    entry = extras.get(key)
    if type(entry) is not dict:
        return None
    if key == "finetune":
        drop_old_ancestors(entry)
    try:
        return plain(entry, 0, MAX_ANCESTORS + MAX_DEPTH, MAX_METADATA)
    except PickleRefused:
        notes.append(f"entry `{key}` ignored: it has too many values")
        return None


def _provenance(
    path: Path, file: PickleFile, rebuilt: dict[str, Rebuilt], entry: dict[str, Any] | None
) -> Provenance:
    identity: dict[str, Any] = {"source": path.name, "sha256": file.sha256, "size": file.size}
    if entry is not None:
        return Provenance.from_entry(entry, **identity)
    network = next(rebuilt[name] for name in ("G_ema", "G", "D") if name in rebuilt)
    return Provenance(**identity, generation=network.generation)
