"""From this host's numpy rows to global arrays on the mesh, a bounded number of batches ahead of the step."""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from vla_jax.data.stream import Stream
from vla_jax.sharding import batch_sharding
from vla_jax.types import Batch


def to_device(batch: Batch, mesh) -> Batch:
    """This process's rows of every field -> global arrays, rows over data and fsdp. `sample_id` stays behind (i64), and so
    does `change`, which is applied to the images on the device."""
    sharding, change = batch_sharding(mesh), batch.change
    put = lambda x: jax.make_array_from_process_local_data(sharding, x)
    out = jax.tree.map(put, dataclasses.replace(batch, sample_id=None, change=None))
    return out if change is None else dataclasses.replace(out, images=augment(out.images, put(change)))


@jax.jit
def augment(images, change):
    """data.augment on the device: images u8[b m h h 3], already resized, change f32[b m 16] -> u8[b m h h 3]. The crop is
    sampled from the resized picture, where the host samples it from the recorded one, and to a fraction of a pixel."""
    return jax.vmap(jax.vmap(_augment_one))(images, change)


def _augment_one(image, change):
    size = image.shape[0]
    (top, left, height, width), colour = change[:4], change[4:].reshape(3, 4)
    # output pixel y shows input pixel (y + 0.5) * height - 0.5 + top * size
    scale, shift = 1 / jnp.stack([height, width]), -size * jnp.stack([top / height, left / width])
    moved = jax.image.scale_and_translate(image.astype(jnp.float32), image.shape, (0, 1), scale, shift, "linear", antialias=False)
    return jnp.round(jnp.clip(moved @ colour[:, :3].T + colour[:, 3], 0, 255)).astype(jnp.uint8)


class Feed:
    """Iterator over (Batch on the mesh, stream state after it), made by a thread that stays at most `ahead` batches in front.
    Use as a context manager."""

    def __init__(self, stream: Stream, mesh, *, ahead: int = 1):
        self._stream, self._mesh = stream, mesh
        self._ready: queue.Queue = queue.Queue(maxsize=ahead)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._produce, name="feed", daemon=True)
        self._thread.start()

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *exc) -> None:
        self._stop.set()
        while self._thread.is_alive():  # it may be waiting to put a batch that nobody takes
            try:
                self._ready.get_nowait()
            except queue.Empty:
                self._thread.join(timeout=0.05)

    def __iter__(self) -> Iterator[tuple[Batch, np.ndarray]]:
        return self

    def __next__(self) -> tuple[Batch, np.ndarray]:
        """Raises: what the stream raises."""
        got = self._ready.get()
        if isinstance(got, BaseException):
            raise got
        return got

    def ready(self) -> bool:
        """Whether the next batch is there."""
        return not self._ready.empty()

    def _produce(self) -> None:
        try:
            while not self._stop.is_set():
                batch, after = next(self._stream)
                self._ready.put((to_device(batch, self._mesh), after))
        except BaseException as e:  # handed to the consumer, who would otherwise wait forever
            self._ready.put(e)


def gather_states(states: np.ndarray) -> np.ndarray:
    """The stream states of all hosts, i64[groups ..], from each host's share. Bytes travel, since i64 would be cut to i32."""
    if jax.process_count() == 1:
        return states
    from jax.experimental import multihost_utils

    raw = multihost_utils.process_allgather(np.frombuffer(states.tobytes(), np.uint8))
    return np.frombuffer(np.asarray(raw).tobytes(), np.int64).reshape(-1, *states.shape[1:])
