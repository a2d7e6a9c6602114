"""What changes during training (`TrainState`) and what does not (`Plan`)."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from finetune.distributed import ProcessGroup
from finetune.errors import CheckpointError
from finetune.models import Network
from finetune.train.ada import AdaController
from finetune.train.distill import Distillation
from finetune.train.graphs import Graphs
from finetune.train.optim import LearningRate, load_adam

MODELS = ("finetune.models.stylegan2", "finetune.models.stylegan3")


@dataclass
class TrainState:
    """The state of the algorithm: networks, optimizers, running averages, counters.

    One clock: `nimg`, the images D has seen; `step` counts iterations. `teacher` is G_ema itself unless
    another one was asked for. `label_generator` draws the labels of generated images. `sd_norms`: running
    averages of the norms of the adversarial and the unweighted distillation gradient at the image, from which
    `--sd-weight auto:` follows. `power_averages`: averages of G for `finetune.train.posthoc_ema`.
    """

    G: Network
    D: Network
    G_ema: Network
    teacher: Network
    opt_G: torch.optim.Optimizer  # noqa: N815
    opt_D: torch.optim.Optimizer  # noqa: N815
    augment_pipe: Network | None
    ada: AdaController
    path_mean: torch.Tensor
    sd_norms: torch.Tensor
    power_averages: dict[str, Network]
    nimg: int = 0
    step: int = 0
    label_generator: torch.Generator = field(default_factory=torch.Generator)

    def networks(self) -> dict[str, torch.nn.Module]:
        """Return the networks by name; a teacher that is G_ema itself is left out."""
        found = {"G": self.G, "D": self.D, "G_ema": self.G_ema, "teacher": self.teacher}
        found |= self.power_averages
        if self.teacher is self.G_ema:
            del found["teacher"]
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return everything as tensors and plain values, random states of torch included."""
        random: dict[str, Any] = {
            "torch": torch.get_rng_state(),
            "labels": self.label_generator.get_state(),
        }
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            random["cuda"] = torch.cuda.get_rng_state_all()
        return {
            "networks": {name: pack_network(network) for name, network in self.networks().items()},
            "opt_G": self.opt_G.state_dict(),
            "opt_D": self.opt_D.state_dict(),
            "ada": self.ada.state_dict(),
            "path_mean": self.path_mean,
            "sd_norms": self.sd_norms,
            "nimg": self.nimg,
            "step": self.step,
            "random": random,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned. Raises CheckpointError if it belongs to other networks."""
        try:
            for name, network in self.networks().items():
                network.load_state_dict(state["networks"][name]["tensors"])
            load_adam(self.opt_G, state["opt_G"])
            load_adam(self.opt_D, state["opt_D"])
        except (KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"the training state does not fit its networks: {error}") from None
        self.ada.load_state_dict(state["ada"])
        self.path_mean.copy_(state["path_mean"])
        self.sd_norms.copy_(state["sd_norms"])
        self.nimg, self.step = int(state["nimg"]), int(state["step"])
        self.label_generator.set_state(state["random"]["labels"])
        torch.set_rng_state(state["random"]["torch"])
        for index, each in enumerate(state["random"].get("cuda", [])[: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(each, index)


@dataclass
class RunCounters:
    """Counters of a run besides images and steps.

    best, last: metric, value, standard error and nimg of `network-best.pkl` and of the last measurement.
    worse: measurements in a row that were clearly worse than the best.
    """

    rollbacks: int = 0
    best: dict[str, Any] = field(default_factory=dict)
    last: dict[str, Any] = field(default_factory=dict)
    worse: int = 0

    def state_dict(self) -> dict[str, Any]:
        """Return all counters."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.rollbacks, self.worse = int(state["rollbacks"]), int(state["worse"])
        self.best, self.last = dict(state["best"]), dict(state["last"])


@dataclass(frozen=True)
class Plan:
    """Constants of a training run: the recipe in the units of the loop (images, not kimg).

    batch: images of all ranks together; batch_gpu: in one micro-batch. d_warmup_nimg: images over which only
    D trains, because it is new. tick_nimg, snap_nimg: images between lines of the log, and between snapshots.
    skip_overflow: set gradients that are not finite, which float16 layers may give now and then, to zero.
    """

    device: torch.device
    total_nimg: int
    batch: int
    batch_gpu: int
    gamma: float
    mixing: float
    r1_interval: int
    path_interval: int | None
    path_weight: float
    path_decay: float
    ema_nimg: float
    ema_rampup: float | None
    teacher_nimg: float | None
    blur_sigma: float
    blur_nimg: float
    distillation: Distillation | None
    labels: Callable[[int], torch.Tensor]
    rate_G: LearningRate  # noqa: N815
    rate_D: LearningRate  # noqa: N815
    tick_nimg: float
    snap_nimg: float
    d_warmup_nimg: float
    skip_overflow: bool
    seed: int
    group: ProcessGroup
    graphs: Graphs
    synthesis: dict
    discriminator: dict

    def blur_at(self, nimg: int) -> float:
        """Return the standard deviation in pixels of the blur of D's input, fading linearly."""
        return self.blur_sigma * max(0.0, 1 - nimg / self.blur_nimg) if self.blur_sigma else 0.0


def pack_network(network: Any) -> dict[str, Any]:
    """Return a network as its class, the arguments of its constructor, and its tensors."""
    kind = type(network)
    return {
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "args": list(network.init_args),
        "kwargs": network.init_kwargs,
        "tensors": network.state_dict(),
    }


def unpack_network(packed: dict[str, Any]) -> torch.nn.Module:
    """Build the network that `pack_network` described. Raises CheckpointError for an unknown class."""
    module, _, kind = packed["class"].rpartition(".")
    if module not in MODELS or kind not in ("Generator", "Discriminator"):
        raise CheckpointError(f"the training state names an unknown network: {packed['class']}")
    network = getattr(importlib.import_module(module), kind)(*packed["args"], **packed["kwargs"])
    network.load_state_dict(packed["tensors"])
    return network
