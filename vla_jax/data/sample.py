"""One frame of an index -> one training sample in robot units."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from vla_jax.data import augment, images, mixture, records
from vla_jax.data.augment import Augmenter
from vla_jax.data.images import UndecodableImage
from vla_jax.data.index import StepIndex
from vla_jax.data.store import Unreadable
from vla_jax.types import Sample


def chunk_steps(control_hz: float, chunk_s: float, max_chunk: int) -> int:
    """Steps of an action chunk: those that fill `chunk_s` seconds, at least 2, at most max_chunk."""
    return int(np.clip(round(control_hz * chunk_s), 2, max_chunk))


def actions(index: StepIndex, frame, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """(f32[.. steps a], bool[.. steps]): from each frame on; past the episode's end the last action repeats with mask False."""
    frame = np.asarray(frame)
    end = index.episode_start[index.episode_of(frame) + 1][..., None]
    at = frame[..., None] + np.arange(steps)
    return index.action[np.minimum(at, end - 1)], at < end


def states(index: StepIndex, frame, history: int = 1) -> np.ndarray:
    """f32[.. history s], oldest first; before the episode's start its first state repeats."""
    frame = np.asarray(frame)
    first = index.episode_start[index.episode_of(frame)][..., None]
    return index.state[np.maximum(frame[..., None] - np.arange(history - 1, -1, -1), first)]


def lagged(view: str, lag: int) -> str:
    """The name of a view `lag` steps ago: base, base@-1, base@-2, .."""
    return f"{view}@-{lag}" if lag else view


class Picture(NamedTuple):
    """Where one picture lies. name: its view, base@-1 for that of one step ago; record: where its episode's record begins in the
    shard (an ArrayRecord's number); offset in the record and length in bytes."""

    name: str
    view: str
    shard: int
    record: int
    offset: int
    length: int


def pictures(index: StepIndex, frames: np.ndarray, wanted: tuple[str, ...], history: int = 1) -> list[tuple[Picture, ...]]:
    """All pictures that the sample of each frame has: oldest step first, then in the wanted order. Views that the dataset or
    the step lacks, and steps before the episode's start, are not there."""
    episode = index.episode_of(frames)
    first, shard, record = index.episode_start[episode], index.episode_shard[episode].tolist(), index.episode_offset[episode].tolist()
    out: list[list[Picture]] = [[] for _ in shard]
    for lag in range(history - 1, -1, -1):
        there = (frames - lag >= first).tolist()
        places = index.image[np.maximum(frames - lag, first)]
        for view in (v for v in wanted if v in index.card.views):
            name = lagged(view, lag)
            for i, (offset, length) in enumerate(places[:, index.views.index(view)].tolist()):
                if length and there[i]:
                    out[i].append(Picture(name, view, shard[i], record[i], offset, length))
    return [tuple(x) for x in out]


def picture(index: StepIndex, frame: int, view: str) -> Picture:
    """One picture of a frame, whether or not it is there (length 0)."""
    episode = int(index.episode_of(frame))
    offset, length = index.image[frame, index.views.index(view)].tolist()
    return Picture(view, view, int(index.episode_shard[episode]), int(index.episode_offset[episode]), offset, length)


def fetch(index: StepIndex, at: Picture, into: memoryview | None = None) -> bytes | memoryview:
    """The stored bytes of one picture: one ranged read, into that memory where it can be done. Raises: UndecodableImage."""
    if at.shard in index.missing:
        raise UndecodableImage(f"{index.place}/{index.shards[at.shard]} is gone", "shard deleted after indexing")
    try:
        if ".array_record" in index.shards[at.shard]:
            return _array_record(index, at.shard, at.record)[at.offset : at.offset + at.length]
        return index.place.read(index.shards[at.shard], at.record + at.offset, at.length, into=into)
    except Unreadable as e:
        raise UndecodableImage(str(e), "unreadable shard") from e


def start(index: StepIndex, at: Picture) -> Callable[[], bytes] | None:
    """The same read begun ahead, where the store is far; call it for the bytes. None: `fetch` them when they are needed."""
    if not index.place.far or at.shard in index.missing or ".array_record" in index.shards[at.shard]:
        return None
    asked = index.place.start(index.shards[at.shard], at.record + at.offset, at.length)

    def wait() -> bytes:
        try:
            return asked()
        except Unreadable as e:
            raise UndecodableImage(str(e), "unreadable shard") from e

    return wait


_one_reader = threading.Lock()


@functools.lru_cache(maxsize=64)
def _reader(index: StepIndex, number: int):
    return records.open_array_record(index.place, index.shards[number])


@functools.lru_cache(maxsize=16)
def _array_record(index: StepIndex, number: int, record: int) -> bytes:
    """An ArrayRecord's records are compressed: a picture costs its whole episode, so the last few are kept."""
    try:
        with _one_reader:
            return _reader(index, number).read([record])[0]
    except (RuntimeError, ValueError, IndexError) as e:
        raise Unreadable(f"{index.place}/{index.shards[number]} record {record}: {e}") from e


def instruction(index: StepIndex, frame: int, seed: int, sample_id: int) -> str:
    """One of the frame's instructions, each equally often, the same for the same sample; "" if it has none."""
    said = index.instructions(frame)
    if len(said) < 2:
        return said[0] if said else ""
    return said[int(mixture.mix_keys(seed, mixture.INSTRUCTION, sample_id) % np.uint64(len(said)))]


_thread = threading.local()
_LARGEST = 16 << 20  # bytes kept by a thread; larger pictures get memory of their own


def _scratch(stored: int, shape: tuple[int, ...]) -> tuple[memoryview | None, np.ndarray | None]:
    """This thread's memory for a picture's stored bytes and for its pixels, used again for the next."""
    pixels = math.prod(shape) if shape and min(shape) > 0 else 0
    if max(stored, pixels) > _LARGEST:
        return None, None
    if getattr(_thread, "stored", None) is None or len(_thread.stored) < stored:
        _thread.stored = memoryview(bytearray(max(stored, 1 << 16)))
    if getattr(_thread, "pixels", None) is None or _thread.pixels.size < pixels:
        _thread.pixels = np.empty(pixels, np.uint8)
    return _thread.stored, _thread.pixels


def pixels(
    index: StepIndex,
    at: Picture,
    *,
    size: int,
    resize: str,
    change: augment.Change | None = None,
    out: np.ndarray | None = None,
    asked: Callable[[], bytes] | None = None,
) -> np.ndarray:
    """One picture, read (or `asked` for ahead, see `start`), decoded, resized and (where `change` says how) augmented:
    u8[size size 3], into `out` if given. Raises: UndecodableImage.
    """
    memory, decoded = _scratch(at.length, index.pictures[at.view].shape)
    image = images.decode(
        asked() if asked else fetch(index, at, memory), index.pictures[at.view], bgr=at.view in index.card.bgr, into=decoded
    )
    if out is None:
        out = np.empty((size, size, 3), np.uint8)  # that of the decoded picture is used again
    if change is None:
        return images.resize(image, size, resize, out)
    return augment.apply(image, change, size, resize, out)


def make(
    index: StepIndex,
    frame: int,
    *,
    steps: int,
    dataset: int,
    sample_id: int,
    size: int,
    wanted: tuple[str, ...],
    history: int = 1,
    resize: str = "linear",
    seed: int = 0,
    augmenter: Augmenter | None = None,
) -> Sample:
    """Raises: UndecodableImage."""
    made = {}
    change = augmenter.changes(np.array([sample_id]))[0] if augmenter else None
    for at in pictures(index, np.array([frame]), wanted, history)[0]:
        how = augmenter.of_view(change, at.view) if augmenter else None
        made[at.name] = pixels(index, at, size=size, resize=resize, change=how)
    chunk, mask = actions(index, frame, steps)
    episode = int(index.episode_of(frame))
    return Sample(
        images=made,
        state=states(index, frame, history).reshape(-1),
        actions=np.asarray(chunk),
        action_mask=mask,
        prompt=instruction(index, frame, seed, sample_id),
        dataset=dataset,
        episode=episode,
        step=frame - int(index.episode_start[episode]),
        sample_id=sample_id,
    )
