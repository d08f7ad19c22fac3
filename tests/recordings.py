"""Tiny datasets of other formats, written here with pyarrow, PyAV and h5py as their formats are published; each writer returns what
went into it: [{"action", "state", "prompt", camera: u8[n h w 3]}] per episode."""

import json

import av
import cv2
import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SIZE = (32, 48)
NAMES = ["pan.pos", "lift.pos", "gripper.pos"]
PROMPTS = ["put the cube away", "öffne die Schublade"]


def episode(number, steps, cameras, dims=3):
    """Smooth pictures in which every frame differs, so that a frame too early or too late is seen."""
    rng = np.random.default_rng(number)
    h, w = SIZE
    made = {"action": rng.normal(size=(steps, dims)), "state": rng.normal(size=(steps, dims)), "prompt": PROMPTS[number % 2]}
    for c, camera in enumerate(cameras):
        ramp = np.add.outer(np.arange(h) * 3, np.arange(w) * 2)[None, ..., None] + np.array([0, 40 * c, 90])
        made[camera] = np.clip(ramp + (np.arange(steps) * 11 + number)[:, None, None, None], 0, 255).astype(np.uint8)
    return made


def mp4(path, frames, *, fps=10, lossless=True):
    """Lossless: RGB in H.264, so that what is decoded is what went in. Else H.264 as LeRobot writes it: 4:2:0, a key frame every two."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as out:
        stream = out.add_stream(
            "libx264rgb" if lossless else "libx264", fps, options={"qp": "0", "g": "4"} if lossless else {"crf": "23", "g": "2"}
        )
        stream.pix_fmt, stream.width, stream.height = "rgb24" if lossless else "yuv420p", frames.shape[2], frames.shape[1]
        for frame in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        out.mux(stream.encode())


def png(picture):
    return cv2.imencode(".png", picture[..., ::-1])[1].tobytes()


def jpeg(picture, quality=90):
    return cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def _info(place, version, episodes, cameras, kind, fps):
    vector = {"dtype": "float32", "shape": [3], "names": NAMES}
    picture = {"dtype": kind, "shape": [*SIZE, 3], "names": ["height", "width", "channels"]}
    number = lambda dtype: {"dtype": dtype, "shape": [1], "names": None}
    counters = {"timestamp": number("float32"), **{k: number("int64") for k in ("frame_index", "episode_index", "index", "task_index")}}
    old = {"chunks_size": 1000, "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"}
    old["video_path"] = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
    new = {"chunks_size": 1000, "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"}
    new["video_path"] = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
    info = {
        "codebase_version": version,
        "robot_type": "so100",
        "fps": fps,
        "total_episodes": len(episodes),
        "features": {
            "action": vector,
            "observation.state": vector,
            **{c: picture for c in cameras},
            "next.done": number("bool"),
            **counters,
        },
        **(new if version == "v3.0" else old),
    }
    (place / "meta").mkdir(parents=True, exist_ok=True)
    (place / "meta" / "info.json").write_text(json.dumps(info))


def _table(e, number, index, cameras, kind, fps):
    n = len(e["action"])
    vector = lambda x: pa.FixedSizeListArray.from_arrays(pa.array(x.astype(np.float32).ravel()), 3)
    columns = {"action": vector(e["action"]), "observation.state": vector(e["state"])}
    if kind == "image":
        columns |= {c: pa.array([{"bytes": png(p), "path": f"frame-{t}.png"} for t, p in enumerate(e[c])]) for c in cameras}
    columns |= {
        "next.done": pa.array(np.arange(n) == n - 1),
        "timestamp": pa.array((np.arange(n) / fps).astype(np.float32)),
        "frame_index": pa.array(np.arange(n)),
        "episode_index": pa.array(np.full(n, number)),
        "index": pa.array(np.arange(index, index + n)),
        "task_index": pa.array(np.full(n, number % 2)),
    }
    return pa.table(columns)


def lerobot_v2(
    place, *, version="v2.1", lengths=(5, 7, 4), cameras=("observation.images.top", "observation.images.wrist"), kind="video", fps=10, **how
):
    made = [episode(i, n, cameras) for i, n in enumerate(lengths)]
    _info(place, version, made, cameras, kind, fps)
    line = lambda rows: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (place / "meta" / "tasks.jsonl").write_text(line({"task_index": i, "task": p} for i, p in enumerate(PROMPTS)))
    rows = [{"episode_index": i, "tasks": [e["prompt"]], "length": len(e["action"])} for i, e in enumerate(made)]
    (place / "meta" / "episodes.jsonl").write_text(line(rows))
    (place / "data" / "chunk-000").mkdir(parents=True)
    for i, e in enumerate(made):
        pq.write_table(_table(e, i, sum(lengths[:i]), cameras, kind, fps), place / "data" / "chunk-000" / f"episode_{i:06d}.parquet")
        for c in cameras if kind == "video" else ():
            mp4(place / "videos" / "chunk-000" / c / f"episode_{i:06d}.mp4", e[c], fps=fps, **how)
    return made


def lerobot_v3(
    place, *, files=((5, 7, 6), (4, 6)), cameras=("observation.images.top", "observation.images.wrist"), fps=10, kind="video", **how
):
    """files: lengths of the episodes that share a data file and a video file of each camera."""
    lengths = [n for group in files for n in group]
    made = [episode(i, n, cameras) for i, n in enumerate(lengths)]
    _info(place, "v3.0", made, cameras, kind, fps)
    # as pandas writes a frame whose index is the task
    pq.write_table(pa.table({"task_index": list(range(len(PROMPTS))), "__index_level_0__": PROMPTS}), place / "meta" / "tasks.parquet")
    rows, at = [], 0
    for file, group in enumerate(files):
        members = range(at, at + len(group))
        tables = [_table(made[i], i, sum(lengths[:i]), cameras, kind, fps) for i in members]
        path = place / "data" / "chunk-000" / f"file-{file:03d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.concat_tables(tables), path)
        for c in cameras if kind == "video" else ():
            frames = np.concatenate([made[i][c] for i in members])
            mp4(place / "videos" / c / "chunk-000" / f"file-{file:03d}.mp4", frames, fps=fps, **how)
        for i in members:
            start = sum(lengths[at:i])
            row = {"episode_index": i, "tasks": [made[i]["prompt"]], "length": lengths[i], "data/chunk_index": 0, "data/file_index": file}
            row |= {"dataset_from_index": sum(lengths[:i]), "dataset_to_index": sum(lengths[: i + 1]), "stats/action/count": [lengths[i]]}
            for c in cameras if kind == "video" else ():
                row |= {f"videos/{c}/chunk_index": 0, f"videos/{c}/file_index": file}
                row |= {f"videos/{c}/from_timestamp": start / fps, f"videos/{c}/to_timestamp": (start + lengths[i]) / fps}
            rows.append(row)
        at += len(group)
    (place / "meta" / "episodes" / "chunk-000").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), place / "meta" / "episodes" / "chunk-000" / "file-000.parquet")
    return made


def robomimic(path, *, lengths=(5, 3), order=(0, 1), cameras=("agentview_image", "robot0_eye_in_hand_image")):
    made = [episode(i, n, cameras, dims=7) for i, n in enumerate(lengths)]
    with h5py.File(path, "w") as f:
        data = f.create_group("data")
        data.attrs["env_args"] = json.dumps({"env_name": "Lift", "type": 1, "env_kwargs": {"robots": ["Panda"], "control_freq": 20}})
        data.attrs["total"] = sum(lengths)
        f["mask/train"] = np.array([b"demo_0"])
        for i, e in enumerate(made):
            rng, demo = np.random.default_rng(50 + i), data.create_group(f"demo_{order[i]}")
            n = len(e["action"])
            e |= {"eef_pos": rng.normal(size=(n, 3)), "eef_quat": rng.normal(size=(n, 4)), "gripper": rng.normal(size=(n, 2)), "prompt": ""}
            demo.attrs["num_samples"], demo.attrs["model_file"] = n, "<mujoco/>"
            demo["actions"], demo["rewards"] = e["action"], np.arange(n, dtype=np.float64)
            demo["dones"], demo["states"] = (np.arange(n) == n - 1).astype(np.int64), rng.normal(size=(n, 32))
            for where in ("obs", "next_obs"):
                demo[f"{where}/robot0_eef_pos"], demo[f"{where}/robot0_eef_quat"] = e["eef_pos"], e["eef_quat"]
                demo[f"{where}/robot0_gripper_qpos"] = e["gripper"]
                for c in cameras:
                    demo.create_dataset(f"{where}/{c}", data=e[c], compression="gzip", chunks=(2, *e[c].shape[1:]))
            demo["obs/agentview_depth"] = rng.random((n, *SIZE, 1)).astype(np.float32)
    return made


def libero(folder, *, lengths=(4, 3), cameras=("agentview_rgb", "eye_in_hand_rgb")):
    """Two tasks, a file each; the second one's instruction is in its file's name alone."""
    made = []
    folder.mkdir(parents=True, exist_ok=True)
    for task, stem in enumerate(("KITCHEN_SCENE10_close_the_top_drawer", "pick_up_the_black_bowl")):
        with h5py.File(folder / f"{stem}_demo.hdf5", "w") as f:
            data = f.create_group("data")
            data.attrs["env_args"] = json.dumps({"env_name": "Libero", "env_kwargs": {"robots": ["Panda"], "control_freq": 20}})
            data.attrs["bddl_file_name"], data.attrs["macros_image_convention"] = f"{stem}.bddl", "opengl"
            if task == 0:
                data.attrs["problem_info"] = json.dumps({"problem_name": "x", "language_instruction": "close the top drawer"})
            for i, n in enumerate(lengths):
                e, demo = episode(10 * task + i, n, cameras, dims=7), data.create_group(f"demo_{i}")
                rng = np.random.default_rng(90 + i)
                e |= {"ee": rng.normal(size=(n, 6)), "prompt": ("close the top drawer", "pick up the black bowl")[task]}
                demo.attrs["num_samples"] = n
                demo["actions"], demo["states"], demo["robot_states"] = e["action"], rng.normal(size=(n, 20)), rng.normal(size=(n, 9))
                demo["rewards"] = demo["dones"] = (np.arange(n) == n - 1).astype(np.uint8)
                demo["obs/ee_states"], demo["obs/gripper_states"] = e["ee"], rng.normal(size=(n, 2))
                for c in cameras:
                    demo[f"obs/{c}"] = e[c]
                made.append(e)
    return made


def aloha(folder, *, lengths=(5, 4, 3), cameras=("cam_high", "cam_left_wrist", "cam_right_wrist"), compressed=False, numbers=(0, 2, 10)):
    folder.mkdir(parents=True, exist_ok=True)
    made = [episode(i, n, cameras, dims=14) | {"prompt": ""} for i, n in enumerate(lengths)]
    for number, e in zip(numbers, made):
        with h5py.File(folder / f"episode_{number}.hdf5", "w") as f:
            f.attrs["sim"], f["action"] = True, e["action"].astype(np.float32)
            f["observations/qpos"], f["observations/qvel"] = e["state"], e["state"] * 2
            if compressed:
                f.attrs["compress"] = True
                files = {c: [jpeg(p, 50 + 3 * t) for t, p in enumerate(e[c])] for c in cameras}
                longest = max(len(x) for one in files.values() for x in one)
                for c, one in files.items():
                    f[f"observations/images/{c}"] = np.stack([np.frombuffer(x.ljust(longest, b"\0"), np.uint8) for x in one])
                f["compress_len"] = np.array([[len(x) for x in one] for one in files.values()], np.float32)
                e["files"] = files
            else:
                for c in cameras:
                    f[f"observations/images/{c}"] = e[c]
    return made
