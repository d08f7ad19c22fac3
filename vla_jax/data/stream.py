"""The endless stream of packed batches, exactly resumable at any step and on any number of hosts.

The global batch consists of groups of rows. Group i of G draws the samples i, i + G, i + 2G, .. and packs them into its
rows; samples that did not fit wait for the group's next batch. A group's state is thus a counter and the numbers of the
waiting samples, and no group depends on which host computes it.
"""

from __future__ import annotations

import collections
import queue
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from vla_jax.config import Config
from vla_jax.data import images, pack, sample
from vla_jax.data.source import Source
from vla_jax.types import Batch, UserError

_OVERSUPPLY = 1.25  # tokens drawn before packing, as a multiple of what fits


class Stream:
    """Iterator over (Batch, state after it) of this host's share of each global batch. Use as a context manager.

    state: i64[groups of this host, 1 + most]: the group's next draw, then its waiting samples' numbers (-1: none).
    `skipped` counts samples passed over, by (dataset, cause).
    """

    def __init__(self, source: Source, *, process: int = 0, processes: int = 1, state: np.ndarray | None = None):
        """Raises: UserError when rows or groups do not divide among the hosts."""
        self.source, p = source, source.config.pack
        if p.rows % p.group:
            raise UserError(f"pack.rows {p.rows} is not a multiple of pack.group {p.group}")
        self.groups = p.rows // p.group
        if self.groups % processes:
            near = processes * p.group * max(1, round(p.rows / (processes * p.group)))
            raise UserError(
                f"pack.rows {p.rows} in groups of {p.group} cannot be shared by {processes} processes. Nearest: --config.pack.rows={near}."
            )
        share = self.groups // processes
        self.mine = range(process * share, (process + 1) * share)
        self.skipped: collections.Counter = collections.Counter()
        self._state = initial_state(source.config)[self.mine.start : self.mine.stop] if state is None else np.array(state, np.int64)
        self._reader = sample.ShardReader()
        self._pool = ThreadPoolExecutor(source.config.data.threads, thread_name_prefix="decode")
        self._ready: queue.Queue = queue.Queue(maxsize=source.config.data.prefetch)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join()
        self._pool.shutdown(wait=True)
        self._reader.close()

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> tuple[Batch, np.ndarray]:
        if self._thread is None:
            self._thread = threading.Thread(target=self._produce, name="stream", daemon=True)
            self._thread.start()
        got = self._ready.get()
        if isinstance(got, BaseException):
            raise got
        return got

    def _produce(self) -> None:
        try:
            while not self._stop.is_set():
                made = self._next()
                while not self._stop.is_set():
                    try:
                        self._ready.put(made, timeout=0.1)
                        break
                    except queue.Full:
                        continue
        except BaseException as e:  # handed to the consumer, who would otherwise wait forever
            self._ready.put(e)

    def _next(self) -> tuple[Batch, np.ndarray]:
        p, d = self.source.config.pack, self.source.config.data
        rows, states = [], []
        for group, state in zip(self.mine, self._state):
            packed, after = self._pack_group(group, state)
            rows += packed
            states.append(after)
        self._state = np.stack(states)
        pictures = list(self._pool.map(self._pictures, [item for row in rows for item in row]))
        by_id = iter(pictures)
        filled = [[(item, pixels) for item in row if (pixels := next(by_id)) is not None] for row in rows]
        batch = pack.assemble(filled, length=p.length, images=p.images, samples=p.samples, image_size=d.image_size, shape=self.source.shape)
        return batch, self._state

    def _pack_group(self, group: int, state: np.ndarray):
        p = self.source.config.pack
        draw, waiting = int(state[0]), [int(n) for n in state[1:] if n >= 0]
        items = [item for n in waiting if (item := self._item(n))]
        enough = _OVERSUPPLY * p.group * p.length
        while sum(i.sequence.length for i in items) < enough and len(items) < len(state) - 1:
            item = self._item(group + draw * self.groups)
            draw += 1
            if item:
                items.append(item)
        sizes = [(i.sequence.length, len(i.views), i.sequence.targets) for i in items]
        rows = pack.place(sizes, p.group, (p.length, p.images, p.targets), p.samples)
        placed = {i for row in rows for i in row}
        left = [item.sample_id for i, item in enumerate(items) if i not in placed]
        after = np.full(len(state), -1, np.int64)
        after[0], after[1 : 1 + len(left)] = draw, left
        return [[items[i] for i in row] for row in rows], after

    def _item(self, number: int) -> pack.Item | None:
        p = self.source.config.pack
        dataset, _, place = (int(x) for x in self.source.sampler.draw(np.array(number)))
        item = self.source.item(dataset, int(self.source.frames[dataset][place]), number)
        if item.sequence.length > p.length or item.sequence.targets > p.targets:
            self.skipped[self.source.names[dataset], "too long for a row"] += 1
            return None
        return item

    def _pictures(self, item: pack.Item) -> list[np.ndarray] | None:
        index, d = self.source.indexes[item.dataset], self.source.config.data
        try:
            made = sample.make(
                index,
                item.frame,
                steps=len(item.actions),
                dataset=item.dataset,
                sample_id=item.sample_id,
                size=d.image_size,
                wanted=d.views,
                reader=self._reader,
            )
        except images.UndecodableImage:
            self.skipped[index.card.name, "undecodable image"] += 1
            return None
        return [made.images[view] for view in item.views]


def initial_state(config: Config) -> np.ndarray:
    """The state of all groups before the first batch; rows of it are the hosts' shares."""
    p = config.pack
    state = np.full((p.rows // p.group, 1 + 2 * p.group * p.samples), -1, np.int64)
    state[:, 0] = 0
    return state
