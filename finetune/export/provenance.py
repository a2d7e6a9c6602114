"""Provenance entries of written files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.checkpoint.load import Checkpoint
from finetune.version import __version__

FORMAT = 1


def complete_entry(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entry "finetune" of a file, with every key that readers look for."""
    entry = {"format": FORMAT, "version": __version__, "source": None, "training": None, "nimg": None}
    return {**entry, **given}


def entry_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the entry for an export of `checkpoint`, which is not a training step.

    The export of a run's snapshot has the same source, options and images seen as the snapshot; the export of
    any other file names that file as its source. Both record which file was exported.
    """
    origin = checkpoint.provenance
    exported = {"source": origin.source, "sha256": origin.sha256, "size": origin.size}
    entry: dict[str, Any] = {"licence": origin.licence}
    if origin.sha256:  # of a file
        entry["exported_from"] = exported
    if origin.blended_with is not None:
        entry["blended_with"] = origin.blended_with
    if origin.generation == "finetune":
        entry |= {"source": origin.parent, "training": origin.training, "nimg": origin.nimg}
    else:
        entry |= {"source": origin.to_dict()}
    return complete_entry(entry)
