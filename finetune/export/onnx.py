"""Write a generator as ONNX: opset 18, standard operators only, float32, for any batch size.

Inputs: `z` [N, z_dim], `c` [N, c_dim] (only with classes), `truncation_psi` []. Outputs: `img` [N, C, H, W]
and `ws` [N, num_ws, w_dim], where onnx.utils.extract_model can cut mapping and synthesis apart. In StyleGAN2
`noise` [1 or N, number of pixels of all noise maps] is an optional input; left out, it is the network's own.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetune.checkpoint.load import NETWORKS, Checkpoint
from finetune.checkpoint.rebuild import tensors_of
from finetune.errors import ConfigError, ExportError
from finetune.export.provenance import entry_of
from finetune.export.stylegan_pickle import plain
from finetune.models import Network
from finetune.version import __version__
from torch_utils.files import atomic_write
from torch_utils.ops import impl

OPSET = 18
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
MIN_TORCH = "2.8"  # the exporter of torch 2.6 makes the batch size a constant, or fails
PARTS = ("mapping", "synthesis")
NOISE = ".noise_const"


def write(
    path: str | os.PathLike, checkpoint: Checkpoint, *, check: Callable[[Path], None] | None = None
) -> None:
    """Write the generator of `checkpoint`, with its provenance and license as metadata.

    `check` is called with the finished temporary file before it takes its name. Raises ExportError unless
    there is one generator and nothing else, ConfigError without the packages of the extra `onnx`, WriteError
    if the file cannot be written; a file that was at `path` before is then untouched.
    """
    held = [name for name in NETWORKS if name not in checkpoint.missing]
    if held not in (["G_ema"], ["G"]):
        raise ExportError(
            f"An ONNX file has one generator, not {', '.join(held)}.", hint="Use --which G_ema or --which G."
        )
    model = join(*(to_onnx(checkpoint.generator, part) for part in PARTS))
    add_metadata(model, metadata_of(checkpoint))
    content = model.SerializeToString()
    with atomic_write(path) as stream:
        stream.write(content)
        if check is not None:
            stream.flush()
            check(Path(stream.name))


def metadata_of(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the metadata of an ONNX file, origin and license: strings, as the format requires."""
    return {
        "version": __version__,
        "family": checkpoint.family,
        "network": "G" if checkpoint.G_ema is None else "G_ema",
        "finetune": json.dumps(plain(entry_of(checkpoint), "provenance")),
        "license": checkpoint.provenance.licence or "",
    }


def to_onnx(G: Network, part: str, *, original: Network | None = None, noise_input: bool = True) -> Any:
    """Return a part of `G` as an `onnx.ModelProto`: "mapping" up to `ws`, or "synthesis" from there.

    With `original`, a network of equal shapes, the input `alpha` [] blends the weights linearly, buffers
    included: 0 is `original`, 1 is `G`, exactly. Noise is not an input then. ConfigError if shapes differ.
    Source: "Deep Network Interpolation" (1811.10515), equation 1.
    """
    require_packages()
    graph = _Graph(G, part, original, noise_input and original is None).eval()
    with torch.no_grad(), warnings.catch_warnings(), impl.using("ref"):
        warnings.simplefilter("ignore")  # the exporter warns about its own use of torch
        program = torch.onnx.export(
            graph,
            tuple(graph.examples.values()),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(graph.examples),
            output_names=["ws" if part == "mapping" else "img"],
            dynamic_shapes=(graph.dynamic_shapes(),),
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    model.producer_name, model.producer_version = "stylegan-finetune", __version__
    if graph.maps:
        _make_noise_optional(model, graph.noise().numpy())
    return model


def join(mapping: Any, synthesis: Any) -> Any:
    """Return the two parts of `to_onnx` as one model with the outputs `img` and `ws`."""
    from onnx import compose

    renamed = compose.add_prefix(mapping, "mapping.", rename_inputs=False, rename_outputs=False)
    model = compose.merge_models(renamed, synthesis, io_map=[("ws", "ws")], name="generator")
    model.graph.output.extend(mapping.graph.output)
    del model.opset_import[1:]  # a duplicate
    model.producer_name, model.producer_version = mapping.producer_name, mapping.producer_version
    return model


def add_metadata(model: Any, metadata: Mapping[str, str]) -> None:
    """Add `metadata` to an `onnx.ModelProto`."""
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value)


def require_packages() -> None:
    """Raise ConfigError unless torch can export, and the packages of the extra `onnx` are installed."""
    if torch.__version__ < MIN_TORCH:  # compared as versions
        raise ConfigError(
            f"torch {torch.__version__}: too old for ONNX, which needs {MIN_TORCH}. Install a newer torch."
        )
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"ONNX needs {', '.join(missing)}, which this environment lacks.",
            hint="Install them with: pip install 'stylegan-finetune[onnx]'",
        )


class _Graph(torch.nn.Module):
    """A part of a generator as a function of tensors alone; `examples` has them in order."""

    run: _Mapping | _Synthesis

    def __init__(self, G: Network, part: str, original: Network | None, noise_input: bool) -> None:
        super().__init__()
        network = plain_copy(getattr(G, part))
        self.run = _Mapping(network) if part == "mapping" else _Synthesis(network)
        self.original = None if original is None else plain_copy(getattr(original, part))
        self.blended = [] if self.original is None else _differing(part, self.run.network, self.original)
        batch = 2  # one example would make the batch size a constant of the graph
        if part == "synthesis":
            self.examples = {"ws": torch.randn([batch, G.num_ws, G.w_dim])}
        else:
            self.examples = {"z": torch.randn([batch, G.z_dim])}
            if G.c_dim > 0:
                self.examples["c"] = torch.eye(G.c_dim)[torch.arange(batch) % G.c_dim]
            self.examples["truncation_psi"] = torch.tensor(0.5)
        self.inputs = list(self.examples)
        if self.original is not None:
            self.examples["alpha"] = torch.tensor(0.5)
        self.maps: dict[str, torch.Tensor] = {}
        if noise_input:
            self.maps = {name: x for name, x in self.run.network.named_buffers() if name.endswith(NOISE)}
        if self.maps:
            self.examples["noise"] = self.noise().expand(batch, -1).clone()

    def noise(self) -> torch.Tensor:
        """Return the noise maps of the network in one row."""
        return torch.cat([x.reshape(1, -1) for x in self.maps.values()], dim=1)

    def dynamic_shapes(self) -> tuple[dict[int, Any], ...]:
        """Return the dimensions of each example that are variable."""
        batch = torch.export.Dim("N")
        return tuple({0: batch} if x.ndim else {} for x in self.examples.values())

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        given = dict(zip(self.examples, tensors))
        replaced = {}
        if self.maps:
            parts = given["noise"].split([x.numel() for x in self.maps.values()], dim=1)
            replaced = {
                name: part.reshape(-1, 1, *x.shape) for (name, x), part in zip(self.maps.items(), parts)
            }
        if self.original is not None:
            alpha = given["alpha"]
            ours, theirs = tensors_of(self.run.network), tensors_of(self.original)
            # Not torch.lerp, which not every runtime computes exactly at both ends.
            replaced = {name: theirs[name] * (1 - alpha) + ours[name] * alpha for name in self.blended}
        replaced = {f"network.{name}": tensor for name, tensor in replaced.items()}
        return torch.func.functional_call(self.run, replaced, tuple(given[name] for name in self.inputs))


class _Mapping(torch.nn.Module):
    network: Network

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, z: torch.Tensor, *c_and_psi: torch.Tensor) -> torch.Tensor:
        *c, psi = c_and_psi
        ws = self.network(z, c[0] if c else z[:, :0])
        return self.network.w_avg * (1 - psi) + ws * psi


class _Synthesis(torch.nn.Module):
    network: Network

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, ws: torch.Tensor) -> torch.Tensor:
        return self.network(ws, noise_mode="const")


def plain_copy(network: Network) -> Network:
    """Return a copy on the CPU, in float32, evaluation mode and without gradients."""
    return copy.deepcopy(network).cpu().float().eval().requires_grad_(False)


def _differing(part: str, network: Network, original: Network) -> list[str]:
    """Return the names of the tensors whose values differ; ConfigError if names or shapes do."""
    ours, theirs = tensors_of(network), tensors_of(original)
    for name in sorted(ours.keys() | theirs.keys()):
        shapes = [list(side[name].shape) if name in side else "absent" for side in (theirs, ours)]
        if shapes[0] != shapes[1]:
            raise ConfigError(
                f"--original: another architecture ({part}.{name} is {shapes[0]}, here {shapes[1]}). Only "
                "weights of equal shapes can be blended: give the checkpoint that training started from."
            )
    return [name for name in ours if not torch.equal(ours[name], theirs[name])]


def _make_noise_optional(model: Any, noise: np.ndarray) -> None:
    """Give the input `noise` an initializer: such an input may be left out."""
    from onnx import numpy_helper

    (value,) = (value for value in model.graph.input if value.name == "noise")
    value.type.tensor_type.shape.dim[0].dim_param = "1 or N"
    model.graph.initializer.append(numpy_helper.from_array(noise, "noise"))
    del model.graph.value_info[:]  # shapes of intermediate values, which hold for N rows of noise only


def session_of(model: str | os.PathLike | bytes) -> Any:
    """Return the onnxruntime session of a file, or of its content, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; it warns about an input that may be left out
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


class OnnxGenerator:
    """A written generator in onnxruntime on the CPU, called as the network is."""

    def __init__(self, path: str | os.PathLike) -> None:
        self.session = session_of(path)
        self.inputs = {value.name for value in self.session.get_inputs()}
        self.noise_shapes = [value.shape for value in self.session.get_overridable_initializers()]

    def __call__(
        self, z: torch.Tensor, c: torch.Tensor, *, truncation_psi: float = 1, noise_mode: str = "const"
    ) -> torch.Tensor:
        """Return images [N, C, H, W] on the CPU; `noise_mode` is "const" or "none"."""
        given = {"z": z.cpu().numpy(), "truncation_psi": np.array(truncation_psi, np.float32)}
        if "c" in self.inputs:
            given["c"] = c.cpu().numpy()
        if noise_mode == "none" and self.noise_shapes:
            given["noise"] = np.zeros([1, self.noise_shapes[0][1]], np.float32)
        return torch.from_numpy(self.session.run(["img"], given)[0])


def reopen(path: Path, device: torch.device) -> dict[str, OnnxGenerator]:
    """Return the generator of a written file by its name; it computes on the CPU whatever `device` is."""
    generator = OnnxGenerator(path)
    return {generator.session.get_modelmeta().custom_metadata_map["network"]: generator}
