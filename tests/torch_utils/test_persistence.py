"""Objects that carry their source: what is recorded, what comes back, and what is refused."""

from __future__ import annotations

import copy
import importlib.util
import pickle
import pickletools
import sys

import pytest
import torch

from dnnlib import EasyDict
from torch_utils import persistence

SOURCE = """
import torch
from torch_utils import persistence

@persistence.persistent_class
class Layer(torch.nn.Module):
    def __init__(self, width, bias=True):
        super().__init__()
        self.linear = torch.nn.Linear(width, width, bias=bias)
        self.register_buffer("scale", torch.ones([]))

    def forward(self, x):
        return self.linear(x) * self.scale

@persistence.persistent_class
class Stack(torch.nn.Module):
    def __init__(self, *widths, layer_kwargs={}):
        super().__init__()
        self.note = "kept"
        self.layers = torch.nn.ModuleList([Layer(width, **layer_kwargs) for width in widths])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x

@persistence.persistent_class
class Named(Stack):
    def __init__(self, name):
        super().__init__(2, 2)
        self.name = name

@persistence.persistent_class
class Plain:
    def __init__(self, value=1):
        self.value = value

class Undecorated(Plain):
    pass
"""


def import_models(tmp_path, monkeypatch, name="finetune.models.probe", source=SOURCE):
    """Import a file of its own as a module of that name."""
    path = tmp_path / f"{name}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(persistence, "_sources", {**persistence._sources})
    monkeypatch.setattr(persistence, "_classes", {*persistence._classes})
    return module


@pytest.fixture
def models(tmp_path, monkeypatch):
    monkeypatch.setattr(persistence, "_sources", dict(persistence._sources))
    return import_models(tmp_path, monkeypatch)


def round_trips(obj):
    yield copy.deepcopy(obj)
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        yield pickle.loads(pickle.dumps(obj, protocol=protocol))


def meta_of(obj):
    function, (meta,) = obj.__reduce__()
    assert function is persistence._reconstruct_persistent_obj
    return meta


def test_persistence_copies_are_equal(models):
    stack = models.Stack(2, 2, layer_kwargs=EasyDict(bias=False)).eval()
    stack.layers[1].requires_grad_(False)
    stack.layers[0].scale.fill_(3)
    x = torch.randn(4, 2)
    for twin in round_trips(stack):
        assert type(twin) is models.Stack and twin is not stack
        assert torch.equal(twin(x), stack(x))
        assert not twin.training and twin.note == "kept"
        assert [p.requires_grad for p in twin.parameters()] == [True, False]
        assert twin.init_args == (2, 2) and twin.init_kwargs == {"layer_kwargs": {"bias": False}}
        twin.layers[0].scale.fill_(0)
    assert stack.layers[0].scale == 3


def test_persistence_init_args_are_plain_copies(models):
    inner = EasyDict(bias=False, deep=[EasyDict(a=1)])
    plain = models.Plain(value=inner)
    inner.bias = True
    assert type(plain.init_kwargs["value"]) is dict and type(plain.init_kwargs["value"]["deep"][0]) is dict
    assert plain.init_kwargs == {"value": {"bias": False, "deep": [{"a": 1}]}}
    plain.init_kwargs["value"]["bias"] = "changed"
    assert plain.init_kwargs["value"]["bias"] is False
    with pytest.raises(AttributeError):
        plain.init_kwargs = {}


def test_persistence_init_args_of_outermost_constructor(models):
    named = models.Named("n")
    assert (named.init_args, named.init_kwargs) == (("n",), {})
    for twin in round_trips(named):
        assert type(twin) is models.Named and twin.init_args == ("n",) and len(twin.layers) == 2


def test_persistence_pickle_content(models):
    meta = meta_of(models.Plain(value=5))
    assert meta == {
        "type": "class",
        "version": 6,
        "module_src": SOURCE,
        "class_name": "Plain",
        "state": {"_init_args": (), "_init_kwargs": {"value": 5}, "value": 5},
        "module_name": "finetune.models.probe",
    }
    names = {
        argument
        for opcode, argument, _ in pickletools.genops(pickle.dumps(models.Stack(2, 2), protocol=2))
        if opcode.name == "GLOBAL"
    }
    assert "torch_utils.persistence _reconstruct_persistent_obj" in names
    assert not any("probe" in name or "copyreg" in name for name in names), "the class itself is never named"
    # However many objects a pickle holds, it holds their source once.
    assert pickle.dumps(models.Stack(*[2] * 9)).count(b"@persistence.persistent_class\nclass Layer") == 1


def test_is_persistent_of_classes_and_instances(models):
    assert persistence.is_persistent(models.Plain) and persistence.is_persistent(models.Plain())
    for other in (models.Undecorated, models.Undecorated(), torch.nn.Linear(1, 1), dict, 3):
        assert not persistence.is_persistent(other)


def test_persistence_undecorated_subclass_is_plain(models):
    for twin in round_trips(models.Undecorated(value=7)):
        assert type(twin) is models.Undecorated and twin.value == 7


def test_persistence_never_executes_foreign_source(models, tmp_path):
    meta = meta_of(models.Plain())
    trap = f"open({str(tmp_path / 'executed')!r}, 'w')\nclass Plain: pass\n"
    changes = [
        dict(module_src=trap),
        dict(module_src=SOURCE + "\n"),
        dict(module_src=None),
        dict(module_name="os"),
        dict(module_name="finetune.models"),
        dict(module_name="finetune.models.no_such_module"),
        dict(module_name=None),
        dict(class_name="Undecorated"),
        dict(class_name="torch"),
        dict(class_name="Missing"),
        dict(class_name=None),
        dict(type="function"),
        dict(version=5),
    ]
    for change in changes:
        with pytest.raises(RuntimeError, match=r"finetune\.load"):
            persistence._reconstruct_persistent_obj({**meta, **change})
    for broken in (None, [], {}, {**meta, "state": None}):
        with pytest.raises(RuntimeError, match="not a persistent object"):
            persistence._reconstruct_persistent_obj(broken)
    without_name = {key: value for key, value in meta.items() if key != "module_name"} | {"module_src": trap}
    with pytest.raises(RuntimeError, match=r"finetune\.load"):  # the form of every foreign file
        persistence._reconstruct_persistent_obj(without_name)
    assert not (tmp_path / "executed").exists()
    assert persistence._reconstruct_persistent_obj(meta).value == 1


def test_persistence_outside_finetune_can_only_be_written(tmp_path, monkeypatch):
    elsewhere = import_models(tmp_path, monkeypatch, name="elsewhere_probe")
    data = pickle.dumps(elsewhere.Plain())
    with pytest.raises(RuntimeError, match=r"finetune\.load"):
        pickle.loads(data)


def test_persistence_source_is_the_imported_one(models, tmp_path):
    """Editing the file of a running program does not change what its objects say they are."""
    (tmp_path / "finetune.models.probe.py").write_text("edited = True\n")
    assert meta_of(models.Plain())["module_src"] == SOURCE


def test_persistence_requires_source_file(monkeypatch):
    monkeypatch.setattr(persistence, "_sources", {})
    monkeypatch.setattr(persistence, "_classes", set())
    namespace = {"__name__": "sourceless"}
    monkeypatch.setitem(sys.modules, "sourceless", type(sys)("sourceless"))
    exec("class Thing:\n    def __init__(self): pass\n", namespace)
    thing = persistence.persistent_class(namespace["Thing"])()
    with pytest.raises(RuntimeError, match="sourceless"):
        pickle.dumps(thing)


def test_persistence_round_trip_of_networks():
    from finetune.models.stylegan2 import Discriminator

    network = Discriminator(c_dim=0, img_resolution=8, img_channels=3, channel_base=32, channel_max=4)
    x, c = torch.randn(2, 3, 8, 8), torch.zeros(2, 0)
    for twin in round_trips(network):
        assert type(twin) is Discriminator and twin.init_kwargs == network.init_kwargs
        assert torch.equal(twin(x, c), network(x, c))
