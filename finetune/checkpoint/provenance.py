"""Provenance of the weights of a checkpoint, as stated in its file; every value is checked."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from finetune.checkpoint.unpickle.stubs import printable

Generation = Literal["tf", "ada", "sg3", "rosinality", "state-dict", "finetune"]

MAX_ANCESTORS = 200  # runs, each started from the checkpoint of the one before; further ones are dropped
NOT_KNOWN = "not known"  # in the license of a blend, for a side without one
MAX_BLENDS = 20  # blends of blends; further ancestors are dropped


@dataclass(frozen=True, slots=True)
class Provenance:
    """Describe the origin of a checkpoint.

    `generation` is the code base that wrote the file; `parent` is the provenance of the checkpoint that
    training started from, `training` its options and `nimg` the images it saw; None if not stated in the
    file. A blend has a second parent, `blended_with`. The names of the fields are keys inside files and never
    change.
    """

    generation: Generation
    source: str
    sha256: str
    size: int
    licence: str | None = None
    parent: dict | None = None
    training: dict | None = None
    nimg: int | None = None
    blended_with: dict | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        values = asdict(self)
        if self.blended_with is None:
            del values["blended_with"]
        return values

    @classmethod
    def from_entry(cls, entry: dict[str, Any], *, source: str, sha256: str, size: int) -> Provenance:
        """Build the provenance of a file that this program wrote from its entry "finetune".

        The license is the one stated for the file itself, or else that of its source.
        """
        parent = _lineage(entry.get("source"))
        stated = _typed(entry)
        return cls(
            generation="finetune",
            source=source,
            sha256=sha256,
            size=size,
            licence=stated["licence"] or (parent or {}).get("licence"),
            parent=parent,
            training=stated["training"],
            nimg=stated["nimg"],
            blended_with=stated.get("blended_with"),
        )


def drop_old_ancestors(entry: dict[str, Any]) -> None:
    """Remove from the entry "finetune" what is stated about more than MAX_ANCESTORS ancestors."""
    for key in ("source", "blended_with"):
        step: Any = entry.get(key)
        for _ in range(MAX_ANCESTORS - 1):
            step = step.get("parent") if type(step) is dict else None
        if type(step) is dict:
            step["parent"] = None


def _lineage(entry: Any, depth: int = 0) -> dict[str, Any] | None:
    """Return what a file states about its source, the source of that, and so on, as `to_dict` does."""
    lineage = []
    while type(entry) is dict:
        lineage.append(_typed(entry, depth))
        entry = entry.get("parent")
    parent = None
    for step in reversed(lineage):
        parent = {**step, "parent": parent}
    return parent


def _typed(entry: dict[str, Any], depth: int = 0) -> dict[str, Any]:
    """Return the known values of an entry, None for a value of another type; texts become one line."""
    types = {"generation": str, "source": str, "sha256": str, "size": int, "licence": str}
    types |= {"training": dict, "nimg": int}
    stated = {key: entry[key] if type(entry.get(key)) is kind else None for key, kind in types.items()}
    stated = {key: printable(value) if type(value) is str else value for key, value in stated.items()}
    other = _lineage(entry.get("blended_with"), depth + 1) if depth < MAX_BLENDS else None
    return stated if other is None else {**stated, "blended_with": other}
