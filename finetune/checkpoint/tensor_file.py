"""Read the safetensors files that `finetune export` writes: tensors named `G_ema.synthesis.b4.const`, and a
header that describes the networks.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from finetune.checkpoint.provenance import Provenance, drop_old_ancestors
from finetune.checkpoint.rebuild import Rebuilt, fill
from finetune.checkpoint.state_dict import rebuild_described
from finetune.checkpoint.unpickle.stubs import Tensor, printable
from finetune.errors import CheckpointError, PickleRefused
from finetune.sniff import SAFETENSORS

FORMAT = "stylegan-finetune/1"
NETWORKS = ("G", "D", "G_ema")
DTYPES = {"F64", "F32", "F16", "I64", "I32", "I16", "I8", "U8", "BOOL"}  # of safetensors, known to numpy


def is_tensor_file(path: Path) -> bool:
    """Return whether the file begins like a safetensors file; False if it cannot be read."""
    try:
        with path.open("rb") as stream:
            return re.match(SAFETENSORS, stream.read(64), re.DOTALL) is not None
    except OSError:
        return False


def read_tensor_file(path: Path) -> tuple[dict[str, Rebuilt], dict[str, Any], Provenance]:
    """Rebuild the networks of a safetensors file, with the same checks as for a pickle.

    Returns the networks by name, filled, the options of the data set, and the origin.
    Raises CheckpointError if the file is damaged or not of this tool, CheckpointMismatch if its tensors are
    not exactly those of the networks that its header describes.
    """
    metadata, found = _read(path)
    networks = _read_json(metadata, "networks")
    stray = sorted(name for name in found if name.split(".", 1)[0] not in networks)
    if unknown := sorted(set(networks) - set(NETWORKS)) or stray:
        names = ", ".join(map(printable, unknown[:20]))
        raise CheckpointError(f"tensors of unknown networks ({names})")
    if not networks:
        raise CheckpointError("has none of G, D and G_ema")
    size = path.stat().st_size
    rebuilt = {name: _rebuild(name, networks[name], found) for name in networks}
    fill(rebuilt.values())
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    entry = _read_json(metadata, "finetune")  # as in our pickles
    drop_old_ancestors(entry)
    provenance = Provenance.from_entry(entry, source=path.name, sha256=digest, size=size)
    return rebuilt, _read_json(metadata, "training_set_kwargs"), provenance


def _read(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Return the strings of the header, and the tensors by name; CheckpointError for a file of others."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata, found = file.metadata() or {}, {}
            if (seen := metadata.get("format")) != FORMAT:
                raise CheckpointError(
                    f"not a safetensors file of this tool (format {seen!r:.80}, expected {FORMAT!r})",
                    hint="Only files of `finetune export --format safetensors` describe their networks. "
                    "Pass the checkpoint that it was made from (.pkl or .pt).",
                )
            for name in file.keys():
                dtype = file.get_slice(name).get_dtype()
                if dtype not in DTYPES:
                    raise CheckpointError(f"{printable(name)} has dtype {dtype}, expected F32")
                found[name] = file.get_tensor(name)
            return metadata, found
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is a damaged safetensors file ({printable(str(error))})",
            hint="Download or copy it again.",
        ) from None


def _read_json(metadata: dict[str, str], key: str) -> dict[str, Any]:
    try:
        value = json.loads(metadata.get(key) or "{}")
    except (ValueError, RecursionError):
        value = None
    if value is None and metadata.get(key) == "null":
        return {}
    if type(value) is not dict:
        raise CheckpointError(f"{key} in the header is not a JSON object")
    return value


def _rebuild(name: str, constructor: Any, found: dict[str, np.ndarray]) -> Rebuilt:
    """Build one network, checking its arguments, then names, shapes and dtypes of its tensors."""
    given = constructor.get("init_kwargs") if type(constructor) is dict else None
    if type(given) is not dict:
        raise CheckpointError(f"the header does not describe {name}")
    prefix = name + "."
    tensors = {
        key.removeprefix(prefix): Tensor(array, array.dtype.name, offset=0)
        for key, array in found.items()
        if key.startswith(prefix)
    }
    try:
        module, notes = rebuild_described(name, tensors, given)
    except PickleRefused as error:
        raise CheckpointError(f"{name} cannot be built as the header describes ({error.what})") from None
    return Rebuilt(module, notes, "finetune", tensors)
