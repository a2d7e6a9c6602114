"""Training: `run(config)` takes a checkpoint and pictures and leaves a run folder with a better checkpoint."""

from finetune.train.run import RunResult, prepare, run

__all__ = ["RunResult", "prepare", "run"]
