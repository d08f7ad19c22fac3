"""FAST action tokens: a chunk's discrete cosine transform, rounded, then byte-pair encoded. Numpy only.

Source: Pertsch et al., "FAST: Efficient Action Tokenization for Vision-Language-Action Models", 2025. The number of
steps and dimensions is passed at each call, never remembered, so one tokenizer serves robots of any shape.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import json
from pathlib import Path

import numpy as np

from vla_jax.types import UserError

FORMAT = "vla_jax.fast.1"
_TABLE_VOCAB = 4096  # up to here all pairs fit a table of 64 MiB
_NEVER = np.int32(2**31 - 1)


@functools.lru_cache(maxsize=64)
def dct_matrix(k: int) -> np.ndarray:
    """The orthonormal DCT-II as f64[k k]: coefficients = matrix @ signal; its transpose inverts it."""
    n = np.arange(k)
    matrix = np.cos(np.pi * (2 * n[None] + 1) * n[:, None] / (2 * k)) * np.sqrt(2 / k)
    matrix[0] /= np.sqrt(2)
    return matrix


@dataclasses.dataclass(frozen=True)
class FastTokenizer:
    """Ids 0..(max_coef - min_coef) are single coefficients; id `alphabet + i` is the i-th merge of two earlier ids.

    merges: pairs in the order they were learned. Coefficients beyond the fitted range are clamped to it.
    """

    scale: float
    min_coef: int
    max_coef: int
    merges: tuple[tuple[int, int], ...]

    @property
    def alphabet(self) -> int:
        return self.max_coef - self.min_coef + 1

    @property
    def vocab_size(self) -> int:
        return self.alphabet + len(self.merges)

    @functools.cached_property
    def _ranks(self) -> dict[tuple[int, int], int]:
        return {pair: self.alphabet + i for i, pair in enumerate(self.merges)}

    @functools.cached_property
    def _expanded(self) -> tuple[tuple[int, ...], ...]:
        """What each id stands for, as coefficients minus min_coef."""
        out: list[tuple[int, ...]] = [(i,) for i in range(self.alphabet)]
        for left, right in self.merges:
            out.append(out[left] + out[right])
        return tuple(out)

    def coefficients(self, chunk: np.ndarray) -> np.ndarray:
        """f32[k a] -> i64[k*a], frequency-major, not yet clamped. Raises: ValueError for NaN or a wrong rank."""
        chunk = np.asarray(chunk, np.float64)
        if chunk.ndim != 2 or not np.isfinite(chunk).all():
            raise ValueError(f"an action chunk must be finite numbers [steps dims], got shape {chunk.shape}")
        return np.rint(self.scale * (dct_matrix(len(chunk)) @ chunk)).astype(np.int64).reshape(-1)

    def clamped(self, chunk: np.ndarray) -> float:
        """Fraction of a chunk's coefficients outside the fitted range."""
        c = self.coefficients(chunk)
        return float(np.mean((c < self.min_coef) | (c > self.max_coef)))

    def encode(self, chunk: np.ndarray) -> np.ndarray:
        """f32[k a] in [-1, 1] -> i32[t]."""
        c = np.clip(self.coefficients(chunk), self.min_coef, self.max_coef) - self.min_coef
        return np.array(_merge(c.tolist(), self._ranks), np.int32)

    def encode_batch(self, chunks: np.ndarray) -> list[np.ndarray]:
        """f32[n k a] -> n times i32[t]; the same ids as `encode` chunk by chunk."""
        n, k, a = chunks.shape
        c = np.rint(self.scale * (dct_matrix(k) @ np.asarray(chunks, np.float64))).astype(np.int64).reshape(n, k * a)
        c = np.clip(c, self.min_coef, self.max_coef) - self.min_coef
        if n < 4 or self.vocab_size > _TABLE_VOCAB:
            return [np.array(_merge(row, self._ranks), np.int32) for row in c.tolist()]
        return _merge_rows(c, self._rank_table)

    @functools.cached_property
    def _rank_table(self) -> np.ndarray:
        """i32[v+1 v+1]: the id that a pair merges into, _NEVER if it does not; the last id stands for a row's end."""
        table = np.full((self.vocab_size + 1,) * 2, _NEVER, np.int32)
        for (left, right), rank in self._ranks.items():
            table[left, right] = rank
        return table

    def decode(self, ids: np.ndarray, *, steps: int, dims: int) -> tuple[np.ndarray, bool]:
        """i32[t] -> (f32[steps dims], valid). A sequence of another length is cut or filled with zero coefficients
        to the nearest valid one and reported by `valid` = False; unknown ids are passed over, likewise."""
        symbols: list[int] = []
        valid = True
        for i in np.asarray(ids, np.int64).tolist():
            if 0 <= i < self.vocab_size:
                symbols.extend(self._expanded[i])
            else:
                valid = False
        want = steps * dims
        valid = valid and len(symbols) == want
        c = np.zeros(want, np.float64)
        c[: len(symbols[:want])] = np.array(symbols[:want], np.float64) + self.min_coef
        return (dct_matrix(steps).T @ (c.reshape(steps, dims) / self.scale)).astype(np.float32), valid

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """i32[vocab_size]: how many coefficients each id stands for."""
        return np.array([len(e) for e in self._expanded], np.int32)

    def to_json(self) -> dict:
        body = {
            "format": FORMAT,
            "scale": self.scale,
            "min_coef": self.min_coef,
            "max_coef": self.max_coef,
            "merges": [list(m) for m in self.merges],
        }
        return {**body, "digest": _digest(body)}


def from_json(values: dict, *, where: str = "action tokenizer") -> FastTokenizer:
    """Raises: UserError when the format, the digest or the merges are not right."""
    body = {k: v for k, v in values.items() if k != "digest"}
    if body.get("format") != FORMAT:
        raise UserError(f"{where} has format {body.get('format')!r}, expected {FORMAT!r}")
    if values.get("digest") != _digest(body):
        raise UserError(f"{where} is damaged: its digest does not match its content. Fit it again with `vla-jax tokens fit`.")
    merges = tuple((int(a), int(b)) for a, b in body["merges"])
    alphabet = body["max_coef"] - body["min_coef"] + 1
    if any(not (0 <= a < alphabet + i and 0 <= b < alphabet + i) for i, (a, b) in enumerate(merges)):
        raise UserError(f"{where}: a merge refers to an id that does not exist yet")
    return FastTokenizer(float(body["scale"]), int(body["min_coef"]), int(body["max_coef"]), merges)


def load(path: str | Path) -> FastTokenizer:
    try:
        values = json.loads(Path(path).read_text())
    except (OSError, ValueError) as e:
        raise UserError(f"action tokenizer {path} cannot be read: {e}") from e
    return from_json(values, where=str(path))


def _digest(body: dict) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]


def _merge(ids: list[int], ranks: dict[tuple[int, int], int]) -> list[int]:
    """Byte-pair encoding: the earliest learned pair first, everywhere, left to right, until none is left."""
    none = len(ranks) + (1 << 60)
    rank = [ranks.get(p, none) for p in zip(ids, ids[1:])]  # of the pair that begins at each place
    while rank:
        best = min(rank)
        if best == none:
            break
        at = rank.index(best)
        while at >= 0:
            ids[at : at + 2] = [best]
            del rank[at]
            if at:
                rank[at - 1] = ranks.get((ids[at - 1], best), none)
            if at < len(rank):
                rank[at] = ranks.get((best, ids[at + 1]), none)
            try:
                at = rank.index(best, at)
            except ValueError:
                break
    return ids


def _merge_rows(ids: np.ndarray, table: np.ndarray) -> list[np.ndarray]:
    """`_merge` of each row of ids i64[n l] at once: in every round each row merges its own earliest learned pair, everywhere."""
    n, wide = len(ids), len(table)
    table, end = table.reshape(-1), wide - 1
    seq = np.concatenate([ids, np.full((n, 1), end)], axis=1).reshape(-1).astype(np.int32)
    start, row = np.arange(n) * (ids.shape[1] + 1), np.repeat(np.arange(n, dtype=np.int32), ids.shape[1] + 1)
    while True:
        rank = table.take(seq[:-1] * wide + seq[1:])
        best = np.minimum.reduceat(rank, np.minimum(start, len(rank) - 1))  # the last row may be its end alone
        hit = np.flatnonzero(rank == np.where(best == _NEVER, -1, best).take(row[:-1]))
        if not hit.size:
            break
        hit = hit[_every_other(hit)]
        seq[hit] = rank[hit]
        keep = np.ones(len(seq), bool)
        keep[hit + 1] = False
        start -= np.searchsorted(hit, start)
        seq, row = seq[keep], row[keep]
    return [part[:-1] for part in np.split(seq, start[1:])]


def _every_other(hit: np.ndarray) -> np.ndarray:
    """bool[n] for ascending places of one pair: in a run x x x x only the first, third, .. can merge."""
    run = np.cumsum(np.concatenate([[0], np.diff(hit) != 1]))
    return (hit - hit[np.searchsorted(run, run)]) % 2 == 0


def fit(chunks, *, vocab_size: int, scale: float, margin: int = 2) -> FastTokenizer:
    """Learns range and merges from normalised chunks, f32[k a] each (any k and a).

    margin: coefficients by which the range is widened on both sides, so that held-out data is seldom clamped.
    Raises: UserError when the range alone needs more ids than `vocab_size`.
    """
    probe = FastTokenizer(scale, 0, 0, ())
    rows = [probe.coefficients(c) for c in chunks]
    if not rows:
        raise UserError("no action chunks to fit a tokenizer on")
    low, high = min(int(r.min()) for r in rows) - margin, max(int(r.max()) for r in rows) + margin
    alphabet = high - low + 1
    if alphabet > vocab_size:
        raise UserError(
            f"action_vocab {vocab_size} is below the {alphabet} coefficients in use at scale {scale:g}. Raise tokens.action_vocab or lower tokens.action_scale."
        )
    counts = collections.Counter(tuple((r - low).tolist()) for r in rows)
    return FastTokenizer(scale, low, high, tuple(_learn(counts, alphabet, vocab_size)))


def _learn(counts: collections.Counter, alphabet: int, vocab_size: int) -> list[tuple[int, int]]:
    """Classic byte-pair training on the concatenated corpus; ties go to the smallest pair, so it is deterministic."""
    stop = np.int64(-1)  # between sequences: no merge crosses it
    corpus = np.concatenate([np.concatenate([np.array(s, np.int64), [stop]]) for s in sorted(counts)])
    weight = np.concatenate([np.full(len(s) + 1, n, np.int64) for s, n in sorted(counts.items())])
    merges: list[tuple[int, int]] = []
    while alphabet + len(merges) < vocab_size:
        left, right = corpus[:-1], corpus[1:]
        real = (left >= 0) & (right >= 0)
        code = (left * vocab_size + right)[real]
        if not code.size:
            break
        total = np.bincount(code, weights=weight[:-1][real])
        best = int(total.argmax())
        if total[best] < 2:
            break
        pair = divmod(best, vocab_size)
        hit = np.flatnonzero((left == pair[0]) & (right == pair[1]))
        if pair[0] == pair[1]:  # in a run x x x only every other start merges
            hit = hit[_every_other(hit)]
        new = alphabet + len(merges)
        merges.append((int(pair[0]), int(pair[1])))
        corpus[hit] = new
        keep = np.ones(len(corpus), bool)
        keep[hit + 1] = False
        corpus, weight = corpus[keep], weight[keep]
    return merges
