"""Building a step index: one scan of the shards leaves a part for each (scan.py), and the parts are merged into the folder of
arrays that index.py opens. A scan cut short goes on with the shards that it has not done; several hosts share the shards.
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
from collections.abc import Collection
from pathlib import Path

import numpy as np

from vla_jax import distributed
from vla_jax.console import say
from vla_jax.data import cards, index, rlds, scan, shelves, stats
from vla_jax.data.cards import DatasetCard
from vla_jax.data.store import Store
from vla_jax.types import UserError

_IN_PROCESS = 64 << 20  # bytes below which a scan starts no processes
_LATE_S = 10.0  # by which a network's folder may be listed late
_PARTS = 256  # after so many a host gives them away, so that a machine that is taken has not scanned for nothing


def ensure(
    card: DatasetCard, root: str, index_dir: str = "", *, holdout: float = 0.1, max_skipped: float = 0.1, workers: int = 0, progress=None
) -> index.StepIndex:
    """Opens the index of a card's dataset below `root`, scanning the dataset first if there is none: its shards are shared out
    among the hosts, each scans its own with several processes, and the first host merges. `index_dir`: a folder that all of them
    see; gs://bucket/path, of which each keeps a copy in its cache; or folders of their own, for which each scans everything.

    holdout: the fraction of episodes that the statistics, made in the same pass, leave out. progress(iterable, total) shows
    shards as they are done. Raises: UserError, on every host, when data or card are at fault, or more than `max_skipped` of the
    episodes are bad.
    """
    with distributed.together(f"indexing {card.name}"):
        place = rlds.dataset_dir(root, card.name, card.version)
        cards.check(card, place)
        path = index.location(card, place, index_dir)
        shelf = shelves.Shelf.of(index_dir, path)
        if shelf:
            shelf.fetch()
        path.parent.mkdir(parents=True, exist_ok=True)
    have = distributed.gather_json((path / "meta.json").is_file())
    if not all(have):
        make = {"holdout": holdout, "workers": workers, "progress": progress}
        _build(card, place, path, have, shelf, **make)
    with distributed.together(f"opening {card.name}"):
        try:
            return index.open_index(card, place, path, max_skipped=max_skipped)
        except UserError as e:
            raise (UserError(f"{e} It is a copy of {shelf.there}, which is to be deleted, too.") if shelf else e) from None


def _build(
    card: DatasetCard, place: Store, path: Path, have: list[bool], shelf: shelves.Shelf | None, *, holdout, workers, progress
) -> None:
    """The index, on all hosts. have: which of them have it already, as a copy of their own or because they list the folder sooner."""
    me, hosts, main = distributed.process_index(), distributed.process_count(), distributed.is_main()
    scan = functools.partial(scan_shards, card, place, path, workers=workers, progress=progress)
    if shelf:  # a bucket: parts and index pass through it
        with distributed.together(f"scanning {card.name}"):
            if not any(have):
                shelf.give_parts(_parts(path))  # what a start that was cut short has left here
                while scan(share=(me, hosts), but=shelf.parts(), most=_PARTS):
                    shelf.give_parts(_parts(path))
        with distributed.together(f"merging {card.name}"):
            if main and not any(have):
                shelf.fetch_parts(_parts(path))
                merge(card, place, path, holdout=holdout)
            if me == (have.index(True) if any(have) else 0):
                shelf.give()
        with distributed.together(f"fetching the index of {card.name}"):
            shelf.fetch()
            shutil.rmtree(_parts(path), ignore_errors=True)  # or they would be taken for those of data that has changed
        return
    unseen = distributed.blind(path.parent, _LATE_S)
    if unseen and main:
        say(
            f"{path.parent} is another folder on each host: each indexes all of {card.name} by itself. With storage that all see, or gs://bucket/path, as "
            "data.index_dir they share the work, and the next machines find it done."
        )
    with distributed.together(f"scanning {card.name}"):
        if unseen and not have[me] or not unseen and not any(have):
            scan(share=(0, 1) if unseen else (me, hosts))
    with distributed.together(f"merging {card.name}"):
        if unseen and not have[me] or not unseen and not any(have) and main:
            merge(card, place, path, holdout=holdout)
    until = time.monotonic() + _LATE_S
    while not (path / "meta.json").is_file() and time.monotonic() < until:
        time.sleep(0.2)


def todo(card: DatasetCard, place: Store) -> list[tuple[int, str, int]]:
    """(number, file, episodes that it should hold) of every shard of the card's splits."""
    listed = [(f, n) for split in card.splits for f, n in zip(rlds.shards(place, split), rlds.episodes(place, split), strict=True)]
    return [(i, name, n) for i, (name, n) in enumerate(listed)]


def scan_shards(
    card: DatasetCard,
    place: Store,
    path: Path,
    *,
    workers: int = 0,
    share: tuple[int, int] = (0, 1),
    progress=None,
    but: Collection[int] = (),
    most: int | None = None,
) -> int:
    """Leaves a part for every shard of this host's share (host, hosts) that is there and has none yet; of `most` of them. Returns how many it made.

    workers: processes to use; 0: one a core, none for a small dataset. but: shards that have a part elsewhere.
    """
    parts = _parts(path)
    parts.mkdir(parents=True, exist_ok=True)
    done = {int(p.stem) for p in parts.glob("*.npz")} | set(but)
    there = set(place.names())
    jobs = [job for job in todo(card, place)[share[0] :: share[1]] if job[1] in there and job[0] not in done][:most]
    raw = json.loads(json.dumps(dataclasses.asdict(card)))
    show = progress or (lambda steps, total: steps)
    size = sum(place.size(name) or _IN_PROCESS for _, name, _ in jobs)
    workers = min(workers or (scan.cores() if size >= _IN_PROCESS else 1), len(jobs))
    running = []
    try:
        if workers <= 1:
            for job in show(jobs, len(jobs)):
                scan.Job(raw, place.url, str(parts), [job]).run()
            return len(jobs)
        for w in range(workers):
            file = parts / f"job-{share[0]}-{os.getpid()}-{w}.json"
            file.write_text(json.dumps(dataclasses.asdict(scan.Job(raw, place.url, str(parts), jobs[w::workers], os.getpid()))))
            running.append(subprocess.Popen([sys.executable, "-m", "vla_jax.data.scan", str(file)], stdin=subprocess.DEVNULL))
        for _ in show(_done(jobs, parts, running), len(jobs)):
            pass
    except (OSError, RuntimeError):
        if not (path / "meta.json").is_file():  # else another program has finished the same index, and cleared its parts
            raise
    finally:
        for process in running:
            process.kill()
            process.wait()
    return len(jobs)


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
    """The parts of all shards -> the index folder with its statistics, in the order of the shards. Where another program has
    made the same index meanwhile, that one stays.

    Raises: UserError when no usable episode remains.
    """
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        _merge(card, place, path, partial, holdout)
    except (OSError, UserError):  # whoever was first has cleared the parts, some of them or all
        if not (path / "meta.json").is_file():
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _merge(card: DatasetCard, place: Store, path: Path, partial: Path, holdout: float) -> None:
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
    held = index.held_out(card.name, [j[1] for j in jobs], arrays["episode_shard"], arrays["episode_offset"], holdout)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    digest = hashlib.sha256(card.digest.encode())
    for key, value in {**arrays, **language}.items():
        np.save(partial / f"{key}.npy", value)
        digest.update(np.ascontiguousarray(value).tobytes())
    total = int(steps.sum())
    shapes = {"action": (total, len(card.action.dims)), "state": (total, len(card.state.dims))}
    shapes |= {"image": (total, len(card.views), 2), "language": (total,)}
    maps = {k: _create(partial / f"{k}.npy", shapes[k], dtype) for k, dtype in index.FRAME.items()}
    running, at, episode = {"state": stats.Running(), "action": stats.Running()}, 0, 0
    for n in have:
        part = _load(files[n], tuple(index.FRAME))
        part["language"] = set_numbers[numbers[n]][part["language"]].astype(np.int32) if len(part["language"]) else part["language"]
        end, count = at + len(part["action"]), len(small[n]["episode_steps"])
        for key in index.FRAME:
            maps[key][at:end] = part[key]
            digest.update(np.ascontiguousarray(part[key]).tobytes())
        long = small[n]["episode_steps"]
        keep, begins = np.repeat(~held[episode : episode + count], long), np.zeros(end - at, bool)
        begins[(np.cumsum(long) - long)[long > 0]] = True
        for key in running:
            running[key].update(part[key][keep], first=begins[keep])
        at, episode = end, episode + count
    for value in maps.values():
        if isinstance(value, np.memmap):
            value.flush()
    meta = {
        "format": index.FORMAT,
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
        "surplus": sum(s["surplus"] for s in said.values()),
    }
    (partial / "meta.json").write_text(json.dumps(meta, indent=1))
    stats.save({k: r.stats() for k, r in running.items()}, partial, card=card.digest, index=meta["digest"], holdout=holdout)
    if not (path / "meta.json").is_file():  # a folder without it is the rest of one that was deleted by hand
        shutil.rmtree(path, ignore_errors=True)
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
    """The parts' texts and sets -> the arrays of `index.LANGUAGE`, and for each part the new number of each of its sets."""
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
