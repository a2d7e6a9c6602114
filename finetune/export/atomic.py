"""Write a file so that its name always holds either the old content or the whole new one."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from finetune.errors import ExportError


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Give a binary file that takes the place of `path` when the block ends, and vanishes when it fails.

    The bytes go to a temporary file in the same folder, reach the disk (fsync), and are renamed over `path`.
    Whatever stops that, a full disk or Ctrl-C, leaves a file that was at `path` before as it was. An OSError
    becomes an ExportError that says so.
    """
    target = Path(os.path.realpath(path))  # through a link, so that the link itself stays one
    if target.is_dir():
        raise ExportError(f"{path} is a folder, not a file to write.", hint="Give the name of a file in it.")
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
        _sync_folder(target.parent)
    except OSError as error:
        raise _explain(error, Path(path), existed=target.exists()) from error
    finally:
        # After a successful rename there is nothing left under this name.
        with contextlib.suppress(OSError):
            temporary.unlink()


def _sync_folder(folder: Path) -> None:
    """Make the rename itself last through a power cut, where the system can (Windows cannot open folders)."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # some network file systems refuse fsync on folders; the file itself is safe
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def _explain(error: OSError, path: Path, *, existed: bool) -> ExportError:
    kept = "The previous file is untouched." if existed else "Nothing was left there."
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        hint = "Free some space, or write to another disk."
        return ExportError(f"No space left to write {path}. {kept}", hint=hint)
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        hint = "Choose another folder."
        return ExportError(f"Not allowed to write {path} ({error.strerror}). {kept}", hint=hint)
    if isinstance(error, FileExistsError | NotADirectoryError):
        hint = "Choose another folder."
        return ExportError(
            f"Could not write {path}: a part of its folder's name is a file. {kept}", hint=hint
        )
    return ExportError(f"Could not write {path}: {error.strerror or error}. {kept}")
