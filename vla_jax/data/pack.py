"""Packing: which samples share a row, and the rows as arrays."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Sequence

import numpy as np

from vla_jax.data.augment import Change
from vla_jax.data.sample import Picture
from vla_jax.types import PAD, Batch

_CHOICE = 16  # waiting items that a row is filled from
_TRIES = 8
_FULL = 0.98  # of a row's tokens: no better choice is looked for


@dataclasses.dataclass(frozen=True, eq=False)
class Item:
    """A sample ready for a row: its tokens and normalised numbers, without pixels. `sequence` is tokens.sequence.Sequence;
    pictures: where each image lies; change: how they are augmented, if they are."""

    sample_id: int
    dataset: int
    frame: int
    sequence: object
    pictures: tuple[Picture, ...]
    state: np.ndarray
    actions: np.ndarray
    action_mask: np.ndarray
    change: Change | None = None

    @functools.cached_property
    def size(self) -> tuple[int, int, int]:
        """(tokens, images, targets): what it takes of a row."""
        return self.sequence.length, len(self.pictures), self.sequence.targets


def place(sizes: Sequence[tuple[int, int, int]], rows: int, limits: tuple[int, int, int], samples: int) -> list[list[int]]:
    """Which waiting items make up each row. The oldest always goes first, so that none starves; with it those that come next, if
    they fill the row; else those of the next _CHOICE that fill it most.

    sizes: (tokens, images, targets) of each waiting item, oldest first, none larger than limits, which are those of a row.
    Returns for each row the items in it, in the order they were given.
    """
    waiting, out = list(range(len(sizes))), []
    for _ in range(rows):
        row = _oldest(sizes, waiting, limits, samples)
        if sum(sizes[i][0] for i in row) < _FULL * limits[0]:
            row = _fullest(sizes, waiting[: 1 + _CHOICE], limits, samples) or row
        out.append(row)
        chosen = set(row)
        waiting = [i for i in waiting if i not in chosen]
    return out


def _oldest(sizes, waiting: list[int], limits: tuple[int, int, int], samples: int) -> list[int]:
    """Whoever comes first and still fits."""
    row, (t, m, p) = [], limits
    for i in waiting:
        tokens, images, targets = sizes[i]
        if tokens <= t and images <= m and targets <= p and len(row) < samples:
            row.append(i)
            t, m, p = t - tokens, m - images, p - targets
    return row


def _fullest(sizes, waiting: list[int], limits: tuple[int, int, int], samples: int) -> list[int]:
    """The first and those others whose tokens add up to the most that fits: a subset sum, exact and cheap on the bits of one
    integer, where bit `tokens * stride + images` says that some items add up to these. Should they have more targets or be more
    samples than a row may have, the next fuller row is tried, a few times; [] when none was found.
    """
    if not waiting:
        return []
    length, images, targets = limits
    first, *others = waiting
    stride = images + 1 + max(sizes[i][1] for i in waiting)
    fits, bit = _fits(length, images, stride), [sizes[i][0] * stride + sizes[i][1] for i in others]
    reach = [1 << sizes[first][0] * stride + sizes[first][1]]  # [k]: the sums of `first` and any of the k oldest others
    for by in bit:
        reach.append(reach[-1] | reach[-1] << by & fits)
        if reach[-1] >> length * stride:  # full to the last slot
            break
    sums = reach[-1]
    for _ in range(_TRIES):
        if not sums:
            break
        left = full = sums.bit_length() - 1
        row = [first]
        for k in range(len(reach) - 1, 0, -1):
            if not reach[k - 1] >> left & 1:  # not without this one: of equal sums the one with older items
                row.append(others[k - 1])
                left -= bit[k - 1]
        if len(row) <= samples and sum(sizes[i][2] for i in row) <= targets:
            return sorted(row)
        sums ^= 1 << full
    return []


@functools.lru_cache(maxsize=8)
def _fits(length: int, images: int, stride: int) -> int:
    """The bits of all sums that a row may hold. One picture too many sets a bit between those of two numbers of tokens, which is cut here."""
    return sum(((1 << images + 1) - 1) << tokens * stride for tokens in range(length + 1))


class Memory:
    """Arrays of one shape that are used again once nobody holds them, or a view of them, any more: fresh pages cost as much as a
    quarter of decoding. Whether anybody does, CPython's reference counts say."""

    def __init__(self, most: int = 16):
        self._arrays, self._most = [], most

    def empty(self, shape: tuple[int, ...]) -> np.ndarray:
        """u8[shape], with whatever it held before."""
        size = int(np.prod(shape))
        for i in range(len(self._arrays)):
            if sys.getrefcount(self._arrays[i]) == _UNUSED and self._arrays[i].size == size:
                return self._arrays[i].reshape(shape)
        made = np.empty(size, np.uint8)
        if len(self._arrays) < self._most:
            self._arrays.append(made)
        return made.reshape(shape)


_held = [np.empty(1, np.uint8)]
_UNUSED = sys.getrefcount(_held[0])  # of an array that only a list holds


def assemble(
    rows: list[list[Item]],
    *,
    length: int,
    images: int,
    samples: int,
    image_size: int,
    shape: tuple[int, int, int],
    memory: Memory | None = None,
) -> tuple[Batch, list[tuple[Item, int, int, int]]]:
    """Rows of items -> (Batch (numpy) in which all but the pixels stand, where each picture belongs: (item, which of its
    pictures, row, image slot)). shape: the mixture's largest (chunk steps, action dims, state dims)."""
    b, (k, a, s) = len(rows), shape
    i32 = lambda *d: np.zeros(d, np.int32)
    out = Batch(
        images=(memory or Memory()).empty((b, images, image_size, image_size, 3)),
        tokens=np.full((b, length), PAD, np.int32),
        segment=i32(b, length),
        position=i32(b, length),
        block=i32(b, length),
        target=i32(b, length),
        loss_weight=np.zeros((b, length), np.float32),
        state=np.zeros((b, samples, s), np.float32),
        actions=np.zeros((b, samples, k, a), np.float32),
        action_mask=np.zeros((b, samples, k, a), bool),
        dataset=np.full((b, samples), -1, np.int32),
        sample_id=np.full((b, samples), -1, np.int64),
        chunk=i32(b, samples),
    )
    slots, count = [], np.arange(length)
    for r, row in enumerate(rows):
        at = slot = 0
        for g, item in enumerate(row):
            seq = item.sequence
            span = slice(at, at + seq.length)
            seq.fill(out.block[r, span], out.target[r, span], out.loss_weight[r, span])
            for which in range(len(item.pictures)):
                slots.append((item, which, r, slot))
                slot += 1
            steps, dims = item.actions.shape
            out.state[r, g, : len(item.state)] = item.state
            out.actions[r, g, :steps, :dims] = item.actions
            out.action_mask[r, g, :steps, :dims] = item.action_mask[:, None]
            out.chunk[r, g] = steps
            at += seq.length
        if row:
            lengths, n = [item.sequence.length for item in row], len(row)
            np.concatenate([item.sequence.tokens for item in row], out=out.tokens[r, :at])
            np.concatenate([count[:n] for n in lengths], out=out.position[r, :at], casting="same_kind")
            out.segment[r, :at] = np.repeat(count[1 : n + 1], lengths)
            out.dataset[r, :n], out.sample_id[r, :n] = [item.dataset for item in row], [item.sample_id for item in row]
        out.images[r, slot:] = 0  # the rest is written by whoever decodes
    return out, slots


def without(batch: Batch, rows: list[list[Item]], bad: set[int], **sizes) -> Batch:
    """The batch of the same rows without the items whose sample numbers are `bad`, made from pixels that are already there."""
    kept = [[item for item in row if item.sample_id not in bad] for row in rows]
    before = {(item.sample_id, which): (r, slot) for item, which, r, slot in assemble(rows, **sizes)[1]}
    out, slots = assemble(kept, **sizes)
    if batch.change is not None:
        out = dataclasses.replace(out, change=np.zeros_like(batch.change))
    for item, which, r, slot in slots:
        out.images[r, slot] = batch.images[before[item.sample_id, which]]
        if batch.change is not None:
            out.change[r, slot] = batch.change[before[item.sample_id, which]]
    return out
