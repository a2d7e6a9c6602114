"""Metrics while training: now and then, with few pictures, and never a reason to stop."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from finetune.config import TrainConfig
from finetune.data import ImageSet
from finetune.errors import FinetuneError
from finetune.metrics.evaluate import HIGHER_IS_BETTER, Evaluation, check_names
from finetune.metrics.together import ALONE, Share
from finetune.train.state import TrainState

log = logging.getLogger("finetune.train")


def names_of(config: TrainConfig) -> tuple[str, ...]:
    """The metrics that `--metrics` asks for, () for none. Raises ConfigError for unknown ones."""
    if config.metrics in (None, "none"):
        return ()
    return check_names([name.strip() for name in str(config.metrics).split(",") if name.strip()])


class Measurements:
    """Measures G_ema whenever `metrics_kimg` have passed since the last time, and at the end; never at the
    start. What fails is said once each time, and training goes on. share: this process among those that train
    together; all of them take each measurement, and get the same numbers, or none.
    """

    def __init__(
        self,
        config: TrainConfig,
        image_set: ImageSet,
        device: torch.device,
        tell: Callable[[str], None],
        share: Share = ALONE,
    ) -> None:
        self.share = share
        self.names = names_of(config)
        self.config, self.image_set, self.device, self.tell = config, image_set, device, tell
        self.interval_nimg = (config.metrics_kimg or 0) * 1000
        self.next_nimg = self.interval_nimg
        self._evaluation: Evaluation | None = None

    def start_at(self, nimg: int) -> None:
        """Go on with the next measurement after `nimg` images."""
        while self.names and self.next_nimg <= nimg:
            self.next_nimg += self.interval_nimg

    def due(self, nimg: int, is_end: bool = False) -> bool:
        """Whether it is time."""
        return bool(self.names) and nimg > 0 and (nimg >= self.next_nimg or is_end)

    def take(self, state: TrainState) -> dict[str, Any] | None:
        """Measure now: `{"num": …, "sec": …, name: value, name_spread: spread}`; None where it failed."""
        self.start_at(state.nimg)
        started = time.perf_counter()
        try:
            if self._evaluation is None:
                inception = self.config.metrics_inception
                self._evaluation = Evaluation(
                    self.image_set,
                    self.names,
                    device=self.device,
                    workers=self.config.workers or 0,
                    cache=True,
                    inception=Path(inception) if inception else None,
                    tell=self.tell,
                    share=self.share,
                )
            num = self.config.metrics_num or 1000
            found = self._evaluation.distances(state.G_ema, num, self.config.seed)
        except (FinetuneError, RuntimeError, OSError) as error:
            what = error.what if isinstance(error, FinetuneError) else str(error)
            if self.share.is_first:
                self.tell(f"Metrics at {state.nimg / 1000:g} kimg failed, and training goes on: {what}")
                log.warning("metrics failed at %d images: %s", state.nimg, what)
            return None
        numbers: dict[str, Any] = {"num": num}
        for name, each in found.items():
            numbers[name] = each.value
            if each.spread:
                numbers[f"{name}_spread"] = each.spread
        return numbers | {"sec": time.perf_counter() - started}


def is_better(name: str, value: float, than: float | None) -> bool:
    """Whether a value of a metric beats another one (None: there is none)."""
    if than is None:
        return True
    return value > than if name.startswith(HIGHER_IS_BETTER) else value < than
