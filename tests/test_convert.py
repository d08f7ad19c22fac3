"""Demonstrations of other formats to RLDS, read back by tensorflow-datasets and by our own reader. The datasets are written here with
pyarrow, PyAV and h5py (recordings.py); pixels are compared with those, with an encoder and with a decoder that are not ours."""

import io
import json
import os
import shutil

import cv2
import numpy as np
import pytest
import yaml
from PIL import Image

from vla_jax import cli
from vla_jax.data import build, cards, convert, demonstrations, images, rlds, sample
from vla_jax.types import UserError

h5py = pytest.importorskip("h5py", reason="the extra convert is not installed")
pa = pytest.importorskip("pyarrow", reason="the extra convert is not installed")
pq = pytest.importorskip("pyarrow.parquet", reason="the extra convert is not installed")
recordings = pytest.importorskip("recordings", reason="the extra convert (av) is not installed", exc_type=ImportError)
pytest.importorskip("tensorflow_datasets", reason="the extra rlds is not installed")

TOP, WRIST = "observation/images/top", "observation/images/wrist"


def run(source, out, *options):
    """The command itself."""
    return cli.main(["data", "convert", str(source), str(out), "--name", "d", *options])


def read_back(out, name="d"):
    """What tensorflow-datasets reads, in the order of writing: [(episode's metadata, {key: [n ..]})], pictures decoded by it, and
    the bytes of their files under `key:bytes`."""
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(str(out / name / "1.0.0"))
    raw: dict = {}
    pictures = [k for k, f in rlds.features(out / name / "1.0.0").items() if f.kind == "image"]
    for key in pictures:
        convert._put(raw, key, tfds.decode.SkipDecoding())
    found = []
    for decoders in (None, {"steps": raw}):
        for episode in builder.as_dataset(split="train", decoders=decoders):
            steps = [dict(_flat(step)) for step in episode["steps"].as_numpy_iterator()]
            flat = {k: np.stack([np.asarray(s[k], object if isinstance(s[k], bytes) else None) for s in steps]) for k in steps[0]}
            meta = {k: v.numpy() for k, v in episode["episode_metadata"].items()}
            if decoders is None:
                found.append((meta, flat))
            else:
                mine = next(f for m, f in found if m["episode_id"] == meta["episode_id"])
                mine |= {f"{k}:bytes": flat[k] for k in pictures}
    return sorted(found, key=lambda f: int(f[0]["episode_id"]))


def _flat(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}/")
        else:
            yield prefix + key, value


def index(out, tmp, name="d", **changes):
    """Our own reader's index, with the draft filled in as a person would."""
    raw = yaml.safe_load((out / name / "1.0.0" / "card.yaml").read_text())
    raw["gripper"] = {"state": "open_high", "action": "open_high"}
    raw["control_hz"] = 50 if raw["control_hz"] == "?" else raw["control_hz"]
    for dim in raw["state"]["dims"] + raw["action"]["dims"]:
        dim.update(unit="1", frame="base", kind="absolute")
    card = cards.from_dict({**raw, **changes}, where="filled")
    return build.ensure(card, str(out), str(tmp / "index"), workers=1)


def check_ours(ix, made, views):
    """Our index holds every episode and frame, and a sample can be drawn whose actions and pixels are the source's. views: view ->
    the source's camera, of which nothing was lost."""
    assert (ix.episodes, ix.frames, ix.skipped) == (len(made), sum(len(e["action"]) for e in made), {})
    order = []
    for first, end in zip(ix.episode_start, ix.episode_start[1:]):
        order += [j for j, e in enumerate(made) if np.array_equal(e["action"].astype(np.float32), ix.action[first:end])]
    assert sorted(order) == list(range(len(made)))
    e, step = made[-1], 1
    frame = int(ix.episode_start[order.index(len(made) - 1)]) + step
    for view, camera in views.items():
        np.testing.assert_array_equal(images.decode(sample.fetch(ix, sample.picture(ix, frame, view))), e[camera][step])
    one = sample.make(ix, frame, steps=2, dataset=0, sample_id=0, size=16, wanted=("base", "wrist", "wrist_right"))
    assert sorted(one.images) == sorted(ix.views) and {i.shape for i in one.images.values()} == {(16, 16, 3)}
    np.testing.assert_array_equal(one.actions, e["action"][step : step + 2].astype(np.float32))
    return one


def same_numbers(read, made, keys):
    assert len(read) == len(made)
    for (_, got), e in zip(read, made, strict=True):
        for key, ours in keys.items():
            assert got[key].dtype == np.float32
            np.testing.assert_array_equal(got[key], e[ours].astype(np.float32))
        n = len(e["action"])
        np.testing.assert_array_equal(got["is_first"], np.arange(n) == 0)
        np.testing.assert_array_equal(got["is_last"], np.arange(n) == n - 1)


def prompts(read):
    return [{x.decode() for x in got["language_instruction"]} for _, got in read]


@pytest.mark.parametrize("layout", ["v2.1 video", "v3.0 video", "v2.0 image", "v3.0 image"])
def test_lerobot(layout, tmp_path, capsys):
    version, kind = layout.split()
    src, out = tmp_path / "src", tmp_path / "out"
    made = recordings.lerobot_v3(src, kind=kind) if version == "v3.0" else recordings.lerobot_v2(src, version=version, kind=kind)
    assert run(src, out, "--png") == 0
    said = capsys.readouterr().out
    frames = sum(len(e["action"]) for e in made)
    assert f"{len(made)} episodes, {frames} frames, 10 Hz, from LeRobot {version}" in said and "observation/images/top 32 x 48" in said
    read = read_back(out)
    same_numbers(read, made, {"action": "action", "observation/state": "state"})
    assert prompts(read) == [{e["prompt"]} for e in made]
    for (_, got), e in zip(read, made, strict=True):
        for key, camera in ((TOP, "observation.images.top"), (WRIST, "observation.images.wrist")):
            np.testing.assert_array_equal(got[key], e[camera])  # lossless all the way
            if kind == "image":
                assert list(got[f"{key}:bytes"]) == [recordings.png(p) for p in e[camera]]
        assert got["is_terminal"].tolist() == got["is_last"].tolist() and "next/done" not in got
        np.testing.assert_array_equal(got["timestamp"], (np.arange(len(e["action"])) / 10).astype(np.float32))
    assert [meta["source"].decode() for meta, _ in read] == [f"episode {i}" for i in range(len(made))]
    views = {"base": "observation.images.top", "wrist": "observation.images.wrist"}
    assert check_ours(index(out, tmp_path), made, views).prompt == made[-1]["prompt"]


def test_the_card_knows_what_the_source_knows_and_is_refused_until_a_person_has_said_the_rest(tmp_path, capsys):
    recordings.lerobot_v2(tmp_path / "src")
    info = json.loads((tmp_path / "src/meta/info.json").read_text())
    (tmp_path / "src/meta/info.json").write_text(json.dumps({**info, "license": "apache-2.0"}))
    run(tmp_path / "src", tmp_path / "out")
    card = tmp_path / "out/d/1.0.0/card.yaml"
    assert f"vla-jax data check {card} --root {tmp_path / 'out'}" in capsys.readouterr().out
    raw = yaml.safe_load(card.read_text())
    assert (raw["control_hz"], raw["robot"], raw["licence"], raw["name"]) == (10, "so100", "apache-2.0", "d")
    assert raw["views"] == {"base": TOP, "wrist": WRIST} and raw["language"] == ["language_instruction"]
    for vector in ("state", "action"):
        assert [d["name"] for d in raw[vector]["dims"]] == recordings.NAMES
        assert {d[k] for d in raw[vector]["dims"] for k in ("unit", "frame", "kind")} == {"?"}
    assert cli.main(["data", "check", str(card), "--root", str(tmp_path / "out")]) == 2
    assert "gripper is {'state': '?', 'action': '?'}" in capsys.readouterr().err
    card.write_text(card.read_text().replace('gripper: {state: "?", action: "?"}', "gripper: {state: none, action: none}"))
    assert cli.main(["data", "check", str(card), "--root", str(tmp_path / "out")]) == 2
    assert "unit is '?'" in capsys.readouterr().err


def test_video_frames_are_those_of_another_decoder(tmp_path):
    """4:2:0 video, several episodes in a file: OpenCV's own FFmpeg decodes the whole file; ours seeks. They convert to RGB with
    different rounding, hence two levels; neighbouring frames differ by eleven."""
    recordings.lerobot_v3(tmp_path / "src", lossless=False)
    run(tmp_path / "src", tmp_path / "out", "--png")
    got = np.concatenate([got[TOP] for _, got in read_back(tmp_path / "out")])
    expected = []
    for file in (0, 1):
        video = cv2.VideoCapture(str(tmp_path / f"src/videos/observation.images.top/chunk-000/file-{file:03d}.mp4"))
        while (frame := video.read())[0]:
            expected.append(frame[1][..., ::-1])
    assert len(got) == len(expected)
    worst = np.abs(got.astype(int) - np.array(expected)).max()
    assert worst <= 2, worst


def test_jpegs_are_those_of_another_encoder(tmp_path):
    made = recordings.lerobot_v2(tmp_path / "src", lengths=(3,))
    run(tmp_path / "src", tmp_path / "out", "--quality", "80")
    ((_, got),) = read_back(tmp_path / "out")
    for data, picture in zip(got[f"{TOP}:bytes"], made[0]["observation.images.top"], strict=True):
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=80, subsampling=0)
        theirs, ours = Image.open(file), Image.open(io.BytesIO(data))
        assert ours.quantization == theirs.quantization and ours.layer == theirs.layer
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


def test_robomimic(tmp_path, capsys):
    made = recordings.robomimic(tmp_path / "demo.hdf5", order=(10, 2))[::-1]  # demo_2 comes before demo_10
    assert run(tmp_path / "demo.hdf5", tmp_path / "out", "--prompt", "lift the cube", "--png") == 0
    said = capsys.readouterr().out
    assert (
        "2 episodes, 8 frames, 20 Hz, from robomimic" in said and "obs/agentview_depth" in said and "the splits train are not kept" in said
    )
    read = read_back(tmp_path / "out")
    keys = {"action": "action", "observation/robot0_eef_pos": "eef_pos", "observation/robot0_eef_quat": "eef_quat"}
    same_numbers(read, made, keys | {"observation/robot0_gripper_qpos": "gripper"})
    for (_, got), e in zip(read, made, strict=True):
        np.testing.assert_array_equal(got["observation/agentview_image"], e["agentview_image"])
        np.testing.assert_array_equal(got["reward"], np.arange(len(e["action"]), dtype=np.float32))
        assert got["is_terminal"][-1] and "observation/agentview_depth" not in got and "states" not in got
    assert [meta["source"].decode() for meta, _ in read] == ["demo.hdf5:data/demo_2", "demo.hdf5:data/demo_10"]
    raw = yaml.safe_load((tmp_path / "out/d/1.0.0/card.yaml").read_text())
    assert raw["robot"] == "Panda (Lift)" and raw["control_hz"] == 20
    assert [d["name"] for d in raw["state"]["dims"]][3:7] == ["qx", "qy", "qz", "qw"]  # as stored
    views = {"base": "agentview_image", "wrist": "robot0_eye_in_hand_image"}
    assert check_ours(index(tmp_path / "out", tmp_path), made, views).prompt == "lift the cube"


@pytest.mark.parametrize("rotate", [False, True])
def test_libero(rotate, tmp_path, capsys):
    made = recordings.libero(tmp_path / "src")
    assert run(tmp_path / "src", tmp_path / "out", "--png", *(["--rotate"] if rotate else [])) == 0
    assert "4 episodes, 14 frames, 20 Hz, from libero" in (said := capsys.readouterr().out) and "upside down" in said
    read = read_back(tmp_path / "out")
    same_numbers(read, made, {"action": "action", "observation/ee_states": "ee"})
    assert prompts(read) == [{e["prompt"]} for e in made]
    for (_, got), e in zip(read, made, strict=True):
        stored = e["agentview_rgb"]
        np.testing.assert_array_equal(got["observation/agentview_rgb"], np.rot90(stored, 2, axes=(1, 2)) if rotate else stored)
    check_ours(index(tmp_path / "out", tmp_path), made, {} if rotate else {"base": "agentview_rgb", "wrist": "eye_in_hand_rgb"})


@pytest.mark.parametrize("compressed", [False, True])
def test_aloha(compressed, tmp_path, capsys):
    made = recordings.aloha(tmp_path / "src", compressed=compressed)
    assert run(tmp_path / "src", tmp_path / "out", "--prompt", "fold it", *([] if compressed else ["--png"])) == 0
    said = capsys.readouterr().out
    assert "3 episodes, 12 frames, control rate not said by the source" in said
    read = read_back(tmp_path / "out")
    same_numbers(read, made, {"action": "action", "observation/qpos": "state"})
    assert [meta["source"].decode() for meta, _ in read] == [f"episode_{i}.hdf5" for i in (0, 2, 10)]
    for (_, got), e in zip(read, made, strict=True):
        for camera in ("cam_high", "cam_left_wrist", "cam_right_wrist"):
            key = f"observation/images/{camera}"
            if compressed:  # the very files
                assert list(got[f"{key}:bytes"]) == e["files"][camera]
            else:
                np.testing.assert_array_equal(got[key], e[camera])
    raw = yaml.safe_load((tmp_path / "out/d/1.0.0/card.yaml").read_text())
    assert raw["action"]["dims"][7]["name"] == "right_waist" and raw["control_hz"] == "?"
    assert list(raw["views"]) == ["wrist", "wrist_right", "base"]
    views = {"base": "cam_high", "wrist": "cam_left_wrist", "wrist_right": "cam_right_wrist"}
    check_ours(index(tmp_path / "out", tmp_path), made, {} if compressed else views)


def swapped(path, change):
    """Rewrites a parquet file with columns changed."""
    table = pq.read_table(path)
    for name, value in change(table).items():
        table = table.set_column(table.column_names.index(name), name, value)
    pq.write_table(table, path)


def nan_action(table):
    values = np.array(table["action"].to_pylist(), np.float32)
    values[1, 2] = np.nan
    return {"action": pa.array(list(values))}


def truncate(path, share=0.6):
    os.truncate(path, int(path.stat().st_size * share))


DATA, VIDEO = "data/chunk-000/episode_000001.parquet", "videos/chunk-000/observation.images.wrist/episode_000001.mp4"
SPOILT = {
    "unreadable video (": lambda src: truncate(src / VIDEO),
    "missing file (videos/chunk-000/observation.images.wrist/episode_000001.mp4)": lambda src: (src / VIDEO).unlink(),
    "missing file (data/chunk-000/episode_000001.parquet)": lambda src: (src / DATA).unlink(),
    "unreadable file (data/chunk-000/episode_000001.parquet": lambda src: truncate(src / DATA),
    "differing lengths (6 rows of the 7 that meta announces)": lambda src: pq.write_table(
        pq.read_table(src / DATA).slice(0, 6), src / DATA
    ),
    "no frame at that time (episode_000001.mp4: wanted 0.4 s, the nearest frame is at 0.3 s)": lambda src: recordings.mp4(
        src / VIDEO, np.zeros((4, *recordings.SIZE, 3), np.uint8)
    ),
    "another picture size (uint8 [16, 16, 3], elsewhere 32 x 48 x 3)": lambda src: recordings.mp4(
        src / VIDEO, np.zeros((7, 16, 16, 3), np.uint8)
    ),
    "not finite (action holds NaN, infinity or more than float32 does, at step 1)": lambda src: swapped(src / DATA, nan_action),
    "frames out of order": lambda src: swapped(src / DATA, lambda t: {"frame_index": pa.array(range(1, 8))}),
    "timestamps off the grid (they are not 1/10 s apart within 0.0001 s)": lambda src: swapped(
        src / DATA, lambda t: {"timestamp": pa.array(np.float32([0, 0.1, 0.2, 0.301, 0.4, 0.5, 0.6]))}
    ),
    "unknown task (task_index 9 is not in meta/tasks)": lambda src: swapped(src / DATA, lambda t: {"task_index": pa.array([9] * 7)}),
    "another shape (action is [2] a step, elsewhere [3])": lambda src: swapped(
        src / DATA, lambda t: {"action": pa.array([[0.0, 1.0]] * 7)}
    ),
    "unreadable field (action: lists of differing lengths": lambda src: swapped(
        src / DATA, lambda t: {"action": pa.array([[0.0]] * 6 + [[0.0, 1.0]])}
    ),
    "another type (action holds int64, elsewhere float32)": lambda src: swapped(
        src / DATA, lambda t: {"action": pa.array([[1, 2, 3]] * 7)}
    ),
}


@pytest.mark.parametrize("said", SPOILT, ids=lambda said: said.split(" (")[0])
def test_a_damaged_episode_is_left_out_and_named(said, tmp_path, capsys):
    made = recordings.lerobot_v2(tmp_path / "src")
    SPOILT[said](tmp_path / "src")
    assert run(tmp_path / "src", tmp_path / "out", "--png") == 0
    report = capsys.readouterr().out
    assert "2 episodes, 9 frames" in report and f"Skipped 1: 1 x {said.split(' (')[0]}" in report and f"  episode 1: {said}" in report, (
        report
    )
    read = read_back(tmp_path / "out")
    same_numbers(read, [made[0], made[2]], {"action": "action"})
    np.testing.assert_array_equal(read[1][1][WRIST], made[2]["observation.images.wrist"])
    assert [int(meta["episode_id"]) for meta, _ in read] == [0, 1]


def hdf5_change(path, key, value):
    with h5py.File(path, "a") as f:
        old = f[key][()]
        del f[key]
        if value is not None:
            f[key] = value(old)


def nan(x):
    return np.where(np.arange(x.size).reshape(x.shape) == 3, np.nan, x)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("action", lambda x: x[:-1], "differing lengths (observations/images/cam_high has 4 pictures, there are 3 actions)"),
        ("observations/images/cam_high", None, "missing field (observations/images/cam_high)"),
        (
            "observations/images/cam_high",
            lambda x: x[:2],
            "differing lengths (observations/images/cam_high has 2 pictures, there are 4 actions)",
        ),
        ("observations/qpos", nan, "not finite (observations/qpos holds NaN"),
        ("action", lambda x: x[:0], "empty episode"),
        ("observations/images/cam_high", lambda x: x[:, :8], "another picture size (uint8 [8, 48, 3], elsewhere 32 x 48 x 3)"),
    ],
)
def test_a_damaged_aloha_episode_is_left_out_and_named(key, value, said, tmp_path, capsys):
    made = recordings.aloha(tmp_path / "src")
    hdf5_change(tmp_path / "src/episode_2.hdf5", key, value)
    assert run(tmp_path / "src", tmp_path / "out") == 0
    assert f"  episode_2.hdf5: {said}" in capsys.readouterr().out
    same_numbers(read_back(tmp_path / "out"), [made[0], made[2]], {"action": "action"})


@pytest.mark.parametrize("layout", ["v2.1", "v3.0", "image", "robomimic", "aloha", "aloha compressed"])
def test_files_cut_anywhere_are_refused_or_left_out(layout, tmp_path):
    """Every file of a source, cut at random places: a UserError, or an episode less; never another exception, and what is written is
    what the whole source gives."""
    src, rng = tmp_path / "src", np.random.default_rng(7)
    if layout == "v3.0":
        recordings.lerobot_v3(src, files=((3, 4), (3,)))
    elif layout in ("v2.1", "image"):
        recordings.lerobot_v2(src, lengths=(3, 4), kind="image" if layout == "image" else "video")
    elif layout == "robomimic":
        src.mkdir()
        recordings.robomimic(src / "demo.hdf5")
    else:
        recordings.aloha(src, lengths=(3, 4), compressed="compressed" in layout)
    whole, outcomes = drain(src), {"refused": 0, "left out": 0, "whole": 0}
    for path in sorted(p for p in src.rglob("*") if p.is_file()):
        kept = path.read_bytes()
        for cut in rng.integers(0, len(kept), 6):
            path.write_bytes(kept[:cut])
            try:
                found = drain(src)
            except UserError:
                outcomes["refused"] += 1
                continue
            finally:
                path.write_bytes(kept)
            outcomes["left out" if len(found) < len(whole) else "whole"] += 1
            assert all(whole[label] == episode for label, episode in found.items())
    assert outcomes["refused"] + outcomes["left out"] > outcomes["whole"], outcomes


def drain(src):
    """What would be written, without TensorFlow: {label: digest of everything}."""
    import hashlib

    source, found = convert.read(src), {}
    for label, episode in source.episodes(None):
        if isinstance(episode, demonstrations.Damaged):
            continue
        done = convert.Written(src, source)
        try:
            made = convert._example(label, episode, done, {k: c.encoding or "png" for k, c in source.cameras.items()}, 95, "", False)
        except demonstrations.Damaged:
            continue
        digest = hashlib.sha256()
        for step in made["steps"]:
            for key, value in sorted(_flat(step)):
                digest.update(key.encode() + (value.getvalue() if isinstance(value, io.BytesIO) else np.asarray(value).tobytes()))
        found[label] = digest.hexdigest()
    return found


def refused(src, out, *options, says, capsys):
    assert run(src, out, *options) == 2
    assert says in (err := capsys.readouterr().err), err
    assert not out.exists() or not [p for p in out.rglob("*") if p.is_file()]


def test_sources_that_are_refused(tmp_path, capsys):
    out = tmp_path / "out"
    check = lambda src, says, *options: refused(src, out, *options, says=says, capsys=capsys)
    check(tmp_path / "absent", "does not exist")
    (tmp_path / "empty").mkdir()
    check(tmp_path / "empty", "holds neither meta/info.json (LeRobot) nor .hdf5")
    check(tmp_path / "empty", "holds no .hdf5 or .h5 file", "--format", "hdf5")
    (tmp_path / "v1/meta_data").mkdir(parents=True)
    check(tmp_path / "v1", "convert_dataset_v1_to_v2.py")
    src = tmp_path / "src"
    recordings.lerobot_v2(src, lengths=())
    check(src, "has no episodes: nothing is written")
    info = json.loads((src / "meta/info.json").read_text())
    for change, says in (
        ({"codebase_version": "v1.6"}, "of version v1.6; v2.0, v2.1 and v3.0 are read (convert it to v2"),
        ({"codebase_version": "v4.0"}, "of version v4.0"),
        ({"fps": 0}, "fps is 0, not a positive number"),
        ({"features": {"observation.state": info["features"]["action"]}}, "has no feature called action"),
        ({"features": info["features"] | {"observation.images/../x": info["features"]["action"]}}, "names may not be empty, hold a slash"),
        ({"features": info["features"] | {"observation...x": info["features"]["action"]}}, "names may not be empty, hold a slash"),
        (
            {"features": info["features"] | {"observation.a b": info["features"]["action"], "observation.a_b": info["features"]["action"]}},
            "would both",
        ),
        ({"features": info["features"] | {"action": {"dtype": "float32"}}}, "describes no features with dtype and shape"),
    ):
        (src / "meta/info.json").write_text(json.dumps(info | change))
        check(src, says)
    recordings.lerobot_v2(tmp_path / "two")
    check(tmp_path / "two", "must be a name of letters", "--version", "../1.0.0")
    recordings.lerobot_v2(tmp_path / "pointers")
    for path in (tmp_path / "pointers").rglob("*wrist/*.mp4"):
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    check(
        tmp_path / "pointers",
        "no picture of observation.images.wrist can be read in the first 3 episodes, the last one says: unreadable video",
    )
    recordings.aloha(tmp_path / "nan")
    for path in (tmp_path / "nan").iterdir():
        hdf5_change(path, "action", nan)
    check(tmp_path / "nan", "no episode can be used; nothing is written. Skipped 3: 3 x not finite")
    assert cli.main(["data", "convert", str(tmp_path / "two"), str(out), "--name", "../d"]) == 2
    check(tmp_path / "two", "--layout aloha is for HDF5 files", "--format", "lerobot", "--layout", "aloha")
    check(tmp_path / "two", "--quality 101 is above 100", "--quality", "101")
    info = json.loads((tmp_path / "two/meta/info.json").read_text())
    for template in ("../../{episode_index}.parquet", "/etc/passwd"):
        (tmp_path / "two/meta/info.json").write_text(json.dumps(info | {"data_path": template}))
        check(tmp_path / "two", "which is outside")
    (tmp_path / "two/meta/info.json").write_text(json.dumps(info | {"data_path": "{episode_index.__class__}"}))
    check(tmp_path / "two", "no episode can be used")
    (tmp_path / "two/meta/info.json").write_bytes(b'{"a": "\xff"}')
    check(tmp_path / "two", "cannot be read as JSON")


@pytest.mark.parametrize("where", ["observations/qpos", "observations/images/cam_high", "observations", "virtual", "external", "through"])
def test_links_out_of_an_hdf5_file_are_refused(where, tmp_path, capsys):
    recordings.aloha(tmp_path / "src", lengths=(4,), numbers=(0,))
    recordings.aloha(tmp_path / "other", lengths=(4,), numbers=(0,))
    with h5py.File(tmp_path / "src/episode_0.hdf5", "a") as f:
        if where == "virtual":
            layout = h5py.VirtualLayout((4, 3), "f8")
            layout[:] = h5py.VirtualSource(tmp_path / "other/episode_0.hdf5", "observations/qpos", (4, 3))
            del f["observations/qpos"]
            f["observations"].create_virtual_dataset("qpos", layout)
        elif where == "external":
            del f["observations/qpos"]
            f["observations"].create_dataset("qpos", (4, 3), "f8", external=[("/etc/hostname", 0, 96)])
        elif where == "through":  # a link within the file, to one that leads out
            del f["observations/qpos"]
            f["a/b/c/d/e/f"] = h5py.ExternalLink(str(tmp_path / "other/episode_0.hdf5"), "observations/qpos")
            f["observations/qpos"] = h5py.SoftLink("/a/b/c/d/e/f")
        else:
            del f[where]
            f[where] = h5py.ExternalLink(str(tmp_path / "other/episode_0.hdf5"), where)
    refused(tmp_path / "src", tmp_path / "out", says="are not followed", capsys=capsys)


def test_pictures_beside_the_parquet_file_may_not_lie_outside_the_dataset(tmp_path, capsys):
    made = recordings.lerobot_v2(tmp_path / "src", kind="image", lengths=(3,))
    path = tmp_path / "src/data/chunk-000/episode_000000.parquet"
    top = made[0]["observation.images.top"]
    for i, picture in enumerate(top):
        (tmp_path / "src/images").mkdir(exist_ok=True)
        (tmp_path / f"src/images/{i}.png").write_bytes(recordings.png(picture))
    point = lambda folder: {"observation.images.top": pa.array([{"bytes": None, "path": f"{folder}/{i}.png"} for i in range(3)])}
    swapped(path, lambda t: point("images"))
    assert run(tmp_path / "src", tmp_path / "out") == 0
    ((_, got),) = read_back(tmp_path / "out")
    np.testing.assert_array_equal(got[TOP], top)
    shutil.rmtree(tmp_path / "out")
    swapped(path, lambda t: point("../src/images"))
    refused(tmp_path / "src", tmp_path / "out", says="which is outside", capsys=capsys)


def test_an_instruction_that_is_no_utf8_is_replaced_and_said(tmp_path, capsys):
    recordings.lerobot_v2(tmp_path / "src", lengths=(3,))
    tasks = tmp_path / "src/meta/tasks.jsonl"
    tasks.write_bytes(tasks.read_bytes().replace(b"cube", b"c\xffbe"))
    run(tmp_path / "src", tmp_path / "out")
    assert prompts(read_back(tmp_path / "out")) == [{"put the c\ufffdbe away"}]
    assert "instructions of 1 episodes are no UTF-8" in capsys.readouterr().out
    recordings.lerobot_v3(tmp_path / "v3", files=((3,),))
    texts = pa.array([b"put the c\xffbe away", b"b"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"task_index": [0, 1], "task": texts}), tmp_path / "v3/meta/tasks.parquet")
    run(tmp_path / "v3", tmp_path / "out3")
    assert prompts(read_back(tmp_path / "out3")) == [{"put the c\ufffdbe away"}]


def test_nothing_half_written_stays_and_nothing_is_overwritten(tmp_path, capsys, monkeypatch):
    recordings.lerobot_v2(tmp_path / "src")
    out = tmp_path / "out"
    assert run(tmp_path / "src", out, "--episodes", "1") == 0
    assert [p.name for p in out.iterdir()] == ["d"] and "1 episodes, 5 frames" in capsys.readouterr().out
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert run(tmp_path / "src", out) == 2 and "exists. Give another --version" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    assert run(tmp_path / "src", out, "--version", "1.1.0") == 0 and len(list((out / "d").iterdir())) == 2

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "_card", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert.convert(tmp_path / "src", out, "e")
    assert [p.name for p in out.iterdir()] == ["d"]


def test_episodes_without_an_instruction_are_said_and_left_out_by_the_card(tmp_path, capsys):
    recordings.aloha(tmp_path / "src")
    run(tmp_path / "src", tmp_path / "out")
    assert "3 episodes have no instruction" in capsys.readouterr().out
    with pytest.raises(UserError, match="no usable episode"):
        index(tmp_path / "out", tmp_path)


def test_odd_names_and_types_of_lerobot(tmp_path):
    """Fields as other programs name them (openpi: state, actions, image), doubles, a matrix, text, and names that are the folder of
    others."""
    made = recordings.lerobot_v2(tmp_path / "src", lengths=(3,), kind="image", cameras=("image",))
    path, meta = tmp_path / "src/data/chunk-000/episode_000000.parquet", tmp_path / "src/meta/info.json"
    info, table = json.loads(meta.read_text()), pq.read_table(path)
    features = info["features"]
    features["actions"], features["state"] = features.pop("action"), features.pop("observation.state")
    features["state.raw"] = {"dtype": "float64", "shape": [2, 2], "names": None}
    features["note"] = {"dtype": "string", "shape": [1], "names": None}
    features["flag"] = {"dtype": "bool", "shape": [1], "names": None}
    features["count"] = {"dtype": "uint16", "shape": [1], "names": None}
    features["depth"] = {"dtype": "video", "shape": [32, 48, 1], "names": None, "info": {"video.is_depth_map": True}}
    meta.write_text(json.dumps(info))
    table = table.rename_columns(["actions" if n == "action" else "state" if n == "observation.state" else n for n in table.column_names])
    raw = np.random.default_rng(0).normal(size=(3, 2, 2))
    table = table.append_column("state.raw", pa.array(raw.tolist()))
    table = table.append_column("note", pa.array(["a", None, "ü"])).append_column("flag", pa.array([True, False, True]))
    pq.write_table(table.append_column("count", pa.array(np.uint16([1, 2, 65535]))), path)
    assert run(tmp_path / "src", tmp_path / "out") == 0
    ((_, got),) = read_back(tmp_path / "out")
    np.testing.assert_array_equal(got["action"], made[0]["action"].astype(np.float32))
    np.testing.assert_array_equal(got["observation/state"], made[0]["state"].astype(np.float32))
    np.testing.assert_array_equal(got["observation/state_raw"], raw.astype(np.float32))
    np.testing.assert_array_equal(got["observation/image"], made[0]["image"])
    assert got["observation/note"].tolist() == [b"a", b"", "ü".encode()] and got["observation/flag"].ravel().tolist() == [True, False, True]
    assert got["observation/count"].ravel().tolist() == [1, 2, 65535] and not [k for k in got if "depth" in k]


def test_without_the_extra_the_command_says_what_to_install(tmp_path, capsys, monkeypatch):
    import sys

    recordings.lerobot_v2(tmp_path / "src", lengths=(3,))
    for module in ("vla_jax.data.lerobot", "vla_jax.data.hdf5", "vla_jax.data.video"):
        monkeypatch.delitem(sys.modules, module, raising=False)
        monkeypatch.delattr(sys.modules["vla_jax.data"], module.split(".")[-1], raising=False)
    for package in ("h5py", "tensorflow_datasets"):
        monkeypatch.setitem(sys.modules, package, None)
        says = f"converting needs the package {package}: pip install 'vla-jax[convert,rlds]'"
        refused(tmp_path / "src", tmp_path / "out", says=says, capsys=capsys)
