"""Run the command `finetune` as `python -m finetune`."""

from finetune.cli import main

main()
