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
_SCALES, _FARTHEST, LARGEST_VOCAB, _LONGEST = (1e-6, 1e6), 1 << 30, 1 << 16, 1 << 16
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
    """Chunks of any real dtype [n k a] as floats, one behind another in memory. Raises: ValueError for another rank, chunks without
    numbers, NaN or infinity."""
    chunks = np.asarray(chunks)
    if chunks.ndim != 3 or 0 in chunks.shape[1:] or chunks.dtype.kind not in "fiub" and chunks.dtype.name != "bfloat16":
        raise ValueError(f"action chunks must be numbers [chunks steps dims], got {chunks.dtype} of shape {chunks.shape}")
    # in another order of memory a matrix product may round otherwise
    chunks = np.ascontiguousarray(chunks if chunks.dtype in (np.float32, np.float64) else chunks.astype(np.float64))
    if chunks.size and not max(chunks.max(), -chunks.min()) <= _HUGE:  # NaN, too, is not
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
    out = _forward(k, scale) @ chunks
    return np.rint(out, out=out).reshape(n, k * a)


@functools.lru_cache(maxsize=64)
def _forward(steps: int, scale: float) -> np.ndarray:
    return dct_matrix(steps) * scale


@functools.lru_cache(maxsize=64)
def _inverse(steps: int, scale: float) -> np.ndarray:
    return dct_matrix(steps).T / scale


def restore(whole: np.ndarray, scale: float, steps: int, dims: int) -> np.ndarray:
    """Coefficients [n, steps*dims] -> chunks f32[n steps dims], the inverse of `coefficients` up to rounding."""
    return (_inverse(steps, scale) @ whole.reshape(-1, steps, dims).astype(np.float64, copy=False)).astype(np.float32)


def check_policy(malformed: str, last, shape: tuple[int, int, int]) -> None:
    """Refuses what would go wrong at the first malformed sequence only. shape: of the chunks [n k a].

    Raises: ValueError for an unknown policy, no numbers in a chunk, or `last` that is not finite [n a] where it is given or needed.
    """
    n, steps, dims = shape
    if malformed not in MALFORMED:
        raise ValueError(f"malformed is {malformed!r}; allowed: {', '.join(MALFORMED)}")
    if steps < 1 or dims < 1:
        raise ValueError(f"a chunk of {steps} steps x {dims} dims holds no number")
    if malformed == "hold" and (last is None or np.shape(last) != (n, dims) or not np.isfinite(np.asarray(last, np.float64)).all()):
        raise ValueError(f"malformed='hold' needs last=: of each chunk the {dims} finite numbers of the last action, normalised")


def settle(chunk: np.ndarray, why: str, malformed: str, last) -> np.ndarray:
    """What a caller gets for ids that are malformed because of `why`: the repaired `chunk` [k a], or by policy `last` f32[a] repeated.

    Raises: MalformedTokens under policy `raise`.
    """
    if malformed == "raise":
        raise MalformedTokens(why)
    return chunk if malformed == "repair" else np.broadcast_to(np.asarray(last, np.float32), chunk.shape)


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
        return self._encode(np.asarray(chunk)[None])[0]

    def encode_batch(self, chunks: np.ndarray) -> list[np.ndarray]:
        """[n k a] -> n times i32[t]; the same ids as `encode` chunk by chunk."""
        return [ids for part in _blocks(np.asarray(chunks)) for ids in split(*self._encode(part))]

    def _encode(self, chunks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        whole = coefficients(chunks, self.scale)
        np.clip(whole, self.min_coef, self.max_coef, out=whole)
        whole -= self.min_coef
        n, numbers = whole.shape
        return self._bpe.encode(whole.astype(np.int32).reshape(-1), np.arange(n + 1) * numbers)

    def decode(self, ids: np.ndarray, *, steps: int, dims: int, malformed: str = "repair", last=None) -> tuple[np.ndarray, bool]:
        """i32[t] -> (f32[steps dims], whether the ids were a chunk of this shape).

        If they were not, what comes back is as `malformed` says. repair: unknown ids are passed over, and what is left is cut or filled
        up with zero coefficients, those of the highest frequencies, to the nearest valid length; hold: `last` f32[dims] repeated;
        raise: MalformedTokens. Raises: ValueError, see `check_policy`.
        """
        ids = np.asarray(ids)
        if (
            malformed == "repair"
            and ids.ndim == 1
            and ids.size
            and ids.dtype.kind in "iu"
            and 0 <= ids.min() <= ids.max() < self.vocab_size
        ):
            whole = np.concatenate([self._spelt[i] for i in ids.tolist()])  # the same numbers as below with less around them
            if len(whole) == steps * dims:
                return restore(whole[None], self.scale, steps, dims)[0], True
        chunks, valid = self.decode_batch([ids], steps=steps, dims=dims, malformed=malformed, last=None if last is None else [last])
        return chunks[0], bool(valid[0])

    def decode_batch(self, ids, *, steps: int, dims: int, malformed: str = "repair", last=None) -> tuple[np.ndarray, np.ndarray]:
        """n times i32[t] -> (f32[n steps dims], valid bool[n]); the same as `decode` one by one. last: f32[n dims]."""
        check_policy(malformed, last, (len(ids), steps, dims))
        flat, start = joined(ids)
        n, want, size = len(start) - 1, steps * dims, self.vocab_size
        known = (flat >= 0) & (flat < size)
        if known.all():
            ends = np.concatenate([[0], np.cumsum(self.lengths[flat])])[start]
            numbers = np.diff(ends)
            valid = numbers == want
        else:
            row = np.repeat(np.arange(n), np.diff(start))
            numbers = np.bincount(row[known], weights=self.lengths[flat[known]], minlength=n)
            valid = (numbers == want) & (np.bincount(row[~known], minlength=n) == 0)
        if valid.all():
            whole = spell_out(flat, self._bpe.expanded).reshape(n, want).astype(np.float64)
        else:
            whole = np.full((n, want), -float(self.min_coef))
            for i, own in enumerate(split(flat, start)):
                there = spell_out(own[(own >= 0) & (own < size)], self._bpe.expanded)[:want]
                whole[i, : len(there)] = there
        whole += self.min_coef
        chunks = np.concatenate([restore(w, self.scale, steps, dims) for w in _blocks(whole)])
        for i in np.flatnonzero(~valid).tolist():
            why = f"{int(start[i + 1] - start[i])} tokens are {int(numbers[i])} coefficients, {steps} x {dims} = {want} were expected"
            if not known[start[i] : start[i + 1]].all():
                why += f"; ids outside 0..{size - 1} are among them"
            chunks[i] = settle(chunks[i], why, malformed, None if last is None else last[i])
        return chunks, valid

    @functools.cached_property
    def _spelt(self) -> list[np.ndarray]:
        """The coefficients f64 of each id."""
        return split(self._bpe.expanded[0].astype(np.float64) + self.min_coef, self._bpe.expanded[1])

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
    """Raises: UserError for numbers that are no tokenizer's; whatever odd content raises (files.from_json makes it a UserError)."""
    scale, low, high = body["scale"], whole_number(body["min_coef"]), whole_number(body["max_coef"])
    merges = tuple((whole_number(a), whole_number(b)) for a, b in body["merges"])
    made = FastTokenizer(float(scale), low, high, merges)
    if not (_SCALES[0] <= made.scale <= _SCALES[1] and -_FARTHEST <= low <= high <= _FARTHEST and made.vocab_size <= LARGEST_VOCAB):
        raise UserError(f"{where}: scale {made.scale:g}, coefficients {low}..{high} and {made.vocab_size} ids are no tokenizer's")
    if any(not (0 <= a < made.alphabet + i and 0 <= b < made.alphabet + i) for i, (a, b) in enumerate(merges)):
        raise UserError(f"{where}: a merge refers to an id that does not exist yet")
    lengths = [1] * made.alphabet
    for a, b in merges:
        lengths.append(lengths[a] + lengths[b])
        if lengths[-1] > _LONGEST:
            raise UserError(f"{where}: id {len(lengths) - 1} stands for more than {_LONGEST} coefficients: no chunk has so many")
    return made


def whole_number(value) -> int:
    """Raises: TypeError for what only looks like one."""
    if type(value) is not int:
        raise TypeError(f"{value!r} is not a whole number")
    return value


def _blocks(chunks: np.ndarray):
    """Some chunks at a time; of none, none once."""
    step = max(1, _BLOCK // max(1, int(np.prod(chunks.shape[1:]))))
    return (chunks[at : at + step] for at in range(0, max(1, len(chunks)), step))


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
    if max(-low, high) > _FARTHEST or not _SCALES[0] <= scale <= _SCALES[1]:
        raise UserError(
            f"coefficients {low}..{high} at scale {scale:g}: the chunks are not normalised to about [-1, 1], or the scale is none"
        )
    if alphabet > vocab_size:
        raise UserError(
            f"action_vocab {vocab_size} is below the {alphabet} coefficients in use at scale {scale:g}. Raise tokens.action_vocab or lower tokens.action_scale."
        )
    rows = np.concatenate([(w - low).astype(np.int32).reshape(-1) for w in whole])
    start = np.concatenate([[0], np.cumsum(np.concatenate([np.full(len(w), w.shape[1]) for w in whole]))])
    found = bpe.learn(rows, start, alphabet=alphabet, size=vocab_size)
    return FastTokenizer(scale, low, high, tuple(zip(found.left.tolist(), found.right.tolist())))
