"""The formats that a checkpoint can be written in, one row each. Imports neither torch nor numpy."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import PurePath

from finetune.errors import ConfigError

WHICH = ("G_ema", "G", "D", "all")  # networks of a checkpoint to write
# Equal weights, equal code, one machine: what may differ is the order of a sum, where a library picks its
# kernel by how memory happens to be aligned. 8-bit images have steps of 2/255.
EQUAL = 1e-4


@dataclass(frozen=True)
class Format:
    """A format to export.

    `module`, of finetune.export, has `write(path, checkpoint, *, check)`: it writes the networks that
    `checkpoint` holds, calls `check` with the finished temporary file, and only then gives it its name; it
    raises ExportError if the format cannot hold them. If `finetune.load` does not open the format, the module
    also has `reopen(path, device)`, which returns its networks by name, callable as those of the source.
    """

    name: str
    suffix: str  # of the file name
    module: str
    opens_in: str  # completes "opens in ..."
    tolerance: float = EQUAL  # largest difference of a value of an image, in -1 to 1
    which: str = "all"  # networks that are written by default, one of WHICH
    half: bool = True  # readers accept weights in float16
    augment_pipe: bool = False  # keeps the augmentation pipe


FORMATS: dict[str, Format] = {
    row.name: row
    for row in (
        Format(
            "stylegan-pkl",
            ".pkl",
            "finetune.export.stylegan_pickle",
            "the StyleGAN2-ADA and StyleGAN3 code bases",
            half=False,  # their loaders compute in the type of the weights
            augment_pipe=True,
        ),
        Format("safetensors", ".safetensors", "finetune.export.safetensors", "finetune, as tensors and JSON"),
        Format(
            "onnx",
            ".onnx",
            "finetune.export.onnx",
            "onnxruntime (opset 18)",
            tolerance=1e-3,  # other kernels sum in another order; an eighth of a step of an 8-bit image
            which="G_ema",
            half=False,
        ),
        Format(
            "rosinality-pt",
            ".pt",
            "finetune.export.rosinality",
            "the StyleGAN2 port by rosinality and the tools built on it",
            which="G_ema",
        ),
        Format(
            "state-dict",
            ".pth",
            "finetune.export.state_dict",
            "torch.load(weights_only=True), with the names of the official code",
        ),
    )
}

HALF = ", ".join(row.name for row in FORMATS.values() if row.half)  # whose readers accept float16


def half_refused(name: str, option: str = "half") -> ConfigError:
    """Return the error for float16 weights in a format whose readers do not accept them."""
    return ConfigError(f"{name} with {option}: needs float32 weights. Use one of {HALF}, or omit {option}.")


def format_of(path: str | os.PathLike, name: str | None = None, *, option: str | None = "format") -> Format:
    """Return the format called `name`, by default that of the suffix of `path`.

    Raises ConfigError if there is none, or if the suffix is that of another format; `option` is the word for
    the format in its message, None where the suffix alone decides.
    """
    suffix = PurePath(path).suffix.lower()
    by_suffix = next((row for row in FORMATS.values() if row.suffix == suffix), None)
    if name is None:
        if by_suffix is None:
            known = ", ".join(f"{row.suffix} ({row.name})" for row in FORMATS.values())
            other = f", or give {option}" if option else ""
            raise ConfigError(f"{path}: unknown suffix {suffix!r}. Use one of {known}{other}.")
        return by_suffix
    if name not in FORMATS:
        raise ConfigError(f"{option} {name!r} is unknown. Choose from {', '.join(FORMATS)}.")
    if by_suffix not in (None, FORMATS[name]):
        assert by_suffix is not None
        raise ConfigError(
            f"{path}: {suffix} is the suffix of {by_suffix.name}, but {option} is {name}. Use {option} "
            f"{by_suffix.name}, or a name that ends in {FORMATS[name].suffix}."
        )
    return FORMATS[name]
