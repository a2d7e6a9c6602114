"""Make pretrained StyleGAN2 and StyleGAN3 checkpoints better: safe loading, self-distillation, export.

Importing this package loads nothing heavy; torch comes with the first use of `load`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune.errors import FinetuneError
from finetune.version import __version__

if TYPE_CHECKING:
    from finetune.checkpoint.load import Checkpoint
    from finetune.resolve import load

__all__ = ["Checkpoint", "FinetuneError", "__version__", "load"]


def __getattr__(name: str):
    if name == "load":
        from finetune.resolve import load

        return load
    if name == "Checkpoint":
        from finetune.checkpoint.load import Checkpoint

        return Checkpoint
    raise AttributeError(f"module 'finetune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
