"""What is inside an exported pickle, read from its bytes; tests/foreign opens it elsewhere."""

from __future__ import annotations

import ast
import copy
import io
import json
import pickle
import pickletools
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

import finetune
from finetune.errors import ExportError
from finetune.export import stylegan_pickle
from finetune.export.provenance import entry_of
from finetune.export.stylegan_pickle import named_globals, plain, save_stylegan_pickle

# The last part of the specification of pickles: all that an exported file may refer to.
ALLOWED = {
    "torch_utils.persistence._reconstruct_persistent_obj",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    "torch.storage._load_from_bytes",
    "collections.OrderedDict",
}
NAME = "stylegan2-32"  # it holds G, D, G_ema and an augmentation pipe
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how a tensor file starts that torch 1.9 opens


def save(path, checkpoint, **overrides):
    networks = {name: getattr(checkpoint, name) for name in ("G", "D", "G_ema", "augment_pipe")}
    save_stylegan_pickle(path, **{**networks, "provenance": entry_of(checkpoint), **overrides})
    return path


@pytest.fixture(scope="module")
def exported(golden_checkpoint, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pickle")
    return save(
        folder / "net.pkl", golden_checkpoint(NAME), training_set_kwargs={"path": "x", "resolution": 32}
    )


class Record:
    def __init__(self, meta):
        self.meta = meta


class Inert(pickle.Unpickler):
    """Shows the records of a pickle as they are: no class is built, no storage opened."""

    def find_class(self, module, name):
        if name == "_reconstruct_persistent_obj":
            return Record
        if name == "OrderedDict":
            return OrderedDict
        return lambda *args: args


def records_in(record: Record):
    yield record
    for child in record.meta["state"]["_modules"].values():
        yield from records_in(child)


@pytest.fixture(scope="module")
def content(exported) -> dict:
    return Inert(io.BytesIO(exported.read_bytes())).load()


def scan(data: bytes) -> tuple[set[str], set[str], int]:
    """Globals of a pickle, globals of the storages nested in it, and the highest protocol."""
    outer, nested, protocol = set(named_globals(io.BytesIO(data))), set(), 0
    for opcode, arg, _ in pickletools.genops(data):
        protocol = max(protocol, opcode.proto)
        if isinstance(arg, bytes):
            assert arg.startswith(LEGACY)
            stream = io.BytesIO(arg)
            for _ in range(5):  # magic number, version, system, storage, keys; then come raw numbers
                nested |= set(named_globals(stream))
    return outer, nested, protocol


def test_stylegan_pickle_only_allowed_globals_and_old_protocols(exported):
    outer, nested, protocol = scan(exported.read_bytes())
    assert outer == ALLOWED
    assert nested == {"torch.FloatStorage"}
    assert protocol <= 4
    assert stylegan_pickle.ALLOWED_GLOBALS == ALLOWED


def test_stylegan_pickle_scanner_sees_every_kind_of_global():
    """Both ways of writing a global, with and without the memo."""

    for protocol in (0, 1, 2, 3, 4, 5):
        stream = io.BytesIO(
            pickle.dumps([Path("a"), OrderedDict(), np.float64(1), Path("b")], protocol=protocol)
        )
        found = set(named_globals(stream))
        assert {"collections.OrderedDict", "numpy.dtype"} <= found
        assert any(name.startswith("pathlib.") and name.endswith("PosixPath") for name in found)
        assert any(name.endswith("multiarray.scalar") for name in found)


def test_stylegan_pickle_records(content):
    assert set(content) == {"G", "D", "G_ema", "augment_pipe", "training_set_kwargs", "finetune"}
    folder = Path(finetune.__file__).parent / "models"
    source = {name: (folder / f"{name}.py").read_text(encoding="utf-8") for name in ("stylegan2", "augment")}
    classes = {
        name: {
            node.name
            for node in ast.parse(text, feature_version=(3, 8)).body
            if isinstance(node, ast.ClassDef)
        }
        for name, text in source.items()
    }
    for name in ("G", "D", "G_ema", "augment_pipe"):
        for record in records_in(content[name]):
            meta = record.meta
            assert (meta["type"], meta["version"]) == ("class", 6)
            module = meta["module_name"].rpartition(".")[2]
            assert meta["module_src"] == source[module]
            assert meta["class_name"] in classes[module]


def test_stylegan_pickle_states_hold_plain_values_only(content):
    fields = {
        "training", "_parameters", "_buffers", "_non_persistent_buffers_set", "_backward_hooks",
        "_is_full_backward_hook", "_forward_hooks", "_forward_pre_hooks", "_state_dict_hooks",
        "_load_state_dict_pre_hooks", "_modules", "_init_args", "_init_kwargs",
    }  # fmt: skip

    def check(value):
        if type(value) in (list, tuple, set):
            for item in value:
                check(item)
        elif type(value) is dict:
            for key, item in value.items():
                check(key)
                check(item)
        else:
            assert type(value) in (bool, int, float, str, type(None)), type(value)

    for name in ("G", "D", "G_ema", "augment_pipe"):
        for record in records_in(content[name]):
            state = record.meta["state"]
            assert fields <= set(state)
            private = {key for key in state if key.startswith("_")}
            assert private <= fields, "a field that torch 1.9 does not have"
            assert state["training"] is False
            assert state["_init_args"] == ()
            for key, value in state.items():
                if key.endswith("_hooks"):
                    assert type(value) is OrderedDict and not value
                elif key not in ("_parameters", "_buffers", "_modules"):
                    check(value)
    check(content["training_set_kwargs"])
    check(content["finetune"])


def test_stylegan_pickle_constructor_arguments_rebuild_the_network(content, golden_checkpoint):
    from finetune.models import stylegan2

    G = stylegan2.Generator(**content["G_ema"].meta["state"]["_init_kwargs"])
    shapes = {name: tensor.shape for name, tensor in G.state_dict().items()}
    original = golden_checkpoint(NAME).G_ema
    assert shapes == {name: tensor.shape for name, tensor in original.state_dict().items()}
    mapping = content["G_ema"].meta["state"]["_modules"]["mapping"].meta["state"]["_init_kwargs"]
    assert {"z_dim", "c_dim", "w_dim", "num_ws"} <= set(mapping)


def test_stylegan_pickle_plain_pickle_rebuilds_equal_networks(exported, golden_checkpoint):
    """Our own `torch_utils` opens it as well, since the embedded source is the installed one."""
    with open(exported, "rb") as stream:
        data = pickle.load(stream)
    original = golden_checkpoint(NAME)
    for name in ("G", "D", "G_ema", "augment_pipe"):
        ours, theirs = getattr(original, name).state_dict(), data[name].state_dict()
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        assert not data[name].training
        assert not any(p.requires_grad for p in data[name].parameters())
    copy.deepcopy(data["G"])
    torch.save(data["G"].state_dict(), io.BytesIO())


def test_stylegan_pickle_entry_has_origin_of_weights(exported, golden_checkpoint):
    again = finetune.load(exported)
    assert again.provenance.generation == "finetune"
    assert again.provenance.parent == golden_checkpoint(NAME).provenance.to_dict()
    assert again.training_set_kwargs == {"path": "x", "resolution": 32}


def test_stylegan_pickle_provenance_survives_export(golden_checkpoint, tmp_path):
    """Exporting a run's snapshot keeps the run's source, license, options and images seen."""
    source = {**golden_checkpoint(NAME).provenance.to_dict(), "licence": "CC0-1.0"}
    run = {"source": source, "training": {"kimg": 1.5, "data": "images"}, "nimg": 1500}
    snapshot = finetune.load(save(tmp_path / "snapshot.pkl", golden_checkpoint(NAME), provenance=run))
    again = finetune.load(save(tmp_path / "export.pkl", snapshot))
    for found in (snapshot.provenance, again.provenance):
        assert (found.parent, found.training, found.nimg) == (source, run["training"], 1500)
        assert found.licence == "CC0-1.0"
    entry = pickle.loads((tmp_path / "export.pkl").read_bytes())["finetune"]
    assert entry["exported_from"]["sha256"] == snapshot.provenance.sha256
    assert (entry["format"], entry["version"]) == (1, finetune.__version__)


def test_stylegan_pickle_network_in_training_is_saved_for_use_and_left_as_it_is(golden_checkpoint, tmp_path):
    checkpoint = golden_checkpoint(NAME)
    G = copy.deepcopy(checkpoint.G).train().requires_grad_(True)
    calls = []
    handle = G.synthesis.register_forward_pre_hook(lambda *args: calls.append(1))
    G.synthesis.register_forward_hook(lambda *args: calls.append(1), always_call=True)
    for parameter in G.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = {name: tensor.clone() for name, tensor in G.state_dict().items()}
    path = save(tmp_path / "net.pkl", checkpoint, G=G, D=None, augment_pipe=None)
    assert G.training and all(p.requires_grad and p.grad is not None for p in G.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in G.state_dict().items())
    again = finetune.load(path)
    assert again.missing == ["D"]
    assert scan(path.read_bytes())[0] == ALLOWED
    content = pickle.loads(path.read_bytes())
    assert "D" not in content and content["augment_pipe"] is None
    content["G"](torch.zeros([1, G.z_dim]), torch.zeros([1, G.c_dim]))
    assert calls == []
    handle.remove()


def test_stylegan_pickle_views_are_saved_without_what_they_look_into(golden_checkpoint, tmp_path):
    """A parameter that is a slice of one big buffer takes its own size in the file."""
    checkpoint = golden_checkpoint(NAME)
    G = copy.deepcopy(checkpoint.G_ema)
    big = torch.zeros(10_000_000)
    weight = G.mapping.fc0.weight
    big[: weight.numel()] = weight.detach().reshape(-1)
    weight.data = big[: weight.numel()].reshape(weight.shape)
    path = save(tmp_path / "net.pkl", checkpoint, G=None, D=None, augment_pipe=None, G_ema=G)
    assert path.stat().st_size < 2_000_000
    assert torch.equal(finetune.load(path).G_ema.mapping.fc0.weight, checkpoint.G_ema.mapping.fc0.weight)


def test_stylegan_pickle_nothing_to_save(tmp_path):
    with pytest.raises(ExportError, match="No network to save"):
        save_stylegan_pickle(tmp_path / "net.pkl", G=None, D=None, G_ema=None)
    assert list(tmp_path.iterdir()) == []


def test_stylegan_pickle_network_that_carries_no_source(tmp_path):
    with pytest.raises(ExportError, match="G: other code bases cannot rebuild a Linear"):
        save_stylegan_pickle(tmp_path / "net.pkl", G=torch.nn.Linear(1, 1), D=None, G_ema=None)


def test_stylegan_pickle_value_without_a_plain_form_is_named(golden_checkpoint, tmp_path):
    G = copy.deepcopy(golden_checkpoint(NAME).G)
    G.synthesis.device = torch.device("cpu")
    with pytest.raises(ExportError, match=r"G\.synthesis\.device: a torch\.device"):
        save_stylegan_pickle(tmp_path / "net.pkl", G=G, D=None, G_ema=None)
    assert list(tmp_path.iterdir()) == []


def test_stylegan_pickle_torch_that_writes_other_globals_is_refused(golden_checkpoint, tmp_path, monkeypatch):
    path = tmp_path / "net.pkl"
    path.write_bytes(b"old")
    fewer = stylegan_pickle.ALLOWED_GLOBALS - {"torch._utils._rebuild_tensor_v2"}
    monkeypatch.setattr(stylegan_pickle, "ALLOWED_GLOBALS", fewer)
    with pytest.raises(ExportError, match=r"refer to torch\._utils\._rebuild_tensor_v2"):
        save(path, golden_checkpoint(NAME))
    assert path.read_bytes() == b"old"


def test_stylegan_pickle_plain():
    class Numbers(dict):
        pass

    given = {
        "a": np.float32(0.5), "b": np.int64(3), "c": np.array([[1, 2]]), "d": Path("x/y"),
        "e": Numbers(f=(np.bool_(1),)), "g": {1, 2}, "h": torch.Size([2, 3]), "i": None, "j": True,
    }  # fmt: skip
    found = plain(given, "x")
    assert found == {
        "a": 0.5, "b": 3, "c": [[1, 2]], "d": "x/y",
        "e": {"f": (True,)}, "g": {1, 2}, "h": (2, 3), "i": None, "j": True,
    }  # fmt: skip
    assert [type(found[key]) for key in "abcdeghij"] == [
        float,
        int,
        list,
        str,
        dict,
        set,
        tuple,
        type(None),
        bool,
    ]
    assert type(found["e"]["f"][0]) is bool
    json.dumps({key: value for key, value in found.items() if key != "g"})
    with pytest.raises(ExportError, match=r"x\['k'\]\[1\]: a builtins\.builtin_function"):
        plain({"k": [1, print]}, "x")
