"""Write the log for TensorBoard, if it is installed."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import socket
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetune.sampling import image_grid, to_uint8

log = logging.getLogger("finetune.train")


class Board:
    """Writes numbers, images and options for TensorBoard; does nothing without the package or a folder.

    The records are those of torch's SummaryWriter, written one by one: the thread of that writer dies of a
    full disk and keeps its file open. Here a full disk costs the numbers of a tick.
    """

    def __init__(self, folder: Path | None, options: dict[str, Any]) -> None:
        self._path: Path | None = None
        if folder is None:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the package's own imports
            try:
                from tensorboard.compat.proto import event_pb2, summary_pb2
                from tensorboard.summary.writer.record_writer import RecordWriter
                from torch.utils.tensorboard import summary
            except ImportError:
                return
        self._event, self._summary, self._writer = event_pb2.Event, summary_pb2.Summary, RecordWriter
        self._protos = summary
        self._path = folder / f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        self._append(file_version="brain.Event:2")
        names = [name.strip() for name in options["metrics"].split(",") if name.strip() != "none"]
        shown = dict.fromkeys(("loss_G", "loss_D", "loss_sd", *(f"metrics/{name}" for name in names)), 0.0)
        for proto in summary.hparams(options, shown):
            self._append(summary=proto)

    def add(self, nimg: int, numbers: dict[str, Any]) -> None:
        """Add the numbers of a tick, nested ones as `outer/inner`; the axis is images seen."""
        if self._path is None:
            return
        values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in _flat(numbers)]
        self._append(step=nimg, summary=self._summary(value=values))

    def add_images(self, nimg: int, images: torch.Tensor) -> None:
        """Add images `[N, C, H, W]`, -1 to 1, as one sheet."""
        if self._path is not None:
            sheet = np.asarray(image_grid(list(to_uint8(images)), 4).convert("RGB"))
            self._append(step=nimg, summary=self._protos.image("samples", sheet, dataformats="HWC"))

    def _append(self, **content: Any) -> None:
        assert self._path is not None
        record = io.BytesIO()
        self._writer(record).write(self._event(wall_time=time.time(), **content).SerializeToString())
        size = self._path.stat().st_size if self._path.exists() else 0
        try:
            with open(self._path, "ab") as file:
                file.write(record.getvalue())
        except OSError as error:
            with contextlib.suppress(OSError):  # a part of a record would hide all that follow
                os.truncate(self._path, size)
            log.warning("%s: values could not be written: %s", self._path, error.strerror or error)


def _flat(numbers: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in numbers.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            yield prefix + name, float(value)
