"""Options of a training run as resolved: `TrainConfig`, and its file `config.json`."""

from __future__ import annotations

import dataclasses
import json
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import ConfigError
from finetune.options import OPTIONS, DistillWeight, TrainOptions


@dataclass(frozen=True)
class TrainConfig:
    """Resolved options of a run: every option of `TrainOptions` with its value.

    An empty text and 0 mean none: no checkpoint (`resume`) or no architecture (`scratch`, `cbase`, …), no
    surgery (`classes`), no separate teacher (`sd_teacher_kimg`), no limit of snapshots (`keep`).
    """

    data: str
    mirror: bool
    fit: str
    cond: bool
    labels: str

    resume: str
    scratch: str
    resolution: int
    channels: int
    classes: str
    new_d: bool
    d_warmup_kimg: float
    cbase: int
    cmax: int
    map_depth: int
    z_dim: int

    recipe: str
    kimg: float
    batch: int
    batch_gpu: int
    gamma: float
    glr: float
    dlr: float
    lr_warmup_kimg: float
    ema_kimg: float
    freezed: int
    aug: str
    target: float
    p: float
    augpipe: str

    sd_preset: str
    sd_weight: DistillWeight
    sd_backbone: str
    sd_augment: bool
    sd_interval: int
    sd_teacher: str
    sd_teacher_kimg: float

    device: str
    precision: str
    graphs: str
    deterministic: bool
    workers: int
    seed: int

    outdir: str
    tick: float
    snap: int
    keep: int
    save_every_min: float
    on_divergence: str
    metrics: str
    metrics_num: int

    def to_dict(self) -> dict[str, Any]:
        """Return the options as JSON has them."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        return {k: v.to_json() if isinstance(v, DistillWeight) else v for k, v in values.items()}

    def to_json(self) -> str:
        """Return the options as readable JSON text."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> TrainConfig:
        """Read what `to_json` wrote. Raises ConfigError that lists unknown, missing and ill-typed entries.

        Options with a constant default may be missing: they are newer than the run.
        """
        try:
            entries = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"the configuration is not JSON: {error}.") from None
        if not isinstance(entries, dict):
            raise ConfigError(f"the configuration must be a JSON object, not {type(entries).__name__}.")
        hints = typing.get_type_hints(cls)
        constant = {name: each.default for name, each in OPTIONS.items() if each.default is not None}
        entries = constant | entries
        problems = [f"{key}: no such option." for key in entries if key not in hints]
        problems += [f"{key}: missing." for key in hints if key not in entries]
        for key, value in entries.items():
            if key in hints and not _has_type(value, hints[key]):
                problems.append(f"{key}: {value!r} is not of type {hints[key].__name__}.")
        if problems:
            raise ConfigError(problems)
        return cls(**entries | {"sd_weight": DistillWeight.parse(entries["sd_weight"])})

    @classmethod
    def read(cls, path: str | Path) -> TrainConfig:
        """Read `config.json` of a run folder."""
        return cls.from_json(Path(path).read_text(encoding="utf-8"))

    def as_options(self, **changes: Any) -> TrainOptions:
        """Return options that ask for this run, with changes."""
        return TrainOptions(**{name: getattr(self, name) for name in OPTIONS} | changes)


def _has_type(value: object, hint: type) -> bool:
    if isinstance(value, bool):
        return hint is bool
    allowed = {float: (int, float), DistillWeight: (int, float, str)}.get(hint, hint)
    return isinstance(value, allowed)
