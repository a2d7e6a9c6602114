"""Which device a command runs on."""

from __future__ import annotations

import torch

from finetune.errors import ConfigError


def resolve_device(name: str = "auto") -> torch.device:
    """Turn `--device` (`auto`, `cpu`, `cuda`, `cuda:1`, `mps`) into a torch device that is really there.

    `auto` prefers CUDA, then MPS, then the CPU. Raises ConfigError where the named device does not exist.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device {name}: not a device; use auto, cpu, cuda, cuda:1 or mps.") from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise ConfigError(
                f"--device {name}: this machine shows torch {count} CUDA devices; use --device auto."
            )
    elif device.type == "mps":
        if not torch.backends.mps.is_available():
            raise ConfigError("--device mps: torch sees no Apple GPU here; use --device auto.")
    elif device.type != "cpu":
        raise ConfigError(f"--device {name}: not supported; use auto, cpu, cuda or mps.")
    return device
