"""Checkpoints in repositories of the Hugging Face Hub: `hf://USER/REPO[@REVISION][/FILE]`.

huggingface_hub, of the extra `hub`, downloads them into its own cache, with the token of its own login.
"""

from __future__ import annotations

import contextlib
import logging
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from finetune.errors import CheckpointError, FinetuneError
from finetune.hub import download

ENDINGS = (".safetensors", ".pkl", ".pt", ".pth")  # of checkpoints; the first has precedence
CARD = "README.md"
SHOWN = 10  # files that a message lists
ADDRESS = re.compile(r"hf:/+([\w.-]+/[\w.-]+)(?:@([^/]+))?(?:/(.+))?", re.IGNORECASE)
IN_CACHE = re.compile(r"/models--([^/]+--[^/]+)/snapshots/([^/]+)/(.+)$")

log = logging.getLogger("finetune.hub")


@dataclass(frozen=True, slots=True)
class Address:
    """A repository and, if given, one of its revisions and files."""

    repo: str
    revision: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"hf://{self.repo}{revision}" + (f"/{self.file}" if self.file else "")


def parse(text: str) -> Address | None:
    """Return the address that a text is, None if it is none; a path made of one has lost a slash.

    Raises CheckpointError if it has no user and repository.
    """
    if not re.match(r"hf:/", text, re.IGNORECASE):
        return None
    match = ADDRESS.fullmatch(text)
    if match is None:
        raise CheckpointError(
            f"{text} is not an address", hint="Use hf://USER/REPO, or hf://USER/REPO/FILE for one file."
        )
    return Address(*match.groups())


def address_of(path: Path) -> Address | None:
    """Return where a file of the cache of huggingface_hub comes from, None for any other file."""
    match = IN_CACHE.search(path.as_posix())
    return Address("/".join(match[1].split("--", 1)), match[2], match[3]) if match else None


def library() -> Any:
    """Import huggingface_hub; CheckpointError if it is not installed."""
    try:
        import huggingface_hub
        from huggingface_hub.utils import disable_progress_bars
    except ImportError:
        raise CheckpointError(
            "hf:// needs the package huggingface_hub", hint="Install it: pip install 'stylegan-finetune[hub]'"
        ) from None
    if not sys.stderr.isatty():
        disable_progress_bars()
    return huggingface_hub


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn the errors of huggingface_hub and of the HTTP library that it uses into a CheckpointError."""
    try:
        yield
    except FinetuneError:
        raise
    except Exception as error:  # which library that is depends on its version
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        hint = "Check the name and the connection. Private repositories need `hf auth login` or $HF_TOKEN."
        raise CheckpointError(f"{what} failed ({reason})", hint=hint) from error


def fetch(address: Address, *, on_message: Callable[[str], None] = log.info) -> Path:
    """Return the file of an address, downloaded if it is not in the cache of huggingface_hub.

    Without a file, the repository's only checkpoint, or its only safetensors file. `on_message` is called
    with what is downloaded and its license. Raises CheckpointError if there is none or the download fails.
    """
    if download.is_offline():
        return find(address)
    hub = library()
    where = {"repo_id": address.repo, "revision": address.revision}
    with explained(f"{address}: downloading"):
        name = address.file or choose(address, hub.HfApi().list_repo_files(**where))
        license = license_of(address)  # which keeps the model card, for later uses of the file
        if not isinstance(hub.try_to_load_from_cache(filename=name, **where), str):
            on_message(f"Fetching hf://{address.repo}/{name}")
            on_message(f"License: {license or 'not stated in the model card'}")
        return Path(hub.hf_hub_download(filename=name, **where))


def find(address: Address) -> Path:
    """Return the file of an address in the cache of huggingface_hub; CheckpointError if it is not there."""
    hub = library()
    with explained(f"{address}: finding it on this machine"):
        folder = Path(hub.snapshot_download(address.repo, revision=address.revision, local_files_only=True))
    kept = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    if address.file and address.file not in kept:
        raise CheckpointError(
            f"{address} is not on this machine, and {download.OFFLINE} or --offline forbids downloading it",
            hint=f"On this machine: {', '.join(sorted(kept)[:SHOWN]) or 'none of its files'}.",
        )
    return folder / choose(address, kept)


def choose(address: Address, names: Iterable[str]) -> str:
    """Return the file that an address without one means; CheckpointError if there is none, or several."""
    names = sorted(names)
    if address.file in names:
        return str(address.file)
    found = [name for name in names if PurePosixPath(name).suffix.lower() in ENDINGS]
    preferred = [name for name in found if name.lower().endswith(ENDINGS[0])]
    if address.file is None and len(preferred or found) == 1:
        return (preferred or found)[0]
    listed = ", ".join(found[:SHOWN]) or "none"
    what = f"has no file {address.file}" if address.file else f"has {len(found)} checkpoints"
    raise CheckpointError(
        f"hf://{address.repo} {what} (checkpoints: {listed})", hint=f"Name one: hf://{address.repo}/FILE."
    )


def license_of(address: Address, *, is_local: bool = False) -> str | None:
    """Return the license that the model card of a repository states, None if it states none.

    is_local: only read a card that is on this machine.
    """
    try:
        hub = library()
        card = hub.hf_hub_download(address.repo, CARD, revision=address.revision, local_files_only=is_local)
        data = hub.ModelCard.load(card).data.to_dict()
    except Exception:  # no library, no card, or one that cannot be read: it states nothing
        return None
    name = data.get("license_name") if data.get("license") == "other" else data.get("license")
    parts = [str(part) for part in (name, data.get("license_link")) if part]
    return f"{', '.join(parts)} (stated by hf://{address.repo})" if parts else None
