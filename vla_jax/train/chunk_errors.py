"""What recorded and predicted action chunks say about a policy, in robot units: by unit, dimension, step ahead and instruction. Numpy only."""

from __future__ import annotations

import collections
import dataclasses

import numpy as np

from vla_jax.types import Dim


@dataclasses.dataclass(frozen=True)
class Chunks:
    """n frames of one dataset: recorded and predicted f32[n k a], mask bool[n k] (steps before the episode's end), valid bool[n] (well-formed
    sequences), prompts, and the mean training action f32[a]. Binary numbers are compared as the policy gives them, 0 or 1."""

    dims: tuple[Dim, ...]
    recorded: np.ndarray
    predicted: np.ndarray
    mask: np.ndarray
    valid: np.ndarray
    prompts: tuple[str, ...]
    mean: np.ndarray

    def of(self, keep: np.ndarray) -> Chunks:
        """Those frames alone."""
        cut = {key: getattr(self, key)[keep] for key in ("recorded", "predicted", "mask", "valid")}
        return dataclasses.replace(self, **cut, prompts=tuple(p for p, k in zip(self.prompts, keep) if k))


def by_unit(error: np.ndarray, dims: tuple[Dim, ...]) -> dict[str, float]:
    """f[a] mean errors -> {unit: their mean}; binary numbers are `gripper`, the share that is wrong."""
    units = [d.unit if d.kind != "binary" else "gripper" for d in dims]
    return {u: float(np.mean([e for e, unit in zip(error, units) if unit == u])) for u in dict.fromkeys(units)}


def mae(chunks: Chunks) -> np.ndarray:
    """f64[a]: mean absolute error over all real steps; NaN without one."""
    return _mean(np.abs(chunks.predicted - chunks.recorded), chunks.mask)


def baseline(chunks: Chunks) -> np.ndarray:
    """f64[a]: the same of always giving the mean training action."""
    return _mean(np.abs(as_given(chunks.mean, chunks.dims) - chunks.recorded), chunks.mask)


def as_given(actions: np.ndarray, dims: tuple[Dim, ...]) -> np.ndarray:
    """f32[.. a] -> the same with binary numbers 0 or 1, as a policy gives them."""
    return np.where([d.kind == "binary" for d in dims], actions > 0.5, actions).astype(np.float32)


def _mean(error: np.ndarray, mask: np.ndarray) -> np.ndarray:
    kept = error[mask].astype(np.float64)
    return kept.mean(axis=0) if len(kept) else np.full(error.shape[-1], np.nan)


def detail(chunks: Chunks, *, most: int = 10) -> dict:
    """{"frames", "dims": {name: {unit, mae, baseline}}, "horizon": {unit: [error of the first step, the second, ..]}, "instructions": {text:
    {frames, mae, valid}}}: of the `most` instructions with most frames, and of the rest together under "(N others)". Open loop: a chunk is
    compared with what was recorded from its frame on, and nothing is carried out. A step ahead that no frame reaches ends the list."""
    own, naive = mae(chunks), baseline(chunks)
    dims = {d.name: {"unit": d.unit, "mae": float(own[i]), "baseline": float(naive[i])} for i, d in enumerate(chunks.dims)}
    ahead: dict[str, list[float]] = collections.defaultdict(list)
    for k in range(int(chunks.mask.any(axis=0).sum())):  # a mask is True up to the episode's end
        step = _mean(np.abs(chunks.predicted - chunks.recorded)[:, k : k + 1], chunks.mask[:, k : k + 1])
        for unit, error in by_unit(step, chunks.dims).items():
            ahead[unit].append(error)
    counted = collections.Counter(chunks.prompts).most_common()
    said = np.array(chunks.prompts, object)
    groups = [(text or "(none)", said == text) for text, _ in counted[:most]]
    if rest := [text for text, _ in counted[most:]]:
        groups.append((f"({len(rest)} others)", np.isin(said, rest)))
    texts = {}
    for text, keep in groups:
        some = chunks.of(keep)
        texts[text] = {"frames": int(keep.sum()), "mae": by_unit(mae(some), chunks.dims), "valid": float(some.valid.mean())}
    return {"frames": len(chunks.prompts), "dims": dims, "horizon": dict(ahead), "instructions": texts}
