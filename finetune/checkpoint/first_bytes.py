"""What a text is that stands where a network should: a page of a failing server, a note, a pointer."""

from __future__ import annotations

import re

HEAD = 4096  # bytes that are looked at
QUOTED = 80  # letters

MARKUP = re.compile(r"\s*(<!doctype\s+html|<html|<head|<body|<\?xml|<!--)", re.IGNORECASE)
TITLE = re.compile(r"<title[^>]*>(.*?)</title>", re.IGNORECASE | re.DOTALL)
UNREAD = re.compile(r"<(script|style)\b.*?(</\1>|\Z)", re.IGNORECASE | re.DOTALL)
LFS = "version https://git-lfs"


def text_of(head: bytes) -> str | None:
    """The beginning of a file as text, or None where it is binary. head: its first bytes, HEAD at most."""
    if not head:
        return None
    for encoding in ("utf-8-sig", "utf-16"):
        if encoding == "utf-16" and head[:2] not in (b"\xff\xfe", b"\xfe\xff"):
            continue
        for cut in range(4):  # the last letter may be half there
            try:
                text = head[: len(head) - cut].decode(encoding)
            except UnicodeDecodeError:
                continue
            return text if all(letter.isprintable() or letter in "\t\r\n\f" for letter in text) else None
    return None


def describe_text(head: bytes) -> str | None:
    """What a file of text is, quoted, like `a web page: 'Not found'`; None where it is binary."""
    text = text_of(head)
    if text is None or not text.strip():
        return None if text is None else "nothing but blanks"
    if MARKUP.match(text):
        title = TITLE.search(text)
        said = title[1] if title and title[1].strip() else re.sub(r"<[^>]*>?", " ", UNREAD.sub(" ", text))
        return f"a web page: {_quoted(said if said.strip() else text)}"
    if text.lstrip()[0] in "{[":
        return f"JSON: {_quoted(text)}"
    if text.startswith(LFS):
        return f"a git-lfs pointer, not the file itself: {_quoted(text)}"
    return f"text: {_quoted(text)}"


def _quoted(text: str) -> str:
    words = " ".join(text.split())
    return repr(words if len(words) <= QUOTED else words[: QUOTED - 1] + "…")
