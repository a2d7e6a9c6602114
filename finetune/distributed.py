"""One network on several processes: rank, world size, collectives, and the launcher.

Started by torchrun or by `--gpus N` (`launch`). Random numbers are drawn from the seed, the step and the
number of the micro-batch, so that N ranks with one micro-batch each draw what one rank draws with N of them.
Every decision about how a run continues is the same on all ranks: otherwise a collective would hang.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from finetune.errors import ConfigError, FinetuneError, TrainingError

TIMEOUT_VARIABLE = "FINETUNE_TIMEOUT_MIN"
TIMEOUT_MIN = 30.0  # has to cover what rank 0 does alone: a save, or the scan of a large data set
USER_ERROR, INTERRUPTED = 2, 130  # exit codes
SHUTDOWN_SEC = 120  # for saving after a signal; torch's default is 30

T = TypeVar("T")


@dataclass(frozen=True)
class ProcessGroup:
    """This process among `world_size`; rank 0 writes files and prints.

    control: the group for data on the CPU (None: the default group). Its time-outs raise errors in Python;
    those of NCCL end the process. So NCCL is given twice the time, and the exchange at the end of a step
    reports first. `what` names a collective in errors.
    """

    rank: int = 0
    world_size: int = 1
    control: Any = None

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def all_reduce_sum(self, tensors: Iterable[torch.Tensor], what: str) -> None:
        """Replace each tensor by its sum over all ranks, in one message."""
        if self.world_size > 1:
            self._flattened(tensors, torch.float32, lambda flat: dist.all_reduce(flat), what)

    def broadcast(self, tensors: Iterable[torch.Tensor], what: str) -> None:
        """Replace each tensor by that of rank 0."""
        if self.world_size > 1:
            self._flattened(tensors, torch.float64, lambda flat: dist.broadcast(flat, 0), what)

    def all_reduce_max(self, value: int, what: str) -> int:
        """Return the largest value of all ranks."""
        return self._reduced(value, dist.ReduceOp.MAX, what) if self.world_size > 1 else value

    def all_reduce_total(self, value: int, what: str) -> int:
        """Return the sum of the values of all ranks."""
        return self._reduced(value, dist.ReduceOp.SUM, what) if self.world_size > 1 else value

    def broadcast_object(self, value: T, what: str) -> T:
        """Return the value of rank 0, which can be anything that can be pickled."""
        if self.world_size == 1:
            return value
        box: list[Any] = [value]
        self._run(lambda: dist.broadcast_object_list(box, 0, group=self.control), what)
        return box[0]

    def barrier(self, what: str) -> None:
        """Wait for all ranks."""
        self.broadcast_object(None, what)

    def shard(self, items: list[T]) -> list[T]:
        """Return this rank's items: every `world_size`-th of a list that all ranks have."""
        return items[self.rank :: self.world_size]

    def all_gather_results(self, call: Callable[[], T], what: str) -> list[T]:
        """Return what `call` returns on each rank, by rank; if one fails, raise its error on all."""
        if self.world_size == 1:
            return [call()]
        mine: tuple[T | None, FinetuneError | None] = (None, None)
        try:
            mine = (call(), None)
        except FinetuneError as error:
            mine = (None, FinetuneError(error.what, hint=error.hint))
        except Exception as error:  # the others would wait for this rank until the time-out
            mine = (None, FinetuneError(f"{what} failed on rank {self.rank}: {error}"))
        found: list[Any] = [None] * self.world_size
        self._run(lambda: dist.all_gather_object(found, mine, group=self.control), what)
        for _, failure in found:
            if failure is not None:
                raise failure
        return [value for value, _ in found]

    def broadcast_result(self, call: Callable[[], T], what: str) -> T:
        """Call `call` on rank 0 alone; return its result, or raise its error, on all ranks."""
        found = self.all_gather_results(lambda: call() if self.is_first else None, what)[0]
        return found  # type: ignore[return-value]

    def _reduced(self, value: int, operation: Any, what: str) -> int:
        box = torch.tensor(value)
        self._run(lambda: dist.all_reduce(box, operation, group=self.control), what)
        return int(box)

    def _flattened(
        self,
        tensors: Iterable[torch.Tensor],
        dtype: torch.dtype,
        call: Callable[[torch.Tensor], Any],
        what: str,
    ) -> None:
        given = [tensor for tensor in tensors if tensor.numel()]
        if not given:
            return
        flat = torch.cat([tensor.detach().flatten().to(dtype) for tensor in given])
        self._run(lambda: call(flat), what)
        for tensor, part in zip(given, flat.split([tensor.numel() for tensor in given]), strict=True):
            tensor.copy_(part.reshape(tensor.shape))

    def _run(self, call: Callable[[], Any], what: str) -> None:
        try:
            call()
        except RuntimeError as error:  # torch.distributed's own are among them
            reason = str(error).splitlines()[0][:200]
            timed_out = re.search(r"timed? ?out", str(error), re.IGNORECASE)
            happened = "timed out" if timed_out else "failed"
            raise TrainingError(
                f"Rank {self.rank}/{self.world_size}: collective {happened} in {what}: {reason}",
                hint="Another rank died or hangs; see its own message. What was saved before is intact. "
                f"{TIMEOUT_VARIABLE} sets the time-out in minutes.",
            ) from None


SINGLE = ProcessGroup()


def env_rank() -> int | None:
    """Return the rank that a launcher gave this process, None without a launcher."""
    rank = os.environ.get("RANK")
    return None if rank is None else int(rank)


def env_world_size() -> int:
    """Return the number of processes that a launcher started, 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def init(device: torch.device) -> tuple[ProcessGroup, torch.device]:
    """Join the process group if torchrun started this process; its device is then that of its local rank.

    Raises ConfigError if there are fewer devices than ranks.
    """
    world_size, rank = env_world_size(), env_rank()
    if world_size == 1 or rank is None:
        return SINGLE, device
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise ConfigError(
                f"{int(os.environ.get('LOCAL_WORLD_SIZE', world_size))} ranks on this machine, torch sees "
                f"{torch.cuda.device_count()} CUDA devices. Start one rank per device, or use --device cpu."
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    elif device.type != "cpu":
        raise ConfigError(f"--device {device}: training on several ranks needs CUDA devices or CPUs.")
    timeout = datetime.timedelta(minutes=timeout_min())
    if not dist.is_initialized():
        on_cuda = device.type == "cuda"
        dist.init_process_group("nccl" if on_cuda else "gloo", timeout=timeout * 2 if on_cuda else timeout)
    control = dist.new_group(backend="gloo", timeout=timeout) if device.type == "cuda" else None
    return ProcessGroup(rank, world_size, control), device


def shutdown() -> None:
    """Leave the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def timeout_min() -> float:
    """Return the time-out of collectives in minutes. Raises ConfigError unless it is a number above 0."""
    text = os.environ.get(TIMEOUT_VARIABLE, str(TIMEOUT_MIN))
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < 1e6:
        raise ConfigError(f"{TIMEOUT_VARIABLE}={text}: must be a number of minutes above 0.")
    return minutes


def launch(arguments: Sequence[str], world_size: int, device: str = "auto") -> int:
    """Run `finetune ARGUMENTS` on `world_size` ranks of this machine; return the exit code of the command.

    If a rank fails, the others are stopped. Signals are passed on once, with SHUTDOWN_SEC left for saving
    (30 if torch is too old for the variable). Raises TrainingError if a rank died without a message of its
    own.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    build_kernels(on_cuda=device != "cpu")
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_SEC))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // world_size)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the message below is enough
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world_size,
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
            return failure.exitcode  # the rank has printed why
        raise TrainingError(
            f"Rank {rank}/{world_size} ended with {describe_exit(failure.exitcode)}; the other ranks were "
            "stopped.",
            hint="Its output is above. What was saved before is intact.",
        ) from None
    return 0


# Runs in a process of its own, which releases the GPUs when it ends.
BUILD_CUDA = """
import finetune  # which finds our torch_utils, wherever this runs
import torch
from torch_utils import custom_ops
from torch_utils.ops.native import prebuild
for found in {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}:
    custom_ops.build_cuda(prebuild.specializations(found), found)
"""


def build_kernels(*, on_cuda: bool) -> None:
    """Compile the kernels before the ranks start, so that these do not wait for each other.

    A failure is no error: each rank reports it, and which ops it uses instead.
    """
    from torch_utils.custom_ops import NativeUnavailable, cpu_library

    with contextlib.suppress(NativeUnavailable):
        cpu_library()
    if on_cuda and torch.cuda.device_count():
        subprocess.run([sys.executable, "-c", BUILD_CUDA], capture_output=True, check=False)


def describe_exit(exit_code: int) -> str:
    """Return `exit code 1`, or the name of a signal."""
    if exit_code >= 0:
        return f"exit code {exit_code}"
    try:
        return signal.Signals(-exit_code).name
    except ValueError:
        return f"signal {-exit_code}"
