"""The step index: where every frame of an RLDS dataset lies, and its standardised numbers, so that any frame is one read.

One scan of the shards writes a folder of memory-mapped arrays; the dataset itself is neither copied nor changed.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import mmap
import os
import shutil
from pathlib import Path

import numpy as np

from vla_jax import paths
from vla_jax.data import cards, rlds, standardize
from vla_jax.data.cards import DatasetCard
from vla_jax.types import UserError

FORMAT = 1
_ARRAYS = {
    "action": np.float32,  # [frames a] robot units, as the card standardises them
    "state": np.float32,  # [frames s]
    "image": np.int64,  # [frames views 2] offset and length in the frame's shard
    "language": np.int32,  # [frames] into languages.json
    "frame_episode": np.int32,  # [frames]
    "episode_start": np.int64,  # [episodes + 1] first frame of each episode
    "episode_shard": np.int32,  # [episodes]
}


@dataclasses.dataclass(frozen=True)
class StepIndex:
    """An opened index; arrays are memory-mapped (see the comments in `_ARRAYS` for shapes)."""

    card: DatasetCard
    path: Path
    digest: str
    shards: tuple[Path, ...]
    views: tuple[str, ...]
    languages: tuple[str, ...]
    skipped: dict[str, int]
    action: np.ndarray
    state: np.ndarray
    image: np.ndarray
    language: np.ndarray
    frame_episode: np.ndarray
    episode_start: np.ndarray
    episode_shard: np.ndarray

    @property
    def frames(self) -> int:
        return len(self.frame_episode)

    @property
    def episodes(self) -> int:
        return len(self.episode_shard)

    def held_out(self, fraction: float) -> np.ndarray:
        """bool[episodes]: the episodes kept for evaluation. Chosen by a hash of the episode's place, so a restart,
        another host count or another seed chooses the same; at least one when `fraction` > 0 and there are two."""
        want = min(max(int(round(fraction * self.episodes)), 1), self.episodes - 1) if fraction > 0 else 0
        first = self.episode_start[:-1]
        keys = [
            hashlib.sha256(f"{self.card.name}/{self.shards[s].name}/{int(self.image[f, 0, 0]) if self.views else f}".encode()).digest()
            for s, f in zip(self.episode_shard, first)
        ]
        order = sorted(range(self.episodes), key=keys.__getitem__)
        mask = np.zeros(self.episodes, bool)
        mask[order[:want]] = True
        return mask


def location(card: DatasetCard, directory: Path, index_dir: str) -> Path:
    """The folder of an index: by dataset, and by a digest of card, place and this format, so that none is stale."""
    info = (directory / "dataset_info.json").read_bytes()
    key = hashlib.sha256(f"{FORMAT}|{card.digest}|{directory.resolve()}|".encode() + info).hexdigest()[:12]
    base = Path(index_dir).expanduser() if index_dir else paths.cache_dir() / "index"
    return base / f"{card.name}-{card.version}-{key}"


def ensure(card: DatasetCard, root: str, index_dir: str = "", *, progress=None) -> StepIndex:
    """Opens the index of a card's dataset below `root`, scanning the dataset first if there is none.

    Raises: UserError when data or card are at fault (see rlds.dataset_dir, cards.check).
    """
    directory = rlds.dataset_dir(root, card.name, card.version)
    cards.check(card, directory)
    path = location(card, directory, index_dir)
    if not (path / "meta.json").is_file():
        build(card, directory, path, progress=progress)
    return open_index(card, directory, path)


def open_index(card: DatasetCard, directory: Path, path: Path) -> StepIndex:
    """Raises: UserError when a shard has gone or changed size since it was indexed."""
    meta = json.loads((path / "meta.json").read_text())
    for name, size in meta["shards"]:
        file = directory / name
        if not file.is_file() or file.stat().st_size != size:
            now = f"has {file.stat().st_size} bytes, had {size}" if file.is_file() else "is gone"
            raise UserError(f"shard {file} {now} since it was indexed. Restore it, or delete {path} to index again.")
    arrays = {k: np.load(path / f"{k}.npy", mmap_mode="r") for k in _ARRAYS}
    return StepIndex(
        card=card,
        path=path,
        digest=meta["digest"],
        shards=tuple(directory / n for n, _ in meta["shards"]),
        views=tuple(meta["views"]),
        languages=tuple(meta["languages"]),
        skipped=meta["skipped"],
        **arrays,
    )


def build(card: DatasetCard, directory: Path, path: Path, *, progress=None) -> None:
    """Scans every shard once. Episodes that cannot be used are skipped and counted by cause in meta.json.

    Raises: UserError when no usable episode remains.
    """
    files = [f for split in card.splits for f in rlds.shards(directory, split)]
    parts: dict[str, list] = {k: [] for k in ("action", "state", "image", "language")}
    lengths, shard_of, skipped, languages = [], [], collections.Counter(), {}
    features = rlds.features(directory)
    for number, file in enumerate(progress(files) if progress else files):
        for episode in _episodes(file, card, features, skipped):
            for key in ("action", "state", "image"):
                parts[key].append(episode[key])
            ids = [languages.setdefault(text, len(languages)) for text in episode["language"]]
            parts["language"].append(np.array(ids, np.int32))
            lengths.append(len(ids))
            shard_of.append(number)
    if not lengths:
        raise UserError(f"{directory} has no usable episode (skipped: {dict(skipped) or 'none'}; shards: {len(files)}).")
    arrays = {k: np.concatenate(v).astype(_ARRAYS[k]) for k, v in parts.items()}
    arrays["frame_episode"] = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    arrays["episode_start"] = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    arrays["episode_shard"] = np.array(shard_of, np.int32)
    digest = hashlib.sha256(card.digest.encode())
    for key in _ARRAYS:
        digest.update(np.ascontiguousarray(arrays[key]).tobytes())
    meta = {
        "format": FORMAT,
        "name": card.name,
        "version": card.version,
        "card": card.digest,
        "views": list(card.views),
        "digest": digest.hexdigest()[:16],
        "shards": [[f.name, f.stat().st_size] for f in files],
        "episodes": len(lengths),
        "frames": int(sum(lengths)),
        "skipped": dict(skipped),
        "languages": list(languages),
    }
    _write(path, arrays, meta)


def _write(path: Path, arrays: dict, meta: dict) -> None:
    """All or nothing: a half-written index never has its final name."""
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for key, value in arrays.items():
        np.save(partial / f"{key}.npy", value)
    (partial / "meta.json").write_text(json.dumps(meta, indent=1))
    if path.exists():
        shutil.rmtree(path)
    partial.rename(path)


def _episodes(file: Path, card: DatasetCard, features: dict, skipped: collections.Counter):
    wanted = frozenset(f"steps/{k}" for k in [*card.keys(), "is_first"])
    if file.stat().st_size == 0:
        skipped["empty shard"] += 1
        return
    with open(file, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
        spans = rlds.records(data)
        while True:
            try:
                span = next(spans, None)
                if span is None:
                    return
            except rlds.CorruptRecord as e:  # nothing behind a broken frame can be found
                skipped[e.cause.split(":")[0]] += 1
                return
            try:
                rlds.verify(data, *span)
                fields = rlds.parse_example(data, *span, wanted)
                yield _episode(data, fields, card, features)
            except rlds.CorruptRecord as e:
                skipped[e.cause.split(":")[0].split(" (")[0]] += 1


def _episode(data, raw: dict, card: DatasetCard, features: dict) -> dict:
    """One parsed record -> its rows of the index. Raises: rlds.CorruptRecord with the cause when it cannot be used."""
    raw = {k.removeprefix("steps/"): v for k, v in raw.items()}
    steps = len(raw.get("is_first", ())) or _count(raw, card, features)
    if steps == 0:
        raise rlds.CorruptRecord(0, "empty episode")
    fields = {}
    for key in card.keys():
        value = raw.get(key, np.zeros((0, 2), np.int64))
        if key in card.views.values() or features[key].dtype == "string":
            if len(value) != steps:
                raise rlds.CorruptRecord(0, f"field {key} has another length than the episode")
        else:
            if value.ndim != 1 or value.size == 0 or value.size % steps:
                raise rlds.CorruptRecord(0, f"field {key} has another length than the episode")
            value = value.reshape(steps, -1)
        fields[key] = value
    action, state = standardize.apply(card.action.ops, fields), standardize.apply(card.state.ops, fields)
    if not (np.isfinite(action).all() and np.isfinite(state).all()):
        raise rlds.CorruptRecord(0, "NaN or inf in action or state")
    image = np.stack([fields[key] for key in card.views.values()], axis=1) if card.views else np.zeros((steps, 0, 2), np.int64)
    language = _language(data, fields, card, steps)
    if card.language and not any(language):
        raise rlds.CorruptRecord(0, "no language")
    return {"action": action, "state": state, "image": image, "language": language}


def _count(raw, card, features) -> int:
    for key in [*card.views.values(), *card.language]:
        if key in raw:
            return len(raw[key])
    return 0


def _language(data, fields, card, steps) -> list[str]:
    """The first language key that says something, per step."""
    out = [""] * steps
    for key in reversed(card.language):
        for i, (at, size) in enumerate(fields[key]):
            text = bytes(data[at : at + size]).decode("utf-8", "replace").strip()
            out[i] = text or out[i]
    return out
