"""The log as TensorBoard shows it, where tensorboard is installed."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any


class Board:
    """Writes numbers for TensorBoard into a run folder; does nothing where the package is missing."""

    def __init__(self, folder: Path | None) -> None:
        self._writer: Any = None
        if folder is None:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the package's own imports
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                return
        self._writer = SummaryWriter(str(folder))

    def add(self, nimg: int, numbers: dict[str, Any], prefix: str = "") -> None:
        """Add the numbers of a tick, nested ones as `outer/inner`; the axis is images seen."""
        if self._writer is None:
            return
        for name, value in numbers.items():
            if isinstance(value, dict):
                self.add(nimg, value, f"{prefix}{name}/")
            elif isinstance(value, (int, float)):
                self._writer.add_scalar(prefix + name, value, nimg)
        if not prefix:
            self._writer.flush()

    def close(self) -> None:
        """Finish the file."""
        if self._writer is not None:
            self._writer.close()
