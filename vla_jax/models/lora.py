"""Low-rank adapters (Hu et al., "LoRA", 2021) as a transform of the parameter tree: leaves beside the weights, merged where a model is run."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp

from vla_jax import tree
from vla_jax.config import Train
from vla_jax.types import UserError

NAME = "lora"  # of the subtree


def adapted(shapes: dict, patterns: tuple[str, ...]) -> list[str]:
    """Paths of the weights whose whole path a pattern matches; shapes: a parameter tree, or one of shapes.

    Raises: UserError for a pattern that is none, matches nothing, or matches a leaf without two axes to factor.
    """
    flat, found = tree.flatten(shapes), []
    if not patterns:
        raise UserError("train.lora_rank is set and train.lora_on is empty: no weight would get an adapter")
    for pattern in patterns:
        hits = [p for p in _matching("lora_on", pattern, flat) if not p.startswith(f"{NAME}/")]
        flatter = [p for p in hits if flat[p].ndim < 2 or p.endswith("input_embedding")]  # the loss takes the table as it is
        if not hits or flatter:
            what = f"matches {flatter[0]}, which is no matrix" if flatter else f"matches none of the {len(flat)} parameters"
            raise UserError(f"train.lora_on {pattern!r} {what}. Parameters are named like {next(iter(flat))}.")
        found += [p for p in hits if p not in found]
    return found


def init(params: dict, key, *, rank: int, patterns: tuple[str, ...]) -> dict:
    """The tree with a pair `a` [.. in rank], `b` [.. rank out] for each adapted weight [.. in out]; b is zero, so nothing changes yet.
    Leading axes (layers, heads) have factors of their own, as in openpi."""
    flat, made = tree.flatten(params), {}
    for i, path in enumerate(adapted(params, patterns)):
        *lead, rows, columns = flat[path].shape
        made[f"{path}/a"] = jax.random.normal(jax.random.fold_in(key, i), (*lead, rows, rank)) * rows**-0.5
        made[f"{path}/b"] = jnp.zeros((*lead, rank, columns))
    return params | {NAME: tree.unflatten(made)}


def axes(logical: dict, *, patterns: tuple[str, ...], shapes: dict) -> dict:
    """The logical axes of `init`'s tree: a factor lies as its weight does along the axis that they share."""
    flat, made = tree.flatten(logical), {}
    for path in adapted(shapes, patterns):
        *lead, rows, columns = flat[path]
        made[f"{path}/a"], made[f"{path}/b"] = (*lead, rows, None), (*lead, None, columns)
    return logical | {NAME: tree.unflatten(made)}


def merge(params: dict, alpha: float) -> dict:
    """The tree that a model runs with: each adapted weight plus alpha / rank * a @ b, and no adapters. Without adapters: itself."""
    if NAME not in params:
        return params
    pairs, flat = tree.flatten(params[NAME]), tree.flatten({k: v for k, v in params.items() if k != NAME})
    for path in sorted({p.rpartition("/")[0] for p in pairs}):
        a, b = pairs[f"{path}/a"], pairs[f"{path}/b"]
        flat[path] = flat[path] + (alpha / a.shape[-1]) * (a @ b)
    return tree.unflatten(flat)


def trainable(params: dict, train: Train) -> dict:
    """A tree of bools: all parameters, or where there are adapters those and what `lora_also` matches; less what `freeze` matches, and
    less the expert where the objective has no part for it.

    Raises: UserError for a pattern that is none or matches nothing, or when a loss of the objective would reach nothing that is trained.
    """
    flat = tree.flatten(params)
    of_expert = lambda path: path.removeprefix(f"{NAME}/").startswith("expert/")
    out = dict.fromkeys(flat, True)
    if NAME in params:
        also = {p for pattern in train.lora_also for p in _matching("lora_also", pattern, flat)}
        out = {p: p.startswith(f"{NAME}/") or p in also for p in flat}
    for pattern in train.freeze:
        hits = _matching("freeze", pattern, flat)
        if not hits:
            raise UserError(f"train.freeze {pattern!r} matches none of the {len(flat)} parameters, named like {next(iter(flat))}")
        out |= dict.fromkeys(hits, False)
    if train.objective == "tokens":
        out |= {p: False for p in flat if of_expert(p)}
    reached = {}
    if train.objective != "flow":
        reached["tokens"] = [p for p in flat if not of_expert(p)]
    if train.objective != "tokens":
        bound = train.objective == "both" and train.insulate
        reached["flow"] = [p for p in flat if of_expert(p) or not bound]
    for loss, paths in reached.items():
        if not any(out[p] for p in paths):
            raise UserError(
                f"train.objective={train.objective}, and nothing that the loss of the {loss} reaches is trained. Change train.freeze"
                + (", train.lora_on or train.lora_also." if NAME in params else ".")
            )
    return tree.unflatten(out)


def _matching(setting: str, pattern: str, paths) -> list[str]:
    try:
        return [p for p in paths if re.fullmatch(pattern, p)]
    except re.error as e:
        raise UserError(f"train.{setting} {pattern!r} is no regular expression: {e}") from e
