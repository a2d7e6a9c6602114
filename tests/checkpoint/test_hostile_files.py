"""Files that ask for something: each ends in PickleRefused with the global and its position, and nothing
runs.
"""

from __future__ import annotations

import copyreg
import os
import pickle
import pickletools
import struct

import numpy as np
import pytest
from checkpoint import forge
from checkpoint.forge import Call, Name, Raw, call

import finetune
from finetune.checkpoint import describe
from finetune.checkpoint.unpickle.files import read_pickle
from finetune.checkpoint.unpickle.globals import loads
from finetune.errors import CheckpointError, PickleRefused


def refused(data: bytes) -> PickleRefused:
    with pytest.raises(PickleRefused) as refusal:
        loads(data)
    error = refusal.value
    assert 0 <= error.offset <= len(data)
    assert f"at byte {error.offset}" in error.what
    return error


def position_of_global(data: bytes, name: str) -> int:
    """Where the opcode is that names the global, found by the standard library's reader of opcodes."""
    texts = []
    for opcode, arg, position in pickletools.genops(data):
        if opcode.name == "GLOBAL" and arg.replace(" ", ".") == name:
            return position
        if "UNICODE" in opcode.name:
            texts.append(arg)
        if opcode.name == "STACK_GLOBAL" and ".".join(texts[-2:]) == name:
            return position
    raise AssertionError(f"no {name} in the pickle")


class Runs:
    """Pickles as a call of `function`, which ordinary unpicklers make."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


class HasState:
    """Ordinary unpicklers call __setstate__ of this class with the state."""

    called = False

    def __getstate__(self):
        return {"x": 1}

    def __setstate__(self, state):
        HasState.called = True


@pytest.fixture
def trap(tmp_path):
    """A shell command, and a check that it was never run; `arm` proves that the file would run it."""
    marker = tmp_path / "executed"
    yield f"touch {marker}"
    assert not marker.exists(), "something in the file was executed"


PLACES = {
    "alone": lambda evil: evil,
    "as an entry": lambda evil: {"G": None, "G_ema": evil},
    "in the options": lambda evil: {"training_set_kwargs": {"path": [evil]}},
    "as a tuple": lambda evil: (evil, evil, evil),
}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("place", PLACES)
def test_load_refuses_os_system(trap, place, protocol):
    data = pickle.dumps(PLACES[place](Runs(os.system, trap)), protocol)
    error = refused(data)
    name = f"{os.system.__module__}.system"  # posix.system or nt.system
    assert error.blocked == name
    assert error.offset == position_of_global(data, name)
    assert "nothing was executed" in error.what


def test_hostile_file_runs_in_pickle_load(tmp_path):
    """The traps are real: Python's own unpickler springs this one."""
    marker = tmp_path / "executed"
    pickle.loads(pickle.dumps(Runs(os.mkdir, str(marker))))
    assert marker.exists()


BLOCKED = {
    "eval": call("builtins", "eval", "1"),
    "exec as Python 2 called it": Raw(b"\x80\x02" + forge.emit(call("__builtin__", "eval", "1"))),
    "getattr chain": Call(call("builtins", "getattr", Name("os", "path"), "join")),
    "attribute of an allowed name": call("collections", "OrderedDict.fromkeys", ["x"]),
    "dunder of an allowed name": Name("numpy", "ndarray.__class__"),
    "module instead of a function": Name("torch", "storage"),
    "operator": call("operator", "attrgetter", "system"),
    "functools": call("functools", "partial", Name("os", "system"), "x"),
    "importlib": call("importlib", "import_module", "os"),
    "torch.load": call("torch", "load", b""),
    "torch.jit": call("torch.jit", "load", b""),
    "numpy.load": call("numpy", "load", "x.npy"),
    "numpy's own unpickler": call(
        "numpy.core._multiarray_umath", "_reconstruct", Name("numpy", "ndarray"), (0,), b"b"
    ),
    "torch_utils.persistence, another name": call("torch_utils.persistence", "_src_to_module", "import os"),
    "copyreg with another class": call("copyreg", "_reconstructor", Name("subprocess", "Popen"), None, None),
    "copyreg.__newobj__": call("copyreg", "__newobj__", Name("builtins", "object")),
    "copyreg.add_extension": call("copyreg", "add_extension", "os", "system", 1),
    "a name with a line of spaces": Name("os", "system   "),
    "keywords": Raw(forge.emit(Name("os", "system")) + b"){\x92"),
    "new object": Raw(forge.emit(Name("subprocess", "Popen")) + b")\x81"),
    "old instance": Raw(b"(" + forge.emit("touch x") + b"ios\nsystem\n"),
    "copyreg.pickle": call("copyreg", "pickle", "x"),
    "torch.hub": call("torch.hub", "load", "x"),
    "marshal": call("marshal", "loads", b""),
    "ctypes": call("ctypes", "CDLL", "x"),
    "socket": call("socket", "socket"),
    "runpy": call("runpy", "run_path", "x"),
    "sys": Name("sys", "modules"),
    "codecs": call("codecs", "encode", "x", "rot13"),
    "numpy's memmap": call("numpy", "memmap", "x"),
    "os as an argument of a foreign class": call("vision", "Head", Name("os", "system")),
    "os in the state of a foreign class": Call(Name("vision", "Head"), (), {"x": [Name("nt", "system")]}),
    "os among the items of a foreign list": Raw(
        forge.emit(call("vision", "List")) + forge.emit(Name("posix", "system")) + b"a"
    ),
    "os as a class for copyreg": call(
        "copyreg", "_reconstructor", Name("vision", "Head"), Name("subprocess", "Popen"), None
    ),
    "dunder of a foreign name": Name("vision", "__class__"),
    "attribute of a foreign name": Name("vision", "Head.load"),
    "old object": Raw(b"(" + forge.emit(Name("os", "system")) + b"o"),
}


@pytest.mark.parametrize("name", BLOCKED)
def test_load_refuses_acting_globals(name):
    evil = BLOCKED[name]
    data = forge.dumps({"G_ema": evil})
    error = refused(data)
    assert error.blocked is not None
    module, _, _ = error.blocked.partition(".")
    assert data[error.offset :].startswith((b"c" + module.encode(), b"ios", b"c__builtin__"))


def test_load_never_calls_setstate(trap, tmp_path):
    data = pickle.dumps({"G_ema": HasState()})
    pickle.loads(data)
    assert HasState.called, "the trap is not armed"
    HasState.called = False
    path = tmp_path / "network.pkl"
    path.write_bytes(data)
    with pytest.raises(PickleRefused, match="may be harmless") as refusal:
        finetune.load(path)
    error = refusal.value
    assert error.blocked == f"{HasState.__module__}.HasState"
    assert error.offset == position_of_global(data, error.blocked)
    assert not HasState.called


def test_load_ignores_state_of_stub():
    """BUILD with a state that Python would turn into __setstate__, __dict__ or slots changes nothing."""
    evil = {"__class__": "x", "__reduce__": "y", "__setstate__": 1}
    seen = loads(forge.dumps({"a": Call(Name("dnnlib", "EasyDict"), (), (evil, evil)), "b": 1}))
    assert seen == {"a": {}, "b": 1}
    assert refused(forge.dumps(Raw(forge.emit([1]) + forge.emit(evil) + b"b"))).blocked is None


def test_load_refuses_copyreg_extension(trap):
    copyreg.add_extension(os.system.__module__, "system", 77)
    try:
        data = pickle.dumps(Runs(os.system, trap), 2)
    finally:
        copyreg.remove_extension(os.system.__module__, "system", 77)
    assert b"system" not in data
    error = refused(data)
    assert error.blocked == "copyreg extension 77" and data[error.offset] == 0x82


@pytest.mark.parametrize("place", ["key", "system", "keys", "kind"])
def test_load_refuses_os_system_in_storage(trap, place):
    """The bytes of a tensor storage are a pickle of their own."""
    evil = forge.dumps(call("posix", "system", trap))
    good = forge.storage(np.zeros(2, "<f4"))
    parts = {
        "key": evil + good,
        "system": good[: good.index(b"\x80\x04}")] + evil,
        "keys": good[: good.rindex(b"\x80\x04](")] + evil,
        "kind": forge.storage(np.zeros(2, "<f4"), kind=call("posix", "system", trap)),
    }
    data = forge.dumps([1, call("torch.storage", "_load_from_bytes", parts[place])])
    error = refused(data)
    assert error.blocked == "posix.system"
    assert data[error.offset :].startswith(b"cposix\nsystem\n"), "the position is that in the file"


def test_load_refuses_os_system_in_text_storage(trap):
    """Protocol 2 spells bytes as text, so that positions inside have no place in the file."""
    evil = pickle.dumps(Runs(os.system, trap), 2).decode("latin-1")
    made = call("torch.storage", "_load_from_bytes", call("_codecs", "encode", evil, "latin1"))
    data = forge.dumps(made)
    error = refused(data)
    assert error.blocked == f"{os.system.__module__}.system"
    assert data[error.offset : error.offset + 1] == b"R"


def test_load_refuses_nested_storage(trap):
    inner = forge.dumps(call("torch.storage", "_load_from_bytes", forge.dumps(call("posix", "system", trap))))
    error = refused(forge.dumps(call("torch.storage", "_load_from_bytes", inner)))
    assert error.blocked == "torch.storage._load_from_bytes"


def test_load_refuses_persistent_id():
    assert refused(forge.dumps(Raw(forge.emit("os.system") + b"Q"))).blocked == "a persistent id"


def test_load_never_executes_source(trap, tmp_path):
    """Embedded source is not even read; what is no network is refused by the name of its class."""
    source = f"import os\nos.system({trap!r})\nclass Evil: pass\n"
    state = {"_parameters": {}, "_buffers": {}, "_modules": {}}
    path = tmp_path / "evil.pkl"
    path.write_bytes(forge.dumps({"G_ema": forge.persistent("Evil", state, module_src=source)}))
    with pytest.raises(PickleRefused, match="never run") as refusal:
        finetune.load(path)
    assert refusal.value.blocked == "Evil" and str(path) in str(refusal.value)


def test_load_drops_hostile_source(trap, tmp_path, golden_dir):
    """A real network opens, whatever the source in its file says."""
    root = read_pickle(golden_dir / "stylegan2-ada-32.pkl").root
    data = forge.dumps({"G_ema": root["G_ema"]})
    data = data.replace(b"raise RuntimeError('executed')", b"__import__('os').abort()".ljust(30))
    assert b"os').abort()" in data
    path = tmp_path / "G_ema.pkl"
    path.write_bytes(data)
    assert finetune.load(path).G_ema.img_resolution == 32


F4 = np.arange(6, dtype="<f4")
LOADED = call("torch.storage", "_load_from_bytes", forge.storage(F4))
REBUILD = ("torch._utils", "_rebuild_tensor_v2")
DTYPE = call("numpy", "dtype", "f4", False, True)
NEW = (Name("numpy", "ndarray"), (0,), b"b")

# Calls of allowed names with arguments that no real file has: name -> (call, words of the refusal).
HOSTILE_ARGUMENTS = {
    "tensor of 2^40 elements, stride 0": (forge.tensor(F4, size=(2**40,), stride=(0,)), "beyond its storage"),
    "tensor past its storage": (forge.tensor(F4, size=(3,), stride=(3,)), "beyond its storage"),
    "tensor of strides too long": (forge.tensor(F4, size=(2, 2), stride=(2**40, 1)), "beyond its storage"),
    "tensor of huge strides": (forge.tensor(F4, size=(2,), stride=(2**62,)), "an invalid shape"),
    "tensor before its storage": (forge.tensor(F4, size=(2,), stride=(1,), offset=-1), "an invalid shape"),
    "tensor of negative stride": (forge.tensor(F4, size=(2,), stride=(-1,), offset=3), "an invalid shape"),
    "tensor of negative size": (forge.tensor(F4, size=(-2, -3), stride=(1, 1)), "an invalid shape"),
    "tensor of 20 axes": (forge.tensor(F4, size=(1,) * 20, stride=(1,) * 20), "an invalid shape"),
    "tensor of fractions": (forge.tensor(F4, size=(2.0,), stride=(1,)), "an invalid shape"),
    "tensor of truths": (forge.tensor(F4, size=(True,), stride=(1,)), "an invalid shape"),
    "tensor of a list": (call(*REBUILD, LOADED, 0, [6], [1], False, {}), "an invalid shape"),
    "tensor of more axes than strides": (
        forge.tensor(F4, size=(2, 3), stride=(1,)),
        "more strides than axes",
    ),
    "tensor of no storage": (call(*REBUILD, [1.0], 0, (1,), (1,), False, {}), "without a storage"),
    "tensor of a name": (
        call(*REBUILD, Name("torch", "FloatStorage"), 0, (1,), (1,), False, {}),
        "without a storage",
    ),
    "parameter of no tensor": (call("torch._utils", "_rebuild_parameter", 1, True, {}), "without a tensor"),
    "array of objects": (call("numpy", "dtype", "O8", False, True), "numpy.dtype O8"),
    "array of endless texts": (call("numpy", "dtype", "U9999999", False, True), "numpy.dtype U9999999"),
    "array of empty texts": (call("numpy", "dtype", "U0", False, True), "numpy.dtype U0"),
    "buffer of another size": (
        call("numpy.core.numeric", "_frombuffer", b"\0" * 8, DTYPE, (3,), "C"),
        "does not fit its 8 bytes",
    ),
    "buffer of no order": (
        call("numpy.core.numeric", "_frombuffer", b"\0" * 4, DTYPE, (1,), "CF"),
        "a buffer",
    ),
    "buffer with a list for an order": (
        call("numpy.core.numeric", "_frombuffer", b"\0" * 4, DTYPE, (1,), []),
        "a buffer",
    ),
    "buffer of unknown axes": (
        call("numpy.core.numeric", "_frombuffer", b"\0" * 4, DTYPE, (1,), "K", (1,)),
        "unknown axes",
    ),
    "dill array of a text": (call("dill._dill", "_create_array", "x", (), (), None), "it calls a str"),
    "size of a number": (call("torch", "Size", 5), "without a tuple"),
    "path of a list": (call("pathlib", "PosixPath", []), "not text"),
    "default dict of numbers": (call("collections", "defaultdict", 5), "something other than a class"),
    "bytes of a number": (call("builtins", "bytes", 1 << 40), "not made of text"),
    "parameter with a state and no tensor": (
        call("torch._utils", "_rebuild_parameter_with_state", 1, True, {}, {}),
        "without a tensor",
    ),
    "tensor of a class and no tensor": (
        call(
            "torch._tensor",
            "_rebuild_from_type_v2",
            Name("torch", "Size"),
            Name("torch", "Tensor"),
            ((),),
            {},
        ),
        "without a tensor",
    ),
    "array of records": (call("numpy", "dtype", [("a", "f4")], False, True), "without a code"),
    "dtype with fields": (
        Call(DTYPE.function, DTYPE.args, (3, "<", None, ("a",), {}, -1, -1, 0)),
        "dtype with fields",
    ),
    "array of another class": (
        call("numpy.core.multiarray", "_reconstruct", Name("torch", "FloatStorage"), (0,), b"b"),
        "another class than ndarray",
    ),
    "array larger than its bytes": (
        Call(Name("numpy.core.multiarray", "_reconstruct"), NEW, (1, (2**40,), DTYPE, False, b"\0" * 8)),
        "does not fit its 8 bytes",
    ),
    "array of pickled items": (
        Call(Name("numpy.core.multiarray", "_reconstruct"), NEW, (1, (1,), DTYPE, False, [1.0])),
        "without bytes",
    ),
    "number of another size": (call("numpy.core.multiarray", "scalar", DTYPE, b"\0" * 5), "wrong size"),
    "number of an object": (call("numpy.core.multiarray", "scalar", DTYPE, "x"), "without bytes"),
    "codec that decodes": (call("_codecs", "encode", "x", "rot13"), "codec rot13"),
    "codec that grows": (call("_codecs", "encode", "x", "utf-32"), "codec utf-32"),
    "bytes above 255": (call("_codecs", "encode", "\u0100", "latin1"), "above 255"),
    "dict of a dict": (call("collections", "OrderedDict", {"a": 1}), "something other than names"),
    "dict with a list as name": (call("collections", "OrderedDict", [([], 1)]), "something other than names"),
    "set of lists": (call("builtins", "set", [[1]]), "something other than texts"),
    "object with arguments": (call("builtins", "object", 1), "made with arguments"),
    "network object with arguments": (call("dnnlib.tflib.network", "Network", "x"), "made with arguments"),
    "network without a meta": (
        call("torch_utils.persistence", "_reconstruct_persistent_obj"),
        "without a class",
    ),
    "call of a text": (Call("os.system", ("x",)), "it calls a str"),
    "call of a result": (Call(LOADED, ("x",)), "it calls a Storage"),
    "call of a class only named": (call("torch", "FloatStorage", 5), "is called"),
    "storage of no bytes": (call("torch.storage", "_load_from_bytes", "x"), "without bytes"),
    "storage cut off": (call("torch.storage", "_load_from_bytes", forge.storage(F4)[:-1]), "has 23 bytes"),
    "storage of more than it holds": (
        call("torch.storage", "_load_from_bytes", forge.storage(F4, count=2**40)),
        "has 24 bytes",
    ),
    "storage of less than it holds": (
        call("torch.storage", "_load_from_bytes", forge.storage(F4, count=2)),
        "24 bytes",
    ),
    "storage in zip form": (
        call("torch.storage", "_load_from_bytes", b"PK\x03\x04" + b"\0" * 99),
        "in zip form",
    ),
    "storage of a number": (call("torch.storage", "_load_from_bytes", forge.dumps(1) * 5), "unknown format"),
    "storage whose key is a plain tuple": (
        call("torch.storage", "_load_from_bytes", forge.storage(F4).replace(b"tQ.", b"t0).")),
        "without its own key",
    ),
    "storage of a kind that is a text": (
        call("torch.storage", "_load_from_bytes", forge.storage(F4, kind="FloatStorage")),
        "unknown kind",
    ),
}


@pytest.mark.parametrize("name", HOSTILE_ARGUMENTS)
def test_load_refuses_hostile_arguments(name):
    evil, words = HOSTILE_ARGUMENTS[name]
    error = refused(forge.dumps({"G_ema": evil}))
    assert words in error.what


def test_load_repeated_storage_takes_no_memory():
    """Tensors are views: as many as there are opcodes share one storage."""
    head = b"\x80\x04](" + forge.emit(LOADED) + b"q\x00"
    again = b"ctorch._utils\n_rebuild_tensor_v2\n(h\x00K\x00(K\x06t(K\x01t\x89}tR"
    seen = loads(head + again * 1000 + b"e.")
    assert len(seen) == 1001 and all(np.shares_memory(item.array, seen[1].array) for item in seen[1:])


def test_load_searches_shared_entries_once(tmp_path, golden_dir, monkeypatch):
    searched = []
    monkeypatch.setattr(describe, "is_harmless", lambda name: searched.append(name) is None)
    shared = forge.emit([call("datetime", "date")] * 20) + b"q\x00"
    entries = {"a": Raw(shared), **{f"b{index}": Raw(b"h\x00") for index in range(20)}}
    path = tmp_path / "network.pkl"
    path.write_bytes(
        forge.dumps({"D": read_pickle(golden_dir / "stylegan2-ada-32.pkl").root["D"], **entries})
    )
    assert "unknown entries ignored" in finetune.load(path).notes[-1]
    assert searched == ["datetime.date"] * 20


OTHER_FILES = {
    "a zip archive": b"PK\x03\x04" + b"\0" * 60,
    "git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "web page": b"\n<!DOCTYPE html><html><body>Sign in</body></html>",
    "safetensors": struct.pack("<Q", 20) + b'{"a": {"dtype": 1}}',
    "gzip": b"\x1f\x8b\x08" + b"\0" * 20,
    "JSON": b'{"message": "not found"}',
    "is empty": b"",
}


@pytest.mark.parametrize("words", OTHER_FILES)
def test_load_names_other_files(tmp_path, words):
    path = tmp_path / "network.pkl"
    path.write_bytes(OTHER_FILES[words])
    with pytest.raises(CheckpointError, match=words) as refusal:
        finetune.load(path)
    assert not isinstance(refusal.value, PickleRefused) and str(path) in str(refusal.value)


TEXTS = {
    "source": "import numpy as np\nprint(np.pi)\n",
    "prose": "Ich mag Züge\n",
    "settings": "[project]\nname = 1\n",
    "numbers": "1\n2\n",
    "a page of words": "cat dog\nmouse\n" * 400,
}


@pytest.mark.parametrize("name", TEXTS)
def test_load_names_text_file(tmp_path, name):
    """Though its first letters are opcodes, like the `i` of import."""
    path = tmp_path / "network.pkl"
    path.write_text(TEXTS[name], encoding="utf-8")
    with pytest.raises(CheckpointError) as refusal:
        finetune.load(path)
    quoted = " ".join(TEXTS[name].split())[:40]
    assert refusal.value.what.startswith(f"{path} is not a checkpoint: it is text: '{quoted}")
    assert "refers to" not in str(refusal.value)


def test_load_refuses_hostile_text_pickle(tmp_path):
    path = tmp_path / "network.pkl"
    path.write_bytes(b"cos\nsystem\n(Vecho\ntR.")
    with pytest.raises(PickleRefused, match=r"refers to os\.system"):
        finetune.load(path)


def test_load_escapes_names():
    error = refused(forge.dumps(Name("os", "sys\x1b[31mtem" + "x" * 500)))
    assert "\x1b" not in str(error) and len(error.blocked) <= 200
