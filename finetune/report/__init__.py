"""The page of a run: `report.html`, self-contained and readable offline, from the files of a run folder."""

from __future__ import annotations

from finetune.report.commands import continue_command, end_message
from finetune.report.page import write_report
from finetune.report.read import RunRecord, read_run

__all__ = ["RunRecord", "continue_command", "end_message", "read_run", "write_report"]
