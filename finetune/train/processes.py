"""Several processes that train one network: who they are, and how they add up what each has found.

Started by torchrun (or `--gpus N`, see launch.py). Everything random is drawn from the seed, the step and
the number of the part of the batch (`fresh`), so that N processes with one part each draw what one process
with N parts draws. What decides how a run goes on is the same in all of them, so that none waits for another
in vain.
"""

from __future__ import annotations

import datetime
import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from finetune.errors import ConfigError, TrainingError

TIMEOUT_VARIABLE = "FINETUNE_TIMEOUT_MIN"
TIMEOUT_MIN = 30.0  # what one process does alone, a save or a look at a large set, has to fit in

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among `world` of them; `rank` 0 is the one that writes and speaks.

    control: the group for what stays on the CPU. Its time-outs can be told from Python, those of NCCL end the
    process from within; so NCCL is given twice the time, and the exchange at the end of a step speaks first.
    """

    rank: int = 0
    world: int = 1
    control: Any = None

    @property
    def is_first(self) -> bool:
        """Whether this one writes and speaks."""
        return self.rank == 0

    def add_up(self, tensors: Iterable[torch.Tensor], what: str) -> None:
        """Replace each tensor by its sum over all processes, in one message; `what` names it in errors."""
        if self.world > 1:
            self._flattened(tensors, torch.float32, lambda flat: dist.all_reduce(flat), what)

    def take_from_first(self, tensors: Iterable[torch.Tensor], what: str) -> None:
        """Replace each tensor by that of the first process."""
        if self.world > 1:
            self._flattened(tensors, torch.float64, lambda flat: dist.broadcast(flat, 0), what)

    def largest(self, value: int, what: str) -> int:
        """The largest of the values that the processes give."""
        return self._one_number(value, dist.ReduceOp.MAX, what) if self.world > 1 else value

    def total(self, value: int, what: str) -> int:
        """The sum of the values that the processes give."""
        return self._one_number(value, dist.ReduceOp.SUM, what) if self.world > 1 else value

    def agree(self, value: T, what: str) -> T:
        """The value of the first process: anything that can be pickled."""
        if self.world == 1:
            return value
        box: list[Any] = [value]
        self._together(lambda: dist.broadcast_object_list(box, 0, group=self.control), what)
        return box[0]

    def _one_number(self, value: int, operation: Any, what: str) -> int:
        box = torch.tensor(value)
        self._together(lambda: dist.all_reduce(box, operation, group=self.control), what)
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
        self._together(lambda: call(flat), what)
        for tensor, part in zip(given, flat.split([tensor.numel() for tensor in given]), strict=True):
            tensor.copy_(part.reshape(tensor.shape))

    def _together(self, call: Callable[[], Any], what: str) -> None:
        try:
            call()
        except RuntimeError as error:  # torch.distributed's own are among them
            reason = str(error).splitlines()[0][:200]
            raise TrainingError(
                f"Process {self.rank} of {self.world} waited in vain for the others in {what}: {reason}",
                hint="Another process has died or hangs; its own message says why. What was saved is whole. "
                f"{TIMEOUT_VARIABLE} sets how many minutes are waited.",
            ) from None


ALONE = Processes()


def join(device: torch.device) -> tuple[Processes, torch.device]:
    """Join the others where torchrun has started this process; its device is then the one of its number.

    Raises ConfigError where there are fewer devices than processes.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or "RANK" not in os.environ:
        return ALONE, device
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise ConfigError(
                f"{int(os.environ.get('LOCAL_WORLD_SIZE', world))} processes on this machine, and torch sees "
                f"{torch.cuda.device_count()} CUDA devices; start one for each, or use --device cpu."
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    elif device.type != "cpu":
        raise ConfigError(f"several processes train on CUDA devices or on CPUs, not on {device}.")
    patience = datetime.timedelta(minutes=timeout_min())
    if not dist.is_initialized():
        on_cuda = device.type == "cuda"
        dist.init_process_group("nccl" if on_cuda else "gloo", timeout=patience * 2 if on_cuda else patience)
    control = dist.new_group(backend="gloo", timeout=patience) if device.type == "cuda" else None
    return Processes(rank, world, control), device


def timeout_min() -> float:
    """Minutes that a process waits for the others. Raises ConfigError for what is no number above 0."""
    text = os.environ.get(TIMEOUT_VARIABLE, str(TIMEOUT_MIN))
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < 1e6:
        raise ConfigError(f"{TIMEOUT_VARIABLE}={text}: must be a number of minutes above 0.")
    return minutes


def leave() -> None:
    """Say goodbye to the others, if there are any."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def fresh(generators: Iterable[torch.Generator], *key: int | str) -> None:
    """Seed torch's global generators and those given by `key` alone."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    # The generator of CPUs takes 32 bits of a seed.
    seed = int.from_bytes(digest[:4], "little")
    torch.manual_seed(seed)
    for generator in generators:
        generator.manual_seed(seed)
