"""Packing: which samples share a row, and the rows as arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from vla_jax.data.augment import Change
from vla_jax.data.sample import Picture
from vla_jax.types import PAD, Batch


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
    """Best fit, longest first, except that the oldest item always goes first and so never starves.

    sizes: (tokens, images, targets) of each waiting item, oldest first; limits: the same of a row.
    Returns for each row the items in it, in the order they were given.
    """
    free = [list(limits) for _ in range(rows)]
    out: list[list[int]] = [[] for _ in range(rows)]
    order = [0, *sorted(range(1, len(sizes)), key=lambda i: (-sizes[i][0], i))] if sizes else []
    for i in order:
        fits = [r for r in range(rows) if len(out[r]) < samples and all(f >= s for f, s in zip(free[r], sizes[i]))]
        if not fits:
            continue
        row = min(fits, key=lambda r: free[r][0])
        out[row].append(i)
        free[row] = [f - s for f, s in zip(free[row], sizes[i])]
    return [sorted(r) for r in out]


def assemble(
    rows: list[list[Item]], *, length: int, images: int, samples: int, image_size: int, shape: tuple[int, int, int]
) -> tuple[Batch, list[tuple[Item, int, int, int]]]:
    """Rows of items -> (Batch (numpy) in which all but the pixels stand, where each picture belongs: (item, which of its
    pictures, row, image slot)). shape: the mixture's largest (chunk steps, action dims, state dims)."""
    b, (k, a, s) = len(rows), shape
    i32 = lambda *d: np.zeros(d, np.int32)
    out = Batch(
        images=np.empty((b, images, image_size, image_size, 3), np.uint8),
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
    slots = []
    for r, row in enumerate(rows):
        at = slot = 0
        for g, item in enumerate(row):
            seq = item.sequence
            span = slice(at, at + seq.length)
            out.tokens[r, span], out.block[r, span], out.target[r, span] = seq.tokens, seq.block, seq.target
            out.loss_weight[r, span], out.segment[r, span] = seq.loss_weight, g + 1
            out.position[r, span] = np.arange(seq.length)
            for which in range(len(item.pictures)):
                slots.append((item, which, r, slot))
                slot += 1
            steps, dims = item.actions.shape
            out.state[r, g, : len(item.state)] = item.state
            out.actions[r, g, :steps, :dims] = item.actions
            out.action_mask[r, g, :steps, :dims] = item.action_mask[:, None]
            out.dataset[r, g], out.sample_id[r, g] = item.dataset, item.sample_id
            at += seq.length
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
