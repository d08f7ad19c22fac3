"""Bins: every number of a chunk becomes one token; and states written as bins, as pi0-FAST's prompt has them. Numpy only.

Sources: Brohan et al., "RT-2", 2023, and Kim et al., "OpenVLA", 2024 (256 uniform bins of the range between the 1st and the
99th percentile); openpi's FASTTokenizer for states.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from vla_jax.tokens.actions import LARGEST_VOCAB, check_policy, checked, joined, settle, split
from vla_jax.tokens.grammar import Grammar
from vla_jax.types import UserError

FORMAT = "vla_jax.bins.1"
_STATE_EDGES = np.linspace(-1, 1, 257)[:-1]


@dataclasses.dataclass(frozen=True)
class BinTokenizer:
    """Id i stands for the numbers from edges[i] to edges[i + 1], and decodes to centers[i]; the outer edges clamp. One token a
    number, step by step. edges: ascending, one more than centers."""

    edges: tuple[float, ...]
    centers: tuple[float, ...]

    @property
    def vocab_size(self) -> int:
        return len(self.centers)

    @functools.cached_property
    def _inner(self) -> np.ndarray:
        return np.array(self.edges[1:-1], np.float64)

    def clamps(self, chunks: np.ndarray) -> tuple[int, int]:
        """How many numbers of chunks [n k a] lie (below, above) the outer edges."""
        chunks = checked(chunks)
        return int((chunks < self.edges[0]).sum()), int((chunks > self.edges[-1]).sum())

    def encode(self, chunk: np.ndarray) -> np.ndarray:
        """Normalised actions [k a] of any real dtype -> i32[k*a]. Raises: ValueError, see actions.checked."""
        return self.encode_batch(np.asarray(chunk)[None])[0]

    def encode_batch(self, chunks: np.ndarray) -> list[np.ndarray]:
        """[n k a] -> n times i32[k*a]."""
        chunks = checked(chunks)
        return list(np.searchsorted(self._inner, chunks, side="right").astype(np.int32).reshape(len(chunks), np.prod(chunks.shape[1:])))

    def decode(self, ids: np.ndarray, *, steps: int, dims: int, malformed: str = "repair", last=None) -> tuple[np.ndarray, bool]:
        """i32[t] -> (f32[steps dims], whether the ids were a chunk of this shape).

        If they were not: repair passes over unknown ids, cuts what is too long, and lets the last whole action stand for the steps that
        are missing (the middle of the range where there is none); hold and raise as FastTokenizer.decode.
        """
        chunks, valid = self.decode_batch([ids], steps=steps, dims=dims, malformed=malformed, last=None if last is None else [last])
        return chunks[0], bool(valid[0])

    def decode_batch(self, ids, *, steps: int, dims: int, malformed: str = "repair", last=None) -> tuple[np.ndarray, np.ndarray]:
        """n times i32[t] -> (f32[n steps dims], valid bool[n]). last: f32[n dims]."""
        check_policy(malformed, last, (len(ids), steps, dims))
        flat, start = joined(ids)
        want, centers = steps * dims, np.array(self.centers, np.float32)
        out, valid = np.empty((len(start) - 1, steps, dims), np.float32), np.zeros(len(start) - 1, bool)
        for i, own in enumerate(split(flat, start)):
            known = own[(own >= 0) & (own < self.vocab_size)]
            valid[i] = len(known) == len(own) == want
            values = centers[known[:want]]
            whole = len(values) // dims
            out[i] = values[(whole - 1) * dims : whole * dims] if whole else (self.edges[0] + self.edges[-1]) / 2
            out[i].reshape(-1)[: len(values)] = values
            if not valid[i]:
                why = f"{len(own)} tokens, of which {len(known)} are bins, are no chunk of {steps} x {dims} = {want}"
                out[i] = settle(out[i], why, malformed, None if last is None else last[i])
        return out, valid

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """i32[vocab_size]: how many numbers each id stands for."""
        return np.ones(self.vocab_size, np.int32)

    @functools.cached_property
    def grammar(self) -> Grammar:
        return Grammar(after=np.zeros((1, self.vocab_size), np.int32), count=self.lengths[None])

    def to_json(self) -> dict:
        return {"format": FORMAT, "edges": list(self.edges), "centers": list(self.centers)}


def from_json(body: dict, where: str) -> BinTokenizer:
    """Raises: UserError when the edges are not finite or do not ascend, or a centre lies outside its bin."""
    edges, centers = np.array(body["edges"], np.float64), np.array(body["centers"], np.float64)
    good = 1 < len(edges) == len(centers) + 1 <= LARGEST_VOCAB + 1 and np.isfinite(edges).all() and (np.diff(edges) > 0).all()
    if not good or not ((edges[:-1] <= centers) & (centers <= edges[1:])).all():
        raise UserError(
            f"{where}: {len(edges)} edges and {len(centers)} centres are no bins: edges must ascend, each centre lie between two"
        )
    return BinTokenizer(tuple(edges.tolist()), tuple(centers.tolist()))


def uniform(bins: int = 256, low: float = -1.0, high: float = 1.0) -> BinTokenizer:
    """Bins of one width from low to high."""
    edges = np.linspace(low, high, bins + 1)
    return BinTokenizer(tuple(edges.tolist()), tuple(((edges[1:] + edges[:-1]) / 2).tolist()))


def quantile(chunks, bins: int = 256) -> BinTokenizer:
    """Bins that hold about equally many of the numbers of all chunks, so that they are fine where robots mostly are; a bin decodes to
    the mean of its numbers. A value that fills four bins by itself (a gripper's) has one of its own, and all values have if they
    are no more than `bins`: there may be fewer.

    chunks: normalised [k a] each, of any shapes. Raises: UserError when there is no number.
    """
    numbers = np.concatenate([np.zeros(0), *(checked(np.asarray(c)[None]).reshape(-1) for c in chunks)])
    if not len(numbers):
        raise UserError("no action chunks to fit bins on")
    values, count = np.unique(numbers, return_counts=True)
    if len(values) <= bins:
        which = np.arange(len(values))
    else:
        often = count >= 4 * len(numbers) / bins  # at most a quarter of the bins
        middle = (np.cumsum(count) - count / 2) / len(numbers)
        which = np.floor(middle * max(1, bins - 2 * np.count_nonzero(often)))
        new = (np.diff(which) > 0) | often[1:] | often[:-1]
        which = np.concatenate([[0], np.cumsum(new)])
    first = np.flatnonzero(np.diff(which)) + 1
    inner = values[first - 1] + (values[first] - values[first - 1]) / 2
    margin = max(1e-6, 1e-6 * np.abs(values).max())
    edges = np.concatenate([[values[0] - margin], inner, [values[-1] + margin]])
    centers = np.bincount(which, weights=values * count) / np.bincount(which, weights=count)
    return BinTokenizer(tuple(edges.tolist()), tuple(np.clip(centers, edges[:-1], edges[1:]).tolist()))


def state_bins(state: np.ndarray) -> np.ndarray:
    """Normalised state f32[s] -> i64[s], the bins 0..255 of [-1, 1]; -1 below -1 and 255 from 1 on, as openpi has it.
    Raises: ValueError for NaN, which has no bin."""
    if np.isnan(state).any():
        raise ValueError(f"the state holds NaN: {np.asarray(state).tolist()}")
    return np.digitize(np.asarray(state), _STATE_EDGES) - 1


def state_text(state: np.ndarray) -> str:
    """Normalised state f32[s] -> its bins, joined by spaces."""
    return " ".join(map(str, state_bins(state).tolist()))
