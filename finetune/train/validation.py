"""Metrics during training, on few images; a failure never stops the run."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune.config import TrainConfig
from finetune.data import ImageSet
from finetune.distributed import ProcessGroup
from finetune.errors import FinetuneError
from finetune.metrics.evaluate import Evaluation, check_names
from finetune.options import TrainOptions
from finetune.train.run_dir import exact_kimg
from finetune.train.state import TrainState
from torch_utils.files import WriteError

log = logging.getLogger("finetune.train")


def names_of(options: TrainConfig | TrainOptions) -> tuple[str, ...]:
    """Return the metrics of `--metrics`, () for none. Raises ConfigError for unknown ones."""
    if options.metrics in (None, "none"):
        return ()
    return check_names([name.strip() for name in str(options.metrics).split(",") if name.strip()])


@dataclass(eq=False)
class Validation:
    """Measures G_ema when a snapshot is due and at the end. A failure is a warning; training continues.

    All ranks of `group` take part in each measurement and get the same numbers, or None. run_dir: gets the
    sheet of images that `memorization` finds most similar.
    """

    config: TrainConfig
    image_set: ImageSet
    device: torch.device
    on_message: Callable[[str], None]
    group: ProcessGroup
    run_dir: Path

    def __post_init__(self) -> None:
        self.names = names_of(self.config)
        self._evaluation: Evaluation | None = None

    def measure(self, state: TrainState) -> dict[str, Any] | None:
        """Return `{"num": …, name: value, name_spread: …, name_error: …, "sec": …}`, None if it failed.

        Also None without metrics. Spread and standard error are left out where they are 0.
        """
        if not self.names:
            return None
        started = time.perf_counter()
        try:
            if self._evaluation is None:
                self._evaluation = Evaluation(
                    self.image_set,
                    self.names,
                    device=self.device,
                    workers=self.config.workers,
                    cache=True,
                    on_message=self.on_message,
                    group=self.group,
                    with_error=True,
                )
            num = self.config.metrics_num
            found = self._evaluation.distances(state.G_ema, num, self.config.seed)
            pairs = self.run_dir / f"memorization-{exact_kimg(state.nimg)}.png"
            with contextlib.suppress(WriteError):  # the numbers are worth more than the sheet
                self._evaluation.write_pairs(state.G_ema, num, self.config.seed, pairs)
        except Exception as error:  # whatever it is, training continues
            what = error.what if isinstance(error, FinetuneError) else str(error) or type(error).__name__
            if self.group.is_first:
                self.on_message(
                    f"Metrics at {state.nimg / 1000:g} kimg failed, and training continues: {what}"
                )
                log.warning("metrics failed at %d images: %s", state.nimg, what)
            return None
        numbers: dict[str, Any] = {"num": num}
        for name, each in found.items():
            numbers[name] = each.value
            if each.spread:
                numbers[f"{name}_spread"] = each.spread
            if each.error:
                numbers[f"{name}_error"] = each.error
        return numbers | {"sec": time.perf_counter() - started}
