"""Batches of made-up samples: known numbers of cameras and tokens, for measuring a step without data."""

from __future__ import annotations

import dataclasses

import numpy as np

from vla_jax.config import Config
from vla_jax.data import pack
from vla_jax.types import IMAGE, PAD, Batch, UserError

TEXT = 250  # text slots of openpi's layout (three cameras and these)
PROMPT, ACTION = 60, 60  # real tokens of them, as the peer program has them
KINDS = ("full", "padded", "packed")


def shaped(config: Config, kind: str, patches: int) -> Config:
    """The config with rows as a kind of batch has them. full: a sample of three cameras and TEXT slots in each row (openpi's layout);
    padded: the same rows, and as many samples of one as of two and of three cameras, of which absent ones are black; packed: the same rows,
    and such samples without the absent cameras, two in a row where they fit. Raises: UserError."""
    if kind not in KINDS:
        raise UserError(f"--batch {kind!r}; there are: {', '.join(KINDS)}")
    if kind == "packed" and config.pack.rows < 2:
        raise UserError("--batch packed puts samples of one, two and three cameras in two rows: set --config.pack.rows=2 or more")
    length, samples = 3 * patches + TEXT, 2 if kind == "packed" else 1
    sizes = {"length": length + length % 2, "images": 3, "samples": samples, "targets": ACTION * samples}
    return dataclasses.replace(config, pack=dataclasses.replace(config.pack, **sizes))


def make(config: Config, kind: str, *, patches: int, vocab: int, seed: int = 0) -> Batch:
    """A batch of `shaped` rows; random pixels and ids."""
    p, rng = config.pack, np.random.default_rng(seed)
    cameras = [3 if kind == "full" else 1 + i % 3 for i in range(p.rows * p.samples)]
    rows = _packed(p, cameras, patches) if kind == "packed" else [[i] for i in range(p.rows)]
    i32 = lambda *shape: np.zeros(shape, np.int32)
    out = {name: i32(p.rows, p.length) for name in ("segment", "position", "block", "target")} | {
        "tokens": np.full((p.rows, p.length), PAD, np.int32)
    }
    weight, dataset = np.zeros((p.rows, p.length), np.float32), np.full((p.rows, p.samples), -1, np.int32)
    side = config.data.image_size
    images = np.zeros((p.rows, p.images, side, side, 3), np.uint8)
    for r, row in enumerate(rows):
        at = slot = 0
        for g, i in enumerate(row):
            seen = cameras[i] if kind == "packed" else 3  # a padded layout computes absent cameras, too
            prefix, n = seen * patches + PROMPT, seen * patches + PROMPT + ACTION
            span = slice(at, at + n)
            out["tokens"][r, span] = rng.integers(2, vocab, n)
            out["tokens"][r, at : at + seen * patches] = IMAGE
            out["segment"][r, span], out["position"][r, span] = g + 1, np.arange(n)
            out["block"][r, span] = np.maximum(np.arange(n) - prefix + 1, 0)
            out["target"][r, at + prefix - 1 : at + n - 1] = rng.integers(2, vocab, ACTION)
            weight[r, at + prefix - 1 : at + n - 1] = 1 / ACTION
            images[r, slot : slot + cameras[i]] = rng.integers(0, 256, (cameras[i], side, side, 3), np.uint8)
            dataset[r, g] = 0
            at, slot = at + n, slot + seen
    robot = (p.rows, p.samples, 2, 1)  # two steps of one number
    return Batch(
        images=images,
        loss_weight=weight,
        dataset=dataset,
        state=np.zeros((p.rows, p.samples, 1), np.float32),
        actions=np.zeros(robot, np.float32),
        action_mask=np.ones(robot, bool),
        chunk=i32(p.rows, p.samples) + 2,
        **out,
    )


def _packed(p, cameras: list[int], patches: int) -> list[list[int]]:
    """The most whole rounds of one, two and three cameras that all find a place: were there more to choose from, small samples would be
    chosen, and the batch would be another than the padded one."""
    sizes, limits = [(n * patches + PROMPT + ACTION, n, ACTION) for n in cameras], (p.length, p.images, p.targets)
    placed = ((n, pack.place(sizes[:n], p.rows, limits, p.samples)) for n in range(len(sizes) // 3 * 3, 0, -3))
    return next(rows for n, rows in placed if sum(map(len, rows)) == n)


def black(batch: Batch, patches: int) -> int:
    """Cameras that are computed and are not there."""
    seen = batch.images.reshape(*batch.images.shape[:2], -1).any(axis=-1).sum()
    return int((batch.tokens == IMAGE).sum() // patches - seen)
