"""The ops that the networks are made of; `docs/add-an-op.md` describes how each file is organized."""
