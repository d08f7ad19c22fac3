"""Mixtures, and the sampler: which frame the n-th sample of a run is, as a pure function of the seed and n.

A weight is the share of samples drawn from that dataset, after normalising the weights to sum to one
(`weight: per_dataset`), or the same multiplied by the dataset's number of frames (`weight: times_size`).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json

import numpy as np

from vla_jax import paths
from vla_jax.data import cards
from vla_jax.data.cards import DatasetCard
from vla_jax.types import UserError

_LARGEST = 1e12  # of a weight: times a number of frames it must stay exact enough
BLOCK = 1 << 16  # samples; within each block every dataset has its exact quota


@dataclasses.dataclass(frozen=True)
class Mixture:
    name: str
    cards: tuple[DatasetCard, ...]
    weights: tuple[float, ...]
    weight: str = "per_dataset"


def load(name: str) -> Mixture:
    """A mixture by name or path; a card's name or path stands for that dataset alone.

    Raises: UserError naming the file and the fault.
    """
    if not name:
        raise UserError("data.mixture is not set. Name a mixture (data/mixtures) or a card (data/cards).")
    if name in cards.names():
        return Mixture(name, (cards.load(name),), (1.0,))
    path = paths.find("data", name if name.endswith((".yaml", ".yml")) else f"mixtures/{name}.yaml")
    raw = cards.read_yaml(path, "mixture")
    if isinstance(raw, dict) and "robot" in raw:
        card = cards.from_dict(raw, where=str(path))
        return Mixture(card.name, (card,), (1.0,))
    if (
        not isinstance(raw, dict)
        or set(raw) != {"name", "source", "weight", "datasets"}
        or not isinstance(raw["datasets"], dict)
        or not raw["datasets"]
    ):
        raise UserError(
            f"mixture {path} must have exactly: name, source (where the weights were published), weight (per_dataset or times_size), datasets (name: weight)"
        )
    if raw["weight"] not in ("per_dataset", "times_size"):
        raise UserError(f"mixture {path}: weight is {raw['weight']!r}; allowed: per_dataset, times_size")
    for key, value in raw["datasets"].items():
        if not isinstance(key, str):
            raise UserError(f"mixture {path}: dataset {key!r} is no name; it must be text")
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < _LARGEST:
            raise UserError(f"mixture {path}: weight of {key} is {str(value)[:40]}; it must be a positive number below {_LARGEST:g}")
    chosen = tuple(cards.load(k) for k in raw["datasets"])
    if twice := [c.name for c in chosen if [d.name for d in chosen].count(c.name) > 1]:
        raise UserError(f"mixture {path}: {twice[0]} stands there more than once; give it one weight")
    return Mixture(str(raw["name"]), chosen, tuple(map(float, raw["datasets"].values())), raw["weight"])


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Draws by counting: sample n falls in block n // BLOCK, where a seeded permutation deals out the datasets' quotas;
    the dataset's own running number then picks epoch and frame, every frame once an epoch in a fresh order."""

    seed: int
    sizes: tuple[int, ...]  # frames of each dataset
    quotas: tuple[int, ...]  # samples of each dataset in a block

    @classmethod
    def make(cls, seed: int, sizes, weights, *, times_size: bool = False) -> Sampler:
        """Raises: UserError for an empty dataset."""
        if len(sizes) > BLOCK:
            raise UserError(f"a mixture of {len(sizes)} datasets; at most {BLOCK} can be drawn from")
        empty = [i for i, s in enumerate(sizes) if s < 1]
        if empty:
            raise UserError(f"datasets {empty} of the mixture have no frames to draw from")
        share = np.array(weights, np.float64) * (np.array(sizes) if times_size else 1)
        share = share / share.sum() * BLOCK
        quotas = np.maximum(np.floor(share), 1).astype(int)
        while quotas.sum() < BLOCK:  # largest remainder
            quotas[np.argmax(share - quotas)] += 1
        while quotas.sum() > BLOCK:
            quotas[np.argmax(np.where(quotas > 1, quotas - share, -np.inf))] -= 1  # nothing is left out altogether
        return cls(seed, tuple(map(int, sizes)), tuple(map(int, quotas)))

    def draw(self, n: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sample numbers i64[..] -> (dataset, epoch, frame), i64[..] each. A pure function; any n, in any order."""
        n = np.asarray(n, np.int64)
        dataset, number = np.empty(n.shape, np.int64), np.empty(n.shape, np.int64)
        for block in np.unique(n // BLOCK):
            here = n // BLOCK == block
            deal, rank = _deal(self.seed, self.quotas, int(block))
            dataset[here] = deal[n[here] % BLOCK]
            number[here] = block * np.array(self.quotas)[dataset[here]] + rank[n[here] % BLOCK]
        size = np.array(self.sizes)[dataset]
        epoch = number // size
        return dataset, epoch, _permute(number % size, size, mix_keys(self.seed, 1 + dataset, epoch))

    def counts(self, n: int) -> np.ndarray:
        """i64[datasets]: how many of the samples 0 .. n - 1 are of each."""
        deal = _deal(self.seed, self.quotas, n // BLOCK)[0]
        return n // BLOCK * np.array(self.quotas) + np.bincount(deal[: n % BLOCK], minlength=len(self.quotas))

    def fingerprint(self, digests) -> str:
        """Of all that decides which frames are drawn: seed, sizes, quotas and the indexes' digests."""
        text = json.dumps([self.seed, self.sizes, self.quotas, list(digests)])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.lru_cache(maxsize=4)
def _deal(seed: int, quotas: tuple[int, ...], block: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each slot of a block: its dataset, and how many slots of that dataset come before it; i64[BLOCK] each."""
    place = _permute(np.arange(BLOCK), np.full(BLOCK, BLOCK), mix_keys(seed, _DEAL, block))
    dataset = np.searchsorted(np.cumsum(quotas), place, side="right")
    order = np.argsort(dataset, kind="stable")
    rank = np.empty(BLOCK, np.int64)
    rank[order] = np.arange(BLOCK) - np.repeat(np.cumsum(quotas) - quotas, quotas)
    return dataset, rank


# What a key is for, so that no two uses share random numbers. Datasets are 1 + their number in a mixture.
_DEAL, INSTRUCTION, AUGMENT = 0, 1 << 32, 1 << 33


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (public domain, S. Vigna): a bijection of u64 whose output bits look independent."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def mix_keys(*parts) -> np.ndarray:
    """u64: a hash of whole numbers (arrays broadcast), whose bits look independent."""
    key = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        for part in parts:
            key = _mix(key + np.asarray(part).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return key


def _permute(i: np.ndarray, size: np.ndarray, key: np.ndarray) -> np.ndarray:
    """A keyed permutation of range(size) applied to i: a four-round Feistel network over the next even power of two,
    walked along its cycle until it lands inside (Black and Rogaway, 2002)."""
    half = np.maximum(np.ceil(np.log2(np.maximum(size, 2)) / 2), 1).astype(np.uint64)
    half = np.where((np.uint64(1) << (2 * half)) < size.astype(np.uint64), half + np.uint64(1), half)
    mask = (np.uint64(1) << half) - np.uint64(1)
    key, x, todo = np.broadcast_to(key, i.shape), i.astype(np.uint64), np.ones(i.shape, bool)
    while todo.any():
        left, right = x >> half, x & mask
        for r in range(4):
            left, right = right, left ^ (_mix(right + mix_keys(r, 7) ^ key) & mask)
        x = np.where(todo, (left << half) | right, x)
        todo = todo & (x >= size.astype(np.uint64))
    return x.astype(np.int64)
