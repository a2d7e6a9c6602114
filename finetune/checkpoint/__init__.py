"""Checkpoints of StyleGAN2 and StyleGAN3: found, fetched, opened; nothing that they carry is executed.

Importing this package loads nothing heavy: torch comes with `load` and all else of `opening`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune.checkpoint.run import newest_snapshot, resolve_network

if TYPE_CHECKING:
    from finetune.checkpoint.opening import NETWORKS, Checkpoint, Provenance, load

__all__ = ["NETWORKS", "Checkpoint", "Provenance", "load", "newest_snapshot", "resolve_network"]


def __getattr__(name: str):
    if name in ("NETWORKS", "Checkpoint", "Provenance", "load"):
        from finetune.checkpoint import opening

        return getattr(opening, name)
    raise AttributeError(f"module 'finetune.checkpoint' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
