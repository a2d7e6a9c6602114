"""Which implementation of an op runs: one place for the rule that every op follows."""

from __future__ import annotations

KNOWN = ("auto", "ref", "cpu", "cuda")


def choose(op: str, impl: str) -> str:
    """Return the implementation to run for `impl`; a named choice that cannot run raises, 'auto' never does.

    Raises ValueError for a name that does not exist, RuntimeError for one that is not available.
    """
    if impl not in KNOWN:
        raise ValueError(f"{op}: impl must be one of {', '.join(map(repr, KNOWN))}, got {impl!r}")
    if impl in ("cpu", "cuda"):
        raise RuntimeError(f"{op}: impl={impl!r} is not part of this build; use 'auto' or 'ref'")
    return "ref"
