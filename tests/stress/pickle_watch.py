"""Opens damaged and hostile pickles under watch: nothing may be executed, and memory is limited."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import pickle
import resource
import signal
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any

from stress import pickle_mutations as mutations

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
MEMORY = 1 << 30  # bytes above what real files need
HANG_SEC = 10  # of processor time, so that other programs on the machine do not matter
GOOD = (
    *("loaded", "refused, damaged", "refused, asks for a name", "refused, tensors do not fit"),
    "refused, no pickle",
)
BAD = ("executed", "memory", "hang", "crash", "uncaught", "message")
FORBIDDEN = (  # beginnings of the names of Python's audit events
    *("exec", "compile", "import", "os.system", "os.exec", "os.spawn", "os.posix_spawn", "os.fork"),
    *("subprocess.", "socket.", "pickle.", "marshal.", "code.", "function.", "ctypes.", "pty.", "shutil."),
    *("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.chmod", "os.link", "os.symlink", "os.putenv"),
    *("os.kill", "os.startfile", "builtins.input", "webbrowser.", "cpython.run", "sys.addaudithook"),
    *("urllib.", "ftplib.", "smtplib.", "http."),
)


class Executed(BaseException):
    """Something in a file was about to be done."""


class Canary:
    """Raises Executed at what no reader may do, while it is awake."""

    def __init__(self) -> None:
        self.awake = False
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.awake:
            return
        writes = (
            event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        )
        if writes or event.startswith(FORBIDDEN):
            self.awake = False
            raise Executed(f"{event} {str(args)[:200]}")

    @contextlib.contextmanager
    def watching(self):
        self.awake = True
        try:
            yield
        finally:
            self.awake = False

    def prove(self) -> None:
        """It hears what Python's own unpickler would do."""
        for hostile in (
            b"cos\nsystem\n(S'true'\ntR.",
            b"cbuiltins\neval\n(S'1'\ntR.",
            b"csocket\nsocket\n(tR.",
        ):
            try:
                with self.watching():
                    pickle.loads(hostile)
            except Executed:
                continue
            raise AssertionError(f"the canary sleeps through {hostile!r}")


def open_one(path: Path, data: bytes, canary: Canary) -> tuple[str, str]:
    """What becomes of one input: an outcome of GOOD or BAD, and what was said.

    SIGPROF ends the process if it takes HANG_SEC.
    """
    import finetune
    from finetune.errors import CheckpointError, CheckpointMismatch, PickleRefused

    path.write_bytes(data)
    signal.setitimer(signal.ITIMER_PROF, HANG_SEC)
    try:
        with canary.watching():
            finetune.load(path)
        return "loaded", ""
    except Executed as error:
        return "executed", str(error)
    except CheckpointError as error:
        said = str(error)
        if not all(letter.isprintable() or letter == "\n" for letter in said) or len(error.what) > 1_000_000:
            return "message", repr(said[:500])
        if isinstance(error, CheckpointMismatch):
            return "refused, tensors do not fit", said
        if isinstance(error, PickleRefused):
            return "refused, damaged" if error.blocked is None else "refused, asks for a name", said
        return "refused, no pickle", said
    except MemoryError:
        return "memory", traceback.format_exc()
    except BaseException as error:
        out_of_memory = isinstance(error, RuntimeError) and "memory" in str(error)
        return "memory" if out_of_memory else "uncaught", traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def sources_of(names: list[str] | None = None) -> dict[str, list[mutations.Source]]:
    """Golden files, their first networks, a checkpoint as small as can be, short ones made by hand."""
    short = {name: data for name, data in mutations.HOSTILE.items() if len(data) < 5000}
    hostile = [mutations.source(name, data) for name, data in short.items()]
    return {
        **mutations.golden(GOLDEN, names),
        "tiny": tiny(),
        "hostile": [each for each in hostile if each.outer],
    }


def tiny() -> list[mutations.Source]:
    """A StyleGAN2 of 8 pixels and 2 channels: as exported, with records, rectangular, and of torch.save."""
    import torch

    torch.manual_seed(0)
    square, G, D = exported({})
    made = {"tiny": square, "tiny rectangle": exported({"base_shape": (4, 2)})[0]}
    entries = b"".join(mutations.text(key) + value for key, value in mutations.RECORDS.items())
    assert square.endswith(b"u.")
    made["tiny with records"] = square[:-2] + entries + b"u."
    stream = io.BytesIO()
    networks = {"G_ema": G.state_dict(), "D": D.state_dict(), "device": torch.device("cpu")}
    torch.save(networks, stream, _use_new_zipfile_serialization=False)
    made["tiny of torch.save, legacy"] = stream.getvalue()
    archive = io.BytesIO()
    torch.save(networks, archive)
    return [
        *(mutations.source(name, data) for name, data in made.items()),
        mutations.in_archive("tiny of torch.save", archive.getvalue()),
    ]


def exported(shape: dict[str, Any]) -> tuple[bytes, Any, Any]:
    """The smallest networks, as `finetune export` writes them without the text of their classes."""
    from finetune.export.stylegan_pickle import save_stylegan_pickle
    from finetune.models import stylegan2

    size = {"img_resolution": 8, "img_channels": 1, "c_dim": 2}
    G = stylegan2.Generator(
        **{"z_dim": 2, "w_dim": 2, **size, **shape},
        mapping_kwargs={"num_layers": 1},
        synthesis_kwargs={"channel_max": 2},
    )
    D = stylegan2.Discriminator(**size, channel_max=2, mapping_kwargs={"num_layers": 1}, **shape)
    with tempfile.TemporaryDirectory() as folder:
        save_stylegan_pickle(Path(folder) / "tiny.pkl", G=None, D=D, G_ema=G)
        return mutations.without_sources((Path(folder) / "tiny.pkl").read_bytes()), G, D


def prepare(sources: dict[str, list[mutations.Source]]) -> Canary:
    """Load what reading loads, open the real files, then limit memory and wake the canary."""
    warnings.simplefilter("error")
    import torch

    import finetune

    torch.set_num_threads(1)
    b"a".decode("raw-unicode-escape")  # a codec that Python imports when it is first asked for
    os.environ["FINETUNE_CACHE"] = os.devnull
    os.environ["FINETUNE_OPS"] = "ref"  # the mean w is computed for some files, and ctypes calls the kernels
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "real.pkl"
        for each in (*sources["whole"], *sources["cut"], *sources["tiny"]):
            path.write_bytes(each.file(each.data))
            finetune.load(path)
        with contextlib.suppress(finetune.errors.FinetuneError):  # type: ignore[attr-defined]
            path.write_bytes(b"<html>")
            finetune.load(path)
    canary = Canary()
    canary.prove()
    largest = max(len(each.data) for each in sources["whole"])
    gc.collect()
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + MEMORY + largest, resource.RLIM_INFINITY))
    with contextlib.suppress(MemoryError):
        bytearray(MEMORY + (64 << 20))
        raise AssertionError("the limit of memory does not hold")
    return canary
