"""The step index: where every frame of an RLDS dataset lies, and its standardised numbers, so that any frame is one read.

One scan of the shards (scan.py) leaves a part for each; the parts are merged into a folder of memory-mapped arrays. The
dataset itself is neither copied nor changed. A scan cut short goes on with the shards that it has not done.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from vla_jax import paths
from vla_jax.data import cards, rlds, scan, stats
from vla_jax.data.cards import DatasetCard
from vla_jax.data.store import Store
from vla_jax.types import UserError

FORMAT = 2
_FRAME = {  # one row a frame
    "action": np.float32,  # [frames a] robot units, as the card standardises them
    "state": np.float32,  # [frames s]
    "image": np.uint32,  # [frames views 2] offset in the episode's record, and length; length 0: no such picture
    "language": np.int32,  # [frames] which set of instructions
}
_EPISODE = {
    "episode_start": np.int64,  # [episodes + 1] first frame of each episode
    "episode_shard": np.int32,  # [episodes]
    "episode_offset": np.int64,  # [episodes] byte offset of the record in its shard (ArrayRecord: its number)
    "episode_crc": np.uint32,  # [episodes] checksum of the record: equal ones are copies of each other
}
_LANGUAGE = {  # texts end to end; a set is a list of text numbers
    "text": np.uint8,
    "text_start": np.int64,
    "set_text": np.int32,
    "set_start": np.int64,
}
_IN_PROCESS = 64 << 20  # bytes below which a scan starts no processes


@dataclasses.dataclass(frozen=True, eq=False)
class StepIndex:
    """An opened index; arrays are memory-mapped (see the comments above for their shapes). skipped counts episodes that
    were bad, by cause; filtered those that the card leaves out; missing shards are named."""

    card: DatasetCard
    path: Path
    digest: str
    place: Store
    shards: tuple[str, ...]
    missing: frozenset[int]
    pictures: dict[str, rlds.Feature]
    skipped: dict[str, int]
    filtered: dict[str, int]
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
    base = Path(index_dir).expanduser() if index_dir else paths.cache_dir() / "index"
    return base / f"{card.name}-{card.version}-{key}"


def ensure(
    card: DatasetCard, root: str, index_dir: str = "", *, holdout: float = 0.1, max_skipped: float = 0.1, workers: int = 0, progress=None
) -> StepIndex:
    """Opens the index of a card's dataset below `root`, scanning the dataset first if there is none.

    holdout: the fraction of episodes that the statistics, made in the same pass, leave out. progress(iterable, total) shows
    shards as they are done. Raises: UserError when data or card are at fault, or more than `max_skipped` of the episodes are bad.
    """
    place = rlds.dataset_dir(root, card.name, card.version)
    cards.check(card, place)
    path = location(card, place, index_dir)
    if not (path / "meta.json").is_file():
        scan_shards(card, place, path, workers=workers, progress=progress)
        merge(card, place, path, holdout=holdout)
    return open_index(card, place, path, max_skipped=max_skipped)


def todo(card: DatasetCard, place: Store) -> list[tuple[int, str, int]]:
    """(number, file, episodes that it should hold) of every shard of the card's splits."""
    listed = [(f, n) for split in card.splits for f, n in zip(rlds.shards(place, split), rlds.episodes(place, split), strict=True)]
    return [(i, name, n) for i, (name, n) in enumerate(listed)]


def scan_shards(card: DatasetCard, place: Store, path: Path, *, workers: int = 0, share: tuple[int, int] = (0, 1), progress=None) -> None:
    """Leaves a part for every shard of this host's share (host, hosts) that is there and has none yet.

    workers: processes to use; 0: one a core, none for a small dataset.
    """
    parts = _parts(path)
    parts.mkdir(parents=True, exist_ok=True)
    done = {int(p.stem) for p in parts.glob("*.npz")}
    there = set(place.names())
    jobs = [job for job in todo(card, place)[share[0] :: share[1]] if job[1] in there and job[0] not in done]
    raw = json.loads(json.dumps(dataclasses.asdict(card)))
    show = progress or (lambda steps, total: steps)
    size = sum(place.size(name) or _IN_PROCESS for _, name, _ in jobs)
    workers = min(workers or (scan.cores() if size >= _IN_PROCESS else 1), len(jobs))
    if workers <= 1:
        for job in show(jobs, len(jobs)):
            scan.Job(raw, place.url, str(parts), [job]).run()
        return
    running = []
    try:
        for w in range(workers):
            file = parts / f"job-{share[0]}-{w}.json"
            file.write_text(json.dumps(dataclasses.asdict(scan.Job(raw, place.url, str(parts), jobs[w::workers]))))
            running.append(subprocess.Popen([sys.executable, "-m", "vla_jax.data.scan", str(file)], stdin=subprocess.DEVNULL))
        for _ in show(_done(jobs, parts, running), len(jobs)):
            pass
    finally:
        for process in running:
            process.kill()
            process.wait()


def _done(jobs, parts: Path, running):
    """Yields once for every part that has come, until all have. Raises: RuntimeError when a worker failed."""
    waiting = {job[0] for job in jobs}
    while waiting:
        come = {n for n in waiting if (parts / f"{n:06d}.npz").is_file()}
        waiting -= come
        yield from come
        if waiting and not come:
            failed = [p.returncode for p in running if p.poll() not in (None, 0)]
            if failed or all(p.poll() == 0 for p in running) and not any((parts / f"{n:06d}.npz").is_file() for n in waiting):
                raise RuntimeError(f"a scanning process ended with {failed or 'parts missing'}; its traceback is above")
            time.sleep(0.05)


def _parts(path: Path) -> Path:
    return path.with_name(path.name + ".parts")


def merge(card: DatasetCard, place: Store, path: Path, *, holdout: float) -> None:
    """The parts of all shards -> the index folder with its statistics, in the order of the shards.

    Raises: UserError when no usable episode remains.
    """
    jobs, parts = todo(card, place), _parts(path)
    files = {n: parts / f"{n:06d}.npz" for n, _, _ in jobs}
    have = [n for n in files if files[n].is_file()]
    missing = [(n, name, episodes) for n, name, episodes in jobs if n not in have]
    small = {n: _load(files[n], ("episode_steps", "episode_offset", "episode_crc")) for n in have}
    said = {n: json.loads(bytes(_load(files[n], ("said",))["said"])) for n in have}
    skipped, filtered = _total(said, "skipped"), _total(said, "filtered")
    if missing:
        skipped["missing shard"] = sum(episodes for _, _, episodes in missing)
    steps = np.concatenate([small[n]["episode_steps"] for n in have]) if have else np.zeros(0, np.int64)
    if not len(steps):
        raise UserError(
            f"{place} has no usable episode (skipped: {skipped or 'none'}; left out by filters: {filtered or 'none'}; "
            f"shards: {len(jobs)}, missing: {len(missing)})."
        )
    numbers = {n: i for i, n in enumerate(have)}
    arrays = {
        "episode_start": np.concatenate([[0], np.cumsum(steps)]).astype(np.int64),
        "episode_shard": np.concatenate([np.full(len(small[n]["episode_steps"]), n, np.int32) for n in have]),
        "episode_offset": np.concatenate([small[n]["episode_offset"] for n in have]),
        "episode_crc": np.concatenate([small[n]["episode_crc"] for n in have]),
    }
    language, set_numbers = _languages([said[n] for n in have])
    held = held_out(card.name, [j[1] for j in jobs], arrays["episode_shard"], arrays["episode_offset"], holdout)
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    digest = hashlib.sha256(card.digest.encode())
    for key, value in {**arrays, **language}.items():
        np.save(partial / f"{key}.npy", value)
        digest.update(np.ascontiguousarray(value).tobytes())
    total = int(steps.sum())
    shapes = {"action": (total, len(card.action.dims)), "state": (total, len(card.state.dims))}
    shapes |= {"image": (total, len(card.views), 2), "language": (total,)}
    maps = {k: _create(partial / f"{k}.npy", shapes[k], dtype) for k, dtype in _FRAME.items()}
    running, at, episode = {"state": stats.Running(), "action": stats.Running()}, 0, 0
    for n in have:
        part = _load(files[n], tuple(_FRAME))
        part["language"] = set_numbers[numbers[n]][part["language"]].astype(np.int32) if len(part["language"]) else part["language"]
        end, count = at + len(part["action"]), len(small[n]["episode_steps"])
        for key in _FRAME:
            maps[key][at:end] = part[key]
            digest.update(np.ascontiguousarray(part[key]).tobytes())
        keep = np.repeat(~held[episode : episode + count], small[n]["episode_steps"])
        for key in running:
            running[key].update(part[key][keep])
        at, episode = end, episode + count
    for value in maps.values():
        if isinstance(value, np.memmap):
            value.flush()
    meta = {
        "format": FORMAT,
        "name": card.name,
        "version": card.version,
        "card": card.digest,
        "views": list(card.views),
        "digest": digest.hexdigest()[:16],
        "shards": [[name, said[n]["identity"] if n in said else None] for n, name, _ in jobs],
        "expected": sum(n for _, _, n in jobs),
        "episodes": len(steps),
        "frames": total,
        "skipped": skipped,
        "filtered": filtered,
    }
    (partial / "meta.json").write_text(json.dumps(meta, indent=1))
    stats.save({k: r.stats() for k, r in running.items()}, partial, card=card.digest, index=meta["digest"], holdout=holdout)
    if path.exists():
        shutil.rmtree(path)
    partial.rename(path)
    shutil.rmtree(parts, ignore_errors=True)


def _load(file: Path, keys) -> dict[str, np.ndarray]:
    with np.load(file) as found:
        return {key: found[key] for key in keys}


def _create(path: Path, shape, dtype) -> np.ndarray:
    """A memory-mapped .npy to fill; one without elements cannot be mapped and is written at once."""
    if 0 in shape:
        np.save(path, np.zeros(shape, dtype))
        return np.zeros(shape, dtype)
    return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)


def _total(said: dict, key: str) -> dict[str, int]:
    out: dict[str, int] = {}
    for part in said.values():
        for cause, n in part[key].items():
            out[cause] = out.get(cause, 0) + n
    return out


def _languages(said: list[dict]) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """The parts' texts and sets -> the arrays of `_LANGUAGE`, and for each part the new number of each of its sets."""
    texts: dict[str, int] = {}
    sets: dict[tuple[int, ...], int] = {}
    numbers = []
    for part in said:
        mine = [texts.setdefault(t, len(texts)) for t in part["texts"]]
        numbers.append(np.array([sets.setdefault(tuple(mine[i] for i in s), len(sets)) for s in part["sets"]], np.int64))
    raw = [t.encode() for t in texts]
    ends = lambda items: np.concatenate([[0], np.cumsum([len(x) for x in items])]).astype(np.int64)
    arrays = {
        "text": np.frombuffer(b"".join(raw), np.uint8),
        "text_start": ends(raw),
        "set_text": np.array([i for s in sets for i in s], np.int32),
        "set_start": ends(sets),
    }
    return arrays, numbers


def open_index(card: DatasetCard, place: Store, path: Path, *, max_skipped: float = 0.1) -> StepIndex:
    """Raises: UserError when a shard has changed since it was indexed, or more than `max_skipped` of the episodes are bad or gone."""
    try:
        meta = json.loads((path / "meta.json").read_text())
        arrays = {k: _map(path / f"{k}.npy", dtype) for k, dtype in {**_FRAME, **_EPISODE, **_LANGUAGE}.items()}
        shards = [(str(name), known) for name, known in meta["shards"]]
        skipped, filtered, expected, digest = dict(meta["skipped"]), dict(meta["filtered"]), int(meta["expected"]), str(meta["digest"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"index {path} is damaged ({e}). Delete the folder to index again.") from e
    missing, identity = set(), place.identities([name for name, _ in shards])
    for number, (name, known) in enumerate(shards):
        now = identity[name]
        if now is None:
            missing.add(number)
        elif now != known:
            change = f"has {now} bytes, had {known}" if place.path and known else "has changed"
            raise UserError(f"shard {place}/{name} {change} since it was indexed. Restore it, or delete {path} to index again.")
    gone = int(np.isin(arrays["episode_shard"], sorted(missing)).sum())
    if gone:
        skipped["shard deleted after indexing"] = gone
    bad = sum(skipped.values())
    if bad > max_skipped * max(expected, 1):
        causes = ", ".join(f"{n} x {cause}" for cause, n in sorted(skipped.items(), key=lambda x: -x[1]))
        first = f" First missing shard: {place}/{shards[min(missing)][0]}." if missing else ""
        raise UserError(
            f"{card.name}: {bad} of {expected} episodes cannot be used ({causes}), more than data.max_skipped = {max_skipped:g} allows.{first} "
            f"Mend the data and delete {path}, or raise --config.data.max_skipped."
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
        **arrays,
    )


def _map(path: Path, dtype) -> np.ndarray:
    found = np.load(path, mmap_mode="r")
    if found.dtype != dtype:
        raise ValueError(f"{path.name} holds {found.dtype}, not {np.dtype(dtype)}")
    return found.view(np.ndarray)  # still mapped, and quicker to index than numpy's memmap class
