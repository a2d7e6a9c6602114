"""The ops that the networks are made of; `docs/add-an-op.md` says how each file is organised."""
