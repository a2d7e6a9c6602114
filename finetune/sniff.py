"""Identify files that are not checkpoints by their first bytes, with a quotation of text files."""

from __future__ import annotations

import mmap
import re
import zipfile
from pathlib import Path
from typing import Any

from finetune.errors import CheckpointError, PickleRefused

HEAD = 4096  # bytes that are looked at
QUOTED = 80  # letters

MARKUP = re.compile(r"\s*(<!doctype\s+html|<html|<head|<body|<\?xml|<!--)", re.IGNORECASE)
TITLE = re.compile(r"<title[^>]*>(.*?)</title>", re.IGNORECASE | re.DOTALL)
UNREAD = re.compile(r"<(script|style)\b.*?(</\1>|\Z)", re.IGNORECASE | re.DOTALL)
JSON = re.compile(r'\s*(\{\s*["}]|\[\s*(["{\[\]\d-]|true|false|null))')  # a `[section]` of settings is none
LFS = "version https://git-lfs"
TEXT_HINT = "A failed download leaves such a file behind, and git without git-lfs does; get the file again."

ZIP = b"PK\x03\x04"
TORCH_SAVE = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9"  # its magic number, before torch 1.6
SAFETENSORS = rb".{8}\{\s*\""  # the length of a JSON header, then that header
SUFFIXES = ".pkl, .pt or .safetensors"
FOR_IMAGES = f"Images are given with --data; give a checkpoint ({SUFFIXES}) here."
UNPACK = f"Unpack it and give the checkpoint ({SUFFIXES}) inside."
SAME_NETWORK = f"Give a checkpoint of the same network ({SUFFIXES})."
# first bytes -> (what it is, what to do)
OTHER_FORMATS = (
    (rb"\x1f\x8b|BZh[1-9]|\xfd7zXZ\x00|\x28\xb5\x2f\xfd", "compressed (gzip, bzip2, xz or zstd)", UNPACK),
    (rb".{257}ustar", "a tar archive", UNPACK),
    (rb"7z\xbc\xaf\x27\x1c|Rar!", "a 7z or rar archive", UNPACK),
    (rb"\xff\xd8\xff", "a JPEG image", FOR_IMAGES),
    (rb"\x89PNG", "a PNG image", FOR_IMAGES),
    (rb"GIF8", "a GIF image", FOR_IMAGES),
    (rb"RIFF.{4}WEBP", "a WebP image", FOR_IMAGES),
    (rb"II\*\x00|MM\x00\*", "a TIFF image", FOR_IMAGES),
    (rb"%PDF", "a PDF document", "Download or copy the checkpoint again."),
    (rb"\x89HDF", "an HDF5 file", SAME_NETWORK),
    (rb"\x08[\x03-\x1f]\x12", "an ONNX model", "Give the checkpoint that it was exported from."),
    (rb"\x93NUMPY", "a numpy array (.npy)", SAME_NETWORK),
)
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")


def is_torch_save(data: mmap.mmap) -> bool:
    """Return whether a file that passed `refuse_other_formats` is one of torch.save, zip or legacy."""
    return data[: len(TORCH_SAVE)] == TORCH_SAVE or data[: len(ZIP)] == ZIP


def refuse_other_formats(path: Path, stream: Any) -> None:
    """Raise CheckpointError if the file at `path` is neither a pickle nor of torch.save.

    stream: the file, open at its beginning, of which only the beginning and a zip's directory are read.
    """
    start, found = stream.read(HEAD), None
    if start.startswith(ZIP):
        found = _describe_zip(_names_in_zip(stream))
    elif not start.startswith(TORCH_SAVE):
        matches = ((what, hint) for head, what, hint in OTHER_FORMATS if re.match(head, start, re.DOTALL))
        found = next(matches, None)
    if found is not None:
        raise CheckpointError(f"{path} is not a checkpoint: it looks like {found[0]}", hint=found[1])
    text = describe_text(start)
    if text is not None and not text.startswith("text: "):  # which some pickles are, of protocol 0
        raise CheckpointError(f"{path} is not a checkpoint: it is {text}", hint=TEXT_HINT)


def _names_in_zip(stream: Any) -> list[str] | None:
    """Return the names of the members of a zip archive, None if it is damaged."""
    try:
        with zipfile.ZipFile(stream) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, OverflowError):
        return None


def _describe_zip(names: list[str] | None) -> tuple[str, str] | None:
    """Return what a zip archive contains and what to do; None for a file of torch.save."""
    if names is None:
        return "a zip archive that is damaged or cut off", "Download or copy it again."
    if any(name.endswith("/constants.pkl") for name in names):
        return "a TorchScript program", "Give the checkpoint that it was made from."
    if any(name.endswith("/data.pkl") for name in names):
        return None
    if any(name.lower().endswith((".pkl", ".pt", ".pth", ".safetensors")) for name in names):
        return "a zip archive with a checkpoint in it", UNPACK
    if names and all(name.endswith(".npy") for name in names):
        return "numpy arrays (.npz)", SAME_NETWORK
    if any(name.lower().endswith(IMAGES) for name in names):
        return "a zip archive of images", FOR_IMAGES
    return "a zip archive", UNPACK


def named_as_text(data: mmap.mmap, error: PickleRefused) -> PickleRefused:
    """Return the error for content that is not a pickle: another one for text, whose letters were taken
    for opcodes.
    """
    text = describe_text(data[:HEAD])
    is_name = error.blocked is not None and all(part.isidentifier() for part in error.blocked.split("."))
    if text is None or is_name:
        return error
    return PickleRefused(f"the pickle is not a checkpoint: it is {text}", offset=error.offset, hint=TEXT_HINT)


def text_of(head: bytes) -> str | None:
    """Return the beginning of a file as text, None if it is binary. head: its first bytes, HEAD at most."""
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
    """Describe a text file, with a quotation, like `a web page: 'Not found'`; None if it is binary."""
    text = text_of(head)
    if text is None or not text.strip():
        return None if text is None else "nothing but blanks"
    if MARKUP.match(text):
        title = TITLE.search(text)
        shown = title[1] if title and title[1].strip() else re.sub(r"<[^>]*>?", " ", UNREAD.sub(" ", text))
        return f"a web page: {_quoted(shown if shown.strip() else text)}"
    if JSON.match(text):
        return f"JSON: {_quoted(text)}"
    if text.startswith(LFS):
        return f"a git-lfs pointer, not the file itself: {_quoted(text)}"
    return f"text: {_quoted(text)}"


def _quoted(text: str) -> str:
    words = " ".join(text.split())
    return repr(words if len(words) <= QUOTED else words[: QUOTED - 1] + "…")
