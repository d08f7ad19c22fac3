"""Reading RLDS as it lies on disk: TFDS folders, TFRecord framing and tf.train.Example bytes, without TensorFlow.

A record is one episode. Payload bytes (images) are not copied: the parser gives their place in the file, so that a
frame can later be fetched by one ranged read.
"""

from __future__ import annotations

import dataclasses
import json
import mmap
import struct
from collections.abc import Iterator
from pathlib import Path

import google_crc32c
import numpy as np

from vla_jax.types import UserError

_DTYPES = {"float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "bool", "string"}


@dataclasses.dataclass(frozen=True)
class Feature:
    """What features.json says of one field of a step. kind: image, text or tensor; shape as published (-1 = any)."""

    kind: str
    dtype: str
    shape: tuple[int, ...]
    encoding: str = ""


class CorruptRecord(Exception):
    """A record whose framing, checksum or proto is broken. `at` is the byte offset in the shard."""

    def __init__(self, at: int, cause: str):
        super().__init__(f"{cause} at byte {at}")
        self.at, self.cause = at, cause


def dataset_dir(root: str | Path, name: str, version: str) -> Path:
    """`root/name/version`, checked to be a TFDS folder.

    Raises: UserError when the root is missing, the dataset is not below it, or the folder holds no dataset.
    """
    root = Path(root).expanduser()
    if not str(root) or str(root) == ".":
        raise UserError("data.root is not set. Give the folder that holds <dataset>/<version>/: --config.data.root=DIR")
    if not root.is_dir():
        raise UserError(
            f"data root {root} does not exist or is no folder. Set --config.data.root (or --root) to the folder that holds {name}/."
        )
    path = root / name / version
    if not path.is_dir():
        have = sorted(p.name for p in (root / name).glob("*") if p.is_dir()) if (root / name).is_dir() else []
        found = (
            f"versions there: {', '.join(have)}"
            if have
            else f"folders there: {', '.join(sorted(p.name for p in root.iterdir() if p.is_dir())[:8]) or 'none'}"
        )
        raise UserError(f"dataset {name} {version} is not at {path} ({found}). Correct the root or the card's version.")
    missing = [f for f in ("dataset_info.json", "features.json") if not (path / f).is_file()]
    if missing:
        raise UserError(
            f"{path} is no TFDS directory: {' and '.join(missing)} missing. It must be a folder as written by tensorflow-datasets."
        )
    return path


def shards(path: Path, split: str) -> list[Path]:
    """The shard files of a split in order, named by the dataset's own template.

    Raises: UserError when the split is absent or a shard is missing.
    """
    info = _json(path / "dataset_info.json")
    splits = {s["name"]: s for s in info.get("splits", [])}
    if split not in splits:
        raise UserError(f"{path} has no split {split!r}; it has {', '.join(sorted(splits)) or 'none'}.")
    lengths = splits[split].get("shardLengths", [])
    template = splits[split].get("filepathTemplate") or "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    digits = max(5, len(str(len(lengths))))
    files = []
    for i in range(len(lengths)):
        index, count = f"{i:0{digits}d}", f"{len(lengths):0{digits}d}"
        files.append(
            path
            / template.format(
                DATASET=info["name"],
                SPLIT=split,
                FILEFORMAT=info.get("fileFormat", "tfrecord"),
                SHARD_INDEX=index,
                NUM_SHARDS=count,
                SHARD_X_OF_Y=f"{index}-of-{count}",
            )
        )
    gone = [f.name for f in files if not f.is_file()]
    if gone:
        raise UserError(f"{path}: {len(gone)} of {len(files)} shards of split {split!r} are missing, first {gone[0]}.")
    return files


def features(path: Path) -> dict[str, Feature]:
    """The fields of a step, named relative to it (`observation/image`), from features.json."""
    raw = _json(path / "features.json")
    tree = raw.get("featuresDict", {}).get("features", {}) if isinstance(raw, dict) else {}
    if "steps" not in tree:
        raise UserError(f"{path}/features.json describes no `steps`: this is not an RLDS dataset.")
    steps = tree["steps"].get("sequence", {}).get("feature") or tree["steps"].get("sequenceFeature", {}).get("feature", {})
    out: dict[str, Feature] = {}
    _flatten(steps, "", out)
    return out


def _flatten(node: dict, name: str, out: dict[str, Feature]) -> None:
    if "featuresDict" in node:
        for key, child in node["featuresDict"].get("features", {}).items():
            _flatten(child, f"{name}/{key}" if name else key, out)
        return
    kind = "image" if "image" in node else "text" if "text" in node else "tensor"
    spec = node.get(kind) or {}
    shape = tuple(int(d) for d in spec.get("shape", {}).get("dimensions", []))
    dtype = spec.get("dtype") or {"image": "uint8", "text": "string"}.get(kind, "float32")
    out[name] = Feature(kind, dtype if dtype in _DTYPES else "unknown", shape, spec.get("encodingFormat", ""))


def _json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read as JSON: {e}") from e


def records(data: mmap.mmap | bytes, *, check_payload: bool = True) -> Iterator[tuple[int, int]]:
    """(offset, length) of each record's payload in one TFRecord file.

    Raises: CorruptRecord. After a bad payload checksum iteration could go on, so it is raised lazily by `verify`;
    a bad length cannot be passed over and ends the file.
    """
    at, size = 0, len(data)
    while at < size:
        if at + 12 > size:
            raise CorruptRecord(at, "truncated record header")
        head = data[at : at + 8]
        (length,) = struct.unpack("<Q", head)
        if struct.unpack("<I", data[at + 8 : at + 12])[0] != _masked_crc(head):
            raise CorruptRecord(at, "length checksum mismatch")
        if at + 16 + length > size:
            raise CorruptRecord(at, f"truncated record: {length} bytes announced, {size - at - 16} present")
        yield at + 12, length
        at += 16 + length


def verify(data: mmap.mmap | bytes, offset: int, length: int) -> None:
    """Raises: CorruptRecord when the payload's checksum does not match."""
    stored = struct.unpack("<I", data[offset + length : offset + length + 4])[0]
    if stored != _masked_crc(data[offset : offset + length]):
        raise CorruptRecord(offset, "payload checksum mismatch")


def _masked_crc(data: bytes) -> int:
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def parse_example(data, offset: int, length: int, wanted: frozenset[str]) -> dict[str, np.ndarray]:
    """Fields of a serialised tf.train.Example, by name.

    float_list -> f32[n]; int64_list -> i64[n]; bytes_list -> i64[n 2], the (offset, length) in `data` of each value.

    Raises: CorruptRecord when the bytes are no Example.
    """
    out: dict[str, np.ndarray] = {}
    try:
        for field, start, end in _fields(data, offset, offset + length):
            if field != 1:
                continue
            for entry, s, e in _fields(data, start, end):
                if entry == 1:
                    name, feature = _map_entry(data, s, e)
                    if name in wanted:
                        out[name] = _feature(data, *feature)
    except (IndexError, ValueError, struct.error, UnicodeDecodeError) as e:
        raise CorruptRecord(offset, f"record is no tf.train.Example ({e})") from e
    return out


def _map_entry(data, start: int, end: int) -> tuple[str, tuple[int, int]]:
    name, feature = "", (start, start)
    for field, s, e in _fields(data, start, end):
        if field == 1:
            name = bytes(data[s:e]).decode()
        elif field == 2:
            feature = (s, e)
    return name, feature


def _feature(data, start: int, end: int) -> np.ndarray:
    for kind, s, e in _fields(data, start, end):
        if kind == 1:
            spans = [(a, b - a) for field, a, b in _fields(data, s, e) if field == 1]
            return np.array(spans, np.int64).reshape(-1, 2)
        if kind == 2:
            parts = [np.frombuffer(data[a:b], "<f4") for field, a, b in _fields(data, s, e) if field == 1]
            return np.concatenate(parts) if parts else np.zeros(0, np.float32)
        if kind == 3:
            parts = [_varints(bytes(data[a:b])) for field, a, b in _fields(data, s, e) if field == 1]
            return np.concatenate(parts) if parts else np.zeros(0, np.int64)
    return np.zeros(0, np.float32)


def _fields(data, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(field number, start, end) of every field of a message; of a varint field the span of its bytes."""
    while at < end:
        tag, at = _varint(data, at, end)
        wire = tag & 7
        if wire == 2:
            size, at = _varint(data, at, end)
        elif wire == 5:
            size = 4
        elif wire == 1:
            size = 8
        elif wire == 0:
            size = _varint(data, at, end)[1] - at
        else:
            raise ValueError(f"wire type {wire}")
        if at + size > end:
            raise ValueError(f"field of {size} bytes passes its message's end")
        yield tag >> 3, at, at + size
        at += size


def _varint(data, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= end or shift > 63:
            raise ValueError("unterminated varint")
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7


def _varints(packed: bytes) -> np.ndarray:
    raw = np.frombuffer(packed, np.uint8)
    if raw.size and raw.max() < 0x80:  # flags and small numbers: one byte each
        return raw.astype(np.int64)
    out, at = [], 0
    while at < len(packed):
        value, at = _varint(packed, at, len(packed))
        out.append(value - (1 << 64) if value >> 63 else value)
    return np.array(out, np.int64)
