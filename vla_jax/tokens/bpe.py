"""Byte-pair encoding of rows of small integers. Numpy alone; with numba installed the same ids come several times faster."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import warnings

import numpy as np

_TABLE_SIZE = 4096  # up to here all pairs fit a table of 64 MiB
_NONE = 65535  # the rank of a pair that does not merge


@dataclasses.dataclass(frozen=True)
class Bpe:
    """Merges in the order they were learned: wherever `left[i] right[i]` stand side by side, `result[i]` may take their place.

    size: number of ids; i32[merges] each. Of all merges that apply anywhere, the earliest learned is done first, and of its places the
    leftmost (Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units", 2016). Vocabularies above 4,096 ids are
    merged by plain Python, many times more slowly.
    """

    size: int
    left: np.ndarray
    right: np.ndarray
    result: np.ndarray

    def encode(self, rows: np.ndarray, start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ragged rows in one array, ids i32[l] and where each row begins i64[n + 1] -> the same, merged.

        An id of `size` is a wall: nothing merges across it, and it is left out of the result. Raises: ValueError for other ids.
        """
        rows, start = np.ascontiguousarray(rows, np.int32), np.ascontiguousarray(start, np.int64)
        if len(rows) and not 0 <= rows.min() <= rows.max() <= self.size:  # compiled code would read beyond its table
            raise ValueError(f"ids {rows.min()}..{rows.max()} are not all in 0..{self.size}")
        small = self.size <= _TABLE_SIZE and 0 < len(self.left) < 1 << 15
        if small and (merge := _compiled()) is not None:
            return merge(rows, start, self.size, self.left, self.right, self.result, self._ranks)
        if small and self._ordered and len(start) > 4:
            return _merge_rows(rows, start, self._ranks, self.result)
        parts = [_merge(rows[a:b].tolist(), self._rank, self.result, self.size) for a, b in zip(start, start[1:])]
        return np.array([i for part in parts for i in part], np.int32), _starts([len(part) for part in parts])

    @functools.cached_property
    def expanded(self) -> tuple[np.ndarray, np.ndarray]:
        """(i32[total], i64[size + 1]): what id i stands for is the first array from the second's [i] to its [i + 1]."""
        made: dict[int, tuple[int, ...]] = {}
        for left, right, result in zip(self.left.tolist(), self.right.tolist(), self.result.tolist()):
            made.setdefault(result, made.get(left, (left,)) + made.get(right, (right,)))
        spelt = [made.get(i, (i,)) for i in range(self.size)]
        return np.array([s for part in spelt for s in part], np.int32), _starts([len(part) for part in spelt])

    @functools.cached_property
    def _rank(self) -> dict[tuple[int, int], int]:
        pairs = list(zip(self.left.tolist(), self.right.tolist()))
        return {pair: i for i, pair in enumerate(pairs)}  # of a pair that stands there twice the last counts, as in HF's `tokenizers`

    @functools.cached_property
    def _ordered(self) -> bool:
        """Whether no merge makes an id that an earlier one needs: then each merge can be done everywhere before the next."""
        last = np.full(self.size, -1)
        last[self.result] = np.arange(len(self.result))
        return bool((np.maximum(last[self.left], last[self.right]) < np.arange(len(self.left))).all())

    @functools.cached_property
    def _ranks(self) -> np.ndarray:
        """u16[size + 1, size + 1]: rank of a pair's merge, or _NONE."""
        table = np.full((self.size + 1,) * 2, _NONE, np.uint16)
        for (left, right), rank in self._rank.items():
            table[left, right] = rank
        return table


@functools.cache
def _compiled():
    """The compiled merge, or None where numba is not installed or does not work."""
    if importlib.util.find_spec("numba") is None:
        return None
    one = np.zeros(2, np.int32), np.array([0, 2]), 2, *(np.array([i], np.int32) for i in (0, 0, 1)), np.full((3, 3), _NONE, np.uint16)
    for cache in (True, False):  # what is compiled is kept in a folder, if there is one
        try:
            from vla_jax.tokens import bpe_numba

            merge = bpe_numba.compiled(cache=cache)
            merge(*one)
            return merge
        except (Exception, SystemExit) as e:
            why = e
    warnings.warn(f"numba does not work here ({type(why).__name__}: {why}): action tokens are encoded by numpy, more slowly", stacklevel=2)
    return None


def _starts(lengths) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def _merge(ids: list[int], ranks: dict[tuple[int, int], int], result: np.ndarray, wall: int) -> list[int]:
    none = len(ranks) + len(result) + 1
    rank = [ranks.get(p, none) for p in zip(ids, ids[1:])]  # of the pair that begins at each place
    while rank:
        best = min(rank)
        if best == none:
            break
        at, new = rank.index(best), int(result[best])
        while at >= 0:
            ids[at : at + 2] = [new]
            del rank[at]
            if at:
                rank[at - 1] = ranks.get((ids[at - 1], new), none)
            if at < len(rank):
                rank[at] = ranks.get((new, ids[at + 1]), none)
            if min(rank[at - 1] if at else none, rank[at] if at < len(rank) else none) < best:
                break  # what was just made is needed by an earlier merge
            try:
                at = rank.index(best, at)
            except ValueError:
                break
    return [i for i in ids if i != wall]


def _merge_rows(ids: np.ndarray, start: np.ndarray, ranks: np.ndarray, result: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`_merge` of all rows at once: in every round each row merges its own earliest learned pair, everywhere."""
    n, wide = len(start) - 1, len(ranks)
    ranks, wall = ranks.reshape(-1), wide - 1
    begin = start[:-1] + np.arange(n)  # of each row, one wall behind each
    seq = np.insert(ids, start[1:], wall)
    row = np.repeat(np.arange(n, dtype=np.int32), np.diff(start) + 1)
    while len(seq) > 1:
        rank = ranks.take(seq[:-1].astype(np.int64) * wide + seq[1:])
        best = np.minimum.reduceat(rank, np.minimum(begin, len(rank) - 1))  # the last row may be its wall alone
        hit = np.flatnonzero((rank == best.take(row[:-1])) & (rank != _NONE))
        if not hit.size:
            break
        hit = hit[_every_other(hit)]
        seq[hit] = result[rank[hit]]
        keep = np.ones(len(seq), bool)
        keep[hit + 1] = False
        begin = begin - np.searchsorted(hit, begin)
        seq, row = seq[keep], row[keep]
    real = seq != wall
    return seq[real], _starts(np.bincount(row[real], minlength=n))


def _every_other(hit: np.ndarray) -> np.ndarray:
    """bool[n] for ascending places of one pair: in a run x x x x only the first, third, .. can merge."""
    run = np.cumsum(np.concatenate([[0], np.diff(hit) != 1]))
    return (hit - hit[np.searchsorted(run, run)]) % 2 == 0


def learn(rows: np.ndarray, start: np.ndarray, *, alphabet: int, size: int) -> Bpe:
    """Merges from a corpus of ragged rows (as `Bpe.encode` takes them) of ids below `alphabet`: the most frequent pair becomes a new
    id, again and again, until there are `size` ids or no pair occurs twice. Ties go to the smallest pair, so it is deterministic."""
    spelt, weight = _distinct(rows, start)
    stop = size  # between rows: no merge crosses it
    corpus = np.concatenate([np.append(s, stop) for s in spelt]).astype(np.int64) if spelt else np.zeros(0, np.int64)
    weights = np.repeat(weight, [len(s) + 1 for s in spelt])
    wide = size + 1
    count = np.bincount(corpus[:-1] * wide + corpus[1:], weights=weights[:-1], minlength=wide * wide).astype(np.int64)
    count = count.reshape(wide, wide)
    count[stop], count[:, stop] = 0, 0
    merges: list[tuple[int, int]] = []
    while alphabet + len(merges) < size:
        best = int(count.argmax())
        left, right = divmod(best, wide)
        if count[left, right] < 2:
            break
        hit = np.flatnonzero((corpus[:-1] == left) & (corpus[1:] == right))
        if left == right:
            hit = hit[_every_other(hit)]
        new = alphabet + len(merges)
        merges.append((left, right))
        touched = np.unique(np.concatenate([hit - 1, hit, hit + 1]))  # pairs that change, by where they begin
        touched = touched[(touched >= 0) & (touched < len(corpus) - 1)]
        np.subtract.at(count, (corpus[touched], corpus[touched + 1]), weights[touched])
        corpus[hit] = new
        keep = np.ones(len(corpus), bool)
        keep[hit + 1] = False
        at = hit - np.arange(len(hit))  # where the new ids stand once the others have gone
        corpus, weights = corpus[keep], weights[keep]
        touched = np.unique(np.concatenate([at - 1, at]))
        touched = touched[(touched >= 0) & (touched < len(corpus) - 1)]
        np.add.at(count, (corpus[touched], corpus[touched + 1]), weights[touched])
        count[stop], count[:, stop] = 0, 0
    left, right = np.array(merges, np.int32).reshape(-1, 2).T
    return Bpe(alphabet + len(merges), left.copy(), right.copy(), np.arange(alphabet, alphabet + len(merges), dtype=np.int32))


def _distinct(rows: np.ndarray, start: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """Each different row once, in a fixed order, and how often it occurs."""
    seen: dict[bytes, int] = {}
    for a, b in zip(start[:-1].tolist(), start[1:].tolist()):
        key = np.ascontiguousarray(rows[a:b], np.int32).tobytes()
        seen[key] = seen.get(key, 0) + 1
    keys = sorted(seen)
    return [np.frombuffer(key, np.int32) for key in keys], np.array([seen[key] for key in keys], np.int64)
