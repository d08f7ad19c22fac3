"""One frame of an index -> one training sample in robot units."""

from __future__ import annotations

import os
import threading

import numpy as np

from vla_jax.data import images
from vla_jax.data.index import StepIndex
from vla_jax.types import Sample


class ShardReader:
    """Ranged reads from shard files. File handles are opened once and shared by all threads (pread has no position)."""

    def __init__(self):
        self._open: dict = {}
        self._lock = threading.Lock()

    def read(self, path, offset: int, length: int) -> bytes:
        """Raises: images.UndecodableImage when the shard is gone or shorter than indexed."""
        handle = self._open.get(path)
        if handle is None:
            with self._lock:
                handle = self._open.get(path)
                if handle is None:
                    try:
                        handle = os.open(path, os.O_RDONLY)
                    except OSError as e:
                        raise images.UndecodableImage(f"{path}: {e.strerror}") from e
                    self._open[path] = handle
        data = os.pread(handle, length, offset)
        if len(data) != length:
            raise images.UndecodableImage(f"{path} ends before byte {offset + length}")
        return data

    def close(self) -> None:
        with self._lock:
            for handle in self._open.values():
                os.close(handle)
            self._open.clear()


def chunk_steps(control_hz: float, chunk_s: float, max_chunk: int) -> int:
    """Steps of an action chunk: those that fill `chunk_s` seconds, at least 2, at most max_chunk."""
    return int(np.clip(round(control_hz * chunk_s), 2, max_chunk))


def actions(index: StepIndex, frame: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """(f32[steps a], bool[steps]): from `frame` on; past the episode's end the last action repeats with mask False."""
    end = int(index.episode_start[index.frame_episode[frame] + 1])
    at = np.arange(frame, frame + steps)
    return np.asarray(index.action[np.minimum(at, end - 1)]), at < end


def views(index: StepIndex, wanted: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the wanted views that the dataset has, in the wanted order."""
    return tuple(v for v in wanted if v in index.views)


def make(
    index: StepIndex, frame: int, *, steps: int, dataset: int, sample_id: int, size: int, wanted: tuple[str, ...], reader: ShardReader
) -> Sample:
    """Raises: images.UndecodableImage."""
    episode = int(index.frame_episode[frame])
    shard = index.shards[index.episode_shard[episode]]
    pictures = {}
    for view in views(index, wanted):
        offset, length = index.image[frame, index.views.index(view)]
        pictures[view] = images.resize(images.decode(reader.read(shard, int(offset), int(length))), size)
    chunk, mask = actions(index, frame, steps)
    return Sample(
        images=pictures,
        state=np.asarray(index.state[frame]),
        actions=chunk,
        action_mask=mask,
        prompt=index.languages[index.language[frame]] if index.languages else "",
        dataset=dataset,
        episode=episode,
        step=frame - int(index.episode_start[episode]),
        sample_id=sample_id,
    )
