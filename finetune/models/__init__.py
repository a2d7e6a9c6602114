"""The networks. Each file here is also the source that checkpoints carry: see README.md for the rules."""
