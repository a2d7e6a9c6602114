"""Resolve a path, run folder, catalog name or URL to a checkpoint file, and open it with its license.

This is the only module that uses both `finetune.hub` (names and URLs to files) and `finetune.checkpoint`
(files to networks). Importing it loads neither torch nor requests.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import CheckpointError
from finetune.hub import huggingface
from finetune.recipes import Published
from torch_utils.files import expand_home

if TYPE_CHECKING:
    import torch

    from finetune.checkpoint.load import Checkpoint
    from finetune.checkpoint.provenance import Provenance
    from finetune.hub.catalog import Entry

log = logging.getLogger("finetune.hub")

SNAPSHOT = re.compile(r"network-snapshot-(\d+(?:\.\d+)?)\.pkl")


# generation -> format, as the catalog calls it
FORMATS = {
    "tf": "tensorflow-pickle",
    "ada": "pytorch-pickle",
    "sg3": "pytorch-pickle",
    "rosinality": "state-dict",
    "state-dict": "state-dict",
    "finetune": "pytorch-pickle",
}


def load(
    network: str | Path,
    *,
    device: str | torch.device = "cpu",
    architecture: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """Open the checkpoint that `network` means: a file, run folder (its newest snapshot), name or URL.

    Nothing in the file is executed. The license is that which the file states or, for a public checkpoint,
    that of the catalog or of its model card. architecture: constructor arguments of state dicts, for those
    that no tensor determines. Raises what `resolve_network` and `finetune.checkpoint.load.load` raise.
    """
    from finetune.checkpoint.load import load as load_file
    from finetune.hub.identify import find_license

    path = resolve_network(network)
    checkpoint = load_file(path, device=device, architecture=architecture)
    origin = checkpoint.provenance
    license = origin.licence or find_license(
        sha256=origin.sha256,
        # A file of this tool may have the name of a public checkpoint, and is not that checkpoint.
        file_name=origin.source if origin.generation != "finetune" else None,
        size=origin.size,
        resolution=checkpoint.network.img_resolution,
    )
    if license is None and (address := huggingface.address_of(path)):
        license = huggingface.license_of(address, is_local=True)
    return dataclasses.replace(checkpoint, provenance=dataclasses.replace(origin, licence=license))


def published_for(provenance: Provenance) -> Published | None:
    """Return the published training settings of the checkpoint that a file is or descends from.

    A file counts as that of the catalog by its hash, or by its name if only one entry has that name.
    """
    from finetune.hub import identify

    origin = provenance.to_dict()
    while origin.get("parent"):
        origin = origin["parent"]
    entry = identify.entry_of_hash(origin.get("sha256") or "")
    if entry is None and origin.get("source") and origin.get("size"):
        same = identify.entries_of_name(origin["source"], origin["size"])
        entry = same[0] if len(same) == 1 else None
    return identify.published(entry) if entry else None


def facts_of(path: Path) -> dict[str, Any]:
    """Return what a checkpoint file states about itself, as fields of a catalog entry."""
    from finetune.checkpoint.load import load as load_file

    checkpoint = load_file(path)
    origin, network = checkpoint.provenance, checkpoint.network
    return {
        "format": "safetensors" if path.suffix.lower() == ".safetensors" else FORMATS[origin.generation],
        "architecture": checkpoint.family,
        "resolution": network.img_resolution,
        "classes": network.c_dim,
        "size": origin.size,
        "sha256": origin.sha256,
    }


def newest_snapshot(run_dir: Path) -> Path:
    """Return the snapshot of a run folder with the most images seen; CheckpointError if there is none."""
    found = [
        (float(match[1]), path) for path in run_dir.iterdir() if (match := SNAPSHOT.fullmatch(path.name))
    ]
    if not found:
        raise CheckpointError(
            f"{run_dir} has no network-snapshot-*.pkl",
            hint="Pass a checkpoint file, or the folder of a run that has written a snapshot.",
        )
    return max(found)[1]


def recommended_by(run_dir: Path) -> Path | None:
    """Return the snapshot that a run recommended at its end, None if it did not, or if it is gone."""
    try:
        about = json.loads((run_dir / "about.json").read_text(encoding="utf-8"))
        path = run_dir / Path(about["recommended"]["file"]).name
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return path if path.is_file() else None


def resolve_network(
    network: str | Path,
    *,
    on_message: Callable[[str], None] = log.info,
    progress: Callable[[int, int | None], None] | None = None,
) -> Path:
    """Return the checkpoint file that `network` means: a file, run folder, catalog name or URL (hf:// too).

    The file of a run folder is its newest snapshot; that of a name or URL is downloaded if it is not on this
    machine. `on_message` is called with what is downloaded and its license, and with the file that a run
    recommends in place of its newest one; `progress` with the bytes so far and in total. Raises
    CheckpointError if `network` is none of these, and what `hub.download.fetch` raises.
    """
    text = os.fspath(network)
    if address := huggingface.parse(text):
        return huggingface.fetch(address, on_message=on_message)
    if url := as_url(text):
        from finetune.hub import store

        return store.fetch_url(url, on_message=on_message, progress=progress)
    path = expand_home(text)
    # os.path: the methods of Path raise OSError for names that are too long.
    if os.path.isdir(path):
        run_dir, path = path, newest_snapshot(path)
        if (other := recommended_by(run_dir)) and other != path:
            on_message(f"Using {path}, the newest snapshot. The run recommends {other}.")
    if not os.path.exists(path):
        return _named(text, on_message, progress)
    if not path.is_file():  # a pipe or a device may have no end
        raise CheckpointError(f"{path} is not a file", hint="Pass a regular file.")
    return path


def as_url(text: str) -> str | None:
    """Return the URL that a text is, None if it is none; a path made of a URL has lost a slash."""
    match = re.match(r"(https?):/+(?=[^/])", text, re.IGNORECASE)
    return f"{match[1].lower()}://{text[match.end() :]}" if match else None


def check_architecture(entry: Entry) -> None:
    """Raise CheckpointError if a checkpoint of the catalog cannot be loaded."""
    from finetune.hub import catalog

    if entry.architecture not in catalog.OPENS:
        raise CheckpointError(
            f"{entry.id}: a network of architecture {entry.architecture} cannot be used here",
            hint=f"Supported: {', '.join(catalog.OPENS)}. {entry.notes or ''}".strip(),
        )


def _named(
    text: str, on_message: Callable[[str], None], progress: Callable[[int, int | None], None] | None
) -> Path:
    from finetune.hub import catalog, store

    entry = catalog.find(text)
    if entry is None:
        what = f"{expand_home(text)} does not exist"
        if Path(text).name != text:
            raise CheckpointError(what, hint="Pass a checkpoint file, a run folder, a name or a URL.")
        raise CheckpointError(f"{what}, and is not in the catalog", hint=catalog.suggestion(text))
    check_architecture(entry)
    return store.fetch_entry(entry, on_message=on_message, progress=progress)
