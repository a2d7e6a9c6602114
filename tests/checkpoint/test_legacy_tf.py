"""The TensorFlow generation: every layer that its networks can have, written the way that it stores them."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from checkpoint import forge

import finetune
from finetune.checkpoint.rebuild import tensors_of
from finetune.checkpoint.unpickle.files import read_pickle
from finetune.checkpoint.unpickle.stubs import Array, TFNetwork
from finetune.errors import CheckpointMismatch, PickleRefused
from finetune.models import stylegan2

SMALL = {"channel_base": 128, "channel_max": 8, "num_fp16_res": 0, "conv_clamp": None}
OPTIONS = {"resolution": 16, "num_channels": 2, "fmap_base": 64, "fmap_max": 8}


def network(variables: dict[str, np.ndarray], options: dict, components: dict | None = None) -> TFNetwork:
    stored = [(name, Array(np.asarray(value, np.float32))) for name, value in variables.items()]
    state = {"version": 4, "static_kwargs": options, "components": components or {}, "variables": stored}
    return TFNetwork(0, state)


def transposed(value: np.ndarray, is_rotated: bool) -> np.ndarray:
    """A weight of torch as TensorFlow stores it."""
    if value.ndim == 4:
        value = value.transpose(2, 3, 1, 0)
        return value[::-1, ::-1] if is_rotated else value
    return value.T


def as_tensorflow(module: torch.nn.Module, options: dict) -> TFNetwork:
    """A network of ours in the names and layouts of the TensorFlow generation."""
    is_generator = isinstance(module, stylegan2.Generator)
    layers = {
        "conv0": "Conv0_up" if is_generator else "Conv0",
        "torgb": "ToRGB",
        "fromrgb": "FromRGB",
        "skip": "Skip",
    }
    layers |= {"conv": "Conv", "fc": "Dense0", "conv1": "Conv1" if is_generator else "Conv1_down"}
    parts: dict[str, dict[str, np.ndarray]] = {"": {}, "mapping": {}, "synthesis": {}}
    parts[""]["lod"] = np.zeros([])  # codespell:ignore lod
    for name, tensor in tensors_of(module).items():
        value = tensor.detach().numpy()
        path, kind = name.split("."), name.rpartition(".")[2]
        if kind == "w_avg":
            parts[""]["dlatent_avg"] = value
        elif path[0] == "mapping":
            dense = re.sub(r"fc(\d+)", r"Dense\1" if is_generator else r"Mapping\1", path[1])
            dense = dense.replace("embed", "LabelEmbed")
            parts["mapping" if is_generator else ""][f"{dense}/{kind}"] = transposed(value, False)
        elif kind == "const":
            parts["synthesis"]["4x4/Const/const"] = value[None]
        elif kind == "noise_const":
            log2 = max(value.shape).bit_length() - 1
            index = 0 if log2 == 2 else 2 * log2 - (5 if path[2] == "conv0" else 4)
            parts["synthesis"][f"noise{index}"] = value[None, None]
        elif name.startswith("b4.out."):
            parts[""][f"Output/{kind}"] = transposed(value, False)
        elif kind != "resample_filter":
            block, layer = path[is_generator : is_generator + 2]
            size = f"{block[1:]}x{block[1:]}"
            full = "Conv" if (size, layer) == ("4x4", "conv1") else layers[layer]
            if path[-2] == "affine":
                value = value - 1 if kind == "bias" else value
                kind = f"mod_{kind}"
            is_rotated = full in ("Conv0_up", "Skip")
            parts["synthesis" if is_generator else ""][f"{size}/{full}/{kind}"] = transposed(
                value, is_rotated
            )
    if not is_generator:
        return network(parts[""], options)
    components = {name: network(parts[name], {}) for name in ("mapping", "synthesis")}
    return network(parts[""], options, components)


@pytest.mark.parametrize("c_dim", [0, 3])
@pytest.mark.parametrize("architecture", ["orig", "skip", "resnet"])
def test_legacy_tf_every_layer(tmp_path, architecture, c_dim):
    shape = {"c_dim": c_dim, "img_resolution": 16, "img_channels": 2, "architecture": architecture, **SMALL}
    mapping = {"num_layers": 2, "lr_multiplier": 0.02}
    G = stylegan2.Generator(5, w_dim=6, mapping_kwargs={**mapping, "w_avg_beta": 0.9}, **shape)
    D = stylegan2.Discriminator(mapping_kwargs=mapping, **shape)
    with torch.no_grad():
        for tensor in (*G.parameters(), *D.parameters(), G.mapping.w_avg):
            tensor.normal_()
    options = {
        **OPTIONS,
        "architecture": architecture,
        "label_size": c_dim,
        "mapping_layers": 2,
        "mapping_lrmul": 0.02,
    }
    latents = {"latent_size": 5, "dlatent_size": 6, "mapping_fmaps": 6, "dlatent_avg_beta": 0.9}
    path = tmp_path / "tf.pkl"
    stored = as_tensorflow(G, {**options, **latents})
    path.write_bytes(forge.dumps((None, as_tensorflow(D, options), stored)))
    checkpoint = finetune.load(path)
    for ours, theirs in ((G, checkpoint.G_ema), (D, checkpoint.D)):
        wanted, found = tensors_of(ours), tensors_of(theirs)
        assert wanted.keys() == found.keys()
        for name, tensor in wanted.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6, msg=name)
    for name, value in shape.items():
        assert checkpoint.G_ema.init_kwargs[name] == value
    assert checkpoint.G_ema.init_kwargs["mapping_kwargs"]["w_avg_beta"] == 0.9


def test_legacy_tf_refuses_long_filter(tmp_path):
    shape = {"c_dim": 0, "img_resolution": 16, "img_channels": 2, **SMALL}
    stored = as_tensorflow(stylegan2.Discriminator(**shape), {**OPTIONS, "resample_kernel": [1] * 65})
    (tmp_path / "tf.pkl").write_bytes(forge.dumps(stored))
    with pytest.raises(PickleRefused, match=r"cannot be built: resample_filter is \[1, 1"):
        finetune.load(tmp_path / "tf.pkl")


def rename_blocks(network: TFNetwork, base_shape: tuple[int, int]) -> None:
    """Name blocks height x width, where `as_tensorflow` calls them after their longer side."""

    def renamed(name):
        return re.sub(
            r"^(\d+)x\1/", lambda m: "{}x{}/".format(*(int(m[1]) * s // 4 for s in base_shape)), name
        )

    for part in (network, *network.state["components"].values()):
        part.state["variables"] = [(renamed(name), value) for name, value in part.state["variables"]]


def rectangle(base_shape, is_named=False):
    """A discriminator and a generator in the TensorFlow format, and the same in ours."""
    shape = {"c_dim": 0, "img_resolution": 16, "img_channels": 2, "base_shape": base_shape, **SMALL}
    ours = [stylegan2.Discriminator(**shape), stylegan2.Generator(5, w_dim=6, **shape)]
    latents = {"latent_size": 5, "dlatent_size": 6, "mapping_fmaps": 6}
    stored = [as_tensorflow(ours[0], OPTIONS), as_tensorflow(ours[1], {**OPTIONS, **latents})]
    for network in stored if is_named else ():
        rename_blocks(network, base_shape)
    return ours, stored


@pytest.mark.parametrize("is_named", [False, True])
@pytest.mark.parametrize("base_shape", [(4, 2), (3, 4)])
def test_legacy_tf_rectangular_networks(tmp_path, base_shape, is_named):
    """The constant gives the shape; blocks are named after their longer side or after both."""
    (D, G), (stored_D, stored_G) = rectangle(base_shape, is_named)
    path = tmp_path / "tf.pkl"
    path.write_bytes(forge.dumps((stored_G, stored_D, stored_G)))
    checkpoint = finetune.load(path)
    for ours, theirs in ((G, checkpoint.G_ema), (D, checkpoint.D)):
        assert theirs.init_kwargs["base_shape"] == list(base_shape)
        assert tensors_of(ours).keys() == tensors_of(theirs).keys()
        for name, tensor in tensors_of(theirs).items():
            torch.testing.assert_close(tensor, tensors_of(ours)[name], rtol=1e-6, atol=1e-6, msg=name)


def test_legacy_tf_contradictory_rectangles(tmp_path):
    path = tmp_path / "tf.pkl"

    def refusal(*networks):
        path.write_bytes(forge.dumps(networks))
        with pytest.raises(PickleRefused) as refused:
            finetune.load(path)
        return str(refused.value)

    _, (D, G) = rectangle((4, 2))
    assert "D in the pickle is a rectangular network that cannot be used" in refusal(None, D, None)
    rename_blocks(G, (2, 4))
    assert "whose blocks have another shape than its constant" in refusal(G, None, None)
    _, (D, G) = rectangle((4, 2), is_named=True)
    for name in ("16x9/Conv0/weight", "8x16/Conv0/weight"):  # no shape; that of another network
        changed = [(name if key == "16x8/Conv0/weight" else key, v) for key, v in D.state["variables"]]
        other = TFNetwork(0, {**D.state, "variables": changed})
        assert f"holds {name}, which has no place" in refusal(G, other, None)


@pytest.fixture
def golden(golden_dir):
    return read_pickle(golden_dir / "stylegan2-tf-32.pkl").root


@pytest.fixture
def reload(tmp_path):
    def write_and_load(root):
        (tmp_path / "tf.pkl").write_bytes(forge.dumps(root))
        return finetune.load(tmp_path / "tf.pkl")

    return write_and_load


def variables(net: TFNetwork, component: str) -> list:
    return net.state["components"][component].state["variables"]


def test_legacy_tf_missing_variable(golden, reload):
    stored = variables(golden[2], "synthesis")
    stored.remove(next(item for item in stored if item[0] == "8x8/Conv1/weight"))
    with pytest.raises(CheckpointMismatch) as mismatch:
        reload(golden)
    assert mismatch.value.differences == ["synthesis.b8.conv1.weight [32, 32, 3, 3] is not in the file"]


@pytest.mark.parametrize(
    "name",
    [
        "8x8/Conv1/gain",
        "8x8/Conv2/weight",
        "8x9/Conv1/weight",
        "noise-1",
        "Dense0/weight",
        "8x8/Conv1/__class__",
    ],
)
def test_legacy_tf_unknown_variable(golden, reload, name):
    variables(golden[2], "synthesis").append((name, Array(np.zeros([1, 1, 2, 2], np.float32))))
    with pytest.raises(PickleRefused, match="no place in ours"):
        reload(golden)


def test_legacy_tf_duplicate_variable(golden, reload):
    stored = variables(golden[2], "synthesis")
    stored.append(stored[5])
    with pytest.raises(PickleRefused, match="a name of its own"):
        reload(golden)


@pytest.mark.parametrize(
    "value", ["text", None, {}, Array(np.zeros(3, complex)), Array(np.zeros(3, np.int32))], ids=repr
)
def test_legacy_tf_variable_dtype(golden, reload, value):
    variables(golden[2], "mapping").append(("Dense9/bias", value))
    with pytest.raises(PickleRefused, match="not a float32 array"):
        reload(golden)


@pytest.mark.parametrize(
    "key, value",
    [
        ("version", 3),
        ("version", None),
        ("static_kwargs", None),
        ("static_kwargs", {"resolution": 2**40}),
        ("static_kwargs", {"fmap_base": -1}),
        ("components", None),
        ("components", {"mapping": 1}),
        ("components", {"other": TFNetwork(0, {})}),
        ("variables", None),
        ("variables", [1]),
    ],
    ids=str,
)
def test_legacy_tf_invalid_states(golden, reload, key, value):
    golden[2].state[key] = value
    with pytest.raises(PickleRefused):
        reload(golden)


def test_legacy_tf_recursive_component(golden, reload):
    """A file can refer to itself; only the two levels that exist are looked at."""
    net = golden[1]
    net.state["components"] = {"mapping": TFNetwork(0, {}), "synthesis": TFNetwork(0, {})}
    with pytest.raises(PickleRefused):
        reload(golden)
