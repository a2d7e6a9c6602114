"""Output of `finetune checkpoints`: a table of entries, details of one entry, and both as plain values."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.hub.catalog import Entry

WIDTH = 180  # of a table that goes to a file
PUBLISHED = {"trained": "trained with", "finetune": "to fine-tune", "one_gpu": "on one GPU"}


def as_values(entry: Entry) -> dict[str, Any]:
    """Return an entry as JSON, with the path of its file (None: not on this machine)."""
    from finetune.hub import store

    place = store.place_of(entry)
    return {**entry.to_json(), "path": str(place) if place.is_file() else None}


def print_table(entries: Iterable[Entry]) -> None:
    """Print one line for each entry."""
    from rich.console import Console
    from rich.table import Table

    from finetune.hub import store

    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("name", no_wrap=True)
    table.add_column("pixels", justify="right", no_wrap=True)
    table.add_column("architecture", no_wrap=True)
    table.add_column("images", max_width=40)
    table.add_column("license", max_width=44)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("here", no_wrap=True)
    for entry in entries:
        table.add_row(
            entry.short_name,
            "" if entry.resolution is None else str(entry.resolution),
            entry.architecture + (" (TF)" if entry.format == "tensorflow-pickle" else ""),
            (entry.dataset or "") + (f", {entry.classes} classes" if entry.classes else ""),
            re.split("[(;:,]", entry.licence.name)[0].strip() if entry.licence else "not stated",
            size_text(entry),
            "yes" if store.place_of(entry).is_file() else "",
        )
    console.print(table, markup=False, highlight=False)


def size_text(entry: Entry) -> str:
    """Return the size in human-readable form."""
    if entry.size is not None:
        return f"{entry.size / 1e6:,.0f} MB"
    return f"~{entry.size_about}" if entry.size_about else ""


def as_text(entry: Entry) -> str:
    """Return everything known about one entry as lines of `name  value`."""
    from finetune.hub import store

    place = store.place_of(entry)
    record = store.record_of(place)
    license = "not stated (no permission to use it)"
    if entry.licence:
        license = str(entry.licence) + (f" ({entry.licence.remark})" if entry.licence.remark else "")
    hashed = f"{entry.sha256} (stated by {entry.sha256_from})" if entry.sha256 else None
    if hashed is None and record is not None:
        hashed = f"{record.sha256} (first download, on {record.since})"
    classes = {None: None, 0: "none (unconditional)"}.get(entry.classes, entry.classes)
    lines: list[tuple[str, Any]] = [
        ("name", entry.id),
        ("short names", ", ".join(entry.aliases)),
        ("architecture", entry.architecture),
        ("configuration", entry.config),
        ("format", entry.format),
        ("resolution", f"{entry.resolution} pixels" if entry.resolution else None),
        ("classes", classes),
        ("images", entry.dataset),
        ("license", license),
        ("size", f"{entry.size:,} bytes" if entry.size else size_text(entry)),
        ("sha256", hashed or "not stated; recorded at the first download"),
        *((PUBLISHED[name], settings_text(values)) for name, values in entry.published.items()),
        ("inferred", ", ".join(entry.inferred)),
        ("notes", entry.notes),
        *(("address" if index == 0 else "or", url) for index, url in enumerate(entry.urls)),
        *(("source", source) for source in entry.sources),
        ("here", str(place) if place.is_file() else "no"),
    ]
    return "\n".join(f"{name:<14}{value}" for name, value in lines if value not in (None, ""))


def settings_text(values: Mapping[str, Any]) -> str:
    """Return settings in one line."""
    return ", ".join(
        f"{name} {'yes' if value is True else 'no' if value is False else value}"
        for name, value in values.items()
    )
