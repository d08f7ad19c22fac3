"""LeRobot datasets v2.0, v2.1 and v3.0: numbers in parquet files, pictures beside them or in mp4 files.

v2: an episode has files of its own. v3: files hold many episodes, and `meta/episodes` says where each one lies in them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vla_jax.data import demonstrations as demos
from vla_jax.data import images, video
from vla_jax.data.demonstrations import Camera, Damaged, Episode, Field, Source
from vla_jax.types import UserError

TOLERANCE_S = 1e-4  # LeRobot's own, between a timestamp and the grid of its rate, and between a timestamp and a video's frame
_PATHS = {
    "v2": {
        "data": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    },
    "v3": {
        "data": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    },
}
_PROBED = 32  # episodes in which a camera is looked for
_COUNTERS = ("frame_index", "episode_index", "index", "task_index")  # LeRobot's own columns; RLDS says the same by order
_FAULTS = (OSError, pa.ArrowException, KeyError, ValueError, TypeError, IndexError, AttributeError, MemoryError)  # of damaged files


class _Dataset:
    """An open dataset: what meta/ says, and how to find an episode's rows and pictures."""

    def __init__(self, place: Path):
        self.place, self.info = place, _json(place / "meta" / "info.json")
        said = str(self.info.get("codebase_version"))
        if not re.fullmatch(r"v[23]\.\d+", said):
            how = (
                "convert it to v2 with LeRobot's lerobot/common/datasets/v2/convert_dataset_v1_to_v2.py first"
                if said < "v2"
                else "not known here"
            )
            raise UserError(f"{place} is a LeRobot dataset of version {said}; v2.0, v2.1 and v3.0 are read ({how}).")
        self.version = said[:2]
        features, hz = self.info.get("features"), self.info.get("fps")
        if not isinstance(features, dict) or not all(map(_is_feature, features.values())):
            raise UserError(f"{place}/meta/info.json describes no features with dtype and shape")
        if not isinstance(hz, int | float) or not 0 < hz < 1e6:
            raise UserError(f"{place}/meta/info.json: fps is {hz!r}, not a positive number")
        self.features: dict[str, dict] = features
        self.hz = float(hz)
        self.chunks_size = self.info.get("chunks_size") if isinstance(self.info.get("chunks_size"), int) else 1000
        self.tasks = dict(self._tasks())
        self.episodes = self._episodes()

    def _tasks(self) -> Iterator[tuple[int, str | bytes]]:
        if self.version == "v2":
            yield from ((row["task_index"], row["task"]) for row in _lines(self.place / "meta" / "tasks.jsonl"))
            return
        table = _table(self.place / "meta" / "tasks.parquet", None)
        texts = next((n for n in ("task", "__index_level_0__") if n in table.column_names), "")
        if not texts or "task_index" not in table.column_names:
            raise UserError(f"{self.place}/meta/tasks.parquet has the columns {table.column_names}, not task and task_index")
        yield from zip(table["task_index"].to_pylist(), pc.cast(table[texts], pa.large_binary()).to_pylist())

    def _episodes(self) -> list[dict]:
        if self.version == "v2":
            found = list(_lines(self.place / "meta" / "episodes.jsonl"))
        else:
            files = sorted((self.place / "meta" / "episodes").glob("*/*.parquet"))
            if not files:
                raise UserError(f"{self.place}/meta/episodes holds no chunk-*/file-*.parquet: not a whole dataset of version v3")
            found = [row for file in files for row in _table(file, lambda name: not name.startswith(("stats/", "tasks"))).to_pylist()]
        if not all(isinstance(row.get("episode_index"), int) and isinstance(row.get("length"), int) for row in found):
            raise UserError(f"{self.place}/meta: an episode lacks its episode_index or length")
        return sorted(found, key=lambda row: row["episode_index"])

    def file(self, kind: str, row: dict, key: str = "") -> Path:
        """The file of an episode's rows (data) or of a camera's pictures (video). Raises: Damaged when it is not there."""
        template = self.info.get(f"{kind}_path") or _PATHS[self.version][kind]
        prefix = f"videos/{key}" if kind == "video" else "data"
        known = {
            "video_key": key,
            "episode_index": row["episode_index"],
            "episode_chunk": row["episode_index"] // self.chunks_size,
            "chunk_index": row.get(f"{prefix}/chunk_index"),
            "file_index": row.get(f"{prefix}/file_index"),
        }

        def put(match) -> str:
            value = known.get(match[1])
            if value is None:
                raise Damaged("missing file", f"meta does not say the {match[1]} of {key or 'the data'}")
            return f"{value:0{int(match[2] or 0)}d}" if isinstance(value, int) else str(value)

        # not str.format: a template may reach into objects
        name = re.sub(r"\{(\w+)(?::0?(\d)d)?\}", put, str(template))
        path = demos.inside(self.place, name, f"{self.place}/meta/info.json")
        if not path.is_file():
            raise Damaged("missing file", name)
        return path

    def start(self, row: dict, key: str) -> float:
        """Seconds into the camera's file at which an episode begins. Raises: Damaged."""
        found = row.get(f"videos/{key}/from_timestamp") if self.version == "v3" else 0.0
        if not isinstance(found, int | float) or not 0 <= found < 1e9:
            raise Damaged("missing file", f"meta says {found!r} for where {key} begins in its file")
        return float(found)

    def rows(self, row: dict, columns: list[str]) -> pa.Table:
        """An episode's rows, by frame. Raises: Damaged."""
        path = self.file("data", row)
        try:
            table = pq.read_table(path, columns=columns, filters=pc.field("episode_index") == row["episode_index"], partitioning=None)
            frames = table["frame_index"].to_numpy()
        except _FAULTS as e:
            raise Damaged("unreadable file", f"{path.relative_to(self.place)}: {_short(e)}") from e
        if len(table) != row["length"]:
            raise Damaged("differing lengths", f"{len(table)} rows of the {row['length']} that meta announces")
        if not len(table):
            raise Damaged("empty episode")
        if not np.array_equal(frames, np.arange(len(table))):
            raise Damaged("frames out of order", f"frame_index is not 0 .. {len(table) - 1}")
        return table


def read(place: Path) -> Source:
    """The dataset in a folder. Raises: UserError when it is none, is older than v2, or has no action."""
    if not (place / "meta" / "info.json").is_file() and (place / "meta_data").is_dir():
        raise UserError(
            f"{place} is a LeRobot dataset of version v1; v2.0, v2.1 and v3.0 are read. Convert it to v2 with LeRobot's "
            "lerobot/common/datasets/v2/convert_dataset_v1_to_v2.py first."
        )
    d, where = _Dataset(place), f"{place}/meta/info.json"
    left, kinds = [], {}
    for name, f in d.features.items():
        kind = f.get("dtype")
        if name in _COUNTERS:
            continue
        if kind in ("video", "image"):
            kinds[name] = "" if _is_depth(f) else kind
        elif kind == "string":
            kinds[name] = "string"
        else:
            try:
                kinds[name] = demos.stored(np.dtype(kind)) or ""
            except TypeError:
                kinds[name] = ""
            if not demos.is_vector(tuple(f["shape"])):
                kinds[name] = ""
        if not kinds[name]:
            left.append(f"{name} ({kind} {f['shape']})")
            del kinds[name]
    names = [n for n in kinds if n.split(".")[0] == "action" or n == "actions"]
    if not names:
        raise UserError(f"{where} has no feature called action (it has: {', '.join(d.features)}): there is nothing to learn from")
    keys = demos.unique(_keys(list(kinds), where), where)
    if not d.episodes:
        raise UserError(f"{place} has no episodes: nothing is written")
    fields, cameras = {}, {}
    for name, key in keys.items():
        if kinds[name] in ("video", "image"):
            cameras[key] = _camera(d, name, kinds[name])
        else:
            shape = () if d.features[name]["shape"] == [1] and name.startswith(("next.", "timestamp")) else tuple(d.features[name]["shape"])
            fields[key] = Field(() if kinds[name] == "string" else shape, kinds[name], _names(d.features[name]))
    sources = {key: name for name, key in keys.items() if key in fields or key in cameras}
    return Source(
        kind=f"LeRobot {d.info['codebase_version']}",
        fields={key: f for key, f in fields.items() if key != "next/done"},
        cameras=cameras,
        count=len(d.episodes),
        episodes=lambda first: _episodes(d, d.episodes[:first], sources, fields, cameras),
        control_hz=d.hz,
        robot=str(d.info.get("robot_type") or ""),
        licence=str(d.info.get("license") or ""),
        notes=(f"left out, no numbers that a robot reads or RGB pictures: {', '.join(left)}",) if left else (),
    )


def _episodes(d: _Dataset, rows, sources, fields, cameras) -> Iterator[tuple[str, Episode | Damaged]]:
    for row in rows:
        label = f"episode {row['episode_index']}"
        try:
            yield label, _episode(d, row, sources, fields, cameras)
        except Damaged as e:
            yield label, e


def _episode(d: _Dataset, row: dict, sources: dict, fields: dict, cameras: dict) -> Episode:
    stored = [name for key, name in sources.items() if key in fields or d.features[name]["dtype"] == "image"]
    columns = list(dict.fromkeys([*stored, "frame_index", "task_index", "timestamp"]))
    table = d.rows(row, columns)
    steps = len(table)
    if missing := [name for name in columns if name not in table.column_names]:
        raise Damaged("missing field", ", ".join(missing))
    times = _column(table, "timestamp", steps)
    if (np.abs(np.diff(times.astype(np.float64)) - 1 / d.hz) > TOLERANCE_S).any():
        raise Damaged("timestamps off the grid", f"they are not 1/{d.hz:g} s apart within {TOLERANCE_S} s")
    values = {}
    for key, field in fields.items():
        name = sources[key]
        if field.dtype == "string":
            texts = pc.cast(table[name], pa.large_binary()).to_pylist()  # what is no UTF-8 would stop to_pylist
            values[key] = np.array([demos.clean(t or b"")[0] for t in texts], object)
        else:
            values[key] = demos.numbers(name, _column(table, name, steps), field, steps)
    pictures = {}
    for key in cameras:
        name = sources[key]
        if d.features[name]["dtype"] == "image":
            pictures[key] = _stored_pictures(d, table[name])
        else:
            pictures[key] = video.frames(d.file("video", row, name), d.start(row, name) + times.astype(np.float64), TOLERANCE_S)
    tasks = table["task_index"].to_pylist()
    if unknown := {t for t in tasks if t not in d.tasks}:
        raise Damaged("unknown task", f"task_index {sorted(map(str, unknown))[0]} is not in meta/tasks")
    done = values.pop("next/done", np.zeros(steps))
    return Episode(values, pictures, [d.tasks[t] for t in tasks], terminal=bool(done.ravel()[-1]))


def _stored_pictures(d: _Dataset, column: pa.ChunkedArray) -> Iterator[bytes]:
    for item in column:
        try:
            found = item.as_py()
        except _FAULTS as e:
            raise Damaged("unreadable field", f"a picture: {_short(e)}") from e
        data = found if isinstance(found, bytes) else found.get("bytes") if isinstance(found, dict) else None
        if data is None and isinstance(found, dict) and isinstance(found.get("path"), str):
            path = demos.inside(d.place, found["path"], f"{d.place}: a column of pictures")
            try:
                data = path.read_bytes()
            except OSError as e:
                raise Damaged("missing file", found["path"]) from e
        if not data:
            raise Damaged("undecodable picture", "a row holds none")
        yield data


def _column(table: pa.Table, name: str, steps: int) -> np.ndarray:
    """[n ..] of a column of numbers or of lists of equal lengths, however deep. Raises: Damaged."""
    try:
        column, shape = table[name].combine_chunks(), [steps]
        if isinstance(column, pa.ExtensionArray):  # Hugging Face's arrays of two and more dimensions
            column = column.storage
        if column.null_count:
            raise ValueError(f"{column.null_count} values are missing")
        while pa.types.is_list(column.type) or pa.types.is_large_list(column.type) or pa.types.is_fixed_size_list(column.type):
            inner = column.flatten()
            if inner.null_count or len(set(pc.list_value_length(column).to_pylist())) != 1:
                raise ValueError("lists of differing lengths or with missing values")
            shape.append(len(inner) // max(1, len(column)))
            column = inner
        return column.to_numpy(zero_copy_only=False).reshape(shape)
    except _FAULTS as e:
        raise Damaged("unreadable field", f"{name}: {_short(e)}") from e


def _keys(names: list[str], where: str) -> dict[str, str]:
    """feature -> key: `observation.images.top` is observation/images/top; what is neither observation nor action goes below observation/."""
    known = {"next.reward": "reward", "next.done": "next/done", "next.success": "success", "timestamp": "timestamp"}
    if "action" not in names:
        known["actions"] = "action"
    out = {}
    for name in names:
        head, _, rest = name.partition(".")
        if head not in ("observation", "action", "actions", "next"):
            head, rest = "observation", name
        if any(name.startswith(other + ".") for other in names):  # there is `state`, and `state.arm`
            parts = [head, rest.replace(".", "_")] if head == "observation" else [name.replace(".", "_")]
        else:
            parts = [head, *rest.split(".")] if rest else [head]
        out[name] = known.get(name) or demos.key_of(*parts, said_by=where)
    return out


def _camera(d: _Dataset, name: str, kind: str) -> Camera:
    """Size and encoding, from the first picture that can be read: info.json is sometimes wrong about the order of the axes.

    Raises: UserError when none of the first episodes has one: the files were perhaps not downloaded.
    """
    why: Exception = Damaged("no picture")
    for row in d.episodes[:_PROBED]:
        try:
            if kind == "video":
                found = next(video.frames(d.file("video", row, name), np.array([d.start(row, name)]), TOLERANCE_S))
                return Camera(*found.shape[:2])
            data = next(_stored_pictures(d, d.rows(row, [name, "frame_index"])[name]))
            return Camera(*images.decode(data).shape[:2], demos.encoding_of(data))
        except (Damaged, images.UndecodableImage) as e:
            why = e
    tried = min(_PROBED, len(d.episodes))
    raise UserError(
        f"{d.place}: no picture of {name} can be read in the first {tried} episodes, the last one says: {why}. "
        "Fetch the files, or take the camera out of meta/info.json."
    )


def _is_feature(said) -> bool:
    return isinstance(said, dict) and isinstance(said.get("shape"), list) and all(isinstance(d, int) and d >= 0 for d in said["shape"])


def _is_depth(feature: dict) -> bool:
    said = [feature.get(k) for k in ("info", "video_info") if isinstance(feature.get(k), dict)]
    return any(s.get("is_depth_map") or s.get("video.is_depth_map") for s in said)


def _names(feature: dict) -> tuple[str, ...]:
    """Names of the numbers: a list, or v2's {"motors": [..]}; none where there is not one for each."""
    said = feature.get("names")
    if isinstance(said, dict):
        said = [n for part in said.values() for n in (part if isinstance(part, list) else [part])]
    return tuple(map(str, said)) if isinstance(said, list) and len(said) == np.prod(feature["shape"]) else ()


def _json(path: Path) -> dict:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{path} cannot be read as JSON: {_short(e)}. It belongs to every LeRobot dataset.") from e
    if not isinstance(found, dict):
        raise UserError(f"{path} is no JSON object")
    return found


def _lines(path: Path) -> Iterator[dict]:
    """Objects of a .jsonl file; bytes that are no UTF-8 are replaced. Raises: UserError."""
    try:
        for number, line in enumerate(path.read_bytes().decode("utf-8", "replace").splitlines(), 1):
            if line.strip():
                found = json.loads(line)
                if not isinstance(found, dict) or path.stem == "tasks" and not {"task_index", "task"} <= set(found):
                    raise ValueError(f"line {number} is {line[:80]!r}")
                yield found
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{path} cannot be read: {_short(e)}. It belongs to a dataset of version v2.") from e


def _table(path: Path, wanted) -> pa.Table:
    try:
        file = pq.ParquetFile(path)
        return file.read(columns=[n for n in file.schema_arrow.names if wanted is None or wanted(n)])
    except _FAULTS as e:
        raise UserError(f"{path} cannot be read as parquet: {_short(e)}") from e


def _short(e: BaseException) -> str:
    return " ".join(str(e).split())[:200]
