"""RLDS folders as tensorflow-datasets writes them: which shards there are, and which fields a step and an episode have."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

from vla_jax.data.store import Store, Unreadable
from vla_jax.types import UserError

_DTYPES = {"float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "bool", "string"}
EPISODE = "episode:"  # what stands before the key of an episode's own field, in cards


@dataclasses.dataclass(frozen=True)
class Feature:
    """What features.json says of one field. kind: image, text, tensor or sequence; shape as published (-1 = any);
    encoding: of an image png, jpeg or "", of a tensor none, bytes or zlib."""

    kind: str
    dtype: str
    shape: tuple[int, ...]
    encoding: str = ""

    @property
    def is_picture(self) -> bool:
        """An RGB image: encoded, or stored raw as u8[h w 3]."""
        if self.kind == "image":
            return self.dtype == "uint8" and self.shape[2:] in ((3,), (), (-1,))
        return self.kind == "tensor" and self.dtype == "uint8" and len(self.shape) == 3 and self.shape[2] == 3 and min(self.shape) > 0


def dataset_dir(root: str | Path, name: str, version: str) -> Store:
    """`root/name/version` (a path or a URL), checked to be a TFDS folder.

    Raises: UserError when the root is missing, the dataset is not below it, or the folder holds no dataset.
    """
    if not str(root) or str(root) == ".":
        raise UserError(
            "data.root is not set. Give the folder that holds <dataset>/<version>/: --config.data.root=DIR, or VLA_DATA_ROOT=DIR"
        )
    base = Store(root)
    if base.path and not base.path.is_dir():
        raise UserError(
            f"data root {base} does not exist or is no folder. Set --config.data.root (or --root) to the folder that holds {name}/."
        )
    place = base.child(name, version)
    if not (place.path.is_dir() if place.path else place.names()):
        have = base.child(name).names()
        found = f"versions there: {', '.join(have)}" if have else f"folders there: {', '.join(base.names()[:8]) or 'none'}"
        raise UserError(f"dataset {name} {version} is not at {place} ({found}). Correct the root or the card's version.")
    missing = [f for f in ("dataset_info.json", "features.json") if place.identity(f) is None]
    if missing:
        raise UserError(
            f"{place} is no TFDS directory: {' and '.join(missing)} missing. It must be a folder as written by tensorflow-datasets."
        )
    return place


def shards(place: Store | Path, split: str) -> list[str]:
    """The shard files of a split in order, named by the dataset's own template. Whether each is there is not asked.

    Raises: UserError when the split is absent, or names files outside the folder.
    """
    place = place if isinstance(place, Store) else Store(place)
    info, found = _split(place, split)
    lengths, template = found["shardLengths"], found.get("filepathTemplate") or "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    digits = max(5, len(str(len(lengths))))
    files = []
    for i in range(len(lengths)):
        index, count = f"{i:0{digits}d}", f"{len(lengths):0{digits}d}"
        known = {
            "DATASET": info.get("name", ""),
            "SPLIT": split,
            "FILEFORMAT": info.get("fileFormat", "tfrecord"),
            "SHARD_INDEX": index,
            "NUM_SHARDS": count,
            "SHARD_X_OF_Y": f"{index}-of-{count}",
        }
        name = re.sub(r"\{(\w+)\}", lambda m, known=known: str(known.get(m[1], m[0])), template)
        if "/" in name or name in (".", ".."):
            raise UserError(f"{place}/dataset_info.json names the shard {name!r}, which is outside its folder")
        files.append(name)
    return files


def episodes(place: Store, split: str) -> list[int]:
    """How many episodes dataset_info.json says each shard of a split holds."""
    return _split(place, split)[1]["shardLengths"]


def describe(place: Store) -> tuple[dict, dict[str, dict]]:
    """dataset_info.json, and in it what it says of each split, by name. Raises: UserError when it is no JSON object."""
    info = _json(place, "dataset_info.json")
    splits = info.get("splits")
    return info, {str(s.get("name")): s for s in splits if isinstance(s, dict)} if isinstance(splits, list) else {}


def _split(place: Store, name: str) -> tuple[dict, dict]:
    """dataset_info.json, and in it what it says of a split. Raises: UserError when that is absent or odd."""
    info, known = describe(place)
    if name not in known:
        raise UserError(f"{place} has no split {name!r}; it has {', '.join(sorted(known)) or 'none'}.")
    lengths = known[name].get("shardLengths", [])
    if not isinstance(lengths, list) or not all(re.fullmatch(r"\d+", str(n)) for n in lengths):
        raise UserError(
            f"{place}/dataset_info.json: shardLengths of split {name!r} is {str(lengths)[:80]}, not a list of numbers of episodes"
        )
    template = known[name].get("filepathTemplate")
    if not isinstance(template, str | None):
        raise UserError(f"{place}/dataset_info.json: filepathTemplate of split {name!r} is {template!r}, not text")
    return info, known[name] | {"shardLengths": [int(n) for n in lengths]}


def features(place: Store | str | Path) -> dict[str, Feature]:
    """The fields of a step, named relative to it (`observation/image`), and of its episode (`episode:success`)."""
    place = place if isinstance(place, Store) else Store(place)
    raw = _json(place, "features.json")
    try:
        tree = raw["featuresDict"]["features"]
        steps = tree["steps"]["sequence"]["feature"] if "sequence" in tree["steps"] else tree["steps"]["sequenceFeature"]["feature"]
    except (KeyError, TypeError):
        raise UserError(f"{place}/features.json describes no `steps`: this is not an RLDS dataset.") from None
    inner: dict[str, Feature] = {}
    outer: dict[str, Feature] = {}
    try:
        _flatten(steps, "", inner)
        for key, node in tree.items():
            if key != "steps":
                _flatten(node, key, outer)
    except (AttributeError, TypeError, ValueError, RecursionError) as e:
        raise UserError(f"{place}/features.json is not as tensorflow-datasets writes it ({e})") from e
    return inner | {EPISODE + key: feature for key, feature in outer.items()}


def _flatten(node: dict, name: str, out: dict[str, Feature]) -> None:
    if "featuresDict" in node:
        for key, child in node["featuresDict"].get("features", {}).items():
            _flatten(child, f"{name}/{key}" if name else key, out)
        return
    kind = next((k for k in ("image", "text", "sequence") if k in node), "tensor")
    spec = node.get(kind) or {}
    shape = tuple(int(d) for d in spec.get("shape", {}).get("dimensions", []))
    if kind == "sequence" and "text" in (spec.get("feature") or {}):
        spec = {"dtype": "string"}
    dtype = spec.get("dtype") or {"image": "uint8", "text": "string"}.get(kind, "int64" if "classLabel" in node else "float32")
    out[name] = Feature(kind, dtype if dtype in _DTYPES else "unknown", shape, spec.get("encodingFormat") or spec.get("encoding") or "")


def _json(place: Store, name: str) -> dict:
    try:
        found = json.loads(place.read(name))
    except (Unreadable, ValueError, RecursionError) as e:
        raise UserError(f"{place}/{name} cannot be read as JSON: {e}") from e
    if not isinstance(found, dict):
        raise UserError(f"{place}/{name} is no JSON object")
    return found
