"""What we read against what tfds reads, on the real sample and on a set that stores everything in every way; and broken files."""

import shutil

import numpy as np
import odd_rlds
import pytest

from vla_jax import config
from vla_jax.data import build, cards, images, records, rlds, sample, source
from vla_jax.data.store import Store
from vla_jax.data.stream import Stream
from vla_jax.types import UserError

BRIDGE_VIEWS = {"base": "image_0", "side": "image_1", "side_2": "image_2", "wrist": "image_3"}


@pytest.fixture(scope="module")
def bridge(real_data, tmp_path_factory):
    return build.ensure(cards.load("bridge_dataset"), str(real_data), str(tmp_path_factory.mktemp("ix")))


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    root = tmp_path_factory.mktemp("odd")
    odd_rlds.record(root)
    odd_rlds.record(root / "array_record", array_record=True)
    return root


def by_tfds(folder, keep):
    """Episodes as tfds and rlds give them, pictures named in `keep` undecoded: [[step, ..], ..]."""
    tfds = pytest.importorskip("tensorflow_datasets")
    builder = tfds.builder_from_directory(str(folder))
    if builder.info.file_format.value == "array_record":  # tfds decodes the pictures here, by Pillow
        for episode in builder.as_data_source(split="train"):
            yield list(episode["steps"])
        return
    decoders = {"steps": {"observation": {k: tfds.decode.SkipDecoding() for k in keep}}}
    read = builder.as_dataset(split="train", read_config=tfds.ReadConfig(interleave_cycle_length=1), decoders=decoders)
    for episode in read:
        yield list(episode["steps"].as_numpy_iterator())


def decoded(stored: bytes) -> np.ndarray:
    """TensorFlow's own decoder; both sides use libjpeg-turbo, TensorFlow by default with its fast integer DCT, so it is asked
    for the accurate one that we use. Then they may differ by one level."""
    import tensorflow as tf

    if stored[:2] == b"\xff\xd8":
        return tf.io.decode_jpeg(stored, dct_method="INTEGER_ACCURATE").numpy()
    return tf.io.decode_png(stored).numpy()


def test_every_field_of_the_real_sample_equals_tfds(bridge, real_data):
    """Stored fields and picture bytes are equal bit for bit, pixels within one level."""
    frame = 0
    for number, episode in enumerate(by_tfds(real_data / "bridge_dataset" / "1.0.0", BRIDGE_VIEWS.values())):
        for t, step in enumerate(episode):
            action = np.concatenate([step["action"][:6], [step["action"][6] > 0.5]]).astype(np.float32)
            made = sample.make(bridge, frame, steps=5, dataset=0, sample_id=0, size=64, wanted=("side", "base", "wrist"))
            assert np.array_equal(bridge.action[frame], action) and np.array_equal(made.actions[0], action)
            assert np.array_equal(made.state, step["observation"]["state"])
            assert made.prompt == step["language_instruction"].decode()
            assert (made.episode, made.step) == (number, t) and made.action_mask.tolist() == [t + i < len(episode) for i in range(5)]
            assert list(made.images) == ["side", "base", "wrist"]
            for v, view in enumerate(bridge.views):
                stored = step["observation"][BRIDGE_VIEWS[view]]
                assert sample.fetch(bridge, sample.picture(bridge, frame, bridge.views[v])) == stored
                if view in made.images:
                    assert np.abs(made.images[view].astype(int) - decoded(stored)).max() <= 1
            frame += 1
    assert frame == bridge.frames == 250 and bridge.episodes == 25


@pytest.mark.parametrize("kind", ["tfrecord", "array_record"])
def test_every_field_of_the_odd_set_equals_tfds(odd, tmp_path, kind):
    """JPEG, PNG, raw pictures of three encodings; strings, codes, several instructions; float64, bool and int64 numbers, some of
    them as bytes or compressed; filters; TFRecord and ArrayRecord. Numbers are equal bit for bit as float32, in which the framework computes."""
    root = odd if kind == "tfrecord" else odd / "array_record"
    ix = build.ensure(odd_rlds.card(), str(root), str(tmp_path))
    frame = 0
    for episode in by_tfds(root / odd_rlds.NAME / odd_rlds.VERSION, ["jpeg", "png"]):
        number = len(episode) - 2
        if number in (5, 6):  # left out by the card's filters
            continue
        for step in episode:
            seen, did = step["observation"], step["action"]
            made = sample.make(ix, frame, steps=3, dataset=0, sample_id=0, size=12, wanted=ix.views)
            assert np.array_equal(made.state, np.concatenate([seen["joints"], [seen["flag"]], [seen["count"]]]).astype(np.float32))
            assert np.array_equal(made.actions[0], np.concatenate([did["move"], [1 - did["grip"][0, 0]]]).astype(np.float32))
            codes = bytes(step["codes"].astype(np.uint8)).rstrip(b"\0").decode().strip()
            texts = [step["language"].decode().strip(), step["nested"]["second"].decode().strip(), codes]
            assert ix.instructions(frame) == tuple(x for x in texts if x)
            for v, key in enumerate(odd_rlds.CARD["views"].values()):
                want = seen[key.split("/")[1]]
                pixels = images.decode(sample.fetch(ix, sample.picture(ix, frame, ix.views[v])), ix.pictures[ix.views[v]])
                if isinstance(want, bytes):
                    assert (
                        sample.fetch(ix, sample.picture(ix, frame, ix.views[v])) == want
                        and np.abs(pixels.astype(int) - decoded(want)).max() <= 1
                    )
                elif key.endswith("jpeg"):
                    assert np.abs(pixels.astype(int) - want).max() <= 1
                else:
                    assert np.array_equal(pixels, want)
            frame += 1
        assert made.step == len(episode) - 1
    assert frame == ix.frames == sum(2 + i for i in range(5)) and ix.skipped == {}
    assert ix.filtered == {"episode:success is false": 1, "episode:meta/path does not match '^good'": 1}


@pytest.mark.parametrize("processes", [1, 2])
def test_packed_rows_hold_what_tfds_reads(real_data, tmp_path, processes):
    """What training gets, sample by sample: pixels, state, action chunk, mask and prompt of the frame that the sampler names.
    Pictures keep their size here, so that nothing but the decoder lies between; numbers are normalised in float32."""
    c, _ = config.load("configs/debug.py:bridge", [f"data.root={real_data}", f"data.index_dir={tmp_path}", "data.image_size=64"])
    src = source.open_source(c, tokens_per_image=4)
    steps = [(e, t, step) for e, episode in enumerate(episodes_of(real_data)) for t, step in enumerate(episode)]
    chosen, seen = [v for v in c.data.views if v in BRIDGE_VIEWS], 0
    for process in range(processes):
        with Stream(src, process=process, processes=processes) as stream:
            for batch, _ in (next(stream) for _ in range(6)):
                for row in range(len(batch.tokens)):
                    slot = 0
                    for g in range(batch.segment[row].max()):
                        _, _, place = src.sampler.draw(batch.sample_id[row, g : g + 1])
                        frame = int(src.frames[0][place][0])
                        episode, t, step = steps[frame]
                        assert not src.indexes[0].held_out(c.data.holdout)[episode]
                        for view in chosen:
                            there = np.abs(batch.images[row, slot].astype(int) - decoded(step["observation"][BRIDGE_VIEWS[view]])).max()
                            assert there <= 1
                            slot += 1
                        norm = src.normalizers[0]
                        assert np.allclose(norm["state"].denormalize(batch.state[row, g]), step["observation"]["state"], atol=2e-5)
                        later = [s["action"] for e, _, s in steps[frame : frame + src.steps(0)] if e == episode]
                        chunk = norm["action"].denormalize(batch.actions[row, g])[: len(later)]
                        want = np.array(later)
                        want[:, 6] = want[:, 6] > 0.5
                        inside = np.abs(batch.actions[row, g][: len(later)]) < 1  # what is beyond q01..q99 is clipped
                        assert np.allclose(chunk[inside], want[inside], atol=2e-5) and inside.mean() > 0.5
                        assert batch.action_mask[row, g, :, 0].tolist() == [i < len(later) for i in range(src.steps(0))]
                        tokens = batch.tokens[row][(batch.segment[row] == g + 1) & (batch.block[row] == 0)]
                        said = " ".join(step["language_instruction"].decode().lower().split())
                        space = "3 m delta base, 3 rad delta base, 1 binary ee"
                        ids = src.layout.text.encode(f"bridge_dataset, 5 Hz, {src.steps(0)} steps of {space}: {said}\n")
                        assert tokens[-len(ids) :].tolist() == list(ids)
                        seen += 1
    assert seen > 50


def episodes_of(real_data):
    return by_tfds(real_data / "bridge_dataset" / "1.0.0", list(BRIDGE_VIEWS.values()))


def test_exchanged_colours_are_put_right(odd, tmp_path):
    """JPEG, PNG and raw pictures of a card that says so, against the same without it."""
    plain = build.ensure(odd_rlds.card(), str(odd), str(tmp_path))
    swapped = build.ensure(odd_rlds.card(bgr=["base", "side", "side_2"]), str(odd), str(tmp_path))
    for view in plain.views:
        for frame in (0, 7):
            a, b = (sample.pixels(ix, sample.picture(ix, frame, view), size=12, resize="linear") for ix in (plain, swapped))
            assert np.array_equal(b, a[..., ::-1] if view in swapped.card.bgr else a), view
            assert not np.array_equal(a, a[..., ::-1])


def test_chunk_mask_at_the_end_of_an_episode(bridge):
    """A peer counts a repeated last action as real."""
    chunk, mask = sample.actions(bridge, 8, 5)  # steps 8 and 9 of a ten-step episode
    assert mask.tolist() == [True, True, False, False, False]
    assert np.array_equal(chunk[2:], np.repeat(bridge.action[9:10], 3, axis=0))
    many, masks = sample.actions(bridge, np.array([[8, 10], [0, 249]]), 5)
    assert np.array_equal(many[0, 0], chunk) and masks[1, 1].tolist() == [True] + [False] * 4


def test_history_stays_in_its_episode(bridge):
    made = sample.make(bridge, 11, steps=2, dataset=0, sample_id=0, size=64, wanted=("base", "side"), history=3)
    assert list(made.images) == ["base@-1", "side@-1", "base", "side"]  # frame 10 begins the episode: no picture before it
    assert np.array_equal(
        made.images["base@-1"], sample.make(bridge, 10, steps=2, dataset=0, sample_id=0, size=64, wanted=("base",)).images["base"]
    )
    assert np.array_equal(made.state, np.concatenate([bridge.state[10], bridge.state[10], bridge.state[11]]))


def test_every_instruction_is_drawn_and_the_same_again(odd, tmp_path):
    """A peer's uniform choice never draws the last of the language keys."""
    ix = build.ensure(odd_rlds.card(), str(odd), str(tmp_path))
    drawn = [sample.instruction(ix, 0, 5, n) for n in range(3000)]
    share = {text: drawn.count(text) / 3000 for text in ix.instructions(0)}
    assert len(share) == 3 and all(abs(s - 1 / 3) < 0.04 for s in share.values())  # 4.6 standard deviations
    assert drawn == [sample.instruction(ix, 0, 5, n) for n in range(3000)] != [sample.instruction(ix, 0, 6, n) for n in range(3000)]


# ---- broken on purpose


def _copy(real_data, tmp_path):
    folder = tmp_path / "root" / "bridge_dataset" / "1.0.0"
    shutil.copytree(real_data / "bridge_dataset" / "1.0.0", folder)
    for f in [folder, *folder.iterdir()]:
        f.chmod(0o755)
    return folder, folder / "bridge_dataset-train.tfrecord-00000-of-00001"


def _open(folder, tmp_path, **options):
    return build.ensure(cards.load("bridge_dataset"), str(folder.parent.parent), str(tmp_path / "ix"), **options)


def test_flipped_byte_is_skipped_and_counted(real_data, tmp_path):
    folder, shard = _copy(real_data, tmp_path)
    data = bytearray(shard.read_bytes())
    data[5000] ^= 0xFF
    shard.write_bytes(data)
    ix = _open(folder, tmp_path)
    assert ix.episodes == 24 and ix.skipped == {"payload checksum mismatch": 1}


def test_broken_length_loses_the_rest_of_its_shard_and_says_how_much(real_data, tmp_path):
    folder, shard = _copy(real_data, tmp_path)
    data = bytearray(shard.read_bytes())
    second = next(w for i, (w, _, _) in enumerate(records.read_all(Store(folder), shard.name, 25)) if i == 20) - 12
    data[second] ^= 0x01
    shard.write_bytes(data)
    ix = _open(folder, tmp_path, max_skipped=0.3)
    assert ix.episodes == 20 and ix.skipped == {"length checksum mismatch": 1, "behind a broken record": 4}
    with pytest.raises(
        UserError, match=r"5 of 25 episodes cannot be used \(4 x behind a broken record, 1 x length.*data.max_skipped = 0.1"
    ):
        _open(folder, tmp_path)


def test_truncated_shard_keeps_what_is_whole(real_data, tmp_path):
    folder, shard = _copy(real_data, tmp_path)
    shard.write_bytes(shard.read_bytes()[:-1000])
    ix = _open(folder, tmp_path)
    assert ix.episodes == 24 and ix.skipped == {"truncated record": 1}
    shard.write_bytes(b"")
    shutil.rmtree(tmp_path / "ix")
    with pytest.raises(UserError, match="no usable episode .skipped: {'announced but not there': 25}"):
        _open(folder, tmp_path)


def test_shard_changed_after_indexing_is_refused(real_data, tmp_path):
    folder, shard = _copy(real_data, tmp_path)
    _open(folder, tmp_path)
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(UserError, match="bytes, had 3475142"):
        _open(folder, tmp_path)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"action/move": np.array([0, np.nan, 0], np.float32)}, "NaN or inf in action or state"),
        ({"observation/joints": np.array([0, np.inf, 0])}, "NaN or inf in action or state"),
        ({"language": " ", "nested/second": "", "codes": np.zeros(16, np.int32)}, "no language"),
    ],
)
def test_bad_episodes_are_skipped_and_counted(tmp_path, change, cause):
    good = [odd_rlds.episode(0) for _ in range(4)]
    odd_rlds.record(tmp_path, [*good, odd_rlds.episode(0, **change)], shards=1)
    ix = build.ensure(odd_rlds.card(), str(tmp_path), str(tmp_path / "ix"), max_skipped=0.2)
    assert ix.episodes == 4 and ix.skipped == {cause: 1}
    with pytest.raises(UserError, match="1 of 5 episodes cannot be used"):
        build.ensure(odd_rlds.card(), str(tmp_path), str(tmp_path / "ix"))


def test_empty_episode(tmp_path):
    good = [odd_rlds.episode(0) for _ in range(4)]
    odd_rlds.record(tmp_path, [*good, odd_rlds.episode(0, steps=0)], shards=1)
    ix = build.ensure(odd_rlds.card(), str(tmp_path), str(tmp_path / "ix"), max_skipped=0.2)
    assert ix.episodes == 4 and ix.skipped == {"empty episode": 1}


def test_field_of_another_length():
    """Records that no TFDS writer makes: parsed from hand-made bytes."""
    from google.protobuf import descriptor_pb2  # noqa: F401 - protobuf is there
    from tensorflow.train import BytesList, Feature, Features, FloatList, Int64List
    from tensorflow.train import Example as Proto

    floats = lambda *x: Feature(float_list=FloatList(value=x))
    texts = lambda *x: Feature(bytes_list=BytesList(value=x))
    raw = {"name": "x", "views": {"base": "image"}, "language": ["text"], "filters": []}
    vector = {"ops": [{"pick": "action"}], "dims": [{"name": "x", "unit": "m", "frame": "base", "kind": "delta"}]}
    card = odd_rlds.card(**raw, state={"ops": [], "dims": []}, action=vector)
    have = {
        "image": rlds.Feature("image", "uint8", (2, 2, 3)),
        "text": rlds.Feature("text", "string", ()),
        "action": rlds.Feature("tensor", "float32", (1,)),
    }
    from vla_jax.data import scan

    def made(**change):
        fields = {"action": floats(1, 2, 3), "image": texts(b"a", b"", b"c"), "text": texts(b"t", b"t", b"t"), **change}
        bytes_ = Proto(features=Features(feature={f"steps/{k}": v for k, v in fields.items() if v})).SerializeToString()
        return scan.episode(records.Example(bytes_, scan._wanted(card)), card, have)

    good = made()
    assert good["action"].tolist() == [[1], [2], [3]] and good["image"][:, 0, 1].tolist() == [1, 0, 1]
    assert made(text=texts(b"once"))["language"] == [("once",)] * 3
    for change, cause in (
        ({"action": floats(1, 2)}, "field of another length"),
        ({"action": None}, "field of another length"),
        ({"action": Feature(int64_list=Int64List(value=[1, 2, -3]))}, ""),
        ({"action": texts(b"no")}, "field of another type"),
        ({"image": floats(1)}, "field of another type"),
        ({"text": texts(b"t", b"t")}, "field of another length"),
    ):
        if not cause:
            assert made(**change)["action"].tolist() == [[1], [2], [-3]]
            continue
        with pytest.raises(records.CorruptRecord) as e:
            made(**change)
        assert e.value.cause == cause


def test_shards_that_are_missing_or_miscounted(tmp_path):
    odd_rlds.record(tmp_path, [odd_rlds.episode(i % 5) for i in range(40)], shards=8)
    folder = tmp_path / odd_rlds.NAME / odd_rlds.VERSION
    names = rlds.shards(folder, "train")
    gone = folder / names[3]
    lost = rlds.episodes(Store(folder), "train")[3]
    kept = gone.read_bytes()
    ix = build.ensure(odd_rlds.card(), str(tmp_path), str(tmp_path / "a"), max_skipped=0.5)
    assert ix.episodes == 40
    gone.unlink()  # after indexing
    ix = build.ensure(odd_rlds.card(), str(tmp_path), str(tmp_path / "a"), max_skipped=0.5)
    assert ix.skipped == {"shard deleted after indexing": lost} and ix.missing == {3}
    frame = int(ix.episode_start[np.flatnonzero(ix.episode_shard == 3)[0]])
    with pytest.raises(images.UndecodableImage) as e:
        sample.fetch(ix, sample.picture(ix, frame, ix.views[0]))
    assert e.value.cause == "shard deleted after indexing"
    with pytest.raises(UserError, match=f"{lost} of 40 episodes cannot be used .* First missing shard: .*{names[3]}"):
        build.ensure(odd_rlds.card(), str(tmp_path), str(tmp_path / "a"), max_skipped=0.01)
    ix = build.ensure(odd_rlds.card(), str(tmp_path), str(tmp_path / "b"), max_skipped=0.5)  # before indexing
    assert ix.skipped == {"missing shard": lost} and ix.episodes == 40 - lost
    gone.write_bytes(kept)  # it came back: the index does not know it
    with pytest.raises(UserError, match=f"{names[3]} has changed since it was indexed"):
        build.ensure(odd_rlds.card(), str(tmp_path), str(tmp_path / "b"), max_skipped=0.5)


def test_pictures_that_do_not_decode():
    import cv2
    import simplejpeg

    picture = np.random.default_rng(0).integers(0, 255, (16, 20, 3), np.uint8)
    png = cv2.imencode(".png", picture[..., ::-1])[1].tobytes()
    assert np.array_equal(images.decode(png), picture)
    smooth = np.repeat(np.arange(0, 160, 10, dtype=np.uint8)[:, None, None], 20, 1).repeat(3, 2).copy()
    jpeg = simplejpeg.encode_jpeg(smooth, 95)
    assert np.abs(images.decode(jpeg).astype(int) - smooth).max() < 8
    for bad in (b"", b"\xff\xd8garbage", b"neither", jpeg[: len(jpeg) // 2], png[:60]):
        with pytest.raises(images.UndecodableImage):
            images.decode(bad)
    raw = lambda encoding: rlds.Feature("tensor", "uint8", (2, 2, 3), encoding)
    for bad, encoding in ((b"x" * 11, "bytes"), (b"x", "zlib"), (b"\x80\x80\x01" + b"a" * 11, "none"), (b"a" * 13, "none"), (b"", "none")):
        with pytest.raises(images.UndecodableImage):
            images.decode(bad, raw(encoding))


def test_shard_names_stay_in_their_folder(tmp_path):
    odd_rlds.record(tmp_path, [odd_rlds.episode(0)], shards=1)
    info = tmp_path / odd_rlds.NAME / odd_rlds.VERSION / "dataset_info.json"
    info.write_text(info.read_text().replace("{DATASET}-{SPLIT}", "../../{DATASET}"))
    with pytest.raises(UserError, match="outside its folder"):
        build.ensure(odd_rlds.card(), str(tmp_path), str(tmp_path / "ix"))
