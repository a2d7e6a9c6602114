"""The errors a user can meet. Only `finetune.cli` prints them; every one of them ends a command with code 2.

A file that cannot be written is an OSError, `torch_utils.files.WriteError`.

FinetuneError
├── ConfigError          an option, or a combination of options, that cannot work
├── DataError            images or labels that cannot be used
├── CheckpointError      a network file that cannot be used
│   ├── PickleRefused        it is damaged, or refers to something that is never executed
│   └── CheckpointMismatch   its tensors are not exactly those of the network that it describes
├── WeightsMissing       a perceptual or metric network whose weights are not on this machine
├── TrainingError        training cannot continue (non-finite loss, no space left)
└── ExportError          a written file did not read back as the network it was made from
"""

from __future__ import annotations


class FinetuneError(Exception):
    """A problem the user can solve: what happened with the value seen, and what to do about it."""

    exit_code = 2

    def __init__(self, what: str, *, hint: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.what}\n{self.hint}" if self.hint else self.what


class ConfigError(FinetuneError):
    """An option, or a combination of options, cannot work; `problems` holds all of them, a sentence each."""

    def __init__(self, problems: str | list[str], *, hint: str | None = None) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems), hint=hint)


class DataError(FinetuneError):
    """Images or labels cannot be used; the message lists every offender, with counts by kind."""


class CheckpointError(FinetuneError):
    """A network file cannot be used."""


class PickleRefused(CheckpointError):
    """A pickle is damaged, too large for its size on disk, or names what is not opened here.

    `blocked` is that name as `module.name` (None if the file is damaged) and
    `offset` the position in the file, in bytes, at which reading stopped.
    """

    def __init__(
        self, what: str, *, offset: int, blocked: str | None = None, hint: str | None = None
    ) -> None:
        super().__init__(what, hint=hint)
        self.offset = offset
        self.blocked = blocked


class CheckpointMismatch(CheckpointError):
    """The tensors of a file are not exactly those of the network it describes; `differences` lists all."""

    def __init__(self, what: str, differences: list[str], *, hint: str | None = None) -> None:
        super().__init__("\n".join([what, *(f"  {line}" for line in differences)]), hint=hint)
        self.differences = differences


class WeightsMissing(FinetuneError):
    """The weights of a perceptual or metric network are not here and cannot be fetched."""


class TrainingError(FinetuneError):
    """Training cannot continue."""


class ExportError(FinetuneError):
    """A written file did not read back as the network it was made from."""
