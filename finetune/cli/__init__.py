"""The command `finetune`: run subcommands, and turn errors into messages and exit codes.

Each command is a module of this folder with a `click.Command` called `command`. Modules import torch, numpy
and the rest inside the function that needs them, so that `--help` is fast.

Exit codes: 0 done · 1 an internal error, or a command whose own result is bad · 2 an error that
the user can fix · 130 interrupted.
"""

from __future__ import annotations

import importlib
import io
import logging
import os
import sys
import traceback
import warnings

import click

from finetune.cli.options import offline_option, ops_option
from finetune.errors import FinetuneError
from finetune.version import __version__
from torch_utils.files import WriteError

# In the order of use; `finetune --help` keeps it.
COMMANDS = (
    "demo", "checkpoints", "inspect", "dataset", "train", "watch", "report", "generate", "video", "blend",
    "project", "directions", "evaluate", "ema", "export", "convert", "hub", "doctor",
)  # fmt: skip


class CommandFailed(click.ClickException):
    """An error that ends a command: printed as it is, with the exit code given."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]  # click calls it a class variable and reads it here

    def show(self, file=None) -> None:
        click.echo(f"Error: {self.message}", file=file, err=file is None)


class CommandTable(click.Group):
    """A click group that imports commands lazily and handles their errors."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        return importlib.import_module(f"finetune.cli.{name}").command

    def invoke(self, ctx: click.Context):
        """Run the command; what it raises becomes a message and an exit code (`--debug`: and a traceback)."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.Abort, click.exceptions.Exit, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            click.echo("\nInterrupted.", err=True)
            raise click.exceptions.Exit(130) from None
        except Exception as error:
            failure = explain(error)
            # Of several processes, the one that fails may not fail again when it is asked to.
            if ctx.params.get("debug") or (failure.exit_code == 1 and is_one_of_several()):
                traceback.print_exc()
            raise failure from None


def is_one_of_several() -> bool:
    """Return whether a launcher started this process; never imports torch, which may be what failed."""
    if "torch" not in sys.modules:
        return False
    from finetune.distributed import env_rank

    return env_rank() is not None


def explain(error: Exception) -> CommandFailed:
    """Return the message and exit code for an exception."""
    if isinstance(error, FinetuneError):
        return CommandFailed(str(error), error.exit_code)
    if isinstance(error, WriteError):
        return CommandFailed(str(error), 2)
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return CommandFailed(f"{where}{error.strerror}.", 2)
    if type(error).__name__ in ("ImplementationUnavailable", "UnknownImplementation"):  # of torch_utils.ops
        return CommandFailed(f"{error}\nRun `finetune doctor` to see what this machine supports.", 2)
    if isinstance(error, MemoryError):
        return CommandFailed("Out of memory. Use a smaller batch or resolution.", 2)
    if "no kernel image is available" in str(error):  # what CUDA says of a GPU that torch was not built for
        first_line = str(error).splitlines()[0]
        return CommandFailed(
            f"{first_line}\nThe GPU is too old (or too new) for this build of torch. Use --device cpu, or "
            "install a torch built for it.",
            2,
        )
    what = f"{type(error).__name__}: {error}".rstrip(": ")
    if type(error).__name__ == "OutOfMemoryError":  # torch's; named, so that this file needs no torch
        first_line = what.splitlines()[0]
        return CommandFailed(
            f"{first_line}\nThe device is out of memory: lower --batch-gpu, or use --device cpu.", 2
        )
    return CommandFailed(
        f"{what}\nInternal error (finetune {__version__}). Re-run as `finetune --debug …` and report the "
        "traceback.",
        1,
    )


@click.group(
    cls=CommandTable,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Run `finetune COMMAND --help` for the options of a command.",
)
@click.version_option(__version__, prog_name="finetune", message="%(prog)s %(version)s")
@offline_option()
@ops_option()
@click.option(
    "--debug", is_flag=True, envvar="FINETUNE_DEBUG", help="Show the traceback when a command fails."
)
def cli(debug: bool) -> None:
    """Fine-tune StyleGAN2 and StyleGAN3 checkpoints on your own images."""


class EchoHandler(logging.Handler):
    """Print log records on the current standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(record.getMessage(), err=True)


def log_chosen_ops() -> None:
    """Log once per op which implementation runs and why; show warnings without source lines."""
    log = logging.getLogger("torch_utils.ops")
    log.addHandler(EchoHandler())
    log.setLevel(logging.INFO)
    warnings.formatwarning = lambda message, *args, **kwargs: f"Warning: {message}\n"


def let_threads_sleep() -> None:
    """Make idle OpenMP threads sleep instead of spin, unless the user has set a policy.

    The library reads it when torch is imported. Spinning threads keep their core: beside one busy process on
    two cores a training step took ten times as long. Measured by benchmarks/bench_busy.py.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def main() -> None:
    """Run the program with the arguments of the process; never returns."""
    let_threads_sleep()
    log_chosen_ops()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # characters that its encoding lacks must not end a command
            stream.reconfigure(errors="replace")
    try:
        cli(prog_name="finetune")
    finally:
        end_process()


def end_process() -> None:
    """End this process at once if it is a rank whose command succeeded, or the launcher of ranks.

    Now and then torch.distributed with gloo aborts while the interpreter is torn down ("terminate called
    without an active exception"), after everything is saved, which looks like a failure.
    """
    done = sys.exc_info()[1]
    code = (done.code or 0) if isinstance(done, SystemExit) else None
    is_launcher = "torch.distributed.launcher.api" in sys.modules
    if (is_launcher and isinstance(code, int)) or (code == 0 and is_one_of_several()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
