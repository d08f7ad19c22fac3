"""What a robot is asked to do, kept within what it was seen doing. numpy only.

Of every chunk, in robot units:
- a number that is not finite is refused;
- absolute, delta and velocity dimensions are clamped to the range of the training episodes: q01..q99 widened by `margin` of its width on
  both sides, but not beyond min..max ("quantile"), or min..max ("minmax"). Nought is always within the range of a delta or a velocity: it
  means to stand still;
- an absolute dimension may change from one step to the next by no more than the largest change that two steps of a training episode had
  ("seen"); or by what crosses q01..q99 in `cross_s` seconds ("cross", also where the export does not say what was seen, or an
  angle went once around); or by the number that was stated for it. The first step counts from where the robot is (the state dimension of the same name, unit and
  frame), else from `last_action`; where neither is known it is not limited, and that is counted. An Euler angle (rad, not of a
  joint) goes the shorter way round;
- of a delta or velocity dimension the number itself is the change: a stated `max_step` bounds its size;
- a binary dimension is 0 or 1 and is left alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from vla_jax.types import Dim, Stats, UserError

RANGES, RATES = ("quantile", "minmax", "off"), ("seen", "cross", "off")
_LEAST = 1e-3  # robot units a second


@dataclasses.dataclass(frozen=True)
class Settings:
    """range, rate: of RANGES and RATES. margin: share of the width of q01..q99. max_step: robot units, by dimension."""

    range: str = "quantile"
    margin: float = 0.05
    rate: str = "seen"
    cross_s: float = 1.0
    max_step: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        """Raises: UserError."""
        for name, value, allowed in (("range", self.range, RANGES), ("rate", self.rate, RATES)):
            if value not in allowed:
                raise UserError(f"the {name} of the limits is {value!r}; allowed: {', '.join(allowed)}")
        if not 0 <= self.margin < np.inf or not 0 < self.cross_s < np.inf:
            raise UserError(f"the limits' margin {self.margin:g} must be from 0 on, their cross_s {self.cross_s:g} above 0")
        if odd := {k: v for k, v in self.max_step.items() if not 0 < v < np.inf}:
            raise UserError(f"max_step of the limits is {odd}; a step is above 0")


@dataclasses.dataclass(frozen=True)
class Applied:
    """How many numbers of a chunk were moved into their range and how many held back in their change, by dimension i64[a]; and the
    dimensions whose first step had nothing to count from."""

    range: np.ndarray
    rate: np.ndarray
    unanchored: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Limits:
    """low, high, most f32[a] (infinite: no limit); anchor i64[a]: the state dimension where an action starts from, or -1."""

    dims: tuple[Dim, ...]
    low: np.ndarray
    high: np.ndarray
    most: np.ndarray
    anchor: np.ndarray

    @classmethod
    def make(cls, dims: tuple[Dim, ...], state_dims: tuple[Dim, ...], stats: Stats, *, hz: float, settings: Settings) -> Limits:
        """stats: of the actions. Raises: UserError for a max_step of a dimension that is not there or is binary, and for odd statistics."""
        for name in ("mean", "q01", "q99", "min", "max", "change"):
            values = getattr(stats, name)
            if values is not None and (values.shape != (len(dims),) or not np.isfinite(values).all()):
                raise UserError(
                    f"the statistics hold no {len(dims)} finite numbers as {name} of the actions: there is nothing to limit them to"
                )
        s, kinds = settings, np.array([d.kind for d in dims])
        known = [d.name for d in dims if d.kind != "binary"]
        if odd := sorted(set(s.max_step) - set(known)):
            raise UserError(f"max_step names {', '.join(odd)}; the dimensions that have one are: {', '.join(known)}")
        width = stats.q99.astype(np.float64) - stats.q01
        low, high = stats.min.astype(np.float64), stats.max.astype(np.float64)
        if s.range == "quantile":  # a constant dimension comes back as its mean, which outliers may have drawn out of its quantiles
            low = np.minimum(np.maximum(low, stats.q01 - s.margin * width), stats.mean)
            high = np.maximum(np.minimum(high, stats.q99 + s.margin * width), stats.mean)
        moving = np.isin(kinds, ("delta", "velocity"))
        low, high = np.where(moving, np.minimum(low, 0), low), np.where(moving, np.maximum(high, 0), high)
        if s.range == "off":
            low, high = np.full(len(dims), -np.inf), np.full(len(dims), np.inf)
        # a dimension that hardly moved in training may still be brought back to where it was
        most = np.maximum(width, _LEAST) / (s.cross_s * hz)
        if s.rate == "seen" and stats.change is not None:
            around = np.array([_turns(d) for d in dims]) & (stats.change > np.pi)
            most = np.where(around, most, np.maximum(stats.change, _LEAST / hz))
        most = np.where((kinds == "absolute") & (s.rate != "off"), most, np.inf)
        for name, value in s.max_step.items():
            most[[d.name for d in dims].index(name)] = value
        bounded = moving & np.isfinite(most)
        low, high = np.where(bounded, np.maximum(low, -most), low), np.where(bounded, np.minimum(high, most), high)
        binary = kinds == "binary"
        low, high = np.where(binary, -np.inf, low), np.where(binary, np.inf, high)
        most = np.where(kinds == "absolute", most, np.inf)
        same = lambda d: next((i for i, x in enumerate(state_dims) if (x.name, x.unit, x.frame, x.kind) == _key(d)), -1)
        anchor = np.array([same(d) if d.kind == "absolute" else -1 for d in dims], np.int64)
        f32 = lambda x: x.astype(np.float32)
        return cls(dims, f32(low), f32(high), f32(most), anchor)

    def __call__(self, chunk: np.ndarray, *, state: np.ndarray, last_action: np.ndarray | None = None) -> tuple[np.ndarray, Applied]:
        """f32[k a] -> (f32[k a] within the limits, what was done). state: f32[s], the newest. Raises: ValueError where a number is not finite."""
        chunk = np.asarray(chunk, np.float32)
        if not np.isfinite(chunk).all():
            names = [d.name for d, bad in zip(self.dims, ~np.isfinite(chunk).all(axis=0)) if bad]
            raise ValueError(f"the model's action is not finite in {', '.join(names)}: nothing is sent to a robot")
        inside = np.clip(chunk, self.low, self.high)
        out, held, unanchored = inside.copy(), np.zeros(chunk.shape[1], np.int64), []
        for d in np.flatnonzero(np.isfinite(self.most)):
            dim = self.dims[d]
            at = float(state[self.anchor[d]]) if self.anchor[d] >= 0 else None if last_action is None else float(last_action[d])
            if at is None:
                unanchored.append(dim.name)
                at = float(inside[0, d])
            turns = _turns(dim)
            for k in range(len(chunk)):
                change = float(inside[k, d]) - at
                if turns:
                    change = (change + np.pi) % (2 * np.pi) - np.pi
                if abs(change) > self.most[d] * (1 + 1e-6):  # else as it came, to the last bit
                    at += float(np.sign(change) * self.most[d])
                    if turns:
                        at = (at + np.pi) % (2 * np.pi) - np.pi
                    out[k, d] = at
                    held[d] += 1
                else:
                    at = float(inside[k, d])
        return out, Applied((inside != chunk).sum(axis=0), held, tuple(unanchored))

    def describe(self) -> list[dict]:
        """[{name, low, high, max_step}], None for no limit; JSON-able."""
        number = lambda x: float(x) if np.isfinite(x) else None
        return [
            {"name": d.name, "low": number(a), "high": number(b), "max_step": number(m)}
            for d, a, b, m in zip(self.dims, self.low, self.high, self.most)
        ]


def _key(d: Dim) -> tuple[str, str, str, str]:
    return d.name, d.unit, d.frame, d.kind


def _turns(d: Dim) -> bool:
    """An Euler angle, which begins anew after half a turn."""
    return d.unit == "rad" and d.frame != "joint" and d.kind == "absolute"
