"""What our data path costs besides CPU per picture: memory, time to the first batch, the scan, the index, the stream's state,
drawing far into a run, and threads where the store is slow.

Each runs as a process of its own, pinned by whoever starts it: `python -m vla_jax.bench.data_costs JOB.json`, results on stdout.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import shutil
import sys
import time
from pathlib import Path
from statistics import median

import google_crc32c
import jax
import numpy as np

from vla_jax.bench import data_rates, data_sets
from vla_jax.data import build, cards, rlds, scan
from vla_jax.data.mixture import Sampler
from vla_jax.data.store import Store
from vla_jax.data.stream import Stream, initial_state

_BATCHES = 20
AHEAD = (128, 512, 1024)  # pictures
ENOUGH = 0.9  # of the rate without latency


def start(folder: Path, name: str, *, threads: int, fresh: bool) -> list[dict]:
    """Opening the set in a fresh process (imports done) until the first batch, and resident memory after 20 batches.

    fresh: index and action tokenizer are made first, as in the first run ever; otherwise they are there, as in every later one.
    beyond_mb: resident memory minus that after imports, minus the batches in flight (made ahead, being made, handed out), minus
    the index's mapped pages. jax is imported and started before, since no run does without it.
    """
    if fresh:
        shutil.rmtree(folder / "index", ignore_errors=True)
        (folder / "tokens.json").unlink(missing_ok=True)
    jax.devices()
    gc.collect()
    before, began = _resident(), time.perf_counter()
    src = data_rates.open_set(folder, threads=threads)
    opened = time.perf_counter() - began
    with Stream(src) as stream:
        batch, state = next(stream)
        first = time.perf_counter() - began
        if fresh:
            return [{"what": "first run", "who": "vla_jax", "open_s": round(opened, 3), "first_batch_s": round(first, 3)}]
        for _ in range(_BATCHES - 1):
            batch, state = next(stream)
        _until_idle()
        after, mapped = _resident(), _mapped_kb(src.indexes[0].path) / 1e3
    one = sum(x.nbytes for x in dataclasses.asdict(batch).values() if x is not None) / 1e6
    flying = one * (src.config.data.prefetch + 2)
    resumed = _timed(lambda: _first(src, state))
    again = _timed(lambda: _first(src, None))
    ix = src.indexes[0]
    sizes = {f.name: f.stat().st_size for f in ix.path.iterdir()}
    return [
        {
            "what": "memory",
            "who": "vla_jax",
            "first_batch_s": round(first, 3),
            "open_s": round(opened, 3),
            "resident_mb": round(after["VmRSS"], 1),
            "peak_resident_mb": round(after["VmHWM"], 1),
            "resident_after_imports_mb": round(before["VmRSS"], 1),
            "anonymous_mb": round(after["RssAnon"] - before["RssAnon"], 1),
            "file_backed_mb": round(after["RssFile"] - before["RssFile"], 1),
            "index_mapped_mb": round(mapped, 1),
            "in_flight_mb": round(flying, 1),
            "beyond_mb": round(after["VmRSS"] - before["VmRSS"] - flying - mapped, 1),
        },
        {
            "what": "state",
            "who": "vla_jax",
            "stream_state_bytes": int(initial_state(src.config).nbytes),
            "rows": src.config.pack.rows,
            "resumed_first_batch_s": round(resumed, 3),
            "unresumed_first_batch_s": round(again, 3),
            **_draw(src.sampler),
        },
        {
            "what": "index",
            "who": "vla_jax",
            "frames": ix.frames,
            "views": len(ix.views),
            "index_bytes_per_step": round(sum(sizes.values()) / ix.frames, 1),
            "index_array_bytes_per_step": round(sum(sizes[f"{k}.npy"] for k in ("action", "state", "image", "language")) / ix.frames, 1),
        },
    ]


def _first(src, state) -> None:
    with Stream(src, state=state) as stream:
        next(stream)


def _draw(sampler: Sampler, *, tries: int = 9) -> dict:
    """Drawing one batch of 64 as a resumed run does, its block not dealt yet: each try has a seed of its own."""
    out = {}
    for step, label in ((10, "step_10"), (10_000_000, "step_10_million")):
        numbers, cold, warm = np.arange(step * data_rates.BATCH, (step + 1) * data_rates.BATCH), [], []
        for seed in range(tries):
            fresh = dataclasses.replace(sampler, seed=1000 + seed)
            cold.append(_timed(lambda s=fresh, n=numbers: s.draw(n)))
            warm.append(_timed(lambda s=fresh, n=numbers: s.draw(n)))
        out |= {f"draw_{label}_ms": round(median(cold) * 1e3, 2), f"draw_{label}_again_ms": round(median(warm) * 1e3, 3)}
    return out


def scanning(folder: Path, name: str, *, repeats: int) -> list[dict]:
    """Scanning the set's shards in this process, checksums included, against only reading and checksumming the same files."""
    card, store = cards.load(str(folder / "card.yaml")), Store(data_sets.place(folder, name))
    features, todo = rlds.features(store), build.todo(card, store)
    size = sum(store.size(file) for _, file, _ in todo) / 1e6

    def shards():
        return sum(len(scan.shard(store, file, expected, card, features)["action"]) for _, file, expected in todo)

    def checksums():
        for _, file, _ in todo:
            google_crc32c.value(store.read(file))

    frames, ours, bare = shards(), [], []
    for _ in range(repeats):
        ours.append(_timed(shards, time.process_time))
        bare.append(_timed(checksums, time.process_time))
    return [
        {
            "what": "scan",
            "who": "vla_jax",
            "frames": frames,
            "mb": round(size, 1),
            "frames_per_cpu_s": round(frames / median(ours), 1),
            "mb_per_cpu_s": round(size / median(ours), 1),
            "ceiling_mb_per_cpu_s": round(size / median(bare), 1),
            "ratio_per_cpu": round(median(b / o for b, o in zip(bare, ours)), 3),
        }
    ]


def stores(folder: Path, name: str, *, threads: int, repeats: int, seconds: float, latencies_ms: list[int]) -> list[dict]:
    """The stream over a store that takes its time with every read, with one decoding thread a core and so many pictures asked
    for ahead. Among latencies_ms is 0, with which a picture is read when it is decoded."""
    src = data_rates.open_set(folder, threads=threads)
    place = src.indexes[0].place.url
    found: dict[tuple[int, int], list[float]] = {}
    for _ in range(repeats):
        for ms in latencies_ms:
            slow = dataclasses.replace(src.indexes[0], place=Store(place, latency_s=ms / 1e3))
            for n in AHEAD if ms else (0,):
                data = dataclasses.replace(src.config.data, read_ahead=n or 1, prefetch=1 if n else src.config.data.prefetch)
                one = dataclasses.replace(src, indexes=(slow,), config=dataclasses.replace(src.config, data=data))
                rate = data_rates.rows(one, seconds)
                found.setdefault((ms, n), []).append(rate.pictures / rate.wall_s)
            slow.place.close()
    rates = {key: median(values) for key, values in found.items()}
    best = rates[0, 0]
    lines = []
    for ms in latencies_ms:
        reached = max(rate for (m, _), rate in rates.items() if m == ms)
        enough = [n for (m, n), rate in sorted(rates.items()) if m == ms and rate >= ENOUGH * best]
        by_number = {f"pictures_per_s_{n}_ahead": round(rate, 1) for (m, n), rate in sorted(rates.items()) if m == ms}
        line = {"what": "store", "who": "vla_jax rows", "latency_ms": ms, **by_number, "without_latency_pictures_per_s": round(best, 1)}
        lines.append(line | {"most_of_it": round(reached / best, 3), "least_ahead_for_0.9": enough[0] if enough else None})
    return lines


def _timed(what, clock=time.perf_counter) -> float:
    before = clock()
    what()
    return clock() - before


def _until_idle() -> None:
    """Waits until what is made ahead is made: no more than a hundredth of a core for a while."""
    while True:
        cpu = time.process_time()
        time.sleep(0.4)
        if time.process_time() - cpu < 0.01:
            return


def _resident() -> dict[str, float]:
    """MB by kind, from /proc/self/status."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {
        line[0].rstrip(":"): int(line[1]) * 1024 / 1e6 for line in lines if line and line[0] in ("VmRSS:", "VmHWM:", "RssAnon:", "RssFile:")
    }


def _mapped_kb(folder: Path) -> float:
    """Resident pages, in units of 1000 bytes, of the files of a folder that this process has mapped."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if not first.endswith(":"):  # a mapping's own line: its path stands last
            inside = str(folder) in rest
        elif inside and first == "Rss:":
            total += int(rest.split()[0])
    return total * 1.024


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    made = {"start": start, "scan": scanning, "stores": stores}[job.pop("what")](Path(job.pop("folder")), job.pop("name"), **job)
    print(json.dumps(made))
