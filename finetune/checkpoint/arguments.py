"""The constructor arguments of the network that a file describes.

Defaults differ by generation and one argument may be given in several places. So: what a module of the file
holds as an attribute wins, then what its constructor was given, and only then our own default. Every value is
checked against `LIMITS` before anything is built from it, since it may come from a hostile file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from finetune.checkpoint.describe import MISSING, Described
from finetune.checkpoint.unpickle.stubs import printable
from finetune.errors import PickleRefused

GENERATOR = (
    "z_dim",
    "c_dim",
    "w_dim",
    "img_resolution",
    "img_channels",
    "mapping_kwargs",
    "synthesis_kwargs",
)
DISCRIMINATOR = ("c_dim", "img_resolution", "img_channels", "architecture", "channel_base", "channel_max")
MAPPING = ("num_layers", "embed_features", "layer_features", "activation", "lr_multiplier", "w_avg_beta")
SYNTHESIS2 = (
    *("channel_base", "channel_max", "num_fp16_res", "architecture", "resample_filter", "conv_clamp"),
    *("use_noise", "activation", "fused_modconv_default", "fp16_channels_last"),
)
SYNTHESIS3 = (
    *("channel_base", "channel_max", "num_layers", "num_critical", "first_cutoff", "first_stopband"),
    *("last_stopband_rel", "margin_size", "output_scale", "num_fp16_res", "conv_kernel", "filter_size"),
    *("lrelu_upsampling", "use_radial_filters", "conv_clamp", "magnitude_ema_beta"),
)
# Positional arguments of the two parts of a generator; its own are handed on to them.
MAPPING_CALL = ("z_dim", "c_dim", "w_dim", "num_ws", *MAPPING)
SYNTHESIS_CALL = ("w_dim", "img_resolution", "img_channels", "channel_base", "channel_max")
BLOCK = ("activation", "resample_filter", "freeze_layers", "fp16_channels_last")
EPILOGUE = ("mbstd_group_size", "mbstd_num_channels", "activation")

# name -> allowed range and type, or allowed values.
LIMITS: dict[str, Any] = {
    "z_dim": (1, 1 << 16, int),
    "c_dim": (0, 1 << 20, int),
    "w_dim": (1, 1 << 16, int),
    "img_resolution": (4, 1 << 14, int),
    "img_channels": (1, 64, int),
    "channel_base": (1, 1 << 24, int),
    "channel_max": (1, 1 << 16, int),
    "num_fp16_res": (0, 16, int),
    "conv_clamp": (0, 1e9, float),
    "num_layers": (0, 64, int),
    "embed_features": (1, 1 << 16, int),
    "layer_features": (1, 1 << 16, int),
    "cmap_dim": (0, 1 << 16, int),
    "lr_multiplier": (1e-6, 1e3, float),
    "w_avg_beta": (0, 1, float),
    "num_critical": (0, 64, int),
    "first_cutoff": (1e-3, 1 << 14, float),
    "first_stopband": (1e-3, 1 << 14, float),
    "last_stopband_rel": (1e-3, 1 << 10, float),
    "margin_size": (0, 1 << 10, int),
    "output_scale": (-1e6, 1e6, float),
    "conv_kernel": (1, 15, int),
    "filter_size": (1, 32, int),
    "lrelu_upsampling": (1, 16, int),
    "magnitude_ema_beta": (0, 1, float),
    "freeze_layers": (0, 1 << 10, int),
    "mbstd_group_size": (1, 1 << 16, int),
    "mbstd_num_channels": (0, 1 << 10, int),
    "architecture": ("orig", "skip", "resnet"),
    "activation": ("linear", "relu", "lrelu", "tanh", "sigmoid", "elu", "selu", "softplus", "swish"),
    "fused_modconv_default": (True, False, "inference_only"),
    "use_noise": (True, False),
    "fp16_channels_last": (True, False),
    "use_radial_filters": (True, False),
}
MAY_BE_NONE = {
    *("conv_clamp", "embed_features", "layer_features", "w_avg_beta", "cmap_dim", "mbstd_group_size"),
    "resample_filter",
}
SQUARE = [4, 4]  # the smallest block of a square StyleGAN2 network
MAX_TAPS = 64  # of a filter given as numbers
MAX_FILTER_VALUES = 20_000  # computed for all layers of a StyleGAN3 generator


def generator_arguments(net: Described) -> dict[str, Any]:
    """Return the constructor arguments of a `Generator` of either family, synthesis options flattened."""
    given = net.arguments("", GENERATOR)
    mapping = _given_dict(net, given.pop("mapping_kwargs", None))
    options = {**_given_dict(net, given.pop("synthesis_kwargs", None)), **given}
    base = _attributes(net, "", GENERATOR[:5], given)
    is_stylegan3 = net.has("synthesis.input")
    if is_stylegan3:
        _check_square(net, given)
    synthesis = _synthesis3(net, options) if is_stylegan3 else _synthesis2(net, options)
    names = SYNTHESIS3 if is_stylegan3 else SYNTHESIS2
    arguments = {
        **check_arguments(net, base, GENERATOR[:5], required=True),
        "mapping_kwargs": check_arguments(net, _mapping(net, mapping), MAPPING),
        **check_arguments(net, synthesis, names),
        **base_shape(net),
    }
    if is_stylegan3:
        _check_filters(net, arguments)
    return arguments


def base_shape(net: Described, of_generator: Sequence[int] | None = None) -> dict[str, Any]:
    """Return the argument `base_shape` of a rectangular StyleGAN2 network; nothing for any other network.

    A generator shows it in its constant, a discriminator only how many positions its last block has. Its own
    argument, the generator of the file (`of_generator`) or `square=False`, which means twice as high as wide,
    gives the sides.
    """
    const, fc = net.tensors.get("synthesis.b4.const"), net.tensors.get("b4.fc.weight")
    shapes: list[Any] = []
    if const is not None and const.array.ndim == 3:
        shapes = [const.array.shape[1:]]
    elif fc is not None and fc.array.ndim == 2:
        own = net.arguments("", DISCRIMINATOR)
        shapes = [net.get("", "base_shape", own.get("base_shape")), of_generator]
        shapes += [(4, 2)] if net.get("", "square", own.get("square")) is False else []
        shapes = [shape for shape in shapes if _is_base(shape)]
        shapes = [(h, w) for h, w in shapes if fc.array.shape[1] == fc.array.shape[0] * h * w]
    found = next((list(shape) for shape in shapes if _is_base(shape)), SQUARE)
    return {} if found == SQUARE else {"base_shape": found}


def _is_base(shape: Any) -> bool:
    """Return whether a value is the height and width of a block whose longer side is 4."""
    is_pair = type(shape) in (list, tuple) and len(shape) == 2 and all(type(side) is int for side in shape)
    return is_pair and min(shape) > 0 and max(shape) == 4


def _check_square(net: Described, given: dict[str, Any]) -> None:
    """Refuse a rectangular StyleGAN3 generator, whose layers have the sizes of their images as numbers."""
    sizes = [net.get(path, "out_size") for path in net.modules]
    is_square = all(len(set(size)) == 1 for size in sizes if type(size) in (list, tuple) and size)
    if net.get("", "square", given.get("square")) is False or not is_square:
        raise PickleRefused(
            f"the {net.class_name} in the pickle is a rectangular StyleGAN3 network (object at byte "
            f"{net.offset}), and those of StyleGAN3 are square here",
            offset=net.offset,
            hint="The file is not necessarily damaged. Rectangular StyleGAN2 networks can be used.",
        )


def discriminator_arguments(net: Described, of_generator: Sequence[int] | None = None) -> dict[str, Any]:
    """Return the constructor arguments of a `Discriminator`, without frozen layers.

    `of_generator`: the `base_shape` of the generator in the same file.
    """
    given = net.arguments("", DISCRIMINATOR)
    nested = {
        key: _given_dict(net, given.pop(f"{key}_kwargs", None)) for key in ("block", "mapping", "epilogue")
    }
    base = _attributes(net, "", DISCRIMINATOR[:3], given)
    size = base["img_resolution"] if type(base["img_resolution"]) is int else 0
    first = f"b{size}" if size > 4 else "b4"
    given |= _attributes(net, first, ["architecture"], given) | _attributes(
        net, "b4.conv", ["conv_clamp"], given
    )
    given["num_fp16_res"] = _num_fp16_res(net, "", given)
    if given.get("cmap_dim") is None:
        given.pop("cmap_dim", None)  # decided by the constructor, and seen in the shape of b4.out
    block, epilogue = nested["block"], nested["epilogue"]
    block |= _attributes(net, f"{first}.conv0", ["activation"], block) | {"freeze_layers": MISSING}
    epilogue |= _attributes(net, "b4.conv", ["activation"], epilogue)
    for name in ("group_size", "num_channels"):
        default = epilogue.get(f"mbstd_{name}", MISSING)
        epilogue[f"mbstd_{name}"] = net.get("b4.mbstd", name, default)
    top = ("architecture", "channel_base", "channel_max", "num_fp16_res", "conv_clamp", "cmap_dim")
    return {
        **check_arguments(net, base, DISCRIMINATOR[:3], required=True),
        **check_arguments(net, given, top),
        "block_kwargs": check_arguments(net, block, BLOCK),
        # D has no w_avg.
        "mapping_kwargs": check_arguments(net, _mapping(net, nested["mapping"]), MAPPING[:-1]),
        "epilogue_kwargs": check_arguments(net, epilogue, EPILOGUE),
        **base_shape(net, of_generator),
    }


def augment_arguments(net: Described, names: Iterable[str]) -> dict[str, Any]:
    """Return the constructor arguments of an `AugmentPipe`: the strengths `names`, which are attributes."""
    given = net.arguments("", tuple(names))
    arguments = {}
    for name in names:
        value = net.get("", name, given.get(name, MISSING))
        if value is MISSING:
            continue
        numbers = value if name == "imgfilter_bands" and type(value) in (list, tuple) else [value]
        if len(numbers) > MAX_TAPS or not all(_is_number(x, -1e6, 1e6) for x in numbers):
            _refuse(net, name, value)
        arguments[name] = list(numbers) if name == "imgfilter_bands" else value
    return arguments


def unused_arguments(net: Described) -> list[str]:
    """Return the names of constructor arguments in the file that are unknown here."""
    known = {*GENERATOR, *DISCRIMINATOR, *SYNTHESIS2, *SYNTHESIS3, "num_fp16_res", "conv_clamp", "cmap_dim"}
    known |= {"block_kwargs", "mapping_kwargs", "epilogue_kwargs", "base_shape", "square"}
    given = net.arguments("", GENERATOR if net.has("synthesis") else DISCRIMINATOR)
    nested = given.get("synthesis_kwargs")
    names = {*given, *(nested if type(nested) is dict else ())}
    return sorted(printable(name) for name in names - known)


def _attributes(net: Described, path: str, names: Iterable[str], given: dict[str, Any]) -> dict[str, Any]:
    """Return the attributes `names` of the module at `path`; what was given for those that it lacks."""
    return {name: net.get(path, name, given.get(name, MISSING)) for name in names}


def _given_dict(net: Described, value: Any) -> dict[str, Any]:
    if value is not None and type(value) is not dict:
        _refuse(net, "a dict of arguments", value)
    return dict(value or {})


def _mapping(net: Described, given: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of the mapping network at `mapping`; D has one only with classes."""
    found = given | net.arguments("mapping", MAPPING_CALL)
    found |= _attributes(net, "mapping", ["num_layers", "w_avg_beta"], found)
    found |= _attributes(net, "mapping.fc0", ["activation"], found)
    # The gain of a bias is the learning rate multiplier itself.
    found["lr_multiplier"] = net.get("mapping.fc0", "bias_gain", found.get("lr_multiplier", MISSING))
    return found


def _synthesis2(net: Described, given: dict[str, Any]) -> dict[str, Any]:
    found = given | _attributes(net, "synthesis.b4", ["architecture", "fused_modconv_default"], given)
    found |= _attributes(net, "synthesis.b4.conv1", ["conv_clamp", "activation", "use_noise"], given)
    found["num_fp16_res"] = _num_fp16_res(net, "synthesis", given)
    return found


def _num_fp16_res(net: Described, path: str, given: dict[str, Any]) -> Any:
    """Return the number of float16 resolutions: that of the blocks in the file, or else what was given."""
    stated = given.get("num_fp16_res", MISSING)
    prefix = path + "." if path else ""
    blocks = {
        int(name[len(prefix) + 1 :]): net.get(name, "use_fp16")
        for name in net.modules
        if name.startswith(prefix + "b") and name[len(prefix) + 1 :].isdecimal()
    }
    flags = [blocks[resolution] for resolution in sorted(blocks, reverse=True) if resolution > 4]
    if not flags or MISSING in flags:
        return stated
    count = flags.index(False) if False in flags else len(flags)
    is_same = type(stated) is int and min(stated, len(flags)) == count
    return stated if is_same else count


def _synthesis3(net: Described, given: dict[str, Any]) -> dict[str, Any]:
    found = given | net.arguments("synthesis", SYNTHESIS_CALL)
    whole = ["num_layers", "num_critical", "margin_size", "output_scale", "num_fp16_res"]
    first = next((path for path in sorted(net.modules) if path.startswith("synthesis.L0_")), "")
    layer = ["conv_kernel", "conv_clamp", "magnitude_ema_beta"]
    return found | _attributes(net, "synthesis", whole, found) | _attributes(net, first, layer, found)


def check_arguments(
    net: Described, given: dict[str, Any], names: Iterable[str], *, required: bool = False
) -> dict[str, Any]:
    """Return the arguments `names` of `given`, checked; MISSING ones are omitted, so defaults apply."""
    found = {}
    for name in names:
        value = given.get(name, MISSING)
        if value is MISSING:
            if required:
                _refuse(net, name, value)
            continue
        found[name] = _check(net, name, value)
    return found


def _check(net: Described, name: str, value: Any) -> Any:
    if value is None and name in MAY_BE_NONE:
        return None
    if name == "resample_filter":
        if (
            type(value) in (list, tuple)
            and 0 < len(value) <= MAX_TAPS
            and all(_is_number(x, -1e6, 1e6) for x in value)
        ):
            return list(value)
        _refuse(net, name, value)
    limit = LIMITS[name]
    if limit[-1] in (int, float):
        low, high, number = limit
        if number is int and type(value) is float and value.is_integer():
            value = int(value)
        if not _is_number(value, low, high) or (number is int and type(value) is not int):
            _refuse(net, name, value)
    elif not any(type(value) is type(choice) and value == choice for choice in limit):
        _refuse(net, name, value)
    return value


def _is_number(value: Any, low: float, high: float) -> bool:
    return type(value) in (int, float) and low <= value <= high


def _refuse(net: Described, name: str, value: Any) -> None:
    shown = "is missing" if value is MISSING else f"is {printable(repr(value)[:80])}"
    raise net.refusal(f"the {net.class_name} in the pickle cannot be built: {name} {shown}")


def _check_filters(net: Described, arguments: dict[str, Any]) -> None:
    """Refuse a StyleGAN3 generator whose filters would take long to compute, before they are."""
    get = arguments.get
    count, critical = get("num_layers", 14), get("num_critical", 2)
    stop = get("first_stopband", 2**2.1)
    last_stop = arguments["img_resolution"] / 2 * get("last_stopband_rel", 2**0.3)
    total = 0.0
    previous = None
    for index in range(count + 1):
        part = min(index / max(count - critical, 1), 1)
        stopband = stop * (last_stop / stop) ** part
        rate = 2.0 ** math.ceil(math.log2(min(stopband * 2, arguments["img_resolution"])))
        before = rate if previous is None else previous
        inner = max(before, rate) * get("lrelu_upsampling", 2)
        taps = get("filter_size", 6) * max(inner / before, inner / rate)
        total += taps**2 if get("use_radial_filters", False) else taps
        previous = rate
    if total > MAX_FILTER_VALUES:
        _refuse(net, "the size of its filters", f"{total:.0f} values")
