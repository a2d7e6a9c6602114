"""Damaged and hostile pickles: real files mutated opcode by opcode, and files made by hand.

A `Source` is a pickle with the places of its opcodes, those inside tensor storages too. `mutated(sources,
rng)` gives one input: bits, lengths, numbers and texts changed, opcodes replaced, removed, repeated, swapped
and added, two files joined, the end cut off. `HOSTILE` are pickles made by hand.
"""

from __future__ import annotations

import io
import pickletools
import random
import struct
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

STORAGE = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # how torch.save begins
OPCODES = [ord(opcode.code) for opcode in pickletools.opcodes]
LENGTHS = {  # opcode -> bytes of the length, or of the memo index, that follows it
    **dict.fromkeys(("SHORT_BINUNICODE", "SHORT_BINBYTES", "LONG1", "BINGET", "BINPUT"), 1),
    **dict.fromkeys(("BINUNICODE", "BINBYTES", "LONG4", "LONG_BINGET", "LONG_BINPUT"), 4),
    **dict.fromkeys(("BINUNICODE8", "BINBYTES8", "BYTEARRAY8", "FRAME"), 8),
}
NUMBERS = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "NONE", "NEWTRUE", "NEWFALSE")
TEXTS = ("SHORT_BINUNICODE", "BINUNICODE")
MOST = 400  # bytes of one opcode that are worth changing: the rest is the content of tensors


@dataclass(frozen=True)
class Source:
    """A pickle and its opcodes as (first byte, byte behind it, name); `outer`: those outside storages.

    archive: a file of torch.save whose data.pkl it is.
    """

    name: str
    data: bytes
    outer: list[tuple[int, int, str]]
    inner: list[tuple[int, int, str]]
    archive: bytes = b""

    def file(self, data: bytes) -> bytes:
        """Return a file with `data` instead of the pickle."""
        if not self.archive:
            return data
        stream = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(self.archive)) as old, zipfile.ZipFile(stream, "w") as new:
            for info in old.infolist():
                is_pickle = info.filename.endswith("/data.pkl")
                new.writestr(info, data if is_pickle else old.read(info))
        return stream.getvalue()


def source(name: str, data: bytes) -> Source:
    """Parse a pickle as far as it can be; of a file of torch.save its first member, or five pickles."""
    outer: list[tuple[int, int, str]] = []
    position = max(data.find(b"\x80\x02"), 0) if data.startswith(b"PK") else 0
    for _ in range(5 if data.startswith(STORAGE) else 1):
        found, position = _opcodes(data, position)
        outer += found
    inner: list[tuple[int, int, str]] = []
    for start, stop, kind in outer:
        if kind in ("BINBYTES", "SHORT_BINBYTES", "BINBYTES8") and STORAGE in data[start : start + 40]:
            position = data.index(STORAGE, start)
            for _ in range(5):
                found, position = _opcodes(data[:stop], position)
                inner += found
    return Source(name, data, outer, inner)


def _opcodes(data: bytes, start: int) -> tuple[list[tuple[int, int, str]], int]:
    stream = io.BytesIO(data)
    stream.seek(start)
    found: list[tuple[int, int, str]] = []
    last: tuple[int, str] | None = None
    try:
        for opcode, _, position in pickletools.genops(stream):
            assert position is not None
            if last is not None:
                found.append((last[0], position, last[1]))
            last = (position, opcode.name)
    except Exception:  # what is behind is no pickle
        return found, len(data)
    if last is not None:
        found.append((last[0], stream.tell(), last[1]))
    return found, stream.tell()


def in_archive(name: str, archive: bytes) -> Source:
    """The pickle in a zip file of torch.save, to be changed by itself."""
    with zipfile.ZipFile(io.BytesIO(archive)) as members:
        path = next(path for path in members.namelist() if path.endswith("/data.pkl"))
        return replace(source(f"{name}, its data.pkl", members.read(path)), archive=archive)


def first_network(name: str, data: bytes) -> Source | None:
    """The beginning of a dict of networks up to its second entry, closed: a third of the same opcodes."""
    whole = source(name, data)
    key = next((start for start, stop, _ in whole.outer if data[start:stop] == b"\x8c\x01D"), None)
    if key is None or data[11:12] != b"}":  # three networks in a tuple
        return None
    content = bytearray(data[:key] + b"u.")
    frame = max(start for start, _, kind in whole.outer if kind == "FRAME" and start < key)
    struct.pack_into("<Q", content, frame + 1, len(content) - frame - 9)
    return source(f"{name}, its first network", bytes(content))


def without_sources(data: bytes) -> bytes:
    """The same pickle without frames and without the text of its classes, which is most of a tiny one."""
    outer = source("", data).outer
    parts = (
        text("pass") if kind in TEXTS and stop - start > 1000 else data[start:stop]
        for start, stop, kind in outer
        if kind != "FRAME"
    )
    return b"".join(parts)


def golden(folder: Path, names: Sequence[str] | None = None) -> dict[str, list[Source]]:
    """The checkpoints of a folder: whole ones, and their first networks."""
    paths = sorted([*folder.glob("*.pkl"), *folder.glob("*.pt")])
    paths = [path for path in paths if names is None or path.stem in names]
    contents = {path.stem: path.read_bytes() for path in paths}
    cut = [
        in_archive(name, data) if data.startswith(b"PK") else first_network(name, data)
        for name, data in contents.items()
    ]
    return {
        "whole": [source(name, data) for name, data in contents.items()],
        "cut": [each for each in cut if each is not None],
    }


# Opcodes that leave one value.


def text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def integer(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def named(name: str) -> bytes:
    module, _, last = name.rpartition(".")
    return b"c%s\n%s\n" % (module.encode(), last.encode())


def call(name: str, *args: bytes) -> bytes:
    return named(name) + b"(" + b"".join(args) + b"tR"


def storage(count: bytes, content: bytes, kind: str = "torch.FloatStorage") -> bytes:
    """A tensor storage whose number of elements may lie."""
    system = b"\x80\x02}(" + text("little_endian") + b"\x88u."
    key = b"\x80\x02(" + text("storage") + named(kind) + text("0") + text("cpu") + count + b"NtQ."
    raw = STORAGE + b"\x80\x02M\xe9\x03." + system + key + b"\x80\x02](" + text("0") + b"e." + content
    return call("torch.storage._load_from_bytes", b"B" + struct.pack("<I", len(raw)) + raw)


def tensor(start: int, size: tuple[int, ...], stride: tuple[int, ...], content: bytes) -> bytes:
    made = storage(integer(len(content) // 4), struct.pack("<q", len(content) // 4) + content)
    shape = [b"(" + b"".join(map(integer, numbers)) + b"t" for numbers in (size, stride)]
    return call("torch._utils._rebuild_tensor_v2", made, integer(start), *shape, b"\x89", b"}")


def network(state: bytes, class_name: str = "Generator") -> bytes:
    meta = {"type": text("class"), "version": integer(6), "module_src": text("raise SystemExit(9)")}
    meta |= {"class_name": text(class_name), "state": state}
    items = b"".join(text(key) + value for key, value in meta.items())
    return call("torch_utils.persistence._reconstruct_persistent_obj", b"}(" + items + b"u")


def holding(value: bytes) -> bytes:
    """A checkpoint whose G_ema is `value`."""
    return b"\x80\x04}(" + text("G_ema") + value + b"u."


CALLS = (
    *(
        "os.system",
        "posix.system",
        "builtins.eval",
        "builtins.exec",
        "builtins.__import__",
        "subprocess.Popen",
    ),
    *("builtins.getattr", "operator.attrgetter", "importlib.import_module", "pickle.loads", "torch.load"),
    *(
        "torch.jit.load",
        "numpy.load",
        "runpy.run_path",
        "socket.create_connection",
        "ctypes.CDLL",
        "code.interact",
    ),
    *(
        "webbrowser.open",
        "shutil.rmtree",
        "torch.hub.load",
        "numpy.testing.run_module_suite",
        "timeit.timeit",
    ),
)
UNKNOWN = (  # made a record of, and never called
    *("vision_module.VisionHead", "argparse.Namespace", "dill._dill._create_function"),
    *("dill._dill._load_type", "torch.nn.modules.linear.Linear", "datetime.datetime"),
    *("collections.deque", "pathlib.PosixPath", "torch._tensor._rebuild_from_type_v2"),
    "numpy.random._pickle.__randomstate_ctor",
)
DTYPE = call("numpy.dtype", text("f4"), b"\x89", b"\x88")
RECORDS = {  # entries of valid files: records made in each way, and calls that give plain values
    "REDUCE and BUILD": call(UNKNOWN[0], text("x")) + b"}(" + text("weight") + integer(1) + b"ub",
    "NEWOBJ": named(UNKNOWN[1]) + b")\x81",
    "NEWOBJ_EX": named(UNKNOWN[1]) + b")}(" + text("lr") + integer(1) + b"u\x92",
    "INST": b"(" + text("x") + b"ivision_module\nHead\n",
    "OBJ": b"(" + named(UNKNOWN[0]) + text("x") + b"o",
    "items": call(UNKNOWN[6]) + b"(" + integer(1) + b"e",
    "reconstructor": call("copyreg._reconstructor", named(UNKNOWN[1]), named("builtins.object"), b"N"),
    "type of dill": call("dill._dill._load_type", text("object")),
    "array of protocol 5": call(
        "numpy.core.numeric._frombuffer", b"C\x04abcd", DTYPE, b"(" + integer(1) + b"t", text("C")
    ),
    "default": call("collections.defaultdict", named("builtins.list")),
    "size": call("torch.Size", b"(" + integer(2) + integer(3) + b"t"),
    "device": call("torch.device", text("cuda"), integer(0)),
    "path": call("pathlib.PosixPath", text("/"), text("data")),
}
HUGE = (1 << 31, (1 << 40) + 1, (1 << 62), -1)

HOSTILE: dict[str, bytes] = {
    **{f"{name} called": b"\x80\x04" + call(name, text("echo executed")) + b"." for name in CALLS},
    **{f"{name} as a network": holding(call(name, text("echo executed"))) for name in CALLS[:4]},
    "INST": b"(" + text("echo") + b"ios\nsystem\n.",
    "OBJ": b"(cos\nsystem\n" + text("echo") + b"o.",
    "NEWOBJ": b"\x80\x04cos\nsystem\n(" + text("echo") + b"t\x81.",
    "NEWOBJ_EX": b"\x80\x04cos\nsystem\n(" + text("echo") + b"t}\x92.",
    "STACK_GLOBAL": b"\x80\x04" + text("os") + text("system") + b"\x93(" + text("echo") + b"tR.",
    "a dotted name": b"\x80\x04" + text("dnnlib.util") + text("EasyDict.__init__.__globals__") + b"\x93.",
    "an extension": b"\x80\x02\x82\x01.",
    "a persistent id": b"\x80\x02" + text("x") + b"Q.",
    "a state that is a call": b"\x80\x04" + call("dnnlib.EasyDict") + named("os.system") + b"b.",
    "a network inside its own state": b"\x80\x04" + network(b"}\x94(" + text("_modules") + b"h\x00u") + b".",
    "a list inside itself": b"\x80\x04]\x94h\x00a.",
    "a dict inside itself": b"\x80\x04}\x94" + text("G_ema") + b"h\x00s.",
    "ten to the 99th laughs": b"\x80\x02Nq\x00" + (b"(" + b"h\x00" * 10 + b"tq\x00") * 99 + b".",
    "100,000 lists, each in the next": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "a million marks": b"\x80\x02" + b"(" * 1_000_000,
    "a million times None": b"\x80\x02(" + b"N" * 1_000_000 + b"t.",
    "a memo index of four thousand million": b"\x80\x02Nr\xff\xff\xff\xff.",
    "an integer of two gigabytes": b"\x80\x02\x8b\xff\xff\xff\x7f",
    "a text of exabytes": b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7f",
    "bytes of exabytes": b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f",
    "a frame of exabytes": b"\x80\x04\x95" + b"\xff" * 8 + b"N.",
    "a decimal number of a megabyte": b"I" + b"9" * 1_000_000 + b"\n.",
    "a line that does not end": b"c" + b"a" * 3_000_000,
    "keys that collide": b"\x80\x02}("
    + b"".join(integer(number * ((1 << 61) - 1)) + b"N" for number in range(2000)) + b"u.",
    "text doubled by sharing": holding(network(b"}(" + (text("a" * 60_000) + b"\x94h\x00") * 8 + b"u")),
    "dtype object": b"\x80\x04" + call("numpy.dtype", text("O8"), b"\x89", b"\x88") + b".",
    **{f"a storage of {size:,}": holding(storage(integer(size), struct.pack("<q", size))) for size in HUGE},
    **{f"a tensor of {size}": holding(tensor(0, size, (1,) * len(size), b"\0" * 64)) for size in
       ((1 << 40,), (1 << 20, 1 << 20), (0, 1 << 60), (17,), (2,) * 64)},
    "a tensor with a stride of 2 to the 40th": holding(tensor(0, (2, 2), (1 << 40, 1), b"\0" * 64)),
    "a tensor that starts behind its end": holding(tensor(1 << 40, (1,), (1,), b"\0" * 64)),
    "a network without a state": holding(network(b"N")),
    "a network of no class": holding(network(b"}", "../../etc")),
    **{f"{name}, unknown": holding(call(name, named("os.path"), text("x"))) for name in UNKNOWN},
    "an unknown object in itself": holding(call(UNKNOWN[0]) + b"\x94}(" + text("x") + b"h\x00ub"),
    "100,000 unknown objects, each in the next": b"\x80\x02" + named(UNKNOWN[0]) + b"\x85R" * 50_000 + b".",
    "an unknown object with a hostile state": holding(call(UNKNOWN[0]) + named("posix.system") + b"b"),
    "an unknown object with hostile items": holding(call(UNKNOWN[0]) + b"(" + named("nt.system") + b"e"),
    "an unknown object as a key": b"\x80\x02}" + call(UNKNOWN[0]) + b"Ns.",
    "a buffer of exabytes": b"\x80\x04" + call("numpy.core.numeric._frombuffer", b"C\x04abcd",
        call("numpy.dtype", text("f4"), b"\x89", b"\x88"), b"(" + integer(1 << 60) + b"t", text("C")) + b".",
    "a dill array of a call": b"\x80\x04"
    + call("dill._dill._create_array", named(UNKNOWN[0]), b")", b")", b"N") + b".",
    "all that is unknown": holding(b"(" + b"".join(call(name, text("x")) for name in UNKNOWN) + b"t"),
    "a torch file in a torch file": holding(
        call("torch.storage._load_from_bytes", b"B" + struct.pack("<I", len(STORAGE)) + STORAGE)
    ),
}  # fmt: skip

FRAGMENTS = (
    *(call(name, text("echo executed")) for name in (*CALLS[:6], *UNKNOWN)),
    *(
        named("os.system"),
        b"R",
        b"b",
        b"(",
        b"t",
        b"0",
        b"1",
        b"2",
        b"N",
        b"}",
        b"]",
        b"\x94",
        b"h\x00",
        b"s",
        b"u",
    ),
    *(integer(number) for number in (*HUGE, 0, 1, 1 << 127)),
    tensor(0, (1 << 40,), (1,), b"\0" * 64),
    *(b"\x85", b"\x86", b"\x87", b".", b"\x81", b"\x92", b"Q", b"\x82\x01", b"j\xff\xff\xff\x7f"),
)
WORDS = (
    *CALLS,
    *UNKNOWN,
    "",
    "G",
    "D",
    "G_ema",
    "_modules",
    "_parameters",
    "\ud800",
    "a" * 300,
    "__class__",
    "0",
    "float64",
)


# What is done to a real file.

Change = Callable[[Source, bytearray, tuple[int, int, str], random.Random], None]


def _bits(source: Source, data: bytearray, at: tuple[int, int, str], rng: random.Random) -> None:
    for _ in range(rng.randint(1, 4)):
        data[rng.randrange(at[0], min(at[1], at[0] + MOST))] ^= 1 << rng.randrange(8)


def _bytes(source: Source, data: bytearray, at: tuple[int, int, str], rng: random.Random) -> None:
    place = rng.randrange(at[0], min(at[1], at[0] + MOST))
    data[place] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))


def _opcode(source: Source, data: bytearray, at: tuple[int, int, str], rng: random.Random) -> None:
    data[at[0]] = rng.choice(OPCODES)


def _remove(source: Source, data: bytearray, at: tuple[int, int, str], rng: random.Random) -> None:
    del data[at[0] : at[1]]


def _repeat(source: Source, data: bytearray, at: tuple[int, int, str], rng: random.Random) -> None:
    data[at[0] : at[0]] = data[at[0] : at[1]] * rng.choice((1, 1, 2, 50))


def _insert(source: Source, data: bytearray, at: tuple[int, int, str], rng: random.Random) -> None:
    data[at[0] : at[0]] = rng.choice(FRAGMENTS)


def _swap(source: Source, data: bytearray, at: tuple[int, int, str], rng: random.Random) -> None:
    """Put a copy of another opcode in its place."""
    start, stop, _ = rng.choice(source.outer)
    if stop - start <= MOST:
        data[at[0] : at[1]] = source.data[start:stop]


def _length(source: Source, data: bytearray, at: tuple[int, int, str], rng: random.Random) -> None:
    if size := LENGTHS.get(at[2], 0):
        most = (1 << 8 * size) - 1
        value = rng.choice((0, 1, most, most // 2, rng.randint(0, most), at[1] - at[0] + rng.randint(-8, 8)))
        data[at[0] + 1 : at[0] + 1 + size] = (max(value, 0) & most).to_bytes(size, "little")


def _number(source: Source, data: bytearray, at: tuple[int, int, str], rng: random.Random) -> None:
    if at[2] in NUMBERS:
        numbers = (*HUGE, 0, 1, 2, 3, 7, 8, 64, 255, 1024, 1 << 16, rng.randrange(1 << 20))
        others = (b"N", b"\x88", b"G\x7f\xf8" + b"\0" * 6, b"G\x7f\xf0" + b"\0" * 6, text("4"), b"(t", b"]")
        data[at[0] : at[1]] = rng.choice((integer(rng.choice(numbers)), rng.choice(others)))


def _text(source: Source, data: bytearray, at: tuple[int, int, str], rng: random.Random) -> None:
    if at[2] in TEXTS:
        data[at[0] : at[1]] = text(rng.choice(WORDS))


CHANGES: tuple[Change, ...] = (
    *(_bits, _bytes, _opcode, _remove, _repeat, _insert, _swap),
    *(_length, _length, _number, _number, _number, _text, _text),
)
SELECTIVE = {_length: tuple(LENGTHS), _number: NUMBERS, _text: TEXTS}


def mutated(sources: Sequence[Source], rng: random.Random) -> tuple[str, bytes]:
    """One input: what was done to which source, and its bytes, which are others than the source's."""
    while True:
        chosen = rng.choice(sources)
        way = rng.random()
        if way < 0.04:
            end = rng.choice(chosen.outer)[0] if rng.random() < 0.7 else rng.randrange(len(chosen.data))
            return f"{chosen.name}: cut off", chosen.file(chosen.data[:end])
        if way < 0.1:
            other = rng.choice(sources)
            first, second = rng.choice(chosen.outer)[0], rng.choice(other.outer)[0]
            joined = chosen.file(chosen.data[:first] + other.data[second:])
            return f"{chosen.name}: joined to {other.name}", joined
        names, data = _changed(chosen, rng)
        if data != chosen.data:
            return f"{chosen.name}: {names}", chosen.file(data)


def _changed(chosen: Source, rng: random.Random) -> tuple[str, bytes]:
    """One to three changes, and their names."""
    places = chosen.inner if chosen.inner and rng.random() < 0.25 else chosen.outer
    changes = [rng.choice(CHANGES) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
    pairs = [(_place(places, change, rng), change) for change in changes]
    data = bytearray(chosen.data)
    # From the end to the beginning, so that places stay what they are.
    for (start, stop, kind), change in sorted(pairs, key=lambda pair: -pair[0][0]):
        if start < len(data):
            change(chosen, data, (start, min(stop, len(data)), kind), rng)
    return ", ".join(change.__name__.strip("_") for change in changes), bytes(data)


def _place(places: list[tuple[int, int, str]], change: Change, rng: random.Random) -> tuple[int, int, str]:
    """An opcode that the change can do something with; the beginning is likelier, and is read sooner."""
    wanted = SELECTIVE.get(change)
    count = len(places)
    tries = [
        places[min(rng.randrange(count), rng.randrange(count))] for _ in range(1 if wanted is None else 20)
    ]
    return next((place for place in tries if wanted is None or place[2] in wanted), tries[0])
