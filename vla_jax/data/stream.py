"""The endless stream of packed batches, exactly resumable at any step and on any number of hosts.

The global batch consists of groups of rows. Group i of G draws the samples i, i + G, i + 2G, .. and packs them into its
rows; samples that did not fit wait for the group's next batch. A group's state is thus a counter and the numbers of the
waiting samples, and no group depends on which host computes it.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import queue
import threading
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from vla_jax.config import Config
from vla_jax.data import augment, images, pack, scan
from vla_jax.data.pack import Item
from vla_jax.data.source import Source
from vla_jax.types import Batch, UserError

_OVERSUPPLY = 2.0  # tokens drawn before packing, as a multiple of what fits: the packer needs a choice
_AHEAD = 512  # samples prepared at a time, over all groups: fewer at once cost more each
_ENOUGH = 1024  # samples of a dataset after which its share of bad ones is held against data.max_skipped


@dataclasses.dataclass
class _Pending:
    """A planned batch whose pictures are being decoded."""

    batch: Batch
    rows: list[list[Item]]
    work: list[Future]
    after: np.ndarray


class Stream:
    """Iterator over (Batch, state after it) of this host's share of each global batch. Use as a context manager.

    state: i64[groups of this host, 1 + most]: the group's next draw, then its waiting samples' numbers (-1: none).
    `skipped` counts samples passed over, by (dataset, cause); `drawn` all samples, by dataset; `truncated` those of them whose text
    was longer than tokens.limit and was cut.
    """

    def __init__(self, source: Source, *, process: int = 0, processes: int = 1, state: np.ndarray | None = None):
        """Raises: UserError when rows or groups do not divide among the hosts."""
        self.source, p = source, source.config.pack
        self.groups = groups(source.config, processes)
        share = self.groups // processes
        self.mine = range(process * share, (process + 1) * share)
        self.skipped: collections.Counter = collections.Counter()
        self.drawn: collections.Counter = collections.Counter()
        self.truncated: collections.Counter = collections.Counter()
        self._state = initial_state(source.config)[self.mine.start : self.mine.stop] if state is None else np.array(state, np.int64)
        self._prepared: dict[int, Item] = {}
        self._reached = {g: int(s[0]) for g, s in zip(self.mine, self._state)}  # draws taken, by group
        self._threads = source.config.data.threads or scan.cores()
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="decode")
        self._far = any(index.place.far for index in source.indexes)
        pictures = source.config.data.read_ahead if self._far else 0
        ahead = max(source.config.data.prefetch, math.ceil(pictures / (len(self.mine) * p.group * p.images)))
        self._ready: queue.Queue = queue.Queue(maxsize=ahead)
        self._memory = pack.Memory(most=ahead + 8)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> tuple[Batch, np.ndarray]:
        """Raises: UserError when more than data.max_skipped of a dataset's samples were bad."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._produce, name="stream", daemon=True)
            self._thread.start()
        got = self._ready.get()
        if isinstance(got, BaseException):
            raise got
        return self._finish(got), got.after

    def _produce(self) -> None:
        try:
            while not self._stop.is_set():
                made = self._plan()
                while not self._stop.is_set():
                    try:
                        self._ready.put(made, timeout=0.1)
                        break
                    except queue.Full:
                        continue
        except BaseException as e:  # handed to the consumer, who would otherwise wait forever
            self._ready.put(e)

    def _plan(self) -> _Pending:
        """Packs the next rows and starts decoding their pictures straight into the batch."""
        rows, states = [], []
        for group, state in zip(self.mine, self._state):
            packed, after = self._pack_group(group, state)
            rows += packed
            states.append(after)
        self._state = np.stack(states)
        batch, slots = pack.assemble(rows, **self._sizes(), memory=self._memory)
        augmenter = self.source.augmenter
        if augmenter and self.source.config.augment.where == "device":
            change = np.tile(augment.IDENTITY.numbers(), (*batch.images.shape[:2], 1))
            for item, which, row, slot in slots:
                change[row, slot] = augmenter.of_view(item.change, item.pictures[which].view).numbers()
            batch = dataclasses.replace(batch, change=change)
        # A thread that decodes also reads, which is right as long as a read does not wait. Where it does, all reads of the batch
        # are under way before the first picture is decoded.
        asked = [self.source.start(item, which) for item, which, _, _ in slots] if self._far else [None] * len(slots)
        slots = list(zip(slots, asked))
        each = max(1, min(8, len(slots) // (4 * self._threads)))
        work = [self._pool.submit(self._decode, batch.images, slots[i : i + each]) for i in range(0, len(slots), each)]
        return _Pending(batch, rows, work, self._state)

    def _finish(self, pending: _Pending) -> Batch:
        bad: dict[int, tuple[int, str]] = {}
        for work in pending.work:
            bad |= work.result()
        there = pending.batch.dataset
        for dataset, n in enumerate(np.bincount(there[there >= 0])):
            self.drawn[self.source.names[dataset]] += int(n)
        cut = (item for row in pending.rows for item in row if item.sequence.cut and item.sample_id not in bad)
        self.truncated.update(self.source.names[item.dataset] for item in cut)
        if not bad:
            return pending.batch
        for dataset, cause in bad.values():
            self.skipped[self.source.names[dataset], cause] += 1
        self._refuse()
        return pack.without(pending.batch, pending.rows, set(bad), **self._sizes())

    def _refuse(self) -> None:
        most = self.source.config.data.max_skipped
        for name, drawn in list(self.drawn.items()):
            causes = {cause: n for (d, cause), n in list(self.skipped.items()) if d == name}
            if drawn >= _ENOUGH and sum(causes.values()) > most * drawn:
                said = ", ".join(f"{n} x {cause}" for cause, n in causes.items())
                raise UserError(
                    f"{sum(causes.values())} of {drawn} samples of {name} could not be used ({said}), more than data.max_skipped = {most:g} "
                    "allows. Mend the data or its store, or raise --config.data.max_skipped."
                )

    def _sizes(self) -> dict:
        p = self.source.config.pack
        size = self.source.config.data.image_size
        return {"length": p.length, "images": p.images, "samples": p.samples, "image_size": size, "shape": self.source.shape}

    def _pack_group(self, group: int, state: np.ndarray):
        p = self.source.config.pack
        draw, items = int(state[0]), self._take([int(n) for n in state[1:] if n >= 0])
        limits = p.length, p.images, p.targets
        enough, have = _OVERSUPPLY * p.group * p.length, sum(i.size[0] for i in items)
        while have < enough and len(items) < len(state) - 1:
            (item,) = self._take([group + draw * self.groups], ahead=draw)
            self._reached[group] = draw = draw + 1
            if any(size > limit for size, limit in zip(item.size, limits)):
                self.drawn[self.source.names[item.dataset]] += 1
                self.skipped[self.source.names[item.dataset], "too long for a row"] += 1
                self._refuse()
                if self._stop.is_set():
                    break
                continue
            have += item.size[0]
            items.append(item)
        rows = pack.place([item.size for item in items], p.group, limits, p.samples)
        placed = {i for row in rows for i in row}
        left = [item for i, item in enumerate(items) if i not in placed]
        self._prepared |= {item.sample_id: item for item in left}
        after = np.full(len(state), -1, np.int64)
        after[0], after[1 : 1 + len(left)] = draw, [item.sample_id for item in left]
        return [[items[i] for i in row] for row in rows], after

    def _take(self, numbers: list[int], ahead: int | None = None) -> list[Item]:
        """Items by number, each once. Those that are not prepared yet are; with `ahead` so are the next draws of all groups from
        that draw on, since groups advance at much the same pace."""
        need = {n for n in numbers if n not in self._prepared}
        if need:
            if ahead is not None:
                draws = range(ahead, ahead + max(4, _AHEAD // len(self.mine)))
                need |= {g + d * self.groups for g in self.mine for d in draws if d >= self._reached[g]}
            fresh = np.array(sorted(need - self._prepared.keys()))
            self._prepared |= {item.sample_id: item for item in self.source.draw(fresh)}
        return [self._prepared.pop(n) for n in numbers]

    def _decode(self, out: np.ndarray, slots) -> dict[int, tuple[int, str]]:
        """Fills the pictures' slots of out u8[b m h w 3]; returns {sample number: (dataset, cause)} of those that fail.
        slots: what `assemble` says of each, and its read if that is under way."""
        bad = {}
        for (item, which, row, slot), asked in slots:
            if not self._stop.is_set():
                try:
                    self.source.pixels(item, which, out[row, slot], asked)
                except images.UndecodableImage as e:
                    bad[item.sample_id] = item.dataset, e.cause
        return bad


def groups(config: Config, processes: int = 1) -> int:
    """Groups of rows in a global batch. Raises: UserError when rows are no multiple of a group, or groups do not divide among processes."""
    p = config.pack
    if p.rows % p.group:
        raise UserError(f"pack.rows {p.rows} is not a multiple of pack.group {p.group}")
    count = p.rows // p.group
    if count % processes:
        near = processes * p.group * max(1, round(p.rows / (processes * p.group)))
        fit = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
        raise UserError(
            f"pack.rows {p.rows} in groups of {p.group} cannot be shared by {processes} processes. Nearest: --config.pack.rows={near}; "
            f"a run that has begun keeps its rows and groups and can be shared by {fit}."
        )
    return count


def initial_state(config: Config) -> np.ndarray:
    """The state of all groups before the first batch; rows of it are the hosts' shares."""
    p = config.pack
    state = np.full((p.rows // p.group, 1 + int(2 * _OVERSUPPLY) * p.group * p.samples), -1, np.int64)
    state[:, 0] = 0
    return state
