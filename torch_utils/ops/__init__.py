"""The ops of the networks; `docs/add-an-op.md` describes how each file is organized."""
