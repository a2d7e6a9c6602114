"""Training: `run(config)` turns a checkpoint and pictures into a run folder with a better checkpoint."""

from finetune.train.run import RunResult, prepare, run

__all__ = ["RunResult", "prepare", "run"]
