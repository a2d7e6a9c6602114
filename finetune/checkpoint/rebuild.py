"""Rebuild a described network: every tensor of the file is assigned to exactly one place, or it is refused.

The module is first built on the device 'meta', which costs no memory. Once names, shapes and dtypes of all
networks of a file agree, `fill` allocates their tensors and copies the values.
"""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from finetune.checkpoint import arguments
from finetune.checkpoint.describe import MISSING, Described, describe
from finetune.checkpoint.legacy_tf import add_filters, describe_tf
from finetune.checkpoint.provenance import Generation
from finetune.checkpoint.unpickle.stubs import NOT_OPENED, PersistentObject, Tensor, TFNetwork, printable
from finetune.errors import CheckpointMismatch, PickleRefused
from finetune.models import stylegan2

MAX_GROWTH = 4  # times the size of the file, for all its networks together; one file may hold a network twice
SLACK = 64 << 20  # bytes, for what is not in the file
MEAN_SAMPLES = 10_000  # of w, if a file has no mean
MEAN_CHUNK = 100  # bounds the memory that a file of wide layers can take

MIN_GAIN, MAX_GAIN = 1e-6, 1e3  # of weights; 0.01 / √512 and 1 are those of published networks

# Attributes that decide what a module computes: where file and module both have one, they must agree.
DECISIVE = frozenset(
    """
    activation architecture conv_clamp up down padding use_noise is_torgb bias_gain act_gain
    group_size num_channels num_layers num_ws cmap_dim is_critically_sampled up_factor down_factor up_taps
    down_taps output_scale down_radial conv_kernel sampling_rate bandwidth in_sampling_rate
    out_sampling_rate in_cutoff out_cutoff in_half_width out_half_width in_size out_size margin_size size
    resolution img_resolution img_channels in_channels out_channels base_shape
    """.split()
)
# What every module has, and what only speeds things up.
IGNORED = frozenset(
    """
    training channels_last use_fp16 num_fp16_res layer_names block_resolutions fused_modconv_default
    img_resolution_log2 in_features out_features num_conv num_torgb w_dim z_dim c_dim is_last
    tmp_sampling_rate w_avg_beta magnitude_ema_beta first_layer_idx num_critical embed bias square
    """.split()
)


# Types of weights that become float32, and how.
CONVERTED = {
    "float16": "stored as float16 were widened to float32 (exact)",
    "bfloat16": "stored as bfloat16 were widened to float32 (exact)",
    "float64": "stored as float64 were narrowed to float32 (rounded)",
}


MAX_FLOAT32 = float(np.finfo(np.float32).max)


@dataclass(slots=True)
class Rebuilt:
    """A module, the tensors that `fill` gives it, and notes on what is ignored, one sentence each.

    lacks_w_avg: the mean w is not in the file and is estimated. factors: of weights, see `weight_factors`.
    """

    module: Any  # torch.nn.Module
    notes: list[str]
    generation: Generation
    tensors: Mapping[str, Tensor]
    lacks_w_avg: bool = False
    factors: Mapping[str, float] = field(default_factory=dict)


def rebuild(name: str, network: PersistentObject, base_shape: list[int] | None = None) -> Rebuilt:
    """Build the network that the entry `name` of a checkpoint describes, not filled yet.

    base_shape: that of the generator in the file, if there is one.

    Raises PickleRefused if it is not a known network, CheckpointMismatch with all differences if its
    tensors are not exactly those of the network.
    """
    net = describe(network)
    cls, kwargs = _recognize(name, net, base_shape)
    module = build_on_meta(cls, kwargs, net)
    differences = compare(net.tensors, module)
    if not differences:  # of another shape, every attribute would differ too
        differences = _differing_attributes(net, module)
    notes = check_tensors(name, net, module, differences) + _notes(name, net, module)
    factors = weight_factors(net, module)
    if factors:
        which = ", ".join(sorted(factors)[:3]) + (", …" if len(factors) > 3 else "")
        notes.append(f"{name}: weights multiplied by a weight_gain that is not that of their shape: {which}")
    return Rebuilt(module, notes, _generation(net), net.tensors, factors=factors)


def rebuild_tf(name: str, network: TFNetwork, base_shape: list[int] | None = None) -> Rebuilt:
    """Rebuild a network of the TensorFlow generation, like `rebuild`."""
    net, kwargs = describe_tf(network)
    kwargs |= arguments.base_shape(net, base_shape)
    module = build_on_meta(getattr(stylegan2, net.class_name), kwargs, net)
    options = kwargs if net.class_name == "Generator" else kwargs["block_kwargs"]
    add_filters(net, tensors_of(module), options["resample_filter"])
    notes = check_tensors(name, net, module, compare(net.tensors, module))
    return Rebuilt(module, notes, "tf", net.tensors)


def check_tensors(name: str, net: Described, module: torch.nn.Module, differences: list[str]) -> list[str]:
    """Return notes on converted types.

    Raises CheckpointMismatch with the `differences` if there are any, PickleRefused for a rectangle of
    another kind.
    """
    if differences and (why := _unknown_rectangle(net, module)):
        raise net.refusal(
            f"{name} in the pickle is a rectangular network that cannot be used here: {why}",
            hint="The file is not necessarily damaged.",
        )
    if differences:
        raise CheckpointMismatch(
            f"{name} describes a {type(module).__name__} that its tensors do not fit:",
            differences,
            hint="The file was changed after it was written, or comes from a code base with other networks.",
        )
    counts = Counter(tensor.dtype for tensor in net.tensors.values() if tensor.dtype in CONVERTED)
    return [f"{name}: {count} tensors {CONVERTED[dtype]}" for dtype, count in sorted(counts.items())]


def _unknown_rectangle(net: Described, module: torch.nn.Module) -> str | None:
    """Return why a StyleGAN2 network that is not square has no shape here; None for any other network."""
    const, fc = net.tensors.get("synthesis.b4.const"), net.tensors.get("b4.fc.weight")
    if getattr(module, "base_shape", arguments.SQUARE) != arguments.SQUARE:
        return None
    if const is not None and const.array.ndim == 3 and const.array.shape[1:] != (4, 4):
        height, width = const.array.shape[1:]
        return f"it starts at {height} x {width}, and the longer side must be 4"
    if fc is not None and fc.array.ndim == 2 and fc.array.shape[1] != 16 * fc.array.shape[0]:
        positions, rest = divmod(fc.array.shape[1], max(fc.array.shape[0], 1))
        if rest == 0 and positions:
            return f"its last block has {positions} positions, and no generator in the file has that shape"
    return None


def _recognize(name: str, net: Described, base_shape: list[int] | None) -> tuple[type, dict[str, Any]]:
    """Return the class and constructor arguments, determined by the state and not by class names."""
    if net.has("synthesis.input") and net.has("mapping"):
        from finetune.models import stylegan3

        return stylegan3.Generator, arguments.generator_arguments(net)
    if net.has("synthesis.b4") and net.has("mapping"):
        return stylegan2.Generator, arguments.generator_arguments(net)
    if net.has("b4.conv") and net.has("b4.out"):
        return stylegan2.Discriminator, arguments.discriminator_arguments(net, base_shape)
    if {"p", "Hz_geom"} <= set(net.tensors):
        from finetune.models import augment

        names = list(inspect.signature(augment.AugmentPipe).parameters)
        return augment.AugmentPipe, arguments.augment_arguments(net, names)
    raise PickleRefused(
        f"{name} in the pickle is an object of class {net.class_name} (at byte {net.offset}), which is no "
        "StyleGAN2 or StyleGAN3 network; its code is inside the file and is never run",
        offset=net.offset,
        blocked=net.class_name,
        hint=NOT_OPENED,
    )


def build_on_meta(cls: type, kwargs: dict[str, Any], net: Described) -> torch.nn.Module:
    """Construct `cls` without memory for its tensors; PickleRefused where its arguments contradict each
    other.
    """
    try:
        with ShapesOnly():
            return cls(**kwargs)
    except (TypeError, ValueError, ArithmeticError, LookupError, RuntimeError, AssertionError) as error:
        why = printable(str(error)) or type(error).__name__
        raise net.refusal(f"the {net.class_name} in the pickle cannot be built: {why}") from None


class ShapesOnly(TorchFunctionMode):
    """Build networks without memory or values: large tensors on 'meta', small ones all zero.

    As `torch.device("meta")`, whose arithmetic runs in Python and imports torch._dynamo: 0.8 s and 170 MB.
    """

    LARGE = 1 << 14  # elements
    FACTORIES = frozenset({torch.randn, torch.rand, torch.zeros, torch.ones, torch.full})
    SCALINGS = frozenset({torch.Tensor.mul, torch.Tensor.div})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.FACTORIES:
            size = args[0] if isinstance(args[0], list | tuple) else args[: 1 if func is torch.full else None]
            dtype = (kwargs or {}).get("dtype")
            if math.prod(size) > self.LARGE:
                return torch.empty(size, dtype=dtype, device="meta")
            return torch.zeros(size, dtype=dtype)
        if func in self.SCALINGS and args[0].is_meta and not isinstance(args[1], torch.Tensor):
            return args[0]
        return func(*args, **(kwargs or {}))


def tensors_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return all parameters and buffers by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def compare(found: dict[str, Tensor], module: torch.nn.Module) -> list[str]:
    """Return all differences in names, shapes and dtypes between file and module, one line each."""
    wanted = tensors_of(module)
    lines = []
    for name in sorted({*found, *wanted}):
        if name not in wanted:
            lines.append(f"{name} {list(found[name].array.shape)} is in the file and not in the network")
        elif name not in found:
            lines.append(f"{name} {list(wanted[name].shape)} is not in the file")
        else:
            seen, shape = found[name], list(wanted[name].shape)
            dtype = str(wanted[name].dtype).removeprefix("torch.")
            has_shape = list(seen.array.shape) == shape
            if not has_shape:
                lines.append(f"{name} is {list(seen.array.shape)} in the file and {shape} in the network")
            if seen.dtype != dtype and not (dtype == "float32" and seen.dtype in CONVERTED):
                lines.append(f"{name} is {seen.dtype} in the file and {dtype} in the network")
            elif has_shape and seen.dtype == "float64" and (peak := _peak(seen.array)) > MAX_FLOAT32:
                lines.append(f"{name} has a value of {peak:.3g}, too large for float32")
    return lines


def check_growth(networks: Iterable[Rebuilt], size: int) -> None:
    """Raise PickleRefused if networks, which may share tensors in a file, take much more than its bytes."""
    tensors = [tensor for network in networks for tensor in tensors_of(network.module).values()]
    if sum(tensor.numel() * tensor.element_size() for tensor in tensors) > MAX_GROWTH * size + SLACK:
        raise PickleRefused("the networks of the pickle would take several times its size on disk", offset=0)


def _peak(values: np.ndarray) -> float:
    """Return the largest finite absolute value."""
    return float(np.abs(values).max(initial=0.0, where=np.isfinite(values)))


def fill(networks: Iterable[Rebuilt], give_back: Callable[[int], None] = lambda address: None) -> None:
    """Give the tensors of all networks memory and the values of the file; eval mode, no gradients.

    The values are copied in the order of their addresses. `give_back(address)` is called when everything
    below an address has been copied, and may free it.
    """
    networks, copies = list(networks), []
    for network in networks:
        module, found, targets = network.module, network.tensors, tensors_of(network.module)
        filled = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in targets.items()}
        copies += [(_first_address(found[name].array), filled[name], found[name]) for name in filled]
        module.load_state_dict(filled, assign=True)
        module.eval().requires_grad_(False)
    for address, tensor, source in sorted(copies, key=lambda copy: copy[0]):
        give_back(address)
        np.copyto(tensor.numpy(), values_of(source), casting="same_kind")
    for network in networks:
        for name, factor in network.factors.items():
            network.module.get_parameter(name).mul_(factor)
        if network.lacks_w_avg:
            _estimate_w_avg(network.module)


@torch.no_grad()
def _estimate_w_avg(G: Any) -> None:
    """Set the mean w of a generator from MEAN_SAMPLES latents of a fixed seed, few at a time."""
    generator = torch.Generator().manual_seed(0)
    c = torch.zeros([MEAN_CHUNK, G.c_dim])
    for _ in range(MEAN_SAMPLES // MEAN_CHUNK):
        z = torch.randn([MEAN_CHUNK, G.z_dim], generator=generator)
        G.mapping.w_avg.add_(G.mapping(z, c)[:, 0].sum(dim=0) / MEAN_SAMPLES)


def _first_address(array: np.ndarray) -> int:
    """Return the lowest address that the array reads."""
    backward = sum((extent - 1) * step for extent, step in zip(array.shape, array.strides) if step < 0)
    return array.ctypes.data + (backward if array.size else 0)


def values_of(tensor: Tensor) -> np.ndarray:
    """Return the values of a tensor for numpy, in float32 at most."""
    if tensor.dtype == "bfloat16":  # the upper half of a float32
        return (tensor.array.astype(np.uint32) << 16).view(np.float32)
    return tensor.array.astype(np.float32) if tensor.dtype == "float64" else tensor.array


def _differing_attributes(net: Described, module: torch.nn.Module) -> list[str]:
    lines = []
    for path, ours in module.named_modules():
        if not net.has(path):  # one without tensors, which would be missed otherwise
            lines.append(f"{path} ({type(ours).__name__}) is not in the file")
            continue
        gain = net.get(path, "weight_gain")
        if gain is not MISSING and not (type(gain) in (int, float) and MIN_GAIN < gain < MAX_GAIN):
            shown = printable(repr(gain)[:80])
            lines.append(f"{path}.weight_gain = {shown} in the file, and not a number that layers have")
        for name in sorted(DECISIVE & vars(ours).keys() & net.modules[path].keys()):
            seen, wanted = net.get(path, name), vars(ours)[name]
            if not _agree(seen, wanted):
                shown = printable(repr(seen)[:80])
                lines.append(
                    f"{path + '.' if path else ''}{name} = {shown} in the file and {wanted} in the network"
                )
    ours = dict(module.named_modules())
    return lines + [
        f"{printable(path)} is in the file and not in the network" for path in net.modules if path not in ours
    ]


def weight_factors(net: Described, module: torch.nn.Module) -> dict[str, float]:
    """Return the factor of each weight whose `weight_gain` in the file is not that of its shape.

    Networks whose layers were cut or widened keep the gain of the first shape; the product of gain and
    weight is what they compute with.
    """
    found = {}
    for path, ours in module.named_modules():
        seen, wanted = net.get(path, "weight_gain"), getattr(ours, "weight_gain", None)
        if wanted is not None and seen is not MISSING and not _agree(seen, wanted):
            found[f"{path}.weight"] = seen / wanted
    return found


def _agree(seen: Any, wanted: Any) -> bool:
    """Return whether numbers, strings or lists of them are equal; one number equals a list of it."""
    if isinstance(wanted, np.ndarray | np.generic):
        wanted = wanted.tolist()
    if isinstance(seen, list | tuple) or isinstance(wanted, list | tuple):
        seen = seen if isinstance(seen, list | tuple) else [seen] * len(wanted)
        wanted = wanted if isinstance(wanted, list | tuple) else [wanted] * len(seen)
        return len(seen) == len(wanted) and all(map(_agree, seen, wanted))
    if isinstance(seen, int | float) and isinstance(wanted, int | float):
        return math.isclose(seen, wanted, rel_tol=1e-6)
    return type(seen) is type(wanted) and seen == wanted


def _notes(name: str, net: Described, module: torch.nn.Module) -> list[str]:
    notes = []
    unknown = set()
    for path, ours in module.named_modules():
        unknown |= {key for key in net.modules[path] if type(key) is str and not key.startswith("_")} - vars(
            ours
        ).keys()
    unknown -= IGNORED | DECISIVE
    if unknown:
        notes.append(f"{name}: unknown attributes ignored: {', '.join(sorted(map(printable, unknown)))}")
    if not {"p", "Hz_geom"} <= set(net.tensors) and (unused := arguments.unused_arguments(net)):
        notes.append(f"{name}: unknown constructor arguments ignored: {', '.join(unused)}")
    parameters = {key for key, _ in module.named_parameters()}
    frozen = sum(
        key in parameters and key.endswith("weight") for key, t in net.tensors.items() if not t.is_parameter
    )
    if frozen:
        notes.append(f"{name}: {frozen} layers were frozen in training and can be trained again")
    return notes


def _generation(net: Described) -> Literal["ada", "sg3"]:
    """Return 'sg3' or 'ada', distinguished by the attributes of fully connected layers."""
    if "synthesis_kwargs" in net.arguments("", arguments.GENERATOR):
        return "ada"
    dense = (path for path in net.modules if path.endswith((".fc0", ".fc", ".affine")))
    return "sg3" if any(net.get(path, "in_features") is not MISSING for path in dense) else "ada"
