"""The closed list of ops by which a card turns recorded fields into one state or action vector per step.

An op is a mapping of one name to its argument. `pick` and `concat` append columns of fields; all others change the vector so
far. Functions are over a whole episode: x f32[steps dims] (or None before the first pick), fields {key: [steps n]}.
"""

from __future__ import annotations

import numpy as np

from vla_jax.data import rotations
from vla_jax.types import UserError


def _pick(x, fields, arg):
    key, dims = (arg["key"], arg.get("dims")) if isinstance(arg, dict) else (arg, None)
    new = fields[key].astype(np.float32)
    if dims is not None:
        new = new[:, list(dims)]
    return np.concatenate([x, new], axis=1) if x is not None else new


def _concat(x, fields, arg):
    for key in arg:
        x = _pick(x, fields, key)
    return x


def _slice(x, fields, arg):
    start, stop = arg
    if not 0 <= start < stop <= x.shape[1]:
        raise ValueError(f"slice [{start}, {stop}] of {x.shape[1]} numbers")
    return x[:, start:stop]


def _scale(x, fields, arg):
    return _replace(x, arg["dims"], x[:, arg["dims"]] * np.float32(arg["by"]))


def _offset(x, fields, arg):
    return _replace(x, arg["dims"], x[:, arg["dims"]] + np.float32(arg["by"]))


def _clip(x, fields, arg):
    return _replace(x, arg["dims"], np.clip(x[:, arg["dims"]], arg["low"], arg["high"]))


def _invert(x, fields, arg):
    """A gripper that counts 1 = closed becomes 1 = open."""
    return _replace(x, arg["dims"], 1 - x[:, arg["dims"]])


def _binarise(x, fields, arg):
    return _replace(x, arg["dims"], np.where(np.isfinite(x[:, arg["dims"]]), x[:, arg["dims"]] > arg["threshold"], np.nan))


def _latch(x, fields, arg):
    """A gripper on its way between `low` and `high` already counts as where it is going to arrive: a step takes the next
    decided value of its episode, the tail the last decided one (after Octo's binarize_gripper_actions)."""
    new = x[:, arg["dims"]].copy()
    decided = np.where(new >= arg["high"], 1.0, np.where(new <= arg["low"], 0.0, np.nan))
    for c in range(new.shape[1]):
        at = np.flatnonzero(~np.isnan(decided[:, c]))
        if at.size:
            coming = np.searchsorted(at, np.arange(len(new)))
            new[:, c] = np.where(np.isfinite(new[:, c]), decided[at[np.minimum(coming, at.size - 1)], c], np.nan)
        else:
            new[:, c] = np.where(np.isfinite(new[:, c]), new[:, c] > 0.5, np.nan)
    return _replace(x, arg["dims"], new)


def _accumulate(x, fields, arg):
    """Pulses that open or close (0: leave it) -> position, 1 = open. Before the first pulse: the opposite of what it does."""
    new = x[:, arg["dims"]].copy()
    for c in range(new.shape[1]):
        pulse = -np.sign(new[:, c]) * np.sign(arg["close"])  # +1 opens
        at = np.flatnonzero(np.abs(new[:, c]) > 0.1)
        before = 1.0 if not at.size or pulse[at[0]] < 0 else 0.0
        last = np.searchsorted(at, np.arange(len(new)), side="right") - 1
        value = np.where(last < 0, before, (pulse[at[np.maximum(last, 0)]] > 0) if at.size else before)
        new[:, c] = np.where(np.isfinite(new[:, c]), value, np.nan)
    return _replace(x, arg["dims"], new)


def _next(x, fields, arg):
    """A state as the absolute action that led to it: the value at the next step; the last stays."""
    values = x[:, arg["dims"]]
    return _replace(x, arg["dims"], np.concatenate([values[1:], values[-1:]]))


def _delta(x, fields, arg):
    """Absolute positions -> change to the next step; the last step does not move."""
    moved = np.diff(x[:, arg["dims"]], axis=0, append=x[-1:, arg["dims"]])
    return _replace(x, arg["dims"], moved)


def _absolute(x, fields, arg):
    """Relative to a recorded field's columns at the same step -> absolute."""
    return _replace(x, arg["dims"], x[:, arg["dims"]] + fields[arg["from"]][:, arg["at"]].astype(np.float32))


def _wrap(x, fields, arg):
    angle = x[:, arg["dims"]].astype(np.float64)
    return _replace(x, arg["dims"], (angle + np.pi) % (2 * np.pi) - np.pi)


def _rotate(x, fields, arg):
    at, width = arg["at"], rotations.WIDTH[arg["from"]]
    if at + width > x.shape[1]:
        raise ValueError(f"rotate: columns {at}..{at + width - 1} of {x.shape[1]} numbers")
    new = rotations.convert(x[:, at : at + width], arg["from"], arg["to"]).astype(np.float32)
    return np.concatenate([x[:, :at], new, x[:, at + width :]], axis=1)


def _pose_delta(x, fields, arg):
    """Orientation -> rotation to the next step's, in the base frame: R_next R_now^T; the last step does not turn."""
    at, width = arg["at"], rotations.WIDTH[arg["format"]]
    if at + width > x.shape[1]:
        raise ValueError(f"pose_delta: columns {at}..{at + width - 1} of {x.shape[1]} numbers")
    r = rotations.to_matrix(x[:, at : at + width], arg["format"])
    turn = np.concatenate([r[1:], r[-1:]]) @ np.swapaxes(r, -1, -2)
    return _replace(x, list(range(at, at + width)), rotations.from_matrix(turn, arg["format"]))


def _function(x, fields, arg):
    return FUNCTIONS[arg](x, fields)


def _replace(x, dims, new):
    x = x.copy()
    x[:, dims] = new
    return x


OPS = {
    "pick": _pick,
    "concat": _concat,
    "slice": _slice,
    "scale": _scale,
    "offset": _offset,
    "clip": _clip,
    "invert": _invert,
    "binarise": _binarise,
    "latch": _latch,
    "accumulate": _accumulate,
    "next": _next,
    "delta": _delta,
    "absolute": _absolute,
    "wrap": _wrap,
    "rotate": _rotate,
    "pose_delta": _pose_delta,
    "function": _function,
}
FUNCTIONS: dict = {}  # what no op can say, by name: f(x, fields) -> x
_ARGS = {
    "scale": {"dims", "by"},
    "offset": {"dims", "by"},
    "clip": {"dims", "low", "high"},
    "invert": {"dims"},
    "binarise": {"dims", "threshold"},
    "latch": {"dims", "low", "high"},
    "accumulate": {"dims", "close"},
    "next": {"dims"},
    "delta": {"dims"},
    "absolute": {"dims", "from", "at"},
    "wrap": {"dims"},
    "rotate": {"at", "from", "to"},
    "pose_delta": {"at", "format"},
}


def keys(ops) -> list[str]:
    """Every field that the ops read."""
    out = []
    for op in ops:
        ((name, arg),) = op.items()
        out += {
            "pick": lambda a: [a["key"] if isinstance(a, dict) else a],
            "concat": list,
            "absolute": lambda a: [a["from"]],
        }.get(name, lambda a: [])(arg)
    return list(dict.fromkeys(out))


def check(ops, where: str) -> None:
    """Raises: UserError when `ops` is no list of known ops with their arguments, starting with `pick` or `concat`."""
    if not isinstance(ops, list):
        raise UserError(f"card {where}.ops must be a list")
    for i, op in enumerate(ops):
        if not isinstance(op, dict) or len(op) != 1 or next(iter(op)) not in OPS:
            raise UserError(f"card {where}.ops[{i}] is {op!r}; an op is one of: {', '.join(OPS)}")
        ((name, arg),) = op.items()
        if i == 0 and name not in ("pick", "concat"):
            raise UserError(f"card {where}.ops[0] must be `pick` or `concat`, got {name!r}")
        problem = _problem(name, arg)
        if problem:
            raise UserError(f"card {where}.ops[{i}] {name} {problem}, got {arg!r}")


def _problem(name: str, arg) -> str:
    """What is wrong with an op's argument, or nothing."""
    whole = lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= 0
    number = lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and abs(v) < 1e30
    indices = lambda v: isinstance(v, list) and v and all(map(whole, v))
    if name == "pick":
        fits = isinstance(arg, str) or (
            isinstance(arg, dict)
            and {"key"} <= set(arg) <= {"key", "dims"}
            and indices(arg.get("dims", [0]))
            and isinstance(arg["key"], str)
        )
        return "" if fits else "needs a key, or {key, dims: [0, ..]}"
    if name == "concat":
        return "" if isinstance(arg, list) and arg and all(isinstance(k, str) for k in arg) else "needs a list of keys"
    if name == "slice":
        fits = isinstance(arg, list) and len(arg) == 2 and all(map(whole, arg)) and arg[0] < arg[1]
        return "" if fits else "needs [start, stop], start below stop"
    if name == "function":
        return "" if isinstance(arg, str) and arg in FUNCTIONS else f"needs one of: {', '.join(FUNCTIONS) or 'none is defined'}"
    if not isinstance(arg, dict) or set(arg) != _ARGS[name]:
        return f"needs exactly {sorted(_ARGS[name])}"
    for key in ("by", "low", "high", "threshold", "close"):
        if key in arg and not number(arg[key]):
            return f"needs a number for {key}"
    if "low" in arg and arg["low"] >= arg["high"]:
        return "needs low below high"
    if name == "accumulate" and arg["close"] not in (1, -1):
        return "needs close: 1 or -1"
    if "dims" in arg and not indices(arg["dims"]):
        return "needs dims as a list of column numbers"
    if name == "absolute":
        fits = indices(arg["at"]) and len(arg["at"]) == len(arg["dims"]) and isinstance(arg["from"], str)
        return "" if fits else "needs a key `from` and as many columns `at` as dims"
    if "at" in arg and not whole(arg["at"]):
        return "needs a column number for at"
    for key in ("from", "to", "format"):
        if key in arg and (not isinstance(arg[key], str) or arg[key] not in rotations.WIDTH):
            return f"needs {key} out of {', '.join(rotations.WIDTH)}"
    return ""


def apply(ops, fields: dict[str, np.ndarray], steps: int = 0) -> np.ndarray:
    """fields {key: [steps n]} -> f32[steps dims]; no ops give f32[steps 0].

    Raises: KeyError, IndexError or ValueError where ops do not fit the fields.
    """
    x = np.zeros((steps, 0), np.float32) if not ops else None
    for op in ops:
        ((name, arg),) = op.items()
        x = OPS[name](x, fields, arg)
    return np.ascontiguousarray(x, np.float32)
