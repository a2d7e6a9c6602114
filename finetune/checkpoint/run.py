"""Which file a network on the command line is: a path, a run folder, a name of the catalogue, a URL."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

from finetune.errors import CheckpointError

log = logging.getLogger("finetune.checkpoint")

SNAPSHOT = re.compile(r"network-snapshot-(\d+(?:\.\d+)?)\.pkl")


def newest_snapshot(run_dir: Path) -> Path:
    """The snapshot of a run folder with the most images seen. Raises CheckpointError where there is none."""
    found = [
        (float(match[1]), path) for path in run_dir.iterdir() if (match := SNAPSHOT.fullmatch(path.name))
    ]
    if not found:
        raise CheckpointError(
            f"{run_dir} holds no network-snapshot-*.pkl",
            hint="Give a checkpoint file, or the folder of a run that has written a snapshot.",
        )
    return max(found)[1]


def resolve_network(
    network: str | Path,
    *,
    tell: Callable[[str], None] = log.info,
    progress: Callable[[int, int | None], None] | None = None,
) -> Path:
    """The checkpoint file that `network` means, wherever a network is asked for.

    A file is itself, and a run folder its newest snapshot; a name of the catalogue and a URL are the file
    they stand for, downloaded where it is not here yet. `tell` hears what is fetched and under which
    licence, `progress` the bytes so far and in all. Raises CheckpointError where it is nothing of that, and
    what `finetune.checkpoint.fetch` raises.
    """
    text = os.fspath(network)
    if url := as_url(text):
        from finetune.checkpoint import store

        return store.fetch_url(url, tell=tell, progress=progress)
    path = Path(text).expanduser()
    if path.is_dir():
        path = newest_snapshot(path)
    if not path.exists():
        return _named(text, tell, progress)
    if not path.is_file():  # a pipe or a device may have no end
        raise CheckpointError(f"{path} is not a file", hint="Save what it gives as a file first.")
    return path


def as_url(text: str) -> str | None:
    """The URL that a text is; a path made of one has lost a slash."""
    match = re.match(r"(https?):/+(?=[^/])", text, re.IGNORECASE)
    return f"{match[1].lower()}://{text[match.end() :]}" if match else None


def _named(
    text: str, tell: Callable[[str], None], progress: Callable[[int, int | None], None] | None
) -> Path:
    from finetune.checkpoint import catalog, store

    entry = catalog.find(text)
    if entry is None:
        what = f"{Path(text).expanduser()} does not exist"
        if Path(text).name != text:
            raise CheckpointError(what, hint="Give a checkpoint file, a run folder, a name or a URL.")
        raise CheckpointError(f"{what}, and is no name of the catalogue", hint=catalog.suggestion(text))
    if entry.architecture not in catalog.OPENS:
        raise CheckpointError(
            f"{entry.id} is a network of the kind {entry.architecture}, which cannot be used here",
            hint=f"These can: {', '.join(catalog.OPENS)}. {entry.notes or ''}".strip(),
        )
    return store.fetch_entry(entry, tell=tell, progress=progress)
