"""What a file is that is no checkpoint, told by its first bytes; texts are quoted."""

from __future__ import annotations

import re
from pathlib import Path

from finetune.errors import CheckpointError, PickleRefused

HEAD = 4096  # bytes that are looked at
QUOTED = 80  # letters

MARKUP = re.compile(r"\s*(<!doctype\s+html|<html|<head|<body|<\?xml|<!--)", re.IGNORECASE)
TITLE = re.compile(r"<title[^>]*>(.*?)</title>", re.IGNORECASE | re.DOTALL)
UNREAD = re.compile(r"<(script|style)\b.*?(</\1>|\Z)", re.IGNORECASE | re.DOTALL)
JSON = re.compile(r'\s*(\{\s*["}]|\[\s*(["{\[\]\d-]|true|false|null))')  # a `[section]` of settings is none
LFS = "version https://git-lfs"
TEXT_HINT = "A failed download leaves such a file behind, and git without git-lfs does; get the file again."

TORCH_SAVE = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9"  # its magic number, before torch 1.6
SAFETENSORS = rb".{8}\{\s*\""  # the length of a JSON header, then that header
OTHER_FORMATS = (
    (
        rb"PK\x03\x04",
        "a zip archive, as torch.save writes them; StyleGAN checkpoints are plain pickles (.pkl)",
    ),
    (re.escape(TORCH_SAVE), "a file of torch.save, not a StyleGAN pickle"),
    (SAFETENSORS, "a safetensors file"),
    (rb"\x1f\x8b", "gzip-compressed; unpack it first"),
    (rb"\x89HDF", "an HDF5 file"),
)


def refuse_other_formats(path: Path, data: bytes) -> None:
    """Raise CheckpointError where the content of the file at `path` is certainly no pickle."""
    if not data:
        raise CheckpointError(f"{path} is empty", hint="Download or copy it again.")
    for pattern, what in OTHER_FORMATS:
        if re.match(pattern, data[:512], re.DOTALL):
            raise CheckpointError(f"{path} is not a checkpoint: it looks like {what}")
    text = describe_text(data[:HEAD])
    if text is not None and not text.startswith("text: "):  # which some pickles are, of protocol 0
        raise CheckpointError(f"{path} is not a checkpoint: it is {text}", hint=TEXT_HINT)


def named_as_text(data: bytes, error: PickleRefused) -> PickleRefused:
    """The error for content that is no pickle after all: another where it is text, whose letters were taken
    for opcodes.
    """
    text = describe_text(data[:HEAD])
    is_name = error.blocked is not None and all(part.isidentifier() for part in error.blocked.split("."))
    if text is None or is_name:
        return error
    return PickleRefused(f"the pickle is not a checkpoint: it is {text}", offset=error.offset, hint=TEXT_HINT)


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
    if JSON.match(text):
        return f"JSON: {_quoted(text)}"
    if text.startswith(LFS):
        return f"a git-lfs pointer, not the file itself: {_quoted(text)}"
    return f"text: {_quoted(text)}"


def _quoted(text: str) -> str:
    words = " ".join(text.split())
    return repr(words if len(words) <= QUOTED else words[: QUOTED - 1] + "…")
