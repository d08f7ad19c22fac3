"""The step index: where every frame of an RLDS dataset lies, and its standardised numbers, so that any frame is one read.

A folder of memory-mapped arrays, made by build.py. The dataset itself is neither copied nor changed.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import tokenize
from pathlib import Path

import numpy as np

from vla_jax import paths
from vla_jax.data import records, rlds
from vla_jax.data.cards import DatasetCard
from vla_jax.data.store import Store
from vla_jax.types import UserError

FORMAT = 3
FRAME = {  # one row a frame
    "action": np.float32,  # [frames a] robot units, as the card standardises them
    "state": np.float32,  # [frames s]
    "image": np.uint32,  # [frames views 2] offset in the episode's record, and length; length 0: no such picture
    "language": np.int32,  # [frames] which set of instructions
}
EPISODE = {
    "episode_start": np.int64,  # [episodes + 1] first frame of each episode
    "episode_shard": np.int32,  # [episodes]
    "episode_offset": np.int64,  # [episodes] byte offset of the record in its shard (ArrayRecord: its number)
    "episode_crc": np.uint32,  # [episodes] checksum of the record: equal ones are copies of each other
}
LANGUAGE = {  # texts end to end; a set is a list of text numbers
    "text": np.uint8,
    "text_start": np.int64,
    "set_text": np.int32,
    "set_start": np.int64,
}
_CHECKED = 16  # records of a dataset that are looked at whenever its index is opened


@dataclasses.dataclass(frozen=True, eq=False)
class StepIndex:
    """An opened index; arrays are memory-mapped (see the comments above for their shapes). skipped counts episodes that
    were bad, by cause; filtered those that the card leaves out; surplus those that dataset_info.json does not announce, which
    are used; missing shards are named."""

    card: DatasetCard
    path: Path
    digest: str
    place: Store
    shards: tuple[str, ...]
    missing: frozenset[int]
    pictures: dict[str, rlds.Feature]
    skipped: dict[str, int]
    filtered: dict[str, int]
    surplus: int
    action: np.ndarray
    state: np.ndarray
    image: np.ndarray
    language: np.ndarray
    episode_start: np.ndarray
    episode_shard: np.ndarray
    episode_offset: np.ndarray
    episode_crc: np.ndarray
    text: np.ndarray
    text_start: np.ndarray
    set_text: np.ndarray
    set_start: np.ndarray

    @property
    def frames(self) -> int:
        return len(self.action)

    @property
    def episodes(self) -> int:
        return len(self.episode_shard)

    @property
    def views(self) -> tuple[str, ...]:
        return tuple(self.card.views)

    def episode_of(self, frame):
        """The episode of a frame, or of each frame of an array."""
        return np.searchsorted(self.episode_start, frame, side="right") - 1

    def instructions(self, frame: int) -> tuple[str, ...]:
        """All instructions that a frame has, in the card's order; () if it has none."""
        return self._set(int(self.language[frame]))

    @functools.lru_cache(maxsize=4096)  # noqa: B019 - an index lives as long as its run
    def _set(self, number: int) -> tuple[str, ...]:
        start, end = self.set_start[number : number + 2]
        spans = [self.text_start[t : t + 2] for t in self.set_text[start:end]]
        return tuple(bytes(self.text[a:b]).decode() for a, b in spans)

    def held_out(self, fraction: float) -> np.ndarray:
        """bool[episodes]: the episodes kept for evaluation; see `held_out`."""
        return held_out(self.card.name, self.shards, self.episode_shard, self.episode_offset, fraction)


def held_out(name: str, shards, episode_shard: np.ndarray, episode_offset: np.ndarray, fraction: float) -> np.ndarray:
    """bool[episodes]. Chosen by a hash of the episode's place (shard's name and offset), so a restart, another host count or
    another seed chooses the same; at least one and never all when `fraction` > 0 and there are two."""
    episodes = len(episode_shard)
    want = min(max(int(round(fraction * episodes)), 1), episodes - 1) if fraction > 0 else 0
    by_shard = [int.from_bytes(hashlib.sha256(f"{name}/{s}".encode()).digest()[:8], "little") for s in shards]
    keys = np.array(by_shard, np.uint64)[episode_shard] + np.asarray(episode_offset).astype(np.uint64)
    with np.errstate(over="ignore"):  # splitmix64's finaliser
        keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        keys ^= keys >> np.uint64(31)
    mask = np.zeros(episodes, bool)
    mask[np.argsort(keys, kind="stable")[:want]] = True
    return mask


def location(card: DatasetCard, place: Store, index_dir: str) -> Path:
    """The folder of an index: by dataset, and by a digest of card, place and this format, so that none is stale."""
    where = str(place.path.resolve()) if place.path else place.url
    key = hashlib.sha256(f"{FORMAT}|{card.digest}|{where}|".encode() + place.read("dataset_info.json")).hexdigest()[:12]
    own = not index_dir or "://" in index_dir  # of a bucket's there is a copy
    base = paths.cache_dir() / "index" if own else Path(index_dir).expanduser()
    return base / f"{card.name}-{card.version}-{key}"


def open_index(card: DatasetCard, place: Store, path: Path, *, max_skipped: float = 0.1) -> StepIndex:
    """Raises: UserError when a shard has changed since it was indexed, or more than `max_skipped` of the episodes are bad or gone."""
    try:
        meta = json.loads((path / "meta.json").read_text())
        arrays = {k: _map(path / f"{k}.npy", dtype) for k, dtype in {**FRAME, **EPISODE, **LANGUAGE}.items()}
        shards = [(str(name), known) for name, known in meta["shards"]]
        skipped, filtered, digest = dict(meta["skipped"]), dict(meta["filtered"]), str(meta["digest"])
        expected, surplus = int(meta["expected"]), int(meta["surplus"])
        _fits(card, place, [name for name, _ in shards], int(meta["frames"]), arrays)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, EOFError, RecursionError, SyntaxError, tokenize.TokenError) as e:
        raise UserError(f"index {path} is damaged ({e}). Delete the folder to index again.") from e
    missing, identity = set(), place.identities([name for name, _ in shards])
    for number, (name, known) in enumerate(shards):
        now = identity[name]
        if now is None:
            missing.add(number)
        elif now != known:
            change = f"has {now} bytes, had {known}" if place.path and known else "has changed"
            raise UserError(f"shard {place}/{name} {change} since it was indexed. Restore it, or delete {path} to index again.")
    _spot_check(path, place, [name for name, _ in shards], missing, arrays)
    gone = int(np.isin(arrays["episode_shard"], sorted(missing)).sum())
    if gone:
        skipped["shard deleted after indexing"] = gone
    bad = sum(skipped.values())
    if bad > max_skipped * max(expected, 1):
        causes = ", ".join(f"{n} x {cause}" for cause, n in sorted(skipped.items(), key=lambda x: -x[1]))
        first = f" First missing shard: {place}/{shards[min(missing)][0]}." if missing else ""
        raise UserError(
            f"{card.name}: {bad} of {expected} episodes cannot be used ({causes}), more than data.max_skipped = {max_skipped:g} allows.{first} "
            f"Mend the data and delete {path}, or raise data.max_skipped (--config.data.max_skipped; of `vla-jax data`: --max-skipped)."
        )
    features = rlds.features(place)
    return StepIndex(
        card=card,
        path=path,
        digest=digest,
        place=place,
        shards=tuple(name for name, _ in shards),
        missing=frozenset(missing),
        pictures={view: features[key] for view, key in card.views.items()},
        skipped=skipped,
        filtered=filtered,
        surplus=surplus,
        **arrays,
    )


def _fits(card: DatasetCard, place: Store, names: list[str], frames: int, arrays: dict[str, np.ndarray]) -> None:
    """Shards are those of the dataset, and nothing outside of it; arrays are as long as they must be, and point into one another. Raises: ValueError."""
    listed = [name for split in card.splits for name in rlds.shards(place, split)]
    if names != listed:
        raise ValueError(f"its shards are not those of {place}: {next(iter(set(names) ^ set(listed)), 'in another order')}")
    start, shard = arrays["episode_start"], arrays["episode_shard"]
    episodes = (len(shard),)
    wide = {"action": (frames, len(card.action.dims)), "state": (frames, len(card.state.dims)), "image": (frames, len(card.views), 2)}
    wide |= {"language": (frames,), "episode_start": (len(shard) + 1,), "episode_shard": episodes, "episode_offset": episodes}
    for key, shape in (wide | {"episode_crc": episodes}).items():
        if arrays[key].shape != shape:
            raise ValueError(f"{key} has shape {arrays[key].shape}, not {shape}")
    if (
        start[0] != 0
        or start[-1] != frames
        or (np.diff(start) < 0).any()
        or shard.size
        and not 0 <= shard.min() <= shard.max() < len(names)
    ):
        raise ValueError("its episodes lie outside of it")
    for key, of in (("text_start", "text"), ("set_start", "set_text")):
        ends = arrays[key]
        if ends.ndim != 1 or not ends.size or ends[0] != 0 or ends[-1] != arrays[of].size or (np.diff(ends) < 0).any():
            raise ValueError(f"{key} does not divide {of}")
    texts = arrays["set_text"]
    if texts.size and not 0 <= texts.min() <= texts.max() < len(arrays["text_start"]) - 1:
        raise ValueError("set_text names texts that are not there")


def _spot_check(path: Path, place: Store, names: list[str], missing: set[int], arrays: dict[str, np.ndarray]) -> None:
    """Some records must still lie where they were: their lengths and checksums are read, not they. What has changed without its
    size is seen so. Raises: UserError."""
    there = np.flatnonzero(~np.isin(arrays["episode_shard"], sorted(missing)))
    some = there[np.unique(np.linspace(0, max(len(there) - 1, 0), min(_CHECKED, len(there))).astype(int))].tolist()
    places = {i: (names[int(arrays["episode_shard"][i])], int(arrays["episode_offset"][i])) for i in some}
    places = {i: (name, at) for i, (name, at) in places.items() if ".array_record" not in name}
    for (i, (name, at)), found in zip(places.items(), records.checksums_at(place, list(places.values()))):
        if found != int(arrays["episode_crc"][i]):
            raise UserError(
                f"shard {place}/{name} has changed since it was indexed: at byte {at} there is another record. Restore it, or delete "
                f"{path} to index again."
            )


def _map(path: Path, dtype) -> np.ndarray:
    found = np.load(path, mmap_mode="r")
    if found.dtype != dtype:
        raise ValueError(f"{path.name} holds {found.dtype}, not {np.dtype(dtype)}")
    return found.view(np.ndarray)  # still mapped, and quicker to index than numpy's memmap class
