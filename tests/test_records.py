"""The record and proto reader against protobuf, and against bytes that are anything."""

import cv2
import numpy as np
import odd_rlds
import pytest
import simplejpeg
from google.protobuf.internal import encoder
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_jax.data import images, records, rlds, scan
from vla_jax.data.records import CorruptRecord, Example
from vla_jax.data.store import Store

KEYS = frozenset({"steps/action", "steps/is_first", "steps/observation/image_0", "a"})


def use(payload: bytes) -> None:
    """All that the engine does with a record's bytes; anything but our own error is a fault."""
    try:
        example = Example(payload, KEYS)
        for key in KEYS:
            for read in (example.spans, example.numbers, example.texts, lambda k: example.number_spans(k, 4)):
                try:
                    found = read(key)
                except CorruptRecord:
                    continue
                if read is example.spans:
                    assert all(0 <= at and at + size <= len(payload) for at, size in found.tolist())
    except CorruptRecord:
        pass


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_end_in_our_error_or_an_example(data):
    use(data)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_record_never_breaks_the_parser(real_record, data):
    raw = bytearray(real_record)
    for _ in range(data.draw(st.integers(1, 8))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(raw)))
    use(bytes(raw[:cut]) if data.draw(st.booleans()) else bytes(raw))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_file_yields_records_or_named_faults(tmp_path_factory, small_shard, data):
    """Whatever happens to a shard's bytes: the reader ends, names each fault, and what it yields has a right checksum."""
    raw = bytearray(small_shard)
    for _ in range(data.draw(st.integers(0, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(0, len(raw)))]
    folder = tmp_path_factory.getbasetemp()
    (folder / "x.tfrecord").write_bytes(raw)
    store = Store(folder)
    found = list(records.read_all(store, "x.tfrecord", 3))
    store.close()
    assert len(found) <= 4
    for item in found:
        if isinstance(item, CorruptRecord):
            assert item.cause in ("truncated record", "length checksum mismatch", "payload checksum mismatch")
        else:
            where, payload, crc = item
            assert records.masked_crc(payload) == crc and bytes(raw[where : where + len(payload)]) == payload


@pytest.fixture(scope="module")
def real_record(real_data):
    """The first 3 kB of a real record, enough to hold several fields' framing."""
    name = "bridge_dataset-train.tfrecord-00000-of-00001"
    return next(records.read_all(Store(real_data / "bridge_dataset/1.0.0"), name, 25))[1][:3000]


@pytest.fixture(scope="module")
def small_shard():
    import struct

    out = b""
    for payload in (b"one", b"", b"three" * 9):
        head = struct.pack("<Q", len(payload))
        out += head + struct.pack("<I", records.masked_crc(head)) + payload + struct.pack("<I", records.masked_crc(payload))
    return out


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=20))
def test_varints_equal_protobuf(values):
    packed = b"".join(encoder._VarintBytes(v & (2**64 - 1)) for v in values)
    assert records.varints(packed).tolist() == values


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 255), min_size=1, max_size=60), st.integers(1, 5))
def test_raw_pictures_are_found_in_their_list(values, per):
    """number_spans cuts a packed list of integers where a picture's numbers end."""
    values = values[: len(values) // per * per]
    packed = b"".join(encoder._VarintBytes(v) for v in values)
    entry = lambda tag, body: bytes([tag]) + encoder._VarintBytes(len(body)) + body
    feature = entry(0x1A, entry(0x0A, packed) if values else b"")
    payload = entry(0x0A, entry(0x0A, entry(0x0A, b"a") + entry(0x12, feature)))
    spans = Example(payload, KEYS).number_spans("a", per)
    cut = [records.varints(payload[a : a + n]).tolist() for a, n in spans.tolist()]
    assert cut == np.array(values).reshape(-1, per).tolist()


@pytest.fixture(scope="module")
def odd_record(tmp_path_factory):
    """(payload, features) of an episode that stores numbers, texts and pictures in every way."""
    root = tmp_path_factory.mktemp("odd")
    odd_rlds.record(root, [odd_rlds.episode(0)], shards=1)
    place = rlds.dataset_dir(root, odd_rlds.NAME, odd_rlds.VERSION)
    (found,) = records.read_all(place, rlds.shards(place, "train")[0], 1)
    return bytes(found[1]), rlds.features(place)


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_any_damage_to_an_episode_is_a_named_fault(odd_record, data):
    """Bytes changed, above all those of tags and lengths, in a record whose checksum is right."""
    payload, features = odd_record
    raw, card = bytearray(payload), odd_rlds.card()
    tags = [i for i, byte in enumerate(raw) if byte in (0x0A, 0x12, 0x1A)]
    for _ in range(data.draw(st.integers(1, 4))):
        at = (
            data.draw(st.sampled_from(tags)) + data.draw(st.integers(0, 3))
            if data.draw(st.booleans())
            else data.draw(st.integers(0, len(raw) - 1))
        )
        raw[min(at, len(raw) - 1)] = data.draw(st.one_of(st.sampled_from([0x0A, 0x0B, 0x12, 0x1A, 0x80, 0xFF]), st.integers(0, 255)))
    try:
        made = scan.episode(Example(bytes(raw), scan._wanted(card)), card, features)
    except CorruptRecord:
        return
    assert np.isfinite(made["action"]).all() and len(made["language"]) == len(made["action"]) == len(made["image"])
    inside = (made["image"][..., 0] >= 0) & (made["image"].sum(axis=-1) <= len(raw))
    assert inside.all()


def test_faults_that_a_fuzz_found(odd_record):
    """A list of integers with a wire type that does not exist; and codes of characters stored as floats."""
    kind = {"a": bytes([0x1A, 1, 0x0B])}
    entry = lambda name, feature: (
        b"\x0a"
        + bytes([4 + len(name) + len(feature)])
        + b"\x0a"
        + bytes([len(name)])
        + name.encode()
        + b"\x12"
        + bytes([len(feature)])
        + feature
    )
    body = entry("a", kind["a"])
    example = Example(b"\x0a" + bytes([len(body)]) + body, frozenset({"a"}))
    with pytest.raises(CorruptRecord):
        example.number_spans("a", 4)
    floats = bytes([0x12, 6, 0x0A, 4]) + np.float32(1).tobytes()
    body = entry("steps/codes", floats)
    example = Example(b"\x0a" + bytes([len(body)]) + body, frozenset({"steps/codes"}))
    with pytest.raises(CorruptRecord, match="field of another type"):
        scan._texts(example, "steps/codes", rlds.Feature("tensor", "int32", (16,)), 1)


@pytest.mark.parametrize("kind", ["jpeg", "png"])
def test_a_header_that_announces_too_much_is_no_picture(kind):
    """A damaged size must not fill the memory: 65500 x 65500 pixels would be 12 GB."""
    picture = np.zeros((64, 64, 3), np.uint8)
    if kind == "jpeg":
        data = bytearray(simplejpeg.encode_jpeg(picture))
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = (65500).to_bytes(2, "big") * 2
    else:
        data = bytearray(cv2.imencode(".png", picture)[1].tobytes())
        data[16:24] = (65500).to_bytes(4, "big") * 2
    for into in (None, np.empty(64 * 64 * 3, np.uint8)):
        with pytest.raises(images.UndecodableImage, match="65500 x 65500"):
            images.decode(bytes(data), into=into)
