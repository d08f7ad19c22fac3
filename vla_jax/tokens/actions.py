"""FAST action tokens: a chunk's discrete cosine transform, rounded, then byte-pair encoded. Numpy only.

Source: Pertsch et al., "FAST: Efficient Action Tokenization for Vision-Language-Action Models", 2025. The number of
steps and dimensions is passed at each call, never remembered, so one tokenizer serves robots of any shape.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from vla_jax.tokens import bpe
from vla_jax.tokens.bpe import Bpe
from vla_jax.tokens.grammar import Grammar
from vla_jax.types import UserError

FORMAT = "vla_jax.fast.1"
MALFORMED = ("repair", "hold", "raise")
_HUGE = 1e30
_BLOCK = 1 << 19  # numbers worked on at once: more would leave a core's cache


class MalformedTokens(ValueError):
    """Ids that are no chunk of the wanted shape; raised where a caller of `decode` asks for it."""


@functools.lru_cache(maxsize=64)
def dct_matrix(k: int) -> np.ndarray:
    """The orthonormal DCT-II as f64[k k]: coefficients = matrix @ signal; its transpose inverts it."""
    n = np.arange(k)
    matrix = np.cos(np.pi * (2 * n[None] + 1) * n[:, None] / (2 * k)) * np.sqrt(2 / k)
    matrix[0] /= np.sqrt(2)
    return matrix


def checked(chunks: np.ndarray) -> np.ndarray:
    """Chunks of any real dtype [n k a] as floats. Raises: ValueError for another rank, no number at all, NaN or infinity."""
    chunks = np.asarray(chunks)
    if chunks.ndim != 3 or not chunks.size or chunks.dtype.kind not in "fiub":
        raise ValueError(f"action chunks must be numbers [chunks steps dims], got {chunks.dtype} of shape {chunks.shape}")
    chunks = chunks if chunks.dtype in (np.float32, np.float64) else chunks.astype(np.float64)
    if not max(chunks.max(), -chunks.min()) <= _HUGE:  # NaN, too, is not
        if not np.isfinite(chunks).all():
            raise ValueError(f"action chunks must be finite; {np.count_nonzero(~np.isfinite(chunks))} of {chunks.size} numbers are not")
        chunks = np.clip(chunks, -_HUGE, _HUGE)  # so that sums stay finite
    return chunks


def coefficients(chunks: np.ndarray, scale: float) -> np.ndarray:
    """[n k a] -> f64[n, k*a]: the rounded, scaled transform along time, frequency-major, whole numbers.

    Computed in float64 whatever the input, so that a number rounds alike alone and in a batch. Raises: ValueError, see `checked`.
    """
    chunks = checked(chunks)
    n, k, a = chunks.shape
    out = (dct_matrix(k) * scale) @ chunks
    return np.rint(out, out=out).reshape(n, k * a)


def restore(whole: np.ndarray, scale: float, steps: int, dims: int) -> np.ndarray:
    """Coefficients [n, steps*dims] -> chunks f32[n steps dims], the inverse of `coefficients` up to rounding."""
    return ((dct_matrix(steps).T / scale) @ whole.reshape(-1, steps, dims).astype(np.float64, copy=False)).astype(np.float32)


def settle(chunk: np.ndarray, why: str, malformed: str, last) -> np.ndarray:
    """What a caller gets for ids that are malformed because of `why`: the repaired `chunk` [k a], or by policy `last` f32[a] repeated.

    Raises: MalformedTokens under policy `raise`; ValueError for an unknown policy, or `hold` without `last`.
    """
    if malformed not in MALFORMED:
        raise ValueError(f"malformed is {malformed!r}; allowed: {', '.join(MALFORMED)}")
    if malformed == "raise":
        raise MalformedTokens(why)
    if malformed == "repair":
        return chunk
    if last is None or np.shape(last) != chunk.shape[1:]:
        raise ValueError(f"malformed='hold' needs last=: the {chunk.shape[1]} numbers of the last action, normalised")
    return np.broadcast_to(np.asarray(last, np.float32), chunk.shape).copy()


def joined(ids) -> tuple[np.ndarray, np.ndarray]:
    """Sequences of ids -> (all in one array i64[t], where each begins i64[n + 1]). Raises: ValueError for what is not whole numbers."""
    parts = [np.asarray(i) for i in ids]
    if any(p.ndim != 1 or p.size and p.dtype.kind not in "iu" for p in parts):
        raise ValueError("action tokens must be sequences of whole numbers")
    start = np.concatenate([[0], np.cumsum([len(p) for p in parts], dtype=np.int64)])
    return np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64), start


def split(flat: np.ndarray, start: np.ndarray) -> list[np.ndarray]:
    at = start.tolist()
    return [flat[a:b] for a, b in zip(at, at[1:])]


def spell_out(ids: np.ndarray, expanded: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Known ids i64[t] -> all that they stand for, one after another."""
    symbols, start = expanded
    length = (start[1:] - start[:-1])[ids]
    end = np.cumsum(length)
    return symbols[np.repeat(start[ids] - end + length, length) + np.arange(end[-1] if len(end) else 0)]


@dataclasses.dataclass(frozen=True)
class FastTokenizer:
    """Ids 0..(max_coef - min_coef) are single coefficients; id `alphabet + i` is the i-th merge of two earlier ids.

    merges: pairs in the order they were learned. Coefficients beyond the fitted range are clamped to it, on both sides.
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
    def _bpe(self) -> Bpe:
        left, right = np.array(self.merges, np.int32).reshape(-1, 2).T
        return Bpe(self.vocab_size, left.copy(), right.copy(), np.arange(self.alphabet, self.vocab_size, dtype=np.int32))

    def clamps(self, chunks: np.ndarray) -> tuple[int, int]:
        """How many coefficients of chunks [n k a] lie (below, above) the fitted range and are clamped to it."""
        whole = coefficients(chunks, self.scale)
        return int((whole < self.min_coef).sum()), int((whole > self.max_coef).sum())

    def encode(self, chunk: np.ndarray) -> np.ndarray:
        """Normalised actions [k a] of any real dtype -> i32[t]. Raises: ValueError, see `checked`."""
        return self.encode_batch(np.asarray(chunk)[None])[0]

    def encode_batch(self, chunks: np.ndarray) -> list[np.ndarray]:
        """[n k a] -> n times i32[t]; the same ids as `encode` chunk by chunk."""
        out: list[np.ndarray] = []
        chunks = np.asarray(chunks)
        for part in _blocks(chunks):
            whole = coefficients(part, self.scale)
            np.clip(whole, self.min_coef, self.max_coef, out=whole)
            whole -= self.min_coef
            n, numbers = whole.shape
            out += split(*self._bpe.encode(whole.astype(np.int32).reshape(-1), np.arange(n + 1) * numbers))
        return out

    def decode(self, ids: np.ndarray, *, steps: int, dims: int, malformed: str = "repair", last=None) -> tuple[np.ndarray, bool]:
        """i32[t] -> (f32[steps dims], whether the ids were a chunk of this shape).

        If they were not, what comes back is as `malformed` says. repair: unknown ids are passed over, and what is left is cut or filled
        up with zero coefficients, those of the highest frequencies, to the nearest valid length; hold: `last` f32[dims] repeated;
        raise: MalformedTokens.
        """
        chunks, valid = self.decode_batch([ids], steps=steps, dims=dims, malformed=malformed, last=None if last is None else [last])
        return chunks[0], bool(valid[0])

    def decode_batch(self, ids, *, steps: int, dims: int, malformed: str = "repair", last=None) -> tuple[np.ndarray, np.ndarray]:
        """n times i32[t] -> (f32[n steps dims], valid bool[n]); the same as `decode` one by one. last: f32[n dims]."""
        flat, start = joined(ids)
        n, want, size = len(start) - 1, steps * dims, self.vocab_size
        known = (flat >= 0) & (flat < size)
        numbers = np.bincount(np.repeat(np.arange(n), np.diff(start))[known], weights=self.lengths[flat[known]], minlength=n)
        valid = numbers == want
        if not known.all():
            valid &= np.bincount(np.repeat(np.arange(n), np.diff(start))[~known], minlength=n) == 0
        whole = np.zeros((n, want), np.float64)
        whole[valid] = spell_out(flat[np.repeat(valid, np.diff(start))], self._bpe.expanded).reshape(-1, want) + self.min_coef
        bad = np.flatnonzero(~valid).tolist()
        for i in bad:
            own = flat[start[i] : start[i + 1]][known[start[i] : start[i + 1]]]
            there = spell_out(own, self._bpe.expanded)[:want]
            whole[i, : len(there)] = there + self.min_coef
        chunks = (
            np.concatenate([restore(w, self.scale, steps, dims) for w in _blocks(whole)]) if n else np.zeros((0, steps, dims), np.float32)
        )
        for i in bad:
            why = f"{int(start[i + 1] - start[i])} tokens are {int(numbers[i])} coefficients, {steps} x {dims} = {want} were expected"
            if not known[start[i] : start[i + 1]].all():
                why += f"; ids outside 0..{size - 1} are among them"
            chunks[i] = settle(chunks[i], why, malformed, None if last is None else last[i])
        return chunks, valid

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """i32[vocab_size]: how many coefficients each id stands for."""
        return np.diff(self._bpe.expanded[1]).astype(np.int32)

    @functools.cached_property
    def grammar(self) -> Grammar:
        """Any id may follow any other, as long as the coefficients do not become too many."""
        return Grammar(after=np.zeros((1, self.vocab_size), np.int32), count=self.lengths[None])

    def to_json(self) -> dict:
        body = {"format": FORMAT, "scale": self.scale, "min_coef": self.min_coef, "max_coef": self.max_coef}
        return body | {"merges": [list(m) for m in self.merges]}


def from_json(body: dict, where: str) -> FastTokenizer:
    """Raises: UserError when a merge names an id that does not exist yet, or the range or scale is none."""
    merges = tuple((int(a), int(b)) for a, b in body["merges"])
    made = FastTokenizer(float(body["scale"]), int(body["min_coef"]), int(body["max_coef"]), merges)
    if not (0 < made.scale < np.inf and made.alphabet > 0):
        raise UserError(f"{where}: scale {made.scale:g} and coefficients {made.min_coef}..{made.max_coef} are no tokenizer's")
    if any(not (0 <= a < made.alphabet + i and 0 <= b < made.alphabet + i) for i, (a, b) in enumerate(merges)):
        raise UserError(f"{where}: a merge refers to an id that does not exist yet")
    return made


def _blocks(chunks: np.ndarray):
    """Some chunks at a time."""
    step = max(1, _BLOCK // max(1, int(np.prod(chunks.shape[1:]))))
    return (chunks[at : at + step] for at in range(0, len(chunks), step))


def fit(chunks, *, vocab_size: int, scale: float, margin: int = 2) -> FastTokenizer:
    """Learns range and merges from normalised chunks [k a] each, of any k and a: those of one robot or of many.

    margin: coefficients by which the range is widened on both sides, so that held-out data is seldom clamped.
    Raises: UserError when the range alone needs more ids than `vocab_size`; ValueError, see `checked`.
    """
    by_shape: dict[tuple[int, ...], list] = {}
    for chunk in chunks:
        by_shape.setdefault(np.shape(chunk), []).append(chunk)
    if not by_shape:
        raise UserError("no action chunks to fit a tokenizer on")
    whole = [coefficients(np.stack(group), scale) for group in by_shape.values()]
    low, high = int(min(w.min() for w in whole)) - margin, int(max(w.max() for w in whole)) + margin
    alphabet = high - low + 1
    if alphabet > vocab_size:
        raise UserError(
            f"action_vocab {vocab_size} is below the {alphabet} coefficients in use at scale {scale:g}. Raise tokens.action_vocab or lower tokens.action_scale."
        )
    rows = np.concatenate([(w - low).astype(np.int32).reshape(-1) for w in whole])
    start = np.concatenate([[0], np.cumsum(np.concatenate([np.full(len(w), w.shape[1]) for w in whole]))])
    found = bpe.learn(rows, start, alphabet=alphabet, size=vocab_size)
    return FastTokenizer(scale, low, high, tuple(zip(found.left.tolist(), found.right.tolist())))
