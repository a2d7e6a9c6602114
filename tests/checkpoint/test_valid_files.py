"""Files that people have: other protocols, writers, precisions, entries, and networks of other projects."""

from __future__ import annotations

import argparse
import collections
import datetime
import io
import pathlib
import pickle
import random
import sys
import types

import numpy as np
import pytest
import torch
from checkpoint import forge, valid_files
from checkpoint.forge import Call, Name, Raw, call

import finetune
from finetune.checkpoint.unpickle.globals import loads
from finetune.checkpoint.unpickle.stubs import Array
from finetune.checkpoint.unpickle.values import Record
from finetune.errors import CheckpointError, CheckpointMismatch, ConfigError, PickleRefused

GENERATIONS = ("stylegan2-tf-32", "stylegan2-ada-32", "stylegan2-32", "stylegan3-t-32", "stylegan3-r-32")


@pytest.fixture
def opened(tmp_path):
    """Write a value with Python's pickler and open the file."""

    def write_and_load(value, protocol=4):
        path = tmp_path / "network.pkl"
        path.write_bytes(value if isinstance(value, bytes) else pickle.dumps(value, protocol))
        return finetune.load(path)

    return write_and_load


@pytest.fixture
def ada(golden_dir):
    return dict(valid_files.read(golden_dir / "stylegan2-ada-32.pkl"))


@pytest.fixture
def vision_head(monkeypatch):
    """A class of another project, which pickle names and does not contain."""
    module = types.ModuleType("vision_module")
    monkeypatch.setitem(sys.modules, "vision_module", module)

    class VisionHead:
        def __setstate__(self, state):
            raise AssertionError("executed")

    VisionHead.__module__, VisionHead.__qualname__ = "vision_module", "VisionHead"
    module.VisionHead = VisionHead
    head = VisionHead()
    head.weight = torch.zeros(3)
    return head


def equal(one, other) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("protocol", [0, 2, 4])  # text; Python 2 and torch.save; Python 3.8 to 3.13
@pytest.mark.parametrize("name", GENERATIONS)
def test_load_every_generation_and_protocol(name, protocol, opened, golden_dir, monkeypatch):
    valid_files.install(monkeypatch)
    again = opened(valid_files.read(golden_dir / f"{name}.pkl"), protocol)
    wanted = finetune.load(golden_dir / f"{name}.pkl")
    assert not again.foreign and again.missing == wanted.missing
    for key in ("G", "D", "G_ema"):
        assert equal(getattr(again, key), getattr(wanted, key)), key


F4 = call("numpy", "dtype", "f4", False, True)


@pytest.mark.parametrize("core", ["core", "_core"])
@pytest.mark.parametrize("order, axes", [("C", ()), ("F", ()), ("C", (None,)), ("K", ((1, 0),))])
def test_load_numpy_arrays_of_protocol_5(core, order, axes):
    array = np.arange(6, dtype="<f4").reshape(2, 3)
    stored = array if order == "C" else array.T.copy()
    shape = stored.shape if order == "K" else array.shape
    made = call(f"numpy.{core}.numeric", "_frombuffer", stored.tobytes(), F4, shape, order, *axes)
    seen = loads(forge.dumps(made))
    assert type(seen) is Array and np.array_equal(seen.value, array)


@pytest.mark.parametrize("module", ["dill._dill", "dill.dill"])
def test_load_names_of_dill(module):
    array = np.arange(4, dtype="<f4")
    made = forge.ndarray(array)
    dill = call(module, "_create_array", made.function, made.args, made.state, None)
    kind = call(module, "_load_type", "object")
    plain = call("copyreg", "_reconstructor", Name("dnnlib", "EasyDict"), kind, None)
    seen = loads(forge.dumps([dill, plain, call(module, "_load_type", "CodeType")]))
    assert np.array_equal(seen[0].value, array) and seen[1] == {}
    assert type(seen[2]) is Record and seen[2].args == ("CodeType",)


def test_load_dill_by_value_names_remedy(opened):
    code = call("dill._dill", "_create_function", call("dill._dill", "_create_code", b"x"), {})
    with pytest.raises(PickleRefused, match="written by dill") as refusal:
        opened(forge.dumps({"G_ema": code}))
    assert "pickle.dump({'G_ema': G_ema}, file)" in str(refusal.value)


@pytest.mark.parametrize("name", [("__builtin__", "__main__"), ("builtins", "getattr"), ("os", "system")])
def test_load_dill_with_acting_name(name, opened):
    """dill refers to such names where it stores functions and classes by value."""
    code = call("dill._dill", "_create_function", Name(*name))
    with pytest.raises(PickleRefused, match="written by dill") as refusal:
        opened(forge.dumps({"G_ema": code}))
    assert refusal.value.blocked == ".".join(name) and "trust its author" in refusal.value.hint


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_load_tensors_with_attributes(protocol, ada, opened, golden_dir):
    for module in ada["G_ema"].modules():
        for group in ("_parameters", "_buffers"):
            for tensor in module.state[group].values():
                if tensor is not None:
                    tensor.lr_scale = 2.0
    assert b"_rebuild_parameter_with_state" in pickle.dumps(ada["G_ema"], protocol)
    assert b"_rebuild_from_type_v2" in pickle.dumps(ada["G_ema"], protocol)
    assert equal(opened(ada, protocol).G_ema, finetune.load(golden_dir / "stylegan2-ada-32.pkl").G_ema)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_load_converts_precision(dtype, opened, golden_dir):
    root = dict(valid_files.read(golden_dir / "stylegan3-t-32.pkl"))
    for key in ("G", "D", "G_ema"):
        valid_files.convert(root[key], dtype)
    seen, wanted = opened(root), finetune.load(golden_dir / "stylegan3-t-32.pkl")
    for key in ("G", "D", "G_ema"):
        found = getattr(seen, key).state_dict()
        for path, tensor in getattr(wanted, key).state_dict().items():
            expected = tensor.to(dtype).to(tensor.dtype) if tensor.is_floating_point() else tensor
            assert torch.equal(found[path], expected), path
    way = "narrowed" if dtype is torch.float64 else "widened"
    stored = str(dtype).removeprefix("torch.")
    assert sum(f"stored as {stored} were {way} to float32" in note for note in seen.notes) == 3


@pytest.mark.parametrize("value", [1e300, -1e39, 3.5e38])
def test_load_refuses_weights_beyond_float32(value, ada, opened):
    valid_files.convert(ada["G_ema"], torch.float64)
    mapping = ada["G_ema"].state["_modules"]["mapping"].state
    mapping["_buffers"]["w_avg"][:2] = torch.tensor([value, torch.inf], dtype=torch.float64)
    with pytest.raises(CheckpointMismatch) as refusal:
        opened({"G_ema": ada["G_ema"]})
    shown = f"{abs(value):.3g}"
    assert refusal.value.differences == [f"mapping.w_avg has a value of {shown}, too large for float32"]
    mapping["_buffers"]["w_avg"][0] = 3.4e38
    assert opened({"G_ema": ada["G_ema"]}).G_ema.mapping.w_avg[1] == torch.inf


def test_load_tensorflow_half_precision(opened, golden_dir, monkeypatch):
    valid_files.install(monkeypatch)
    root = valid_files.read(golden_dir / "stylegan2-tf-32.pkl")
    for network in root:
        for part in (network, *network.state["components"].values()):
            part.state["variables"] = [
                (key, value.astype(np.float16) if isinstance(value, np.ndarray) else value)
                for key, value in part.state["variables"]
            ]
    seen, wanted = opened(root), finetune.load(golden_dir / "stylegan2-tf-32.pkl")
    const = wanted.G_ema.synthesis.b4.const
    assert torch.equal(seen.G_ema.synthesis.b4.const, const.half().float())
    assert any("stored as float16 were widened" in note for note in seen.notes)


def test_load_foreign_discriminator_keeps_generators(ada, opened, vision_head):
    ada["D"] = vision_head
    seen = opened(ada)
    assert seen.missing == ["D"] and seen.foreign == {"D": "vision_module.VisionHead"}
    assert any(note.startswith("D: foreign class vision_module.VisionHead") for note in seen.notes)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_load_foreign_part_refuses_network(ada, opened, vision_head, protocol):
    ada["D"].state["_modules"]["b4"].state["head"] = [vision_head]
    seen = opened(ada, protocol)
    assert seen.missing == ["D"] and seen.foreign == {"D": "vision_module.VisionHead"}


def test_load_persistent_discriminator_of_other_architecture(ada, opened):
    modules = ada["D"].state["_modules"]
    ada["D"] = valid_files.Net(
        "ProjectedDiscriminator", {**ada["D"].state, "_modules": {"heads": modules["b8"]}}
    )
    assert opened(ada).foreign == {"D": "ProjectedDiscriminator"}


def test_load_discriminator_of_another_shape_keeps_generators(ada, opened, tmp_path):
    from finetune.train.prepare import load_for_training

    ada["D"].state["_modules"]["b64"] = ada["D"].state["_modules"]["b32"]
    seen = opened(ada)
    assert seen.missing == ["D"] and seen.foreign["D"].startswith("b64.conv0.bias [16] is in the file")
    assert any(note.startswith("D: not opened, 12 tensors or settings do not fit") for note in seen.notes)
    with pytest.raises(ConfigError, match=r"its D is foreign \(b64") as refusal:
        load_for_training(str(tmp_path / "network.pkl"))
    assert "--new-d" in str(refusal.value)


def test_load_generator_of_another_shape_is_refused(ada, opened):
    synthesis = ada["G"].state["_modules"]["synthesis"].state["_modules"]
    synthesis["b64"] = synthesis["b32"]
    with pytest.raises(CheckpointMismatch, match="G describes a Generator"):
        opened(ada)


NO_NETWORKS = {
    "a dict of model, step": {"model": {"weight": torch.zeros(3)}, "step": 5},
    "a dict of 0": {0: torch.zeros(3)},
    "a list": [torch.zeros(3)],
    "a Tensor": torch.zeros(3),
    "a str": "d.pkl",
}


@pytest.mark.parametrize("said", NO_NETWORKS)
def test_load_entry_that_is_no_network_keeps_others(said, ada, opened, tmp_path):
    from finetune.train.prepare import load_for_training

    ada["G"] = ada["D"] = NO_NETWORKS[said]
    seen = opened(ada)
    assert seen.missing == ["G", "D"] and seen.foreign == {
        name: f"{said}, not a network" for name in ("G", "D")
    }
    assert f"D: not opened, {said}, not a network" in seen.notes
    with pytest.raises(ConfigError, match=f"its D is foreign \\({said}") as refusal:
        load_for_training(str(tmp_path / "network.pkl"))
    assert "--new-d" in str(refusal.value)
    del ada["G_ema"]
    with pytest.raises(CheckpointError, match=f"G is {said}, not a network"):
        opened(ada)


def test_load_entry_with_foreign_class_inside(ada, opened, vision_head):
    ada["D"] = {"model": [vision_head]}
    assert opened(ada).foreign == {"D": "vision_module.VisionHead"}


def test_load_foreign_generator_keeps_other(ada, opened, vision_head):
    ada["G"] = vision_head
    seen = opened(ada)
    assert seen.foreign == {"G": "vision_module.VisionHead"} and seen.best is seen.G_ema


def test_load_refuses_foreign_generators(ada, opened, vision_head):
    ada["G"] = ada["G_ema"] = vision_head
    with pytest.raises(
        PickleRefused, match=r"G_ema in the pickle needs vision_module\.VisionHead"
    ) as refusal:
        opened(ada)
    assert refusal.value.blocked == "vision_module.VisionHead" and "may be harmless" in str(refusal.value)


def test_load_refuses_foreign_class(opened, vision_head):
    with pytest.raises(PickleRefused, match="may be harmless"):
        opened(vision_head)


def test_load_for_training_offers_new_d(ada, tmp_path, vision_head):
    from finetune.train.prepare import load_for_training

    ada["D"] = vision_head
    path = tmp_path / "network.pkl"
    path.write_bytes(pickle.dumps(ada))
    with pytest.raises(ConfigError, match=r"vision_module\.VisionHead") as refusal:
        load_for_training(str(path))
    assert "--new-d" in str(refusal.value)
    assert load_for_training(str(path), new_d=True).D is None


def extras():
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.Adam([parameter])
    parameter.sum().backward()
    optimizer.step()
    return {
        "optimizer": optimizer.state_dict(),
        "counter": np.int64(5),
        "path": pathlib.PurePosixPath("/data/x.zip"),
        "windows": pathlib.PureWindowsPath("C:\\data"),
        "device": torch.device("cuda:0"),
        "cpu": torch.device("cpu"),
        "size": torch.Size([1, 2]),
        "dtypes": [torch.float32, torch.bfloat16, np.float32, np.dtype("float32")],
        "default": collections.defaultdict(list, {"a": [1]}),
        "counts": collections.Counter("aab"),
        "deque": collections.deque([1.0], 5),
        "date": [datetime.datetime(2026, 1, 2), datetime.date(2026, 1, 2), datetime.timedelta(1)],
        "random": [random.getstate(), np.random.get_state(), torch.get_rng_state()],
        "generators": [np.random.default_rng(0), np.random.RandomState(0), random.Random(0)],
        "texts": [np.array(["a", "bcd"]), np.array([b"x"]), np.array(["2026"], "datetime64[D]")],
        "image": np.zeros((4, 4, 3), np.uint8),
        "bytes": [b"", b"x\xff", bytearray(b"y")],
        "numbers": [1j, range(3), slice(1, 2), frozenset({"x"})],
        "complex": np.zeros(2, np.complex64),
    }


@pytest.mark.parametrize("protocol", range(6))
def test_load_additional_entries(protocol, opened, golden_dir):
    root = {"G_ema": valid_files.read(golden_dir / "stylegan3-t-32.pkl")["G_ema"], **extras()}
    seen = opened(root, protocol)
    assert seen.notes[-1] == f"unknown entries ignored: {', '.join(sorted(extras()))}"


@pytest.mark.parametrize("protocol", range(6))
def test_load_plain_values(protocol):
    def read(value):
        return loads(pickle.dumps(value, protocol))

    assert read(pathlib.PurePosixPath("/data/x.zip")) == "/data/x.zip"
    assert read(pathlib.PurePosixPath("data/x.zip")) == "data/x.zip"
    assert read(torch.device("cuda:1")) == "cuda:1" and read(torch.device("cpu")) == "cpu"
    assert read(torch.Size([2, 3])) == (2, 3)
    assert read(collections.defaultdict(list, {"a": [1]})) == {"a": [1]}
    assert read(np.array(["a", "bcd"])).value.tolist() == ["a", "bcd"]


def test_load_path_of_training_set(ada, opened):
    ada["training_set_kwargs"] = {"path": pathlib.PurePosixPath("/data/x.zip")}
    assert opened(ada).training_set_kwargs == {"path": "/data/x.zip"}


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_load_ignores_foreign_entry(ada, opened, protocol):
    ada["args"] = argparse.Namespace(lr=1)
    seen = opened(ada, protocol)
    assert seen.missing == [] and not seen.foreign
    said = "entry `args` ignored: foreign class argparse.Namespace"
    assert any(note.startswith(said) for note in seen.notes)


def test_load_ignores_stream_in_entry(ada, opened):
    ada["stream"] = io.BytesIO(b"x")
    assert any(note.startswith("entry `stream` ignored") for note in opened(ada).notes)


RECORDS = {
    "REDUCE": call("vision", "Head", 1),
    "NEWOBJ": Raw(forge.emit(Name("vision", "Head")) + forge.emit((1,)) + b"\x81"),
    "NEWOBJ_EX": Raw(forge.emit(Name("vision", "Head")) + forge.emit((1,)) + forge.emit({"a": 2}) + b"\x92"),
    "INST": Raw(b"(" + forge.emit(1) + b"ivision\nHead\n"),
    "OBJ": Raw(b"(" + forge.emit(Name("vision", "Head")) + forge.emit(1) + b"o"),
    "BUILD": Call(Name("vision", "Head"), (1,), {"x": 1}),
    "call of the result": Call(call("vision", "Head"), (1,)),
    "items": Raw(forge.emit(call("vision", "Head", 1)) + b"(" + forge.emit(2) + b"e"),
    "entries": Raw(forge.emit(call("vision", "Head", 1)) + b"(" + forge.emit("k") + forge.emit(2) + b"u"),
}


@pytest.mark.parametrize("way", RECORDS)
def test_loads_every_construction_gives_record(way):
    seen = loads(forge.dumps({"x": RECORDS[way]}))["x"]
    assert type(seen) is Record and seen.name == "vision.Head" and seen.args == (1,)
    assert seen.keywords == ({"a": 2} if way == "NEWOBJ_EX" else None)
    assert seen.state == ({"x": 1} if way == "BUILD" else None)


@pytest.mark.parametrize(
    "key, height, width",
    [("G", 5, 4), ("G_ema", 5, 4), ("G", 3, 3), ("D", 4, 2), ("D", 2, 4), ("D", 4, 3), ("D", 5, 4)],
)
def test_load_refuses_other_rectangles(key, height, width, ada, opened):
    """A constant that is not 4 high or wide, and a discriminator whose sides nothing gives."""
    net = ada[key]
    if key == "D":
        parameters = net.state["_modules"]["b4"].state["_modules"]["fc"].state["_parameters"]
        weight = parameters["weight"].detach()
        parameters["weight"] = torch.nn.Parameter(torch.zeros(len(weight), len(weight) * height * width))
    else:
        parameters = net.state["_modules"]["synthesis"].state["_modules"]["b4"].state["_parameters"]
        parameters["const"] = torch.nn.Parameter(torch.zeros(len(parameters["const"]), height, width))
    with pytest.raises(CheckpointError, match="is a rectangular network") as refusal:
        opened({key: net})
    size = f"last block has {height * width} positions" if key == "D" else f"starts at {height} x {width}"
    assert f"{size}, and " in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 2


@pytest.mark.parametrize("height, width", [(4, 2), (2, 4), (4, 3)])
def test_load_refuses_constant_of_other_shape(height, width, ada, opened):
    net = ada["G_ema"]
    parameters = net.state["_modules"]["synthesis"].state["_modules"]["b4"].state["_parameters"]
    parameters["const"] = torch.nn.Parameter(torch.zeros(len(parameters["const"]), height, width))
    with pytest.raises(CheckpointMismatch, match=r"b32.conv1.noise_const is \[32, 32\] in the file"):
        opened({"G_ema": net})


def test_load_large_weights_at_old_protocols(tmp_path):
    """Bytes are spelled as text there, of several megabytes, which may be all zeros."""
    for value in (np.zeros(1 << 20, "<f4"), np.random.default_rng(0).random(1 << 20, np.float32)):
        for protocol in range(3):
            seen = loads(pickle.dumps({"a": value, "b": torch.from_numpy(value)}, protocol))
            assert np.array_equal(seen["a"].value, value) and np.array_equal(seen["b"].array, value)


def test_load_refusals_of_harmless_files(ada, opened, vision_head):
    for value in ({"G_ema": vision_head}, {"x": vision_head}, vision_head):
        with pytest.raises(CheckpointError) as refusal:
            opened(value)
        assert "Do not open" not in str(refusal.value) and "can run" not in str(refusal.value)


def test_load_snapshot_by_dill(opened, golden_dir, monkeypatch):
    """The library itself, as the projects derived from Projected GAN use it."""
    dill = pytest.importorskip("dill", reason="needs dill")
    valid_files.install(monkeypatch)
    root = dict(valid_files.read(golden_dir / "stylegan3-t-32.pkl"))
    root["progress"] = {"cur_nimg": torch.tensor([4000]), "best_fid": 9.5}
    seen = opened(dill.dumps(root))
    assert seen.missing == [] and equal(seen.G_ema, finetune.load(golden_dir / "stylegan3-t-32.pkl").G_ema)
