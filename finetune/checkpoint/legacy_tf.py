"""Describe networks of the TensorFlow generation (stylegan2, stylegan2-ada) under our names.

Such a network is a tree of components with a list of variables each, and the options it was made with.
Weights are `[kh, kw, in, out]` and `[in, out]`; kernels of upsampling convolutions are stored rotated by half
a turn; the bias of a modulation is stored without the 1 that it is added to. Filters are not stored at all:
they follow from the options.
"""

from __future__ import annotations

import math
import re
from typing import Any, NoReturn

import numpy as np

from finetune.checkpoint.arguments import (
    BLOCK,
    DISCRIMINATOR,
    EPILOGUE,
    GENERATOR,
    MAPPING,
    SYNTHESIS2,
    check_arguments,
)
from finetune.checkpoint.describe import MISSING, Described, plain
from finetune.checkpoint.unpickle.stubs import Array, Tensor, TFNetwork, damaged, printable
from torch_utils.ops import upfirdn2d

OLDEST_VERSION = 4
UNUSED = {"lod"}  # left over from progressive growing; codespell:ignore lod
MAX_COMPONENTS = 16
MAX_VARIABLES = 10_000  # of a component; the largest has about 200

# Our argument -> (option in the file, default value); `architecture` and the mapping differ for D.
OPTIONS: dict[str, tuple[str, Any]] = {
    "z_dim": ("latent_size", 512),
    "c_dim": ("label_size", 0),
    "w_dim": ("dlatent_size", 512),
    "img_resolution": ("resolution", 1024),
    "img_channels": ("num_channels", 3),
    "channel_base": ("fmap_base", 16384),
    "channel_max": ("fmap_max", 512),
    "num_fp16_res": ("num_fp16_res", 0),
    "conv_clamp": ("conv_clamp", None),
    "architecture": ("architecture", "skip"),
    "resample_filter": ("resample_kernel", [1, 3, 3, 1]),
    "use_noise": ("use_noise", True),
    "activation": ("nonlinearity", "lrelu"),
    "mbstd_group_size": ("mbstd_group_size", 4),
    "mbstd_num_channels": ("mbstd_num_features", 1),
}
MAPPING_OPTIONS: dict[str, tuple[str, Any]] = {
    "num_layers": ("mapping_layers", 8),
    "layer_features": ("mapping_fmaps", None),
    "activation": ("mapping_nonlinearity", "lrelu"),
    "lr_multiplier": ("mapping_lrmul", 0.01),
    "w_avg_beta": ("dlatent_avg_beta", 0.995),
}

# Layer in the file -> our module in block b{r}.
SYNTHESIS_LAYERS = {"Conv0_up": "conv0", "Conv1": "conv1", "Conv": "conv1", "ToRGB": "torgb", "Skip": "skip"}
DISCRIMINATOR_LAYERS = {
    **{"FromRGB": "fromrgb", "Conv0": "conv0", "Conv1_down": "conv1", "Skip": "skip"},
    **{"Conv": "conv", "Dense0": "fc"},
}
ROTATED = {"Conv0_up", "Skip"}


def describe_tf(network: TFNetwork) -> tuple[Described, dict[str, Any]]:
    """Return the tensors of a network under our names, and its constructor arguments.

    Raises PickleRefused if it is neither, or has an unknown variable.
    """
    version = network.state.get("version")
    if type(version) is not int or version < OLDEST_VERSION:
        damaged(f"a TensorFlow network older than version {OLDEST_VERSION}", network.offset)
    parts = {name: _variables(part, network.offset) for name, part in _components(network).items()}
    options = plain(network.state.get("static_kwargs"), network.offset)
    if type(options) is not dict:
        damaged("a TensorFlow network without options", network.offset)
    if {"mapping", "synthesis"} <= parts.keys():
        for part in ("mapping", "synthesis"):
            more = plain(network.state["components"][part].state.get("static_kwargs"), network.offset)
            options = {**(more if type(more) is dict else {}), **options}
        net = Described("Generator", network.offset)
        _name_generator(net, parts)
        const = net.tensors.get("synthesis.b4.const")
        if const is not None and net.get("", "base_shape") not in (MISSING, list(const.array.shape[1:])):
            damaged("a TensorFlow network whose blocks have another shape than its constant", net.offset)
        return net, _generator_arguments(net, options)
    net = Described("Discriminator", network.offset)
    _name_discriminator(net, parts)
    return net, _discriminator_arguments(net, options)


def add_filters(net: Described, wanted: dict[str, Any], taps: Any) -> None:
    """Add the filters `wanted` (names of our buffers) that no TensorFlow file stores."""
    value = upfirdn2d.setup_filter(taps).numpy()
    for name in wanted:
        if name.rpartition(".")[2] == "resample_filter":
            net.tensors[name] = Tensor(value, "float32", net.offset)


def _components(network: TFNetwork) -> dict[str, TFNetwork]:
    components = network.state.get("components")
    if type(components) is not dict or len(components) > MAX_COMPONENTS:
        damaged("a TensorFlow network without components", network.offset)
    if not all(type(name) is str and type(part) is TFNetwork for name, part in components.items()):
        damaged("a component of a TensorFlow network that is no network", network.offset)
    return {"": network, **components}


def _variables(network: TFNetwork, offset: int) -> dict[str, np.ndarray]:
    variables = network.state.get("variables")
    if type(variables) is not list or len(variables) > MAX_VARIABLES:
        damaged("a TensorFlow network without variables", offset)
    found: dict[str, np.ndarray] = {}
    for item in variables:
        if type(item) not in (tuple, list) or len(item) != 2 or type(item[0]) is not str or item[0] in found:
            damaged("a variable without a name of its own", offset)
        name, value = item
        value = value.value if type(value) is Array else value
        if type(value) in (int, float):
            value = np.float32(value)
        elif type(value) is not np.ndarray or value.dtype.kind != "f":
            damaged(f"variable {printable(name)} is not a float32 array", offset)
        found[name] = np.asarray(value)
    return found


def _name_generator(net: Described, parts: dict[str, dict[str, np.ndarray]]) -> None:
    for name, value in parts[""].items():
        if name == "dlatent_avg":
            _add(net, "mapping.w_avg", value)
        elif name not in UNUSED:
            _unknown(net, name)
    for name, value in parts["mapping"].items():
        _name_mapping(net, name, value, r"Dense(\d+)")
    for name, value in parts["synthesis"].items():
        if match := re.fullmatch(r"noise(\d{1,2})", name):
            index = int(match[1])
            # noise0 is 4x4; then for each r: 2 log2(r) - 5 belongs to conv0 and 2 log2(r) - 4 to conv1.
            layer = "conv1" if index % 2 == 0 else "conv0"
            block = f"synthesis.b{2 ** ((index + 5) // 2)}"
            _add(net, f"{block}.{layer}.noise_const", _reshaped(net, name, value, value.shape[2:]))
        elif match := re.fullmatch(r"(?=4|\dx4)([1-4])x([1-4])/Const/const", name):
            _note_shape(net, name, match)
            _add(net, "synthesis.b4.const", _reshaped(net, name, value, value.shape[1:]))
        elif name not in UNUSED:
            block, layer, kind = _split(net, name, SYNTHESIS_LAYERS)
            module = f"synthesis.{block}.{SYNTHESIS_LAYERS[layer]}"
            if kind in ("mod_weight", "mod_bias"):
                value = value + np.float32(1) if kind == "mod_bias" else value
                _add(net, f"{module}.affine.{kind.removeprefix('mod_')}", _turned(net, name, value))
            else:
                _add(net, f"{module}.{kind}", _turned(net, name, value, layer in ROTATED))


def _name_discriminator(net: Described, parts: dict[str, dict[str, np.ndarray]]) -> None:
    if set(parts) != {""}:
        damaged("a TensorFlow network with other components than mapping and synthesis", net.offset)
    for name, value in parts[""].items():
        if name in ("Output/weight", "Output/bias"):
            _add(net, f"b4.out.{name.rpartition('/')[2]}", _turned(net, name, value))
        elif name.startswith(("LabelEmbed/", "Mapping")):
            _name_mapping(net, name, value, r"Mapping(\d+)")
        elif name not in UNUSED:
            block, layer, kind = _split(net, name, DISCRIMINATOR_LAYERS)
            _add(net, f"{block}.{DISCRIMINATOR_LAYERS[layer]}.{kind}", _turned(net, name, value))


def _name_mapping(net: Described, name: str, value: np.ndarray, pattern: str) -> None:
    layer, _, kind = name.partition("/")
    match = re.fullmatch(pattern, layer)
    if kind not in ("weight", "bias") or not (match or layer == "LabelEmbed"):
        _unknown(net, name)
    module = f"fc{int(match[1])}" if match else "embed"
    _add(net, f"mapping.{module}.{kind}", _turned(net, name, value))


def _split(net: Described, name: str, layers: dict[str, str]) -> tuple[str, str, str]:
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})/(\w+)/(\w+)", name)
    kinds = ("weight", "bias", "mod_weight", "mod_bias", "noise_strength")
    if match is None or match[3] not in layers or match[4] not in kinds:
        _unknown(net, name)
    _note_shape(net, name, match)
    return f"b{max(int(match[1]), int(match[2]))}", match[3], match[4]


def _note_shape(net: Described, name: str, match: re.Match) -> None:
    """Keep the shape of blocks named height x width; names of square blocks leave the shape open."""
    sides = [int(match[1]), int(match[2])]
    base, rest = zip(*(divmod(4 * side, max(sides) or 1) for side in sides))
    if sides[0] != sides[1]:
        noted = net.modules.setdefault("", {}).setdefault("base_shape", list(base))
        if any(rest) or noted != list(base):
            _unknown(net, name)


def _turned(net: Described, name: str, value: np.ndarray, is_rotated: bool = False) -> np.ndarray:
    """Return a weight with its axes in torch's order; biases and numbers are returned unchanged."""
    if value.ndim == 4:
        value = value[::-1, ::-1] if is_rotated else value
        return value.transpose(3, 2, 0, 1)
    if value.ndim > 2:
        _unknown(net, name)
    return value.T


def _reshaped(net: Described, name: str, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if value.ndim != 4 or math.prod(shape) != value.size:
        _unknown(net, name)
    return value.reshape(shape)


def _add(net: Described, name: str, value: np.ndarray) -> None:
    if name in net.tensors:
        _unknown(net, name)
    net.tensors[name] = Tensor(value, value.dtype.name, net.offset, is_parameter=True)


def _unknown(net: Described, name: str) -> NoReturn:
    raise net.refusal(
        f"the TensorFlow {net.class_name} in the pickle holds {printable(name)}, which has no place in ours",
        hint="Only networks of stylegan2 and stylegan2-ada can be opened; those of stylegan (1) cannot.",
    )


def _translated(options: dict[str, Any], table: dict[str, tuple[str, Any]]) -> dict[str, Any]:
    found = {ours: options.get(theirs, default) for ours, (theirs, default) in table.items()}
    if type(found.get("channel_base")) in (int, float):
        found["channel_base"] *= 2  # theirs counts from half the resolution
    return found


def _generator_arguments(net: Described, options: dict[str, Any]) -> dict[str, Any]:
    own, mapping = _translated(options, OPTIONS), _translated(options, MAPPING_OPTIONS)
    mapping["num_layers"] = mapping["num_layers"] or 0
    return {
        **check_arguments(net, own, GENERATOR[:5], required=True),
        "mapping_kwargs": check_arguments(net, mapping, MAPPING),
        **check_arguments(net, own, SYNTHESIS2),
    }


def _discriminator_arguments(net: Described, options: dict[str, Any]) -> dict[str, Any]:
    options = {"architecture": "resnet", "mapping_layers": 0, "mapping_lrmul": 0.1, **options}
    own, mapping = _translated(options, OPTIONS), _translated(options, MAPPING_OPTIONS)
    return {
        **check_arguments(net, own, DISCRIMINATOR[:3], required=True),
        **check_arguments(net, own, (*DISCRIMINATOR[3:], "num_fp16_res", "conv_clamp")),
        "block_kwargs": check_arguments(net, own, BLOCK),
        "mapping_kwargs": check_arguments(net, mapping, MAPPING[:-1]),
        "epilogue_kwargs": check_arguments(net, own, EPILOGUE),
    }
