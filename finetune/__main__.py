"""`python -m finetune` is the same program as `finetune`."""

from finetune.cli import main

main()
