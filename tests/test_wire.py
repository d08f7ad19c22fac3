"""The codec: openpi's bytes, and nothing that can be sent does harm."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

msgpack = pytest.importorskip("msgpack")
from vla_jax.deploy import wire  # noqa: E402

ARRAYS = [
    np.arange(6, dtype=np.float32).reshape(2, 3),
    np.zeros((0, 3), np.int64),
    np.array(3.5),
    np.ones((2, 2, 3), np.uint8),
    np.array([True, False]),
    np.arange(4, dtype=">i4"),
    np.asfortranarray(np.arange(6, dtype=np.float16).reshape(2, 3)),
]


def by_hand(x: np.ndarray) -> bytes:
    """openpi's array, by the msgpack format alone: a map of four, its keys bytes."""
    data = x.tobytes()
    shape = bytes([0x90 | x.ndim]) + b"".join(bytes([n]) for n in x.shape)
    entry = lambda key: b"\xc4" + bytes([len(key)]) + key
    dtype = x.dtype.str.encode()
    head = b"\x84" + entry(b"__ndarray__") + b"\xc3"
    return head + entry(b"data") + entry(data) + entry(b"dtype") + bytes([0xA0 | len(dtype)]) + dtype + entry(b"shape") + shape


@pytest.mark.parametrize("x", ARRAYS, ids=lambda x: f"{x.dtype.str}{x.shape}")
def test_the_bytes_are_openpis(x):
    assert wire.pack(x) == by_hand(x)
    back = wire.unpack(by_hand(x))
    assert back.dtype == x.dtype and back.shape == x.shape and np.array_equal(back, x)


def test_openpis_own_client_reads_and_writes_the_same():
    theirs = pytest.importorskip("openpi_client.msgpack_numpy")
    message = {
        "observation/image": ARRAYS[3],
        "observation/state": ARRAYS[0],
        "prompt": "push",
        "n": [1, 2.5, None],
        "s": np.float32(2),
        "i": np.int64(3),
    }
    assert wire.pack(message) == theirs.packb(message) == theirs.Packer().pack(message)
    for back in (wire.unpack(theirs.packb(message)), theirs.unpackb(wire.pack(message))):
        assert back.keys() == message.keys() and back["n"] == message["n"] and type(back["s"]) is np.float32 and back["i"] == 3
        assert all(np.array_equal(back[k], message[k]) for k in ("observation/image", "observation/state"))


def array(**changed) -> bytes:
    whole = {b"__ndarray__": True, b"data": b"\0" * 8, b"dtype": "<f4", b"shape": [2]}
    return msgpack.packb({k: v for k, v in {**whole, **{k.encode(): v for k, v in changed.items()}}.items() if v is not ...})


@pytest.mark.parametrize(
    "data",
    [
        array(dtype="|O"),
        array(dtype="<U2"),
        array(dtype="|V8"),
        array(dtype="<c8"),
        array(dtype="<M8"),
        array(dtype="<f4,<f4"),
        array(dtype="f4"[:1]),
        array(dtype=4),
        array(dtype=...),
        array(shape=[3]),
        array(shape=[-2]),
        array(shape=[1 << 40, 1 << 40]),
        array(shape=[2, 1, 1, 1, 1, 1, 1, 1, 1]),
        array(shape=2),
        array(shape=[2.0]),
        array(shape=[True, 2]),
        array(shape=...),
        array(data="text"),
        array(data=...),
        msgpack.packb({b"__npgeneric__": True, b"data": 300, b"dtype": "|u1"}),
        msgpack.packb({b"__npgeneric__": True, b"data": [], b"dtype": "<f4"}),
        msgpack.packb({b"__npgeneric__": True, b"data": b"x", b"dtype": "|O"}),
        msgpack.packb(msgpack.ExtType(5, b"abc")),
        msgpack.packb({1: 2}),
        b"",
        b"\xc1",
        b"\x81",
        msgpack.packb({}) + b"\0",
        b"\x91" * 100_000,
        b"\x91" * 33 + b"\x01",
        b"\x81\xa1a" * 33 + b"\x01",
        b"\xdd\xff\xff\xff\xff" * 100,
        b"\xdc\x10\x00" + (b"\xdc\x0f\xff" + b"\xc0" * 4095) * 4096,
        b"\xa2\xff\xfe",
    ],
    ids=lambda d: d[:40].hex(),
)
def test_what_is_no_message_is_refused(data):
    with pytest.raises(wire.Malformed):
        wire.unpack(data)


_4000 = (4000).to_bytes(4, "big")


@pytest.mark.parametrize(
    "flood",
    [
        b"\xdd" + _4000 + (b"\xdd" + _4000 + b"\x90" * 4000) * 4000,
        (b"\xdd" + _4000 + b"\xa2ab" * 3999) * 20,
        (b"\xdf" + _4000 + b"\xa2ab\x01" * 3999 + b"\xa2ab") * 20,
    ],
    ids=["lists that end", "lists within lists", "maps within maps"],
)
def test_a_flood_of_small_items_takes_no_memory(flood):
    """16 MB of empty lists would become a gigabyte. Lists within lists do not end before all are made."""
    import tracemalloc

    tracemalloc.start()
    try:
        with pytest.raises(wire.Malformed, match="more than 65536 items"):
            wire.unpack(flood)
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()


def _values(x) -> int:
    if isinstance(x, dict):
        return 1 + sum(1 + _values(v) for v in x.values())
    return 1 + sum(map(_values, x)) if isinstance(x, list) else 1


@settings(max_examples=400, deadline=None)
@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**63), 2**64 - 1)
        | st.floats(width=32)
        | st.text(max_size=300)
        | st.binary(max_size=300)
        | st.sampled_from(["x" * 70_000, b"x" * 70_000, list(range(20)), dict.fromkeys(map(str, range(20)), -1)]),
        lambda x: st.lists(x, max_size=20) | st.dictionaries(st.text(max_size=40), x, max_size=20),
        max_leaves=60,
    ),
    st.booleans(),
    st.randoms(),
)
def test_values_are_counted_before_they_are_made(x, single, random):
    data = msgpack.packb(x, use_single_float=single)
    assert wire.items(data) == _values(x)
    assert 0 <= wire.items(data[: random.randrange(len(data))]) <= _values(x)
    assert wire.items(b"\xdd" + _4000 + data * 8 + b"\xc0" * 3992) == 1 + 8 * _values(x) + 3992


@pytest.mark.parametrize(
    "x",
    [object(), np.array([None]), np.array([1 + 2j]), np.array(["a"]), {"a": {1, 2}}],
    ids=["object", "objects", "complex", "text", "set"],
)
def test_what_cannot_be_sent_is_said(x):
    with pytest.raises((TypeError, ValueError), match="cannot be sent|holds no numbers|send text"):
        wire.pack(x)


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=400))
def test_random_bytes_are_read_or_refused(data):
    try:
        wire.unpack(data)
    except wire.Malformed as e:
        assert len(str(e)) < 400


plain = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(max_size=8) | st.binary(max_size=8)
)
shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)
numbers = st.builds(lambda s, t: np.arange(int(np.prod(s)), dtype=t).reshape(s), shapes, st.sampled_from(["<f4", "|u1", "<i8", "<f2"]))
messages = st.recursive(
    plain | numbers, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=6), x, max_size=3), max_leaves=8
)


def same(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b


@settings(max_examples=200, deadline=None)
@given(messages, st.data())
def test_messages_come_back_and_damaged_ones_do_no_harm(message, data):
    packed = wire.pack(message)
    assert same(message, wire.unpack(packed))
    damaged = bytearray(packed)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(packed) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        wire.unpack(bytes(damaged))
    except wire.Malformed:
        pass


def test_half_a_character_is_sent_as_a_question_mark():
    """As the policy reads it; a speech recogniser's odd text shall not end a robot's program."""
    assert wire.unpack(wire.pack({"prompt": "a\ud800b", "\udfffc": 1})) == {"prompt": "a?b", "?c": 1}
