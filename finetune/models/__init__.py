"""The networks. Each file here is also the source that checkpoints carry: see README.md for the rules."""

from typing import Any

Network = Any  # a torch.nn.Module of this package, whose attributes type checkers cannot see
