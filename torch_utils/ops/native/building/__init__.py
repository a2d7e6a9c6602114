"""Find compilers, compile kernels and cache the binaries."""

from __future__ import annotations


class NativeUnavailable(RuntimeError):
    """A kernel cannot be built or loaded here: `cause` is the reason, `remedy` what to do about it."""

    def __init__(self, cause: str, remedy: str = "") -> None:
        super().__init__(f"{cause}; {remedy}" if remedy else cause)
        self.cause = cause
        self.remedy = remedy
