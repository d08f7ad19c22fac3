"""The reader against tfds on the real sample, and on broken bytes."""

import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_jax.data import cards, images, index, rlds, sample
from vla_jax.types import UserError


@pytest.fixture(scope="module")
def bridge(real_data, tmp_path_factory):
    return index.ensure(cards.load("bridge_dataset"), str(real_data), str(tmp_path_factory.mktemp("ix")))


def test_every_field_equals_tfds(bridge, real_data):
    """Independent path: tfds reads, TensorFlow decodes. Stored fields and image bytes are equal bit for bit. Pixels: both
    use libjpeg-turbo; TensorFlow's default is its fast integer DCT, so it is asked for the accurate one that we use."""
    tfds = pytest.importorskip("tensorflow_datasets")
    import tensorflow as tf

    builder = tfds.builder_from_directory(str(real_data / "bridge_dataset" / "1.0.0"))
    keep = {"steps": {"observation": {k: tfds.decode.SkipDecoding() for k in ("image_0", "image_1")}}}
    frame, reader = 0, sample.ShardReader()
    for episode in builder.as_dataset(split="train", read_config=tfds.ReadConfig(interleave_cycle_length=1), decoders=keep):
        for step in episode["steps"].as_numpy_iterator():
            action = np.concatenate([step["action"][:6], [step["action"][6] > 0.5]]).astype(np.float32)
            assert np.array_equal(bridge.action[frame], action)
            assert np.array_equal(bridge.state[frame], step["observation"]["state"])
            assert bridge.languages[bridge.language[frame]] == step["language_instruction"].decode()
            made = sample.make(bridge, frame, steps=5, dataset=0, sample_id=0, size=64, wanted=("side", "base"), reader=reader)
            assert list(made.images) == ["side", "base"]
            for view, key in (("base", "image_0"), ("side", "image_1")):
                at, size = (int(x) for x in bridge.image[frame, bridge.views.index(view)])
                stored = step["observation"][key]
                assert reader.read(bridge.shards[0], at, size) == stored
                pixels = tf.io.decode_jpeg(stored, dct_method="INTEGER_ACCURATE").numpy()
                assert np.abs(made.images[view].astype(int) - pixels).max() <= 1
            frame += 1
    assert frame == bridge.frames == 250 and bridge.episodes == 25


def test_chunk_mask_at_the_end_of_an_episode(bridge):
    chunk, mask = sample.actions(bridge, 8, 5)  # steps 8 and 9 of a ten-step episode
    assert mask.tolist() == [True, True, False, False, False]
    assert np.array_equal(chunk[2:], np.repeat(bridge.action[9:10], 3, axis=0))


def _copy(real_data, tmp_path):
    folder = tmp_path / "root" / "bridge_dataset" / "1.0.0"
    shutil.copytree(real_data / "bridge_dataset" / "1.0.0", folder)
    for f in [folder, *folder.iterdir()]:
        f.chmod(0o755)
    return folder, folder / "bridge_dataset-train.tfrecord-00000-of-00001"


def test_flipped_byte_is_skipped_and_counted(real_data, tmp_path):
    folder, shard = _copy(real_data, tmp_path)
    data = bytearray(shard.read_bytes())
    data[5000] ^= 0xFF
    shard.write_bytes(data)
    ix = index.ensure(cards.load("bridge_dataset"), str(folder.parent.parent), str(tmp_path / "ix"))
    assert ix.episodes == 24 and ix.skipped == {"payload checksum mismatch": 1}


def test_truncated_shard_keeps_what_is_whole(real_data, tmp_path):
    folder, shard = _copy(real_data, tmp_path)
    shard.write_bytes(shard.read_bytes()[:-1000])
    ix = index.ensure(cards.load("bridge_dataset"), str(folder.parent.parent), str(tmp_path / "ix"))
    assert ix.episodes == 24 and ix.skipped == {"truncated record": 1}


def test_shard_changed_after_indexing_is_refused(real_data, tmp_path):
    folder, shard = _copy(real_data, tmp_path)
    card, root = cards.load("bridge_dataset"), str(folder.parent.parent)
    index.ensure(card, root, str(tmp_path / "ix"))
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(UserError, match="bytes, had 3475142"):
        index.ensure(card, root, str(tmp_path / "ix"))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_end_in_our_error_or_a_dict(data):
    for parse in (lambda: rlds.parse_example(data, 0, len(data), frozenset({"a"})), lambda: list(rlds.records(data))):
        try:
            parse()
        except rlds.CorruptRecord:
            pass


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_damaged_record_never_breaks_the_parser(real_record, data):
    raw = bytearray(real_record)
    for _ in range(data.draw(st.integers(1, 8))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        out = rlds.parse_example(bytes(raw), 0, len(raw), frozenset({"steps/action", "steps/is_first"}))
        assert all(isinstance(v, np.ndarray) for v in out.values())
    except rlds.CorruptRecord:
        pass


@pytest.fixture(scope="module")
def real_record(real_data):
    """The first 3 kB of a real record, enough to hold several fields' framing."""
    data = (real_data / "bridge_dataset/1.0.0/bridge_dataset-train.tfrecord-00000-of-00001").read_bytes()
    at, _ = next(rlds.records(data))
    return data[at : at + 3000]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=20))
def test_varints_equal_protobuf(values):
    from google.protobuf.internal import encoder

    packed = b"".join(encoder._VarintBytes(v & (2**64 - 1)) for v in values)
    assert rlds._varints(packed).tolist() == values


def test_png_and_jpeg_decode_and_garbage_is_named():
    import cv2
    import simplejpeg

    picture = np.random.default_rng(0).integers(0, 255, (16, 20, 3), np.uint8)
    png = cv2.imencode(".png", picture[..., ::-1])[1].tobytes()
    assert np.array_equal(images.decode(png), picture)
    smooth = np.repeat(np.arange(0, 160, 10, dtype=np.uint8)[:, None, None], 20, 1).repeat(3, 2).copy()
    assert np.abs(images.decode(simplejpeg.encode_jpeg(smooth, 95)).astype(int) - smooth).max() < 8
    for bad in (b"", b"\xff\xd8garbage", b"neither"):
        with pytest.raises(images.UndecodableImage):
            images.decode(bad)
