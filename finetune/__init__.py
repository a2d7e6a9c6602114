"""Fine-tune StyleGAN2 and StyleGAN3 checkpoints: safe loading, self-distillation, export.

Importing this package loads nothing heavy; torch comes with the first use of `load`.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING


def _import_ours(name: str) -> None:
    """Import the package `name` that is installed beside this one, whatever comes first on the path.

    The trees of StyleGAN have packages of the same names, on PYTHONPATH or in the current folder.
    """
    root = Path(__file__).resolve().parent.parent
    loaded = sys.modules.get(name)
    if loaded is not None:
        places = [Path(place).resolve() for place in getattr(loaded, "__path__", ())]
        if places and root / name not in places:
            raise ImportError(
                f"finetune needs its own package {name}, and this process has already imported that of "
                f"{places[0].parent}. Restart it (the notebook's kernel) and import finetune first."
            )
        return
    spec = importlib.machinery.PathFinder.find_spec(name, [str(root)])
    if spec is None or spec.loader is None:  # not installed as folders
        return
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


for _name in ("torch_utils", "dnnlib"):
    _import_ours(_name)

from finetune.errors import FinetuneError  # noqa: E402
from finetune.version import __version__  # noqa: E402

if TYPE_CHECKING:
    from finetune.api import evaluate, fine_tune, generate
    from finetune.checkpoint.load import Checkpoint
    from finetune.export.save import save
    from finetune.options import TrainOptions
    from finetune.resolve import load

# Imported when they are first used.
_MODULES = {
    "Checkpoint": "finetune.checkpoint.load",
    "TrainOptions": "finetune.options",
    "evaluate": "finetune.api",
    "fine_tune": "finetune.api",
    "generate": "finetune.api",
    "load": "finetune.resolve",
    "save": "finetune.export.save",
}

__all__ = [
    "Checkpoint", "FinetuneError", "TrainOptions", "__version__",
    "evaluate", "fine_tune", "generate", "load", "save",
]  # fmt: skip


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module 'finetune' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
