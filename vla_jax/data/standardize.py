"""The closed list of ops by which a card turns recorded fields into one state or action vector per step.

An op is a mapping of one name to its arguments. `pick` appends a field's columns; all others change the vector so far.
Functions are over a whole episode: f32[steps dims].
"""

from __future__ import annotations

import numpy as np

from vla_jax.types import UserError


def _pick(x, fields, arg):
    key, dims = (arg["key"], arg.get("dims")) if isinstance(arg, dict) else (arg, None)
    new = fields[key].astype(np.float32)
    if dims is not None:
        new = new[:, list(dims)]
    return np.concatenate([x, new], axis=1) if x is not None else new


def _slice(x, fields, arg):
    start, stop = arg
    if not 0 <= start < stop <= x.shape[1]:
        raise ValueError(f"slice [{start}, {stop}] of {x.shape[1]} numbers")
    return x[:, start:stop]


def _scale(x, fields, arg):
    return _replace(x, arg["dims"], x[:, arg["dims"]] * np.float32(arg["by"]))


def _invert(x, fields, arg):
    """A gripper that counts 1 = closed becomes 1 = open."""
    return _replace(x, arg["dims"], 1 - x[:, arg["dims"]])


def _binarise(x, fields, arg):
    return _replace(x, arg["dims"], (x[:, arg["dims"]] > arg["threshold"]).astype(np.float32))


def _delta(x, fields, arg):
    """Absolute positions -> change to the next step; the last step does not move."""
    moved = np.diff(x[:, arg["dims"]], axis=0, append=x[-1:, arg["dims"]])
    return _replace(x, arg["dims"], moved)


def _replace(x, dims, new):
    x = x.copy()
    x[:, dims] = new
    return x


OPS = {"pick": _pick, "slice": _slice, "scale": _scale, "invert": _invert, "binarise": _binarise, "delta": _delta}
_ARGS = {"scale": {"dims", "by"}, "invert": {"dims"}, "binarise": {"dims", "threshold"}, "delta": {"dims"}}


def check(ops, where: str) -> None:
    """Raises: UserError when `ops` is no list of known ops with their arguments, starting with `pick`."""
    if not isinstance(ops, list) or not ops:
        raise UserError(f"card {where}.ops must be a list that starts with `pick`")
    for i, op in enumerate(ops):
        if not isinstance(op, dict) or len(op) != 1 or next(iter(op)) not in OPS:
            raise UserError(f"card {where}.ops[{i}] is {op!r}; an op is one of: {', '.join(OPS)}")
        ((name, arg),) = op.items()
        if i == 0 and name != "pick":
            raise UserError(f"card {where}.ops[0] must be `pick`, got {name!r}")
        if name in _ARGS and (not isinstance(arg, dict) or set(arg) != _ARGS[name]):
            raise UserError(f"card {where}.ops[{i}] {name} needs exactly {sorted(_ARGS[name])}, got {arg!r}")


def apply(ops, fields: dict[str, np.ndarray]) -> np.ndarray:
    """fields {key: [steps dims]} -> f32[steps dims]. Raises: KeyError, IndexError or ValueError where ops do not fit."""
    x = None
    for op in ops:
        ((name, arg),) = op.items()
        x = OPS[name](x, fields, arg)
    return np.ascontiguousarray(x, np.float32)
