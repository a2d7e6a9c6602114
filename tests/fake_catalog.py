"""A catalog of a few checkpoints whose files a server on this machine serves."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from pathlib import Path

from hub.faulty_server import serving

from finetune.hub import catalog, download
from finetune.hub.catalog import Entry, License

LICENSE = License("Some License 1.0", "https://example.org/license")


@contextlib.contextmanager
def served(folder: Path, files: dict[str, bytes], monkeypatch):
    """Serve `files` (name -> bytes) and write a catalog with an entry for each; its names win over others.

    Gives the server; `server.state(name, **changes)` changes what the catalog says of a file.
    """
    monkeypatch.setenv("FINETUNE_CACHE", str(folder / "cache"))
    monkeypatch.setenv("FINETUNE_CATALOG", str(folder / "mine.json"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("FINETUNE_OFFLINE", raising=False)
    monkeypatch.setattr(download, "sleep", lambda seconds: None)
    monkeypatch.setattr(download, "TIMEOUT_SEC", (5, 0.3))
    with serving(files) as server:
        entries = {
            name: Entry(
                name, (f"{server.url}/{name}.pkl",), "stylegan2", licence=LICENSE, sources=("a test",)
            )
            for name in files
        }
        server.files = {f"{name}.pkl": content for name, content in files.items()}

        def state(name, **changes):
            entries[name] = dataclasses.replace(entries[name], **changes)
            write()

        def write():
            Path(os.environ["FINETUNE_CATALOG"]).write_text(catalog.to_text(entries.values()))
            catalog.entries.cache_clear()

        server.state, server.entries = state, entries
        write()
        yield server
    catalog.entries.cache_clear()
