"""The closed list of filters by which a card leaves episodes out on purpose. What they leave out is counted apart from bad data."""

from __future__ import annotations

import re

import numpy as np

from vla_jax.types import UserError

FILTERS = ("min_steps", "is_true", "matches", "labelled", "moves")


def check(filters, where: str) -> None:
    """Raises: UserError naming the filter at fault."""
    if not isinstance(filters, list):
        raise UserError(f"card {where}: filters must be a list, got {filters!r}")
    for i, item in enumerate(filters):
        if not isinstance(item, dict) or len(item) != 1 or next(iter(item)) not in FILTERS:
            raise UserError(f"card {where}.filters[{i}] is {item!r}; a filter is one of: {', '.join(FILTERS)}")
        ((name, arg),) = item.items()
        problem = _problem(name, arg)
        if problem:
            raise UserError(f"card {where}.filters[{i}] {name} {problem}, got {arg!r}")


def _problem(name: str, arg) -> str:
    if name == "min_steps":
        return "" if isinstance(arg, int) and not isinstance(arg, bool) and arg >= 1 else "needs a number of steps"
    if name == "is_true":
        return "" if isinstance(arg, str) else "needs a key"
    if name == "labelled":
        return "" if arg is True else "needs true"
    if name == "moves":
        return "" if isinstance(arg, (int, float)) and not isinstance(arg, bool) and 0 < arg < 1e30 else "needs a positive number"
    if not isinstance(arg, dict) or set(arg) != {"key", "pattern"} or not all(isinstance(v, str) for v in arg.values()):
        return "needs key and pattern"
    try:
        re.compile(arg["pattern"])
    except re.error as e:
        return f"has a pattern that is no regular expression ({e})"
    return ""


def keys(filters) -> list[str]:
    """Every field that the filters read."""
    out = [item.get("is_true") or item.get("matches", {}).get("key") for item in filters]
    return [k for k in dict.fromkeys(out) if k]


def left_out(filters, fields: dict, *, action: np.ndarray, labelled: bool) -> str:
    """The first filter that leaves this episode out, in words; "" if none does.

    fields: {key: numbers, or a list of str}; action f32[steps a] as standardised.
    """
    for item in filters:
        ((name, arg),) = item.items()
        if name == "min_steps" and len(action) < arg:
            return f"shorter than {arg} steps"
        if name == "is_true" and not np.any(np.asarray(fields[arg]).reshape(-1)[-1:]):
            return f"{arg} is false"
        if name == "matches" and not any(re.search(arg["pattern"], text) for text in fields[arg["key"]]):
            return f"{arg['key']} does not match {arg['pattern']!r}"
        if name == "labelled" and not labelled:
            return "no instruction"
        if name == "moves" and not np.abs(action).max(initial=0.0) > arg:
            return "no motion"
    return ""
