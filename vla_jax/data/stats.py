"""Statistics of one dataset's training episodes, in robot units, and the mapping to [-1, 1] that they define."""

from __future__ import annotations

import dataclasses

import numpy as np

from vla_jax.data.index import StepIndex
from vla_jax.types import Dim, Stats


def compute(index: StepIndex, holdout: float) -> dict[str, Stats]:
    """{"state": Stats, "action": Stats} over the frames of episodes that are not held out."""
    keep = ~index.held_out(holdout)[index.frame_episode]
    return {"state": of(index.state[keep]), "action": of(index.action[keep])}


def of(x: np.ndarray) -> Stats:
    """f32[frames dims] -> Stats. Quantiles interpolate linearly; sums are in float64."""
    x64 = np.asarray(x, np.float64)
    q01, q99 = np.quantile(x64, [0.01, 0.99], axis=0)
    values = (x64.mean(0), x64.std(0), q01, q99, x64.min(0), x64.max(0))
    return Stats(*(v.astype(np.float32) for v in values), count=len(x))


def to_json(stats: dict[str, Stats]) -> dict:
    return {
        group: {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in dataclasses.asdict(s).items()} for group, s in stats.items()
    }


def from_json(values: dict) -> dict[str, Stats]:
    return {group: Stats(**{k: v if k == "count" else np.array(v, np.float32) for k, v in s.items()}) for group, s in values.items()}


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
