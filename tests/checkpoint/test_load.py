"""`finetune.load`: what a file says becomes a network of ours, tensor by tensor, or is refused with every
difference.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import mmap
import pickle

import numpy as np
import pytest
import torch
from checkpoint import forge
from checkpoint.forge import Raw
from conftest import GOLDEN_NETWORKS
from tolerances import NETWORK_F32, assert_close

import finetune
from finetune.checkpoint import load
from finetune.checkpoint import rebuild as rebuilding
from finetune.checkpoint.arguments import MAPPING, SYNTHESIS2, SYNTHESIS3
from finetune.checkpoint.describe import MAX_MODULES, describe
from finetune.checkpoint.provenance import MAX_ANCESTORS, Provenance
from finetune.checkpoint.rebuild import Rebuilt, check_growth, fill, rebuild, tensors_of
from finetune.checkpoint.unpickle import files
from finetune.checkpoint.unpickle.files import read_pickle
from finetune.checkpoint.unpickle.stubs import PersistentObject, Tensor
from finetune.errors import CheckpointError, CheckpointMismatch, PickleRefused
from finetune.hub import catalog
from finetune.models import stylegan2
from finetune.resolve import newest_snapshot, resolve_network


def module_at(network: PersistentObject, path: str) -> dict:
    """The state of a module inside a network that was read from a file."""
    for name in path.split(".") if path else ():
        network = network.state["_modules"][name]
    return network.state


@pytest.fixture
def opened(golden_dir):
    """The entries of a golden file, to be changed."""
    return lambda name: dict(read_pickle(golden_dir / f"{name}.pkl").root)


@pytest.fixture
def reload(tmp_path):
    """Write entries to a file and load it."""

    def write_and_load(entries, name="network.pkl"):
        (tmp_path / name).write_bytes(forge.dumps(entries))
        return finetune.load(tmp_path / name)

    return write_and_load


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().numpy().astype("<f4").tobytes()).hexdigest()


def spread(arguments: dict) -> dict:
    """Constructor arguments with those of the synthesis network spread out, as ours take them."""
    return {**arguments, **arguments.get("synthesis_kwargs", {})}


@pytest.mark.parametrize("name", GOLDEN_NETWORKS)
class TestGoldenFiles:
    def test_load_every_weight(self, name, golden_dir, golden_network):
        facts, arrays = golden_network(name)
        checkpoint = finetune.load(golden_dir / f"{name}.pkl")
        found = {}
        for entry in ("G_ema", "D"):
            for key, tensor in tensors_of(getattr(checkpoint, entry)).items():
                assert tensor.dtype == torch.float32 and not tensor.requires_grad and not tensor.is_meta
                found[f"{entry}/{key}"] = digest(tensor)
        stored = {key: value for key, value in found.items() if key in facts["weights"]}
        assert stored == {key: sha256 for key, (_, sha256) in facts["weights"].items()}
        # Only filters, which the TensorFlow generation does not store, may be ours alone.
        assert all(key.endswith("resample_filter") for key in found.keys() - stored.keys())
        assert name.startswith("stylegan2-tf") or found.keys() == stored.keys()
        if "G/param_sums" in arrays:
            sums = [float(parameter.double().sum()) for parameter in checkpoint.G.parameters()]
            assert_close(np.array(sums), arrays["G/param_sums"], 1e-9, "sums of the parameters of G")
        differing = [
            key for key, tensor in tensors_of(checkpoint.G).items() if digest(tensor) != found[f"G_ema/{key}"]
        ]
        assert differing, "G and G_ema are two networks"

    def test_load_images_and_logits(self, name, golden_dir, golden_network):
        _, arrays = golden_network(name)
        checkpoint = finetune.load(golden_dir / f"{name}.pkl")
        z, c = torch.from_numpy(arrays["z"]), torch.from_numpy(arrays["c"])
        img = checkpoint.G_ema(z, c, noise_mode="const")
        assert_close(img, arrays["img"], NETWORK_F32, "img")
        if "logits_fake" in arrays:
            assert_close(checkpoint.D(img, c), arrays["logits_fake"], NETWORK_F32, "logits")

    def test_load_arguments_and_identity(self, name, golden_dir, golden_network):
        facts, _ = golden_network(name)
        path = golden_dir / f"{name}.pkl"
        checkpoint = finetune.load(path)
        for network, given in (
            (checkpoint.G_ema, facts["generator"]),
            (checkpoint.D, facts["discriminator"]),
        ):
            assert not network.training
            kwargs = network.init_kwargs
            for key, value in spread(given).items():
                if key == "synthesis_kwargs" or key.endswith("_kwargs") or key == "cmap_dim":
                    continue
                assert kwargs[key] == value, key
            for key, value in given.get("mapping_kwargs", {}).items():
                assert value is None or kwargs["mapping_kwargs"].get(key, value) == value, key
        assert checkpoint.family == facts["architecture"]
        assert checkpoint.provenance == Provenance(
            generation=facts["era"],
            source=path.name,
            sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
            size=path.stat().st_size,
        )
        assert checkpoint.missing == [] and checkpoint.notes == ()
        resolution = checkpoint.training_set_kwargs.get("resolution")
        assert resolution == (None if facts["era"] == "tf" else checkpoint.best.img_resolution)


def test_load_attributes_take_precedence(opened, reload):
    """Defaults differ by generation: the attribute is what the network was."""
    root = opened("stylegan2-ada-32")
    network = root["G_ema"]
    del network.state["_init_kwargs"]["synthesis_kwargs"]["conv_clamp"]
    del network.state["_init_kwargs"]["synthesis_kwargs"]["num_fp16_res"]
    for state in each_module(network):
        if state.get("conv_clamp", 0):
            state["conv_clamp"] = 128
        if "use_fp16" in state:
            state["use_fp16"] = state["resolution"] >= 16
    module_at(network, "mapping")["w_avg_beta"] = 0.5
    kwargs = reload({"G_ema": network}).G_ema.init_kwargs
    assert kwargs["conv_clamp"] == 128 and kwargs["num_fp16_res"] == 2
    assert kwargs["mapping_kwargs"]["w_avg_beta"] == 0.5


def each_module(network: PersistentObject):
    yield network.state
    for child in network.state["_modules"].values():
        if child is not None:
            yield from each_module(child)


def test_load_buffers_from_file(opened, reload):
    root = opened("stylegan2-ada-32")
    changed = {}
    for entry, path in (
        ("G_ema", "synthesis.b8.conv0.noise_const"),
        ("G_ema", "synthesis.b8.conv0.resample_filter"),
        ("G_ema", "mapping.w_avg"),
        ("D", "b16.conv1.resample_filter"),
        ("augment_pipe", "p"),
        ("augment_pipe", "Hz_fbank"),
    ):
        module, _, name = path.rpartition(".")
        buffers = module_at(root[entry], module)["_buffers"]
        value = np.asarray(np.random.randn(*buffers[name].array.shape), "<f4")
        buffers[name] = Tensor(value, "float32", 0)
        changed[entry, path] = value
    checkpoint = reload(root)
    for (entry, path), value in changed.items():
        assert np.array_equal(tensors_of(getattr(checkpoint, entry))[path].numpy(), value), path


def test_load_augmentation_strengths(opened, reload):
    root = opened("stylegan2-ada-32")
    pipe = root["augment_pipe"]
    strengths = [name for name, value in pipe.state.items() if type(value) is float]
    for i, name in enumerate(strengths):
        pipe.state[name] = i / 64
    loaded = reload(root).augment_pipe
    assert len(strengths) > 20
    assert {name: getattr(loaded, name) for name in strengths} == {
        name: i / 64 for i, name in enumerate(strengths)
    }


class TestMismatch:
    def test_load_lists_every_difference(self, opened, reload):
        network = opened("stylegan2-ada-32")["G_ema"]
        conv = module_at(network, "synthesis.b8.conv0")
        conv["_parameters"]["weights"] = conv["_parameters"].pop("weight")
        affine = module_at(network, "synthesis.b16.conv1.affine")
        affine["_parameters"]["bias"].array = np.zeros(5, "<f4")
        w_avg = module_at(network, "mapping")["_buffers"]["w_avg"]
        w_avg.array = w_avg.array.astype("<i8")
        w_avg.dtype = "int64"
        del module_at(network, "synthesis.b32.torgb")["_parameters"]["bias"]
        with pytest.raises(CheckpointMismatch) as mismatch:
            reload({"G_ema": network})
        assert mismatch.value.differences == [
            "mapping.w_avg is int64 in the file and float32 in the network",
            "synthesis.b16.conv1.affine.bias is [5] in the file and [32] in the network",
            "synthesis.b32.torgb.bias [3] is not in the file",
            "synthesis.b8.conv0.weight [32, 32, 3, 3] is not in the file",
            "synthesis.b8.conv0.weights [32, 32, 3, 3] is in the file and not in the network",
        ]
        assert all(line in str(mismatch.value) for line in mismatch.value.differences)
        assert "network.pkl" in str(mismatch.value)

    def test_load_refuses_extra_module(self, opened, reload):
        discriminator = opened("stylegan2-ada-32")["D"]
        blocks = discriminator.state["_modules"]
        blocks["b64"] = blocks["b32"]
        with pytest.raises(CheckpointMismatch) as mismatch:
            reload({"D": discriminator})
        assert all("b64." in line and "not in the network" in line for line in mismatch.value.differences)
        assert len(mismatch.value.differences) == len(
            [x for x in describe(discriminator).tensors if "b64" in x]
        )

    def test_load_refuses_missing_module_without_tensors(self, opened, reload):
        """Found by tests/stress/test_fuzzing.py: without it the network would compute something else."""
        discriminator = opened("stylegan2-ada-32")["D"]
        del module_at(discriminator, "b4")["_modules"]["mbstd"]
        with pytest.raises(CheckpointMismatch) as mismatch:
            reload({"D": discriminator})
        assert mismatch.value.differences == ["b4.mbstd (MinibatchStd) is not in the file"]

    def test_load_refuses_additional_module_without_tensors(self, opened, reload):
        discriminator = opened("stylegan2-ada-32")["D"]
        state = {"_parameters": {}, "_buffers": {}, "_modules": {}}
        module_at(discriminator, "b4")["_modules"]["tanh"] = PersistentObject("Tanh", state, 7)
        with pytest.raises(CheckpointMismatch) as mismatch:
            reload({"D": discriminator})
        assert mismatch.value.differences == ["b4.tanh is in the file and not in the network"]

    @pytest.mark.parametrize(
        "path, name, value",
        [
            ("synthesis.b8.conv0", "act_gain", 1.0),
            ("synthesis.b8.conv0", "up", 1),
            ("synthesis.b16.torgb", "conv_clamp", None),
            ("synthesis.b16.conv1", "activation", "relu"),
            ("mapping.fc1", "weight_gain", math.inf),
            ("mapping.fc1", "weight_gain", -0.5),
            ("mapping.fc1", "weight_gain", "0.5"),
            ("mapping.fc1", "bias_gain", 1),
            ("synthesis.b32", "architecture", "resnet"),
        ],
    )
    def test_load_refuses_other_settings_with_equal_tensors(self, opened, reload, path, name, value):
        """Attributes change what is computed without changing a tensor; they are compared too."""
        network = opened("stylegan2-ada-32")["G_ema"]
        assert name in module_at(network, path)
        module_at(network, path)[name] = value
        with pytest.raises(CheckpointMismatch) as mismatch:
            reload({"G_ema": network})
        assert len(mismatch.value.differences) == 1
        assert mismatch.value.differences[0].startswith(f"{path}.{name} = {value!r} in the file")
        assert " and " in mismatch.value.differences[0]

    @pytest.mark.parametrize("path", ["mapping.fc1", "synthesis.b8.torgb", "synthesis.b16.conv1.affine"])
    def test_load_applies_other_weight_gain(self, opened, reload, path):
        """A layer that was cut or widened keeps its gain; the file computes with gain × weight."""
        G = reload({"G_ema": opened("stylegan2-ada-32")["G_ema"]}).G_ema
        changed = opened("stylegan2-ada-32")["G_ema"]
        module_at(changed, path)["weight_gain"] *= 0.5
        checkpoint = reload({"G_ema": changed})
        layer = G.get_submodule(path)
        layer.weight_gain *= 0.5
        z = torch.randn([4, G.z_dim], generator=torch.Generator().manual_seed(0))
        images = [network(z, None, noise_mode="const") for network in (checkpoint.G_ema, G)]
        torch.testing.assert_close(*images)
        (note,) = (each for each in checkpoint.notes if "weight_gain" in each)
        assert note.startswith("G_ema: weights multiplied") and f"{path}.weight" in note


class TestPartialFiles:
    @pytest.mark.parametrize(
        "entries", [("G_ema",), ("G",), ("D",), ("G_ema", "D"), ("G", "D", "augment_pipe")], ids=" ".join
    )
    def test_load_partial_file(self, opened, reload, entries):
        root = opened("stylegan2-ada-32")
        checkpoint = reload({entry: root[entry] for entry in entries})
        for entry in ("G", "D", "G_ema", "augment_pipe"):
            assert (getattr(checkpoint, entry) is not None) == (entry in entries)
        assert checkpoint.missing == [entry for entry in ("G", "D", "G_ema") if entry not in entries]
        assert checkpoint.best is (checkpoint.G_ema or checkpoint.G)
        assert checkpoint.training_set_kwargs == {}

    def test_load_single_network(self, opened, reload):
        root = opened("stylegan2-ada-32")
        assert reload(root["G_ema"]).missing == ["G", "D"]
        assert reload(root["D"]).missing == ["G", "G_ema"]

    def test_load_single_tensorflow_network(self, golden_dir, reload):
        _, D, Gs = read_pickle(golden_dir / "stylegan2-tf-32.pkl").root
        assert reload(Gs).missing == ["G", "D"]
        assert reload(D).missing == ["G", "G_ema"]
        assert reload((None, D, Gs)).missing == ["G"]

    @pytest.mark.parametrize(
        "root", [{}, {"model": {}}, [], "text", None, {"G_ema": {}}, {"G_ema": None}, ([], [], [])]
    )
    def test_load_refuses_file_without_network(self, reload, root):
        with pytest.raises(PickleRefused):
            reload(root)


def test_load_reports_frozen_layers(opened, reload):
    """FreezeD turns parameters into buffers; the names stay."""
    root = opened("stylegan2-ada-32")
    before = tensors_of(reload({"D": root["D"]}).D)
    root["D"].state["_init_kwargs"]["block_kwargs"] = {"freeze_layers": 2}
    for layer in ("fromrgb", "conv0"):
        state = module_at(root["D"], f"b32.{layer}")
        for name in ("weight", "bias"):
            tensor = state["_parameters"].pop(name)
            state["_buffers"][name] = Tensor(tensor.array, "float32", 0)
    checkpoint = reload({"D": root["D"]})
    after = tensors_of(checkpoint.D)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert "b32.fromrgb.weight" in dict(checkpoint.D.named_parameters())
    assert checkpoint.notes == ("D: 2 layers were frozen in training and can be trained again",)


def test_load_positional_arguments(opened, reload):
    state = opened("stylegan2-ada-32")["G_ema"].state
    given = state["_init_kwargs"]
    state["_init_args"] = tuple(given.pop(name) for name in ("z_dim", "c_dim", "w_dim", "img_resolution"))
    assert reload(PersistentObject("Generator", state, 0)).G_ema.img_resolution == 32


def test_load_reports_unknown_attributes_and_entries(opened, reload):
    root = opened("stylegan2-ada-32")
    module_at(root["G_ema"], "synthesis.b8")["my_trick"] = 3
    root["G_ema"].state["_init_kwargs"]["more"] = 1
    checkpoint = reload({"G_ema": root["G_ema"], "progress": 5, "D": None})
    assert checkpoint.notes == (
        "G_ema: unknown attributes ignored: my_trick",
        "G_ema: unknown constructor arguments ignored: more",
        "unknown entries ignored: progress",
    )


@pytest.mark.parametrize("protocol", range(2, 6))
def test_load_files_of_this_python_and_torch(tmp_path, protocol):
    """Parameters, strided weights and numpy's numbers, as the installed versions pickle them."""
    torch.manual_seed(1)
    discriminator = stylegan2.Discriminator(0, 16, 1, channel_base=64, channel_max=4, num_fp16_res=1)
    weight = discriminator.b16.conv0.weight
    weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    generator = stylegan2.Generator(4, 2, 4, 16, 1, {"num_layers": 1}, channel_base=64, channel_max=4)
    path = tmp_path / "new.pkl"
    path.write_bytes(pickle.dumps({"D": discriminator, "G_ema": generator, "augment_pipe": None}, protocol))
    checkpoint = finetune.load(path)
    for theirs, ours in ((checkpoint.D, discriminator), (checkpoint.G_ema, generator)):
        loaded, wanted = tensors_of(theirs), tensors_of(ours)
        assert loaded.keys() == wanted.keys()
        assert all(torch.equal(loaded[name], wanted[name]) for name in wanted)


class TestNonsense:
    """Values that would take long or much memory to build from are refused before anything is built."""

    @pytest.mark.parametrize("value", [-1, 2**62, float("nan"), float("inf"), "x", None, [1], {}], ids=repr)
    @pytest.mark.parametrize("name", ["z_dim", "c_dim", "w_dim", "img_resolution", "img_channels"])
    def test_load_limits_sizes(self, opened, name, value):
        network = opened("stylegan2-ada-32")["G_ema"]
        network.state[name] = value
        with pytest.raises(PickleRefused, match=name):
            rebuild("G_ema", network)

    @pytest.mark.parametrize(
        "family, name",
        [
            *(("stylegan2-ada-32", name) for name in sorted({*MAPPING, *SYNTHESIS2})),
            *(("stylegan3-r-32", name) for name in sorted({*MAPPING, *SYNTHESIS3})),
        ],
    )
    def test_load_limits_arguments(self, opened, family, name):
        network = opened(family)["G_ema"]
        kwargs = network.state["_init_kwargs"]
        kwargs["mapping_kwargs"] = {}
        (kwargs if name in SYNTHESIS2 + SYNTHESIS3 else kwargs["mapping_kwargs"])[name] = 2**62
        for state in each_module(network):
            for values in (state, state["_init_kwargs"]):
                if name in values:
                    values[name] = 2**62
            if name == "lr_multiplier" and "bias_gain" in state:
                state["bias_gain"] = 2**62
        with pytest.raises(PickleRefused, match=name):
            rebuild("G_ema", network)

    def test_load_refuses_size_not_power_of_two(self, opened):
        network = opened("stylegan2-ada-32")["G_ema"]
        network.state["img_resolution"] = 48
        with pytest.raises(PickleRefused, match=r"cannot be built: .*48"):
            rebuild("G_ema", network)

    @pytest.mark.parametrize(
        "changes",
        [
            {"lrelu_upsampling": 16, "filter_size": 32},
            {"num_layers": 2, "num_critical": 1, "first_stopband": 0.01, "filter_size": 32},
        ],
    )
    def test_load_limits_filter_taps(self, opened, changes):
        network = opened("stylegan3-r-32")["G_ema"]
        network.state["_init_kwargs"].update(changes)
        module_at(network, "synthesis").update(changes)
        with pytest.raises(PickleRefused, match="the size of its filters"):
            rebuild("G_ema", network)

    def test_load_limits_modules(self):
        state = {"_parameters": {}, "_buffers": {}, "_modules": {}}
        ring = PersistentObject("Generator", state, 7)
        state["_modules"]["ring"] = ring
        with pytest.raises(PickleRefused, match="too many or nested too deeply"):
            describe(ring)
        tree = PersistentObject("Leaf", {"_parameters": {}, "_buffers": {}, "_modules": {}}, 7)
        for _ in range(14):
            modules = {f"m{i}": tree for i in range(10)}
            tree = PersistentObject("Node", {"_parameters": {}, "_buffers": {}, "_modules": modules}, 7)
        with pytest.raises(PickleRefused, match="too many or nested too deeply"):
            describe(tree)
        assert 10**14 > MAX_MODULES

    def test_load_limits_attributes(self):
        """One dict can be the state of many modules: cheap for a file, so it must be cheap to refuse."""
        many = {f"a{i}": None for i in range(30_000)}
        leaf = PersistentObject("Leaf", {"_parameters": many, "_buffers": many, "_modules": {}}, 7)
        tree = PersistentObject("Tree", {**leaf.state, "_modules": {f"m{i}": leaf for i in range(1000)}}, 7)
        with pytest.raises(PickleRefused, match="too many attributes"):
            describe(tree)

    @pytest.mark.parametrize(
        "state",
        [
            {},
            {"_parameters": [], "_buffers": {}, "_modules": {}},
            {"_parameters": {"a": 1}, "_buffers": {}, "_modules": {}},
            {"_parameters": {}, "_buffers": {5: None}, "_modules": {}},
            {"_parameters": {}, "_buffers": {}, "_modules": {"a.b": None}},
            {"_parameters": {}, "_buffers": {}, "_modules": {"a": {}}},
        ],
    )
    def test_load_refuses_invalid_states(self, state):
        with pytest.raises(PickleRefused):
            describe(PersistentObject("Generator", state, 7))

    def test_load_memory_is_bounded_by_file(self, opened, monkeypatch):
        monkeypatch.setattr(rebuilding, "SLACK", 0)
        network = rebuild("G_ema", opened("stylegan2-ada-32")["G_ema"])
        num_elements = sum(tensor.numel() for tensor in tensors_of(network.module).values())
        check_growth([network, network], 2 * num_elements)  # of 4 bytes each, so 4 times the size
        with pytest.raises(PickleRefused, match="several times its size"):
            check_growth([network, network], 2 * num_elements - 1)


class TestMemoryOfFile:
    """The memory of the file is returned to the system while its values are copied."""

    @pytest.mark.parametrize("name", ["stylegan2-tf-32", "stylegan2-64-cond", "stylegan3-r-32"])
    def test_load_gives_back_memory(self, golden_dir, monkeypatch, name):
        path, seen = golden_dir / f"{name}.pkl", []
        before = {entry: tensors_of(getattr(finetune.load(path), entry)) for entry in ("G", "D", "G_ema")}
        read = load.read_pickle
        monkeypatch.setattr(load, "read_pickle", lambda path: seen.append(read(path)) or seen[-1])
        monkeypatch.setattr(files, "CHUNK", mmap.PAGESIZE)
        after = finetune.load(path)
        (file,) = seen
        assert file.given_back > 0.8 * file.size and not any(file.memory[: file.given_back])
        for entry, tensors in before.items():
            found = tensors_of(getattr(after, entry))
            assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())

    def test_fill_copies_overlapping_views_before_their_memory_is_freed(self):
        memory = np.arange(64, dtype=np.float32)
        views = [memory[40:56][::-1], memory[0:64:4], memory[41:57], memory[:16]]
        wanted = [torch.from_numpy(view.copy()) for view in views]

        def free(address):
            memory[: (address - memory.ctypes.data) // 4] = -1

        networks = [torch.nn.Linear(4, 4, bias=False, device="meta") for _ in views]
        tensors = [{"weight": Tensor(view.reshape(4, 4), "float32", 0)} for view in views[1:]]
        backward = Tensor(np.lib.stride_tricks.as_strided(views[0], (4, 4), (-16, -4)), "float32", 0)
        parts = zip(networks, [{"weight": backward}, *tensors], strict=True)
        fill([Rebuilt(network, [], "ada", part) for network, part in parts], free)
        for network, values in zip(networks, wanted, strict=True):
            assert torch.equal(network.weight.flatten(), values)

    def test_read_pickle_reports_a_file_that_shrinks(self, golden_dir, tmp_path, monkeypatch):
        path = tmp_path / "a.pkl"
        path.write_bytes((golden_dir / "stylegan2-ada-32.pkl").read_bytes())
        size = path.stat().st_size
        monkeypatch.setattr(files, "CHUNK", size // 2)
        real = files._read

        def read(path, each_part):
            return real(path, lambda part: path.write_bytes(bytes(part)))

        monkeypatch.setattr(files, "_read", read)
        with pytest.raises(CheckpointError, match=rf"was cut to {size // 2:,} bytes while it was read"):
            read_pickle(path)


class TestProvenance:
    SOURCE = Provenance("sg3", "ffhq.pkl", "ab" * 32, 5, licence="non-commercial").to_dict()

    def entry(self, **values):
        return {
            "format": 1,
            "version": "1.2.3",
            "source": self.SOURCE,
            "training": {"kimg": 0.5},
            "nimg": 500,
            **values,
        }

    def test_provenance_of_own_file(self, opened, reload):
        network = opened("stylegan2-ada-32")["G_ema"]
        seen = reload({"G_ema": network, "finetune": self.entry()}, "out.pkl").provenance
        assert (seen.generation, seen.source) == ("finetune", "out.pkl")
        assert (seen.parent, seen.training, seen.nimg) == (self.SOURCE, {"kimg": 0.5}, 500)
        assert seen.licence == "non-commercial", "a descendant has the license of its source"
        assert Provenance(**seen.to_dict()) == seen

    def test_provenance_without_source(self, opened, reload):
        network = opened("stylegan2-ada-32")["G_ema"]
        seen = reload(
            {"G_ema": network, "finetune": self.entry(source=None, training=None, nimg=None)}
        ).provenance
        assert (seen.generation, seen.parent, seen.training, seen.nimg, seen.licence) == (
            "finetune",
            *[None] * 4,
        )

    @pytest.mark.parametrize("number", [MAX_ANCESTORS, MAX_ANCESTORS + 1])
    def test_provenance_many_ancestors(self, opened, reload, number):
        network, parent = opened("stylegan2-ada-32")["G_ema"], None
        for index in reversed(range(number)):
            step = Provenance("finetune", f"{index}.pkl", "cd" * 32, 5, "L", training={"betas": [0.5]})
            parent = {**step.to_dict(), "parent": parent}
        seen = reload({"G_ema": network, "finetune": self.entry(source=parent)}).provenance
        assert Provenance(**seen.to_dict()) == seen and seen.licence == "L"
        found, step = [], seen.to_dict()
        while step := step["parent"]:
            found.append((step["source"], step["training"]))
        assert found == [(f"{index}.pkl", {"betas": [0.5]}) for index in range(min(number, MAX_ANCESTORS))]

    def test_load_ignores_metadata_without_end(self, opened, reload):
        network, options = opened("stylegan2-ada-32")["G_ema"], {"names": ["x"] * 1200}
        training = forge.emit(["x"] * 200) + b"q\x00"
        entry = self.entry(
            training={"a": Raw(training), **{f"b{index}": Raw(b"h\x00") for index in range(99)}}
        )
        seen = reload({"G_ema": network, "finetune": entry, "training_set_kwargs": options})
        assert seen.training_set_kwargs == options
        assert seen.notes[-1] == "entry `finetune` ignored: it has too many values"
        assert seen.provenance.generation == "ada" and seen.G_ema is not None

    def test_provenance_of_invalid_entry(self, opened, reload):
        network = opened("stylegan2-ada-32")["G_ema"]
        entry = self.entry(source="x", training=[1], nimg="many")
        seen = reload({"G_ema": network, "finetune": entry}).provenance
        assert (seen.generation, seen.parent, seen.training, seen.nimg, seen.licence) == (
            "finetune",
            *[None] * 4,
        )

    def test_provenance_license_of_public_checkpoint(self, opened, reload, monkeypatch):
        network = opened("stylegan2-ada-32")["G_ema"]
        sha256 = hashlib.sha256(forge.dumps({"G_ema": network})).hexdigest()
        known = catalog.Entry(
            "a",
            ("https://example.org/a.pkl",),
            "stylegan2",
            sha256=sha256,
            resolution=32,
            licence=catalog.License("L1"),
        )
        changes = {"urls": ("https://example.org/b.pkl?x",), "sha256": None}
        other = dataclasses.replace(known, **changes, licence=catalog.License("L2"))
        third = dataclasses.replace(other, licence=catalog.License("L3"))
        monkeypatch.setattr(catalog, "entries", lambda: {"a": known, "b": other})
        assert reload({"G_ema": network}, "any.pkl").provenance.licence == "L1"
        monkeypatch.setattr(catalog, "entries", lambda: {"b": other})
        assert (
            reload({"G_ema": network}, "b.pkl").provenance.licence == "L2 (recognized by the file name alone)"
        )
        assert reload({"G_ema": network}, "c.pkl").provenance.licence is None
        # A file of this tool that states no license is identified by its hash only.
        ours = {"G_ema": network, "finetune": self.entry(source=None)}
        assert reload(ours, "b.pkl").provenance.licence is None
        sha256 = hashlib.sha256(forge.dumps(ours)).hexdigest()
        monkeypatch.setattr(catalog, "entries", lambda: {"a": dataclasses.replace(known, sha256=sha256)})
        assert reload(ours, "b.pkl").provenance.licence == "L1"
        stated = {**ours, "finetune": self.entry(source=None, licence="own")}
        assert reload(stated, "b.pkl").provenance.licence == "own"
        monkeypatch.setattr(catalog, "entries", lambda: {"b": other, "c": third})
        assert reload({"G_ema": network}, "b.pkl").provenance.licence is None, "two files of one name"


class TestRunFolders:
    def test_load_run_folder_newest_snapshot(self, golden_dir, tmp_path):
        for kimg in ("000000", "000020", "000003.5"):
            (tmp_path / f"network-snapshot-{kimg}.pkl").write_bytes(b"")
        (tmp_path / "network-snapshot-000099.pkl.part").write_bytes(b"")
        newest = newest_snapshot(tmp_path)
        assert newest.name == "network-snapshot-000020.pkl"
        newest.write_bytes((golden_dir / "stylegan2-ada-32.pkl").read_bytes())
        assert finetune.load(tmp_path).provenance.source == newest.name

    @pytest.mark.parametrize(
        "about, is_named",
        [
            ({"recommended": {"file": "network-best.pkl"}}, True),
            ({"recommended": {"file": "network-snapshot-000020.pkl"}}, False),
            ({"recommended": {"file": "gone.pkl"}}, False),
            ({"recommended": None}, False),
            ([], False),
        ],
    )
    def test_resolve_run_folder_names_recommended_snapshot(self, about, is_named, tmp_path):
        for name in ("network-snapshot-000020.pkl", "network-best.pkl"):
            (tmp_path / name).touch()
        (tmp_path / "about.json").write_text(json.dumps(about))
        notes = []
        newest = resolve_network(tmp_path, on_message=notes.append)
        assert newest.name == "network-snapshot-000020.pkl"
        said = f"Using {newest}, the newest snapshot. The run recommends {tmp_path / 'network-best.pkl'}."
        assert notes == ([said] if is_named else [])

    def test_load_run_folder_without_snapshot(self, tmp_path):
        with pytest.raises(CheckpointError, match="has no network-snapshot"):
            finetune.load(tmp_path)
        with pytest.raises(CheckpointError, match="does not exist"):
            finetune.load(tmp_path / "missing.pkl")

    @pytest.mark.parametrize("name", ["~nobody-here/x.pkl", "x" * 300, "x/" + "y" * 300])
    def test_load_names_that_no_file_can_have(self, name):
        with pytest.raises(CheckpointError, match=f"{name} does not exist") as caught:
            finetune.load(name)
        assert caught.value.hint


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_load_device(golden_dir, device):
    checkpoint = finetune.load(golden_dir / "stylegan2-ada-32.pkl", device=device)
    for network in (checkpoint.G, checkpoint.D, checkpoint.G_ema, checkpoint.augment_pipe):
        assert all(tensor.device.type == device for tensor in tensors_of(network).values())
