"""Start one command in several processes of this machine, with torchrun's launcher, and end as they end."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
from collections.abc import Sequence

from finetune.errors import TrainingError

USER_ERROR, INTERRUPTED = 2, 130


def launch(arguments: Sequence[str], num_processes: int, device: str = "auto") -> int:
    """Run `finetune ARGUMENTS` in `num_processes` processes, and return the exit code of the command.

    Where one fails, the others are ended. Signals are handed on once, and half a minute is given for saving.
    Raises TrainingError where a process died without a message of its own.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    build_first(on_cuda=device != "cpu")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_processes)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the message below says it
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=f"finetune-{os.getpid()}",
        max_restarts=0,
        monitor_interval=0.2,
        logs_specs=DefaultLogsSpecs(),
    )
    try:
        elastic_launch(config, sys.executable)("-m", "finetune", *arguments)
    except SignalException as stopped:
        return INTERRUPTED if stopped.sigval.name == "SIGINT" else 0
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        if failure.exitcode in (USER_ERROR, INTERRUPTED):
            return failure.exitcode  # which it has explained itself
        raise TrainingError(
            f"Process {rank} of {num_processes} ended with {described(failure.exitcode)}; the others were "
            "stopped.",
            hint="What it printed stands above. What was saved is whole.",
        ) from None
    return 0


# In a process of its own, which takes its hold of the GPUs with it.
BUILD_CUDA = """
import torch
from torch_utils import custom_ops
from torch_utils.ops.native import prebuild
for found in {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}:
    custom_ops.build_cuda(prebuild.specializations(found), found)
"""


def build_first(*, on_cuda: bool) -> None:
    """Build the kernels, so that the processes find them instead of waiting for each other.

    What cannot be built here is no error: each process says so, and how it runs instead.
    """
    import torch

    from torch_utils.custom_ops import NativeUnavailable, cpu_library

    with contextlib.suppress(NativeUnavailable):
        cpu_library()
    if on_cuda and torch.cuda.device_count():
        subprocess.run([sys.executable, "-c", BUILD_CUDA], capture_output=True, check=False)


def described(exit_code: int) -> str:
    """`exit code 1`, or the name of a signal."""
    import signal

    if exit_code >= 0:
        return f"exit code {exit_code}"
    try:
        return signal.Signals(-exit_code).name
    except ValueError:
        return f"signal {-exit_code}"
