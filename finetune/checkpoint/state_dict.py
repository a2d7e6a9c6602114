"""State dicts with the names of the StyleGAN2-ADA and StyleGAN3 trees: networks that follow from shapes.

A state dict is tensors by name. Sizes, channels, number of layers and kind of network can be read off; what
leaves no trace in a tensor is taken from the caller or else assumed to be as the published networks have it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from finetune.checkpoint import arguments
from finetune.checkpoint.describe import MAX_DEPTH, MAX_ENTRIES, Described
from finetune.checkpoint.provenance import Generation
from finetune.checkpoint.rebuild import (
    MEAN_SAMPLES,
    Rebuilt,
    build_on_meta,
    check_tensors,
    compare,
    values_of,
)
from finetune.checkpoint.unpickle.stubs import Tensor, expect
from finetune.checkpoint.unpickle.values import Record
from finetune.errors import CheckpointError
from finetune.models import stylegan2

Tensors = Mapping[str, Tensor]
BILINEAR = (1, 3, 3, 1)
ASSUMED = {"conv_clamp": 256, "num_fp16_res": 4}  # as both trees train
# Arguments that a StyleGAN3 generator's filters and sizes depend on, and that no shape determines.
BANDS = ("num_critical", "first_cutoff", "first_stopband", "last_stopband_rel", "margin_size", "filter_size")
FILTERS = (".up_filter", ".down_filter")
SAME_FILTER = 1e-6
ROUNDING = {"float16": 1e-3, "bfloat16": 1e-2}  # relative, of stored filters
WRAPPED = "module."  # what DistributedDataParallel and DataParallel put before each name
MAX_NAME = 200  # letters of the name of a tensor
HOW = "with `finetune convert --arch NAME=VALUE`, or finetune.load(path, architecture={...})"


@dataclass(slots=True, eq=False)
class StateDict:
    """The tensors of a network by our names, and what is known about its construction.

    stated: its constructor arguments, if the file has them. assumed: arguments that no tensor determines.
    lacks_w_avg: the mean w is to be estimated.
    """

    tensors: dict[str, Tensor]
    stated: Mapping[str, Any] | None = None
    assumed: Mapping[str, Any] = field(default_factory=lambda: ASSUMED)
    generation: Generation = "state-dict"
    lacks_w_avg: bool = False


def tensors_of_state(value: Any) -> dict[str, Tensor] | None:
    """Return the tensors of a state dict, or of a whole module whose class is unknown here, by name.

    None for anything else. Raises PickleRefused for names or nesting that no network has.
    """
    if type(value) is Record and type(value.state) is dict and "_modules" in value.state:
        found = _tensors_of_module(value)
    elif type(value) is dict and {(type(key), type(item)) for key, item in value.items()} == {(str, Tensor)}:
        found = value
        for key in found:
            _check_name(key, 0)
    else:
        return None
    if all(key.startswith(WRAPPED) for key in found):
        return {key.removeprefix(WRAPPED): tensor for key, tensor in found.items()}
    return found


def _check_name(key: Any, offset: int) -> None:
    is_short = type(key) is str and len(key) <= MAX_NAME and key.count(".") <= MAX_DEPTH
    expect(is_short and key.isprintable(), "an invalid tensor name", offset)


def _tensors_of_module(root: Record) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    todo: list[tuple[str, Any]] = [("", root)]
    num_entries = 0  # one table may be that of many modules, so the size of the file bounds nothing here
    while todo:
        prefix, module = todo.pop()
        state = module.state if type(module) is Record and type(module.state) is dict else {}
        for group in ("_parameters", "_buffers", "_modules"):
            table = state.get(group)
            for name, item in table.items() if type(table) is dict else ():
                num_entries += 1
                expect(num_entries <= MAX_ENTRIES, "its modules have too many entries", root.offset)
                key = f"{prefix}{name}"
                _check_name(key, root.offset)
                if group == "_modules":
                    todo.append((f"{key}.", item))
                elif type(item) is Tensor:
                    found[key] = item
    return found


def is_discriminator(tensors: Tensors) -> bool:
    return "b4.out.weight" in tensors


def is_known(tensors: Tensors) -> bool:
    """Return whether the names are those of a network that can be opened."""
    firsts = ("synthesis.b4.const", "synthesis.input.weight")
    is_generator = any(first in tensors for first in firsts) and any(
        key.startswith("mapping.") for key in tensors
    )
    return is_discriminator(tensors) or is_generator


def rebuild_state(
    name: str,
    state: StateDict,
    base_shape: list[int] | None = None,
    *,
    given: Mapping[str, Any] | None = None,
) -> Rebuilt:
    """Build the network `name` of a file from its tensors.

    base_shape: that of the generator in the file, if there is one. given: constructor arguments of the
    caller, for those that no tensor determines. Raises CheckpointError if more are needed, CheckpointMismatch
    if the tensors are not exactly those of the network.
    """
    tensors = state.tensors
    if not is_known(tensors):
        raise CheckpointError(
            f"{name} is a state dict of an unknown network ({', '.join(sorted(tensors)[:3])}, …)",
            hint="Tensors of StyleGAN2 and StyleGAN3 networks with the names of the official PyTorch code or "
            "of the StyleGAN2 port by rosinality can be opened.",
        )
    kwargs, notes, given = state.stated, list[str](), given or {}
    if kwargs is None:
        kwargs = _discriminator(tensors) if is_discriminator(tensors) else _generator(tensors)
        _merge(tensors, kwargs, state.assumed)
        _merge(tensors, kwargs, given)
        note = f"{name}: architecture read off its tensors"
        if assumed := [f"{key}={value}" for key, value in state.assumed.items() if key not in given]:
            note += f"; assumed {', '.join(assumed)}"
        notes.append(note)
    check_bands = state.stated is None
    module, more = rebuild_described(name, tensors, kwargs, base_shape, check_bands=check_bands)
    notes += more
    if state.lacks_w_avg:
        notes.append(f"{name}: no mean w in the file; estimated from {MEAN_SAMPLES:,} z")
    return Rebuilt(module, notes, state.generation, tensors, state.lacks_w_avg)


def rebuild_described(
    name: str,
    tensors: Tensors,
    kwargs: Mapping[str, Any],
    base_shape: list[int] | None = None,
    *,
    check_bands: bool = False,
) -> tuple[torch.nn.Module, list[str]]:
    """Build a network from constructor arguments and tensors, under the same checks as one from a pickle.

    check_bands: compare the filters of a StyleGAN3 generator, too. Returns the module, not filled yet, and
    notes.
    """
    net = Described(class_name="Discriminator" if is_discriminator(tensors) else "Generator", offset=0)
    net.tensors.update(tensors)
    net.modules[""] = {"_init_kwargs": dict(kwargs)}
    for key in tensors:
        _check_name(key, 0)
        while "." in key:
            key = key.rpartition(".")[0]
            net.modules.setdefault(key, {})
    if is_discriminator(tensors):
        checked = arguments.discriminator_arguments(net, base_shape)
        module = build_on_meta(stylegan2.Discriminator, checked, net)
    elif net.has("synthesis.input"):
        from finetune.models import stylegan3

        module = build_on_meta(stylegan3.Generator, arguments.generator_arguments(net), net)
    else:
        module = build_on_meta(stylegan2.Generator, arguments.generator_arguments(net), net)
    differences = compare(net.tensors, module)
    if check_bands and net.has("synthesis.input"):
        _check_bands(name, net, module, differences)
    return module, check_tensors(name, net, module, differences)


def _check_bands(name: str, net: Described, module: Any, differences: list[str]) -> None:
    buffers = dict(module.named_buffers())
    same = not differences and all(
        np.allclose(
            values_of(tensor), buffers[key].numpy(), rtol=ROUNDING.get(tensor.dtype, 1e-5), atol=SAME_FILTER
        )
        for key, tensor in net.tensors.items()
        if key.endswith(FILTERS)
    )
    if not same:
        used = {key: value for key, value in module.init_kwargs.items() if key in BANDS}
        raise CheckpointError(
            f"{name} is a StyleGAN3 generator whose layers are not those of "
            f"{', '.join(f'{key}={value}' for key, value in used.items()) or 'the published configurations'}",
            hint=f"Its tensors do not determine {', '.join(BANDS)}. Pass those of its training {HOW}.",
        )


def _places(tensors: Tensors) -> dict[str, tuple[str, ...]]:
    """Return the names of constructor arguments by the argument that has them ("": the constructor)."""
    if is_discriminator(tensors):
        top = (*arguments.DISCRIMINATOR, "num_fp16_res", "conv_clamp", "cmap_dim")
        nested = {"block_kwargs": arguments.BLOCK, "epilogue_kwargs": arguments.EPILOGUE}
        return {"": top, "mapping_kwargs": arguments.MAPPING, **nested}
    synthesis = arguments.SYNTHESIS3 if "synthesis.input.weight" in tensors else arguments.SYNTHESIS2
    return {"": (*arguments.GENERATOR[:5], *synthesis), "mapping_kwargs": arguments.MAPPING}


def check_given(given: Mapping[str, Any], states: Iterable[StateDict]) -> None:
    """Raise CheckpointError for an argument that no network of a file has, or if all are stated there."""
    inferred = [state for state in states if state.stated is None]
    if not inferred:
        raise CheckpointError("the file states how its networks are built; no architecture can be given.")
    known = {key for state in inferred for names in _places(state.tensors).values() for key in names}
    if unknown := sorted(given.keys() - known):
        raise CheckpointError(
            f"architecture {', '.join(unknown)}: unknown. The networks have: {', '.join(sorted(known))}."
        )


def _merge(tensors: Tensors, kwargs: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Nest arguments as the constructor expects them; unknown ones are omitted."""
    for place, names in _places(tensors).items():
        values = {key: value for key, value in more.items() if key in names}
        (kwargs.setdefault(place, {}) if place else kwargs).update(values)


def _shape(tensors: Tensors, key: str, ndim: int) -> tuple[int, ...]:
    tensor = tensors.get(key)
    if tensor is None or tensor.array.ndim != ndim:
        seen = "missing" if tensor is None else f"of shape {list(tensor.array.shape)}"
        raise CheckpointError(f"the state dict cannot be read: {key} is {seen}")
    return tensor.array.shape


def _resolutions(tensors: Tensors, prefix: str) -> list[int]:
    found = {int(match[1]) for key in tensors if (match := re.match(rf"{prefix}b(\d{{1,5}})\.", key))}
    return sorted(found)


def _channels(by_resolution: Mapping[int, int]) -> dict[str, int]:
    """Return the channel_base and channel_max that give these channels, if any do."""
    widest = max(by_resolution.values())
    narrow = [res * num for res, num in by_resolution.items() if num < widest]
    highest = max(by_resolution)
    return {"channel_base": max([*narrow, highest * by_resolution[highest]]), "channel_max": widest}


def taps_of(tensors: Tensors, key: str) -> list[float]:
    """Return the taps of the filter `key`, 1-D or an outer product; CheckpointError if it is neither."""
    if key not in tensors:
        return list(BILINEAR)
    with np.errstate(all="ignore"):
        taps = values_of(tensors[key])
        total = float(taps.sum())
        is_square = taps.ndim == 2 and taps.shape[0] == taps.shape[1]
        sums = taps.sum(axis=1) if is_square else taps
        is_outer = is_square and np.allclose(np.outer(sums, sums), taps * total, atol=SAME_FILTER)
        if not (taps.ndim == 1 or is_outer) or not np.isfinite(total) or total == 0:
            raise CheckpointError(f"the state dict cannot be read: {key} is no separable filter")
        scaled = sums / sums.sum() * sum(BILINEAR)
    same = scaled.shape == (4,) and np.allclose(scaled, BILINEAR, atol=SAME_FILTER)
    return list(BILINEAR) if same else [float(tap) for tap in sums]


def _mapping(tensors: Tensors, w_dim: int) -> tuple[dict[str, Any], int, int]:
    """Return the arguments of the mapping network, the width of its input without label, and the label's."""
    layers = sum(re.fullmatch(r"mapping\.fc\d+\.weight", key) is not None for key in tensors)
    found: dict[str, Any] = {"num_layers": layers}
    embed, c_dim = 0, 0
    if "mapping.embed.weight" in tensors:
        embed, c_dim = _shape(tensors, "mapping.embed.weight", 2)
        found["embed_features"] = embed
    hidden, width = _shape(tensors, "mapping.fc0.weight", 2) if layers else (w_dim, w_dim)
    if layers > 1:
        found["layer_features"] = hidden
    return found, width - embed, c_dim


def _generator(tensors: Tensors) -> dict[str, Any]:
    is_stylegan3 = "synthesis.input.weight" in tensors
    first = "synthesis.input.affine.weight" if is_stylegan3 else "synthesis.b4.conv1.affine.weight"
    w_dim = _shape(tensors, first, 2)[1]
    mapping, z_dim, c_dim = _mapping(tensors, w_dim)
    synthesis = _synthesis3(tensors) if is_stylegan3 else _synthesis2(tensors)
    return {"z_dim": z_dim, "c_dim": c_dim, "w_dim": w_dim, "mapping_kwargs": mapping, **synthesis}


def _synthesis2(tensors: Tensors) -> dict[str, Any]:
    sizes = _resolutions(tensors, r"synthesis\.")
    last = f"synthesis.b{sizes[-1]}"
    architecture = "skip" if "synthesis.b4.torgb.weight" in tensors else "orig"
    if "synthesis.b8.skip.weight" in tensors:
        architecture = "resnet"
    return {
        "img_resolution": sizes[-1],
        "img_channels": _shape(tensors, f"{last}.torgb.weight", 4)[0],
        **_channels({res: _shape(tensors, f"synthesis.b{res}.conv1.weight", 4)[0] for res in sizes}),
        "architecture": architecture,
        "use_noise": "synthesis.b4.conv1.noise_const" in tensors,
        "resample_filter": taps_of(tensors, "synthesis.b4.resample_filter"),
    }


def _synthesis3(tensors: Tensors) -> dict[str, Any]:
    pattern = r"synthesis\.L(\d{1,3})_(\d{1,5})_(\d{1,5})\.weight"
    matches = [match for key in tensors if (match := re.fullmatch(pattern, key))]
    layers = sorted(tuple(map(int, match.groups())) for match in matches)
    if len(layers) < 2 or [layer[0] for layer in layers] != list(range(len(layers))):
        raise CheckpointError("the state dict cannot be read: layers of the StyleGAN3 generator are missing")
    widths = [width for _, _, width in layers[:-1]]
    kernel = _shape(tensors, "synthesis.L0_{1}_{2}.weight".format(*layers[0]), 4)[2]
    radial = any(t.array.ndim == 2 for key, t in tensors.items() if key.endswith(".down_filter"))
    return {
        "img_resolution": layers[-1][1],
        "img_channels": layers[-1][2],
        # The layer before ToRGB is critically sampled: its cutoff is half the resolution.
        "channel_base": widths[-1] * layers[-1][1],
        "channel_max": max(widths),
        "num_layers": len(layers) - 1,
        "conv_kernel": kernel,
        "use_radial_filters": radial,
    }


def _discriminator(tensors: Tensors) -> dict[str, Any]:
    sizes = [res for res in _resolutions(tensors, "") if res > 4]
    resolution = sizes[-1] if sizes else 4
    width = _shape(tensors, "b4.fc.weight", 2)[0]
    from_rgb = f"b{resolution}.fromrgb.weight"
    widths = {res: _shape(tensors, f"b{res}.conv0.weight", 4)[1] for res in sizes}
    architecture = "resnet" if f"b{resolution}.skip.weight" in tensors else "orig"
    if "b4.fromrgb.weight" in tensors:
        architecture = "skip"
    found: dict[str, Any] = {
        "c_dim": 0,
        "img_resolution": resolution,
        "img_channels": _shape(tensors, from_rgb, 4)[1],
        "architecture": architecture,
        **_channels({**widths, 4: width}),
        "block_kwargs": {"resample_filter": taps_of(tensors, f"b{resolution}.resample_filter")},
        "mapping_kwargs": {},
        "epilogue_kwargs": {"mbstd_num_channels": _shape(tensors, "b4.conv.weight", 4)[1] - width},
    }
    if "mapping.embed.weight" in tensors:
        found["cmap_dim"] = _shape(tensors, "b4.out.weight", 2)[0]
        found["mapping_kwargs"], _, found["c_dim"] = _mapping(tensors, found["cmap_dim"])
    return found
