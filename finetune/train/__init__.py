"""Training: `run(options)` turns a checkpoint and images into a run folder with a better checkpoint."""

from finetune.train.prepare import prepare
from finetune.train.train import RunResult, run

__all__ = ["RunResult", "prepare", "run"]
