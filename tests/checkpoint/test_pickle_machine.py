"""The machine agrees with Python's unpickler on plain values; bombs are refused before they grow."""

from __future__ import annotations

import pickle
import struct
import tracemalloc
from collections import OrderedDict

import pytest
from checkpoint import forge
from checkpoint.forge import Call, Name
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.checkpoint.unpickle.globals import CheckpointWorld, loads
from finetune.checkpoint.unpickle.machine import Machine
from finetune.checkpoint.unpickle.values import Blob, Budget
from finetune.errors import PickleRefused

keys = st.one_of(st.text(max_size=8), st.integers(-(2**31), 2**31 - 1), st.booleans(), st.none())
numbers = st.one_of(st.integers(-(2**300), 2**300), st.floats(allow_nan=False), st.booleans(), st.none())
values = st.recursive(
    st.one_of(numbers, st.text(max_size=20)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(keys, inner, max_size=4),
        st.sets(keys, max_size=4),
    ),
    max_leaves=12,
)


@given(values, st.integers(0, 5))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_machine_plain_values_equal_python(value, protocol):
    assert loads(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("protocol", range(6))
def test_machine_memo_and_globals(protocol):
    shared = ["x"]
    seen = loads(pickle.dumps({"a": shared, "b": (shared, OrderedDict(k=1)), "c": {"x", "y"}}, protocol))
    assert seen == {"a": ["x"], "b": (["x"], {"k": 1}), "c": {"x", "y"}}
    assert seen["a"] is seen["b"][0]


@pytest.mark.parametrize(
    "protocol, value",
    [
        (3, b"ab"),
        (4, b"ab"),
        (5, b"ab"),
        (3, b"\x00\xff" * 300),
        (4, b"\x00\xff" * 300),
        (5, bytearray(b"xyz")),
    ],
)
def test_machine_bytes_are_views(protocol, value):
    data = pickle.dumps([value], protocol)
    blob = loads(data)[0]
    assert bytes(blob.view) == value
    assert data[blob.offset : blob.offset + len(value)] == value


def test_machine_protocol_2_bytes():
    blob = loads(pickle.dumps([b"\x00\xff"], 2))[0]
    assert isinstance(blob, Blob) and bytes(blob.view) == b"\x00\xff" and blob.offset is None


def many(code: bytes, count: int) -> bytes:
    return b"\x80\x04" + code * count


LAUGHS = b"\x80\x04]" + b"".join(
    b"r%s0](" % struct.pack("<I", i) + b"j%s" % struct.pack("<I", i) * 10 + b"e" for i in range(99)
)

# name -> (pickle, words of the refusal)
BOMBS = {
    "integer of 2 GiB": (b"\x80\x04\x8b" + struct.pack("<i", 2**31 - 1) + b"x.", "integer of"),
    "integer of negative size": (b"\x80\x04\x8b" + struct.pack("<i", -1) + b".", "integer of"),
    "decimal of a megabyte": (b"L" + b"9" * 2**20 + b"L\n.", "does not end within"),
    "text of 2^63 bytes": (b"\x80\x04\x8d" + struct.pack("<Q", 2**63) + b"x.", "more bytes are announced"),
    "bytes of 2^63 bytes": (b"\x80\x04\x8e" + struct.pack("<Q", 2**63) + b"x.", "more bytes are announced"),
    "bytearray of 2^63 bytes": (
        b"\x80\x05\x96" + struct.pack("<Q", 2**63) + b"x.",
        "more bytes are announced",
    ),
    "frame of 2^63 bytes": (b"\x80\x04\x95" + struct.pack("<Q", 2**63) + b"N.", "frame of"),
    "text of wide characters": (forge.dumps("\U0001f600" + "a" * 2**21), "neither code nor packed bytes"),
    "nested marks": (many(b"(", 2**16), "nested too deeply"),
    "list as key": (forge.dumps({"a": 1})[:-1] + b"]Ns.", "neither a text nor a number"),
    "tuple as key": (b"\x80\x04})Ns.", "neither a text nor a number"),
    "bytes in a set": (forge.dumps({b"a"}), "neither a text nor a number"),
    "protocol of tomorrow": (b"\x80\x06N.", "pickle protocol 6"),
    "memo entry never made": (b"\x80\x04j\xff\xff\xff\xff.", "an undefined memo index"),
    "no STOP": (b"\x80\x04N", "may be cut off"),
    "no value": (b"\x80\x04.", "unfinished"),
    "two values": (b"\x80\x04NN.", "unfinished"),
    "open mark": (b"\x80\x04N(.", "unfinished"),
    "more after STOP": (b"\x80\x04N.N.", "2 more bytes follow"),
    "no opcode": (b"\x80\x04\xff.", "byte 0xff"),
    "out-of-band buffer": (b"\x80\x05\x97.", "NEXT_BUFFER"),
    "pop of nothing": (b"\x80\x04a.", "a value is missing"),
    "items of a number": (b"\x80\x04K\x01(Ne.", "a int where a list should be"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_machine_refuses_bombs_before_allocation(name):
    data, words = BOMBS[name]
    tracemalloc.start()
    try:
        with pytest.raises(PickleRefused, match=words) as refusal:
            loads(data)
        assert tracemalloc.get_traced_memory()[1] < (8 << 20) + 4 * len(data)
    finally:
        tracemalloc.stop()
    assert 0 <= refusal.value.offset <= len(data) and refusal.value.blocked is None


def test_machine_exponential_sharing_is_cheap():
    seen = loads(LAUGHS + b".")
    for _ in range(99):
        assert len(seen) == 10 and all(item is seen[0] for item in seen)
        seen = seen[0]
    assert seen == []


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_machine_keys_that_could_collide_become_text(protocol):
    value = {2**61 - 1: {2**61, 7}, 0.5: OrderedDict({-(2**31) - 1: 1}), -(2**31): 1, 3: 1}
    seen = loads(pickle.dumps(value, protocol))
    assert seen == {
        "2305843009213693951": {"2305843009213693952", 7},
        "0.5": {"-2147483649": 1},
        -(2**31): 1,
        3: 1,
    }
    pairs = Call(Name("collections", "OrderedDict"), ([(2.5, 1)],))  # as Python 2 wrote them
    assert loads(forge.dumps(pairs)) == {"2.5": 1}


def test_machine_huge_memo_index_takes_no_memory():
    assert loads(b"\x80\x04Nr\xff\xff\xff\xffj\xff\xff\xff\xff\x86.") == (None, None)


def test_machine_limits_steps_and_copies():
    def run(data, **budget):
        budget = Budget(**{"steps": 100, "copied": 100, **budget})
        return Machine(memoryview(data), CheckpointWorld(budget), budget).run()

    endless = b"\x80\x04" + b"N0" * 100
    with pytest.raises(PickleRefused, match="steps to read"):
        run(endless + b"N.")
    with pytest.raises(PickleRefused, match="several times its size"):
        run(forge.dumps("x" * 101))
    with pytest.raises(PickleRefused, match="several times its size"):
        run(b"\x80\x04" + forge.emit(2**60) + b"q\x00" + b"}h\x00Ns0" * 10 + b".")
    # One text, encoded again and again, is charged every time.
    encode = b"c_codecs\nencode\n" + b"h\x00" + forge.emit("latin1") + b"\x86R0"
    repeated = b"\x80\x04" + forge.emit("x" * 30) + b"q\x00" + encode * 3
    with pytest.raises(PickleRefused, match="several times its size"):
        run(repeated + b".")
    # So is a list that many dicts or sets are made of.
    pairs = forge.emit([("k", 1)] * 20) + b"q\x00"
    make = b"ccollections\nOrderedDict\nh\x00\x85R0"
    with pytest.raises(PickleRefused, match="steps to read"):
        run(b"\x80\x04" + pairs + make * 10 + b".")


def test_machine_deep_nesting_without_recursion():
    seen = loads(b"\x80\x04" + b"]" * 100_000 + b"a" * 99_999 + b".")
    depth = 0
    while seen:
        seen, depth = seen[0], depth + 1
    assert depth == 99_999
