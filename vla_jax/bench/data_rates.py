"""How fast pictures come out of our data path, each measurement next to a ceiling of its own.

A picture is one camera's image of one step, decoded and resized to 224 x 224. Rates are per second and per CPU-second: user and
system time of the whole process with all its threads (time.process_time, what os.times adds up, in finer steps).

- ceiling: one thread a core; file bytes in memory, the fastest decoder installed, cv2's linear resize, nothing else.
- samples: draw, ranged read, decode, resize, augment, state, action chunk and instruction, in batches of 64, a pool of one
  thread a core; without tokens and packing.
- rows: the real Stream: the same and tokens, packing and the arrays of the batch.

Runs as a process of its own, pinned by whoever starts it: `python -m vla_jax.bench.data_rates JOB.json`, results on stdout.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import cv2
import numpy as np
import simplejpeg

from vla_jax.bench import data_sets
from vla_jax.config import Augment
from vla_jax.data import augment, pack, sample, source
from vla_jax.data.source import Source
from vla_jax.data.stream import Stream
from vla_jax.models import presets
from vla_jax.types import IMAGE

BATCH = 64  # samples
_WARM = 4  # batches taken before the clock starts, so that what was made ahead is used up
_LEAST, _TRIAL = 8, 0.5  # batches in a window, however long they take, unless it is meant to be shorter than this (s)
_HELD = 4000  # pictures that the ceiling keeps in memory: more than a processor caches, as there are in a dataset
_HOST = Augment(crop=0.9, brightness=0.2, contrast=0.2, saturation=0.2, hue=0.05)
AUGMENTS = {"none": Augment(), "host": _HOST, "device": dataclasses.replace(_HOST, where="device")}
TOKENS_PER_IMAGE = presets.tokens_per_image(data_sets.PRESET, data_sets.IMAGE_SIZE)


@dataclasses.dataclass(frozen=True)
class Rate:
    """What came out in one window. slots_used: share of the rows' token slots that hold tokens."""

    pictures: int
    samples: int
    wall_s: float
    cpu_s: float
    slots_used: float | None = None


def open_set(folder: Path, *, threads: int, resize: str = "linear", where: str = "none") -> Source:
    """A set as training opens it; where: a key of AUGMENTS. The action tokenizer is fitted once and kept with the set."""
    made = data_sets.settings(folder, threads=threads, resize=resize, augment=AUGMENTS[where])
    return source.open_source(made, tokens_per_image=TOKENS_PER_IMAGE, tokenizer_path=folder / "tokens.json")


def rows(src: Source, seconds: float) -> Rate:
    """The real stream. With augmentation on the device only the host's part is counted: what the device is told to do."""
    with Stream(src) as stream:
        for _ in range(_WARM):
            next(stream)
        seen, cpu, wall = [], time.process_time(), time.perf_counter()
        while goes_on(wall, seconds, len(seen)):
            batch = next(stream)[0]
            seen.append((batch.tokens, batch.segment, batch.dataset))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        if stream.skipped:
            raise RuntimeError(f"samples were skipped, so nothing is measured: {dict(stream.skipped)}")
    pictures = sum(int((tokens == IMAGE).sum()) for tokens, _, _ in seen) // TOKENS_PER_IMAGE
    samples = sum(int((dataset >= 0).sum()) for _, _, dataset in seen)
    return Rate(pictures, samples, wall, cpu, float(np.mean([(segment > 0).mean() for _, segment, _ in seen])))


def goes_on(began: float, seconds: float, batches: int) -> bool:
    """Whether a window that began then and has given so many batches is not over yet."""
    return time.perf_counter() - began < seconds or batches < (_LEAST if seconds >= _TRIAL else 1)


def engine(src: Source, seconds: float, *, threads: int) -> Rate:
    """Samples without tokens and packing: two batches in flight, one handed out."""
    pictures, samples, memory = 0, 0, pack.Memory()
    with ThreadPoolExecutor(threads) as pool:
        flying = deque(_submit(src, number, pool, memory) for number in range(2))
        cpu = wall = 0.0
        for number in itertools.count(2):
            made, work = flying.popleft()
            flying.append(_submit(src, number, pool, memory))
            for done in work:
                done.result()
            if number < 2 + _WARM:
                cpu, wall = time.process_time(), time.perf_counter()
                continue
            pictures += made["images"].shape[0] * made["images"].shape[1]
            samples += BATCH
            if not goes_on(wall, seconds, samples // BATCH):
                rate = Rate(pictures, samples, time.perf_counter() - wall, time.process_time() - cpu)
                break
        for _, work in flying:
            for done in work:
                done.cancel()
    return rate


def _submit(src: Source, number: int, pool: ThreadPoolExecutor, memory: pack.Memory) -> tuple[dict, list]:
    """One batch of the set (a single dataset): its numbers at once, its pictures as they are decoded."""
    c, ix = src.config.data, src.indexes[0]
    numbers = np.arange(number * BATCH, (number + 1) * BATCH)
    _, _, place = src.sampler.draw(numbers)
    frames = src.frames[0][place]
    made = {
        "images": memory.empty((BATCH, len(c.views), c.image_size, c.image_size, 3)),
        "state": sample.states(ix, frames),
        "actions": sample.actions(ix, frames, src.steps(0)),
        "prompt": [sample.instruction(ix, f, src.sampler.seed, n) for f, n in zip(frames.tolist(), numbers.tolist())],
    }
    on_host = src.augmenter if src.config.augment.where == "host" else None
    places, few = sample.pictures(ix, frames, c.views), 4  # samples a task
    changes = on_host.changes(numbers) if on_host else None

    def decode(first: int) -> None:
        for i in range(first, first + few):
            for slot, at in enumerate(places[i]):
                change: augment.Change | None = on_host.of_view(changes[i], at.view) if on_host else None
                out = made["images"][i, slot]
                sample.pixels(ix, at, size=c.image_size, resize=c.resize, change=change, out=out)

    return made, [pool.submit(decode, first) for first in range(0, BATCH, few)]


def fastest(encoding: str) -> tuple[str, Callable[[bytes], np.ndarray]]:
    """(name, decoder) of the quickest decoder installed: simplejpeg for JPEG; imagecodecs, else cv2, for PNG."""
    if encoding == "jpeg":
        return "simplejpeg", simplejpeg.decode_jpeg
    if importlib.util.find_spec("imagecodecs"):
        import imagecodecs

        return "imagecodecs", imagecodecs.png_decode
    return "cv2", lambda data: cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)


def held_pictures(src: Source) -> list[bytes]:
    """File bytes of pictures all over the set, both cameras."""
    ix = src.indexes[0]
    frames = np.unique(np.linspace(0, ix.frames - 1, min(_HELD, 2 * ix.frames) // 2).astype(int)).tolist()
    return [sample.fetch(ix, sample.picture(ix, frame, view)) for frame in frames for view in src.config.data.views]


def ceiling(pictures: list[bytes], decode: Callable, seconds: float, *, threads: int) -> Rate:
    size, counts = (data_sets.IMAGE_SIZE,) * 2, [0] * threads
    stop = time.perf_counter() + seconds

    def loop(me: int) -> None:
        for data in itertools.islice(itertools.cycle(pictures), me, None, threads):
            cv2.resize(decode(data), size, interpolation=cv2.INTER_LINEAR)
            counts[me] += 1
            if time.perf_counter() >= stop:
                return

    cpu, wall = time.process_time(), time.perf_counter()
    running = [threading.Thread(target=loop, args=(i,)) for i in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return Rate(sum(counts), 0, time.perf_counter() - wall, time.process_time() - cpu)


def summary(pairs: list[tuple[Rate, Rate]]) -> dict:
    """(measured, ceiling next to it) of each round -> medians. A ratio is taken within its round, then the median of those."""
    per_cpu = lambda r: r.pictures / r.cpu_s
    ratios = [per_cpu(ours) / per_cpu(top) for ours, top in pairs]
    ours = [r for r, _ in pairs]
    out = {
        "pictures": sum(r.pictures for r in ours),
        "pictures_per_s": round(median(r.pictures / r.wall_s for r in ours), 1),
        "pictures_per_cpu_s": round(median(map(per_cpu, ours)), 1),
        "ceiling_pictures_per_cpu_s": round(median(per_cpu(top) for _, top in pairs), 1),
        "ratio_per_cpu": round(median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
    }
    if ours[0].samples:
        out["samples_per_s"] = round(median(r.samples / r.wall_s for r in ours), 1)
    if ours[0].slots_used is not None:
        out["slots_used"] = round(median(r.slots_used for r in ours), 3)
    return out


def measure(folder: Path, name: str, *, threads: int, repeats: int, seconds: float) -> list[dict]:
    """Rounds in which every variant follows a ceiling half as long; one line a variant, and one of the ceiling."""
    named, decode = fastest(data_sets.SETS[name].encoding)
    variants = [(who, resize, where) for who in ("samples", "rows") for resize in ("linear", "antialias") for where in ("none", "host")]
    variants.append(("rows", "linear", "device"))
    sources = {v: open_set(folder, threads=threads, resize=v[1], where=v[2]) for v in variants}
    held = held_pictures(sources[variants[0]])
    pairs: dict[tuple, list] = {v: [] for v in variants}
    for _ in range(repeats):
        for v in variants:
            top = ceiling(held, decode, seconds / 2, threads=threads)
            ours = rows(sources[v], seconds) if v[0] == "rows" else engine(sources[v], seconds, threads=threads)
            pairs[v].append((ours, top))
    every = [(top, top) for found in pairs.values() for _, top in found]
    line = {k: v for k, v in summary(every).items() if not k.startswith(("ratio", "ceiling"))}
    lines = [{"what": "rate", "who": "ceiling", "decoder": named, "bytes_per_picture": round(np.mean([len(p) for p in held])), **line}]
    for (who, resize, where), found in pairs.items():
        lines.append({"what": "rate", "who": f"vla_jax {who}", "resize": resize, "augment": where, **summary(found)})
    return lines


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    print(json.dumps(measure(Path(job.pop("folder")), job.pop("name"), **job)))
