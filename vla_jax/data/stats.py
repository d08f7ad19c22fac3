"""Statistics of one dataset's training episodes, in robot units, and the mapping to [-1, 1] that they define."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np

from vla_jax.types import Dim, Stats, UserError

_BITS = 12  # low bits of a float32 that a quantile's bucket leaves out: 11 bits of mantissa stay, 2^-11 relative width


class Running:
    """Statistics of a stream of rows f32[n dims], in bounded memory; two of them add up to one (`merge`).

    mean and std by the parallel algorithm of Chan, Golub and LeVeque (1979) in float64. Quantiles from a histogram whose
    buckets are floats that agree in their upper 20 bits, each with its own mean: a quantile is off by at most 2^-11 of its own
    size, and exact where values are few (grippers, constants). The buckets do not depend on the order of the rows.
    """

    def __init__(self):
        self.count, self.mean, self.m2 = 0, None, None
        self.low = self.high = self.change = None
        self.buckets: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # per dimension: key u32, count i64, sum f64

    def update(self, rows: np.ndarray, *, first: np.ndarray | None = None) -> None:
        """rows: finite f32[n dims]. first: bool[n], where an episode begins; without it changes from row to row are not looked at."""
        rows = np.asarray(rows, np.float32)
        if len(rows):
            self._add(_of(rows, first))

    def merge(self, other: Running) -> None:
        if other.count:
            self._add(other)

    def _add(self, other: Running) -> None:
        if not self.count:
            self.__dict__.update({k: list(v) if isinstance(v, list) else v for k, v in other.__dict__.items()})
            return
        total, delta = self.count + other.count, other.mean - self.mean
        self.m2 = self.m2 + other.m2 + delta**2 * (self.count * other.count / total)
        self.mean = self.mean + delta * (other.count / total)
        self.count = total
        self.low, self.high = np.minimum(self.low, other.low), np.maximum(self.high, other.high)
        known = self.change is not None and other.change is not None
        self.change = np.maximum(self.change, other.change) if known else None
        self.buckets = [_joined(a, b) for a, b in zip(self.buckets, other.buckets)]

    def stats(self) -> Stats:
        """Raises: UserError when no row was seen."""
        if not self.count:
            raise UserError("no training frames to take statistics of: lower data.holdout, or add episodes")
        q01, q99 = ([self._quantile(d, q) for d in range(len(self.mean))] for q in (0.01, 0.99))
        f32 = lambda x: np.asarray(x, np.float32)
        inside = lambda q: np.clip(f32(q), f32(self.low), f32(self.high))  # a bucket's mean may round beyond the largest value
        spread, change = f32(np.sqrt(self.m2 / self.count)), None if self.change is None else f32(self.change)
        return Stats(f32(self.mean), spread, inside(q01), inside(q99), f32(self.low), f32(self.high), self.count, change)

    def _quantile(self, dim: int, q: float) -> float:
        """Linear between the two values around the rank, as numpy.quantile."""
        _, counts, sums = self.buckets[dim]
        ends, rank = np.cumsum(counts), q * (self.count - 1)
        value = lambda i: sums[at := int(np.searchsorted(ends, i, side="right"))] / counts[at]
        below = int(np.floor(rank))
        return value(below) + (value(min(below + 1, self.count - 1)) - value(below)) * (rank - below)


def _of(rows: np.ndarray, first: np.ndarray | None = None) -> Running:
    out, x = Running(), rows.astype(np.float64)
    out.count, out.mean = len(x), x.mean(axis=0)
    out.m2 = ((x - out.mean) ** 2).sum(axis=0)
    out.low, out.high = x.min(axis=0), x.max(axis=0)
    if first is not None:
        out.change = np.abs(np.diff(x, axis=0))[~np.asarray(first)[1:]].max(axis=0, initial=0)
    for column in rows.T:
        raw = np.ascontiguousarray(column + np.float32(0)).view(np.uint32)  # + 0: minus zero is zero
        ordered = np.where(raw >> 31, ~raw, raw | np.uint32(1 << 31))  # as unsigned numbers they sort as the floats do
        keys, which, counts = np.unique(ordered >> _BITS, return_inverse=True, return_counts=True)
        out.buckets.append((keys, counts, np.bincount(which, weights=column.astype(np.float64), minlength=len(keys))))
    return out


def _joined(a, b):
    keys, which = np.unique(np.concatenate([a[0], b[0]]), return_inverse=True)
    counts = np.bincount(which, weights=np.concatenate([a[1], b[1]]), minlength=len(keys)).astype(np.int64)
    return keys, counts, np.bincount(which, weights=np.concatenate([a[2], b[2]]), minlength=len(keys))


def of(rows: np.ndarray) -> Stats:
    """f32[n dims] -> Stats."""
    running = Running()
    running.update(rows)
    return running.stats()


def compute(index, holdout: float) -> dict[str, Stats]:
    """{"state": Stats, "action": Stats} over the frames of episodes that are not held out: the ones that the scan left beside
    the index, or, for another holdout, a pass over the index's numbers (no image is read).

    index: data.index.StepIndex. Raises: UserError when the file beside the index is of another card or index.
    """
    kept = load(index.path, card=index.card.digest, index=index.digest, holdout=holdout)
    if kept:
        return kept
    keep, made = ~index.held_out(holdout), {"state": Running(), "action": Running()}
    for first in range(0, index.episodes, 4096):
        last = min(first + 4096, index.episodes)
        at = index.episode_start[first : last + 1]
        rows, begins = np.repeat(keep[first:last], np.diff(at)), np.zeros(at[-1] - at[0], bool)
        begins[at[:-1][np.diff(at) > 0] - at[0]] = True
        for key, running in made.items():
            running.update(getattr(index, key)[at[0] : at[-1]][rows], first=begins[rows])
    return {key: running.stats() for key, running in made.items()}


def _file(folder: Path, holdout: float) -> Path:
    return folder / f"stats-{holdout:g}.json"


def save(found: dict[str, Stats], folder: Path, *, card: str, index: str, holdout: float) -> None:
    body = {"card": card, "index": index, "holdout": holdout, "stats": to_json(found)}
    _file(folder, holdout).write_text(json.dumps(body, indent=1))


def load(folder: Path, *, card: str, index: str, holdout: float) -> dict[str, Stats] | None:
    """The statistics kept in an index's folder, or None. Raises: UserError when they are stale or damaged."""
    file = _file(folder, holdout)
    if not file.is_file():
        return None
    try:
        body = json.loads(file.read_text())
        found = {k: body[k] for k in ("card", "index", "holdout")}
        made = from_json(body["stats"])
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"statistics {file} are damaged ({e}). Delete the file: they are made again from the index.") from e
    for key, want in (("card", card), ("index", index), ("holdout", holdout)):
        if found[key] != want:
            raise UserError(f"statistics {file} are stale: made for {key} {found[key]}, not {want}. Delete the file: they are made again.")
    return made


def to_json(stats: dict[str, Stats]) -> dict:
    return {
        group: {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in dataclasses.asdict(s).items()} for group, s in stats.items()
    }


def from_json(values: dict) -> dict[str, Stats]:
    number = lambda k, v: v if k == "count" or k == "change" and v is None else np.array(v, np.float32)
    return {group: Stats(**{k: number(k, v) for k, v in s.items()}) for group, s in values.items()}


@dataclasses.dataclass(frozen=True)
class Normalizer:
    """x -> 2 (x - low) / (high - low) - 1, so that q01..q99 fill [-1, 1]; binary dimensions map 0..1.

    Where high - low is no wider than `eps` the dimension is constant: it normalises to 0 and comes back as its mean,
    instead of exploding. Values outside the quantiles are clipped to [-limit, limit].
    """

    low: np.ndarray
    high: np.ndarray
    constant: np.ndarray
    mean: np.ndarray
    limit: float = 1.5

    @classmethod
    def make(cls, stats: Stats, dims: tuple[Dim, ...], *, eps: float = 1e-6) -> Normalizer:
        binary = np.array([d.kind == "binary" for d in dims], bool)
        low = np.where(binary, 0.0, stats.q01).astype(np.float32)
        high = np.where(binary, 1.0, stats.q99).astype(np.float32)
        constant = (high - low) <= eps
        return cls(low, np.where(constant, low + 1, high).astype(np.float32), constant, stats.mean)

    def normalize(self, x: np.ndarray) -> np.ndarray:
        """f32[.. dims] in robot units -> f32[.. dims] in [-limit, limit]."""
        y = 2 * (x - self.low) / (self.high - self.low) - 1
        return np.clip(np.where(self.constant, 0, y), -self.limit, self.limit).astype(np.float32)

    def denormalize(self, y: np.ndarray) -> np.ndarray:
        """The inverse, exact for values within the limit."""
        x = (np.asarray(y, np.float32) + 1) / 2 * (self.high - self.low) + self.low
        return np.where(self.constant, self.mean, x).astype(np.float32)
