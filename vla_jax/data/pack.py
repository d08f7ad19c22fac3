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

_CHOICE = 64  # waiting items that a row is filled from
_TRIES = 8


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


def place(sizes: Sequence[tuple[int, int, int]], rows: int, limits: tuple[int, int, int], samples: int) -> list[list[int]]:
    """Fills row after row as full as the waiting items allow: the oldest goes first, so that none starves, and to it those of the
    next _CHOICE whose tokens add up to the most that still fits.

    That is a subset sum, exact and cheap on the bits of one integer: bit `tokens * stride + images` says that some items add up
    to these. Should a full row have more samples or targets than a row may, the next fuller one is tried, a few times.

    sizes: (tokens, images, targets) of each waiting item, oldest first, none larger than limits, which are those of a row.
    Returns for each row the items in it, in the order they were given.
    """
    length, images, targets = limits
    stride, fits = 2 * images + 1, _fits(length, images)
    waiting, out = list(range(len(sizes))), []
    for _ in range(rows):
        if not waiting:
            out.append([])
            continue
        first, others = waiting[0], waiting[1 : 1 + _CHOICE]
        bit = lambda i: sizes[i][0] * stride + sizes[i][1]
        reach = [1 << bit(first)]  # [k]: the sums of `first` and any of the k oldest others
        for i in others:
            reach.append(reach[-1] | reach[-1] << bit(i) & fits)
        row, sums = [first], reach[-1]
        for _ in range(_TRIES):
            full = sums.bit_length() - 1
            found = [first, *_parts(full, reach, others, bit)]
            if len(found) <= samples and sum(sizes[i][2] for i in found) <= targets:
                row = found
                break
            sums &= ~(1 << full)
        else:  # targets or samples are what is scarce: whoever comes first
            left = [x - y for x, y in zip(limits, sizes[first])]
            for i in others:
                if len(row) < samples and all(x <= y for x, y in zip(sizes[i], left)):
                    row.append(i)
                    left = [y - x for x, y in zip(sizes[i], left)]
        row.sort()
        out.append(row)
        waiting = sorted(set(waiting) - set(row))
    return out


def _parts(total: int, reach: list[int], others: list[int], bit) -> list[int]:
    """Which of `others` add up to `total`: the older ones, where there is a choice."""
    out = []
    for k in range(len(others), 0, -1):
        if not reach[k - 1] >> total & 1:  # not without this one
            out.append(others[k - 1])
            total -= bit(others[k - 1])
    return out


@functools.lru_cache(maxsize=8)
def _fits(length: int, images: int) -> int:
    """The bits of all sums that a row may hold. A sum of too many images lands between those of `stride`, and is cut here."""
    stride = 2 * images + 1
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
