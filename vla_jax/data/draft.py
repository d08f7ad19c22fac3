"""A card's first draft, from what a dataset says of itself. What only a person can know is left as "?", which no check lets pass."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

from vla_jax.data import rlds
from vla_jax.data.cards import VIEWS
from vla_jax.data.store import Store
from vla_jax.types import UserError

_LANGUAGE = ("instruction", "language", "task", "prompt")
_STATE = ("state", "proprio", "pose", "joint", "gripper", "eef", "position", "qpos")


def draft(
    place: Store,
    name: str,
    version: str,
    *,
    control_hz: float | None = None,
    robot: str = "",
    licence: str = "",
    names: Mapping[str, tuple[str, ...]] | None = None,
) -> str:
    """The text of a YAML card for the dataset at `place`: its fields sorted into views, language, state and action by their names
    and types, every guess open to correction, and units, frames, kinds, rate and the gripper's sense to be filled in.

    control_hz, robot, licence and names (field -> a name for each of its numbers): where a converter knows them from the source.

    Raises: UserError when the dataset has no action, which a card cannot do without.
    """
    fields, (info, splits) = rlds.features(place), rlds.describe(place)
    numbers = {k: math.prod(max(d, 1) for d in f.shape) for k, f in fields.items() if _is_numbers(k, f)}
    actions = [k for k in numbers if k.split("/")[0] == "action" or k.split("/")[-1].startswith("action")]
    if not actions:
        raise UserError(f"{place} has no field called action (it has: {', '.join(fields)}). Write its card by hand: data/README.md.")
    observed = [k for k in numbers if k not in actions and k.startswith("observation/")]
    chosen = [k for k in observed if k.endswith("/state")] or [k for k in observed if any(w in k.lower() for w in _STATE)]
    chosen_actions = [k for k in actions if k == "action"] or actions
    said = [k for k, f in fields.items() if f.dtype == "string" and f.kind != "image" and any(w in k.lower() for w in _LANGUAGE)]
    views = _views(fields)
    left = [k for k in fields if k not in {*chosen, *chosen_actions, *said, *views.values()}]
    lines = [
        f'# A draft: replace every "?" (data/README.md says by what), then `vla-jax data check {name} --root ROOT`.',
        f"# Fields that it does not use: {', '.join(left) or 'none'}",
        f"name: {name}",
        f"version: {version}",
        f"source: {quoted(' '.join((info.get('location') or {}).get('urls') or []))}",
        f"licence: {quoted(licence or (info.get('redistributionInfo') or {}).get('license'))}",
        f"citation: {quoted(info.get('citation'))}",
        f"robot: {quoted(robot or '?')}",
        f"control_hz: {quoted('?') if control_hz is None else format(control_hz, 'g')}  # actions a second, as recorded",
        f"splits: [{', '.join(['train'] if 'train' in splits else sorted(splits))}]",
        f"views: {{{', '.join(f'{view}: {key}' for view, key in views.items())}}}",
        f"language: [{', '.join(said)}]",
        'gripper: {state: "?", action: "?"}  # the sense as recorded; the ops must turn it to 1 = open',
    ]
    for label, keys in (("state", chosen), ("action", chosen_actions)):
        dims = _dims(keys, numbers, names or {})
        lines += [f"{label}:", "  ops:" if keys else "  ops: []", *(f"    - pick: {key}" for key in keys)]
        lines += ["  dims:" if keys else "  dims: []", *(f'    - {{name: {d}, unit: "?", frame: "?", kind: "?"}}' for d in dims)]
    return "\n".join([*lines, f"filters: {'[{labelled: true}]' if said else '[]'}", ""])


def quoted(text) -> str:
    """In YAML, on one line; "" for what tensorflow-datasets puts where nobody wrote anything, which holds a TODO."""
    return json.dumps("" if "TODO" in str(text) else " ".join(str(text or "").split()), ensure_ascii=False)


def _is_numbers(key: str, feature: rlds.Feature) -> bool:
    return feature.kind == "tensor" and feature.dtype.startswith(("float", "int", "bool")) and not key.startswith(rlds.EPISODE)


def _dims(keys: list[str], numbers: dict[str, int], names: Mapping[str, tuple[str, ...]]) -> list[str]:
    """A name for each number, in YAML: the source's where that makes all differ, else the field's with a count."""
    counted = [f"{key.split('/')[-1]}_{i}" if numbers[key] > 1 else key.split("/")[-1] for key in keys for i in range(numbers[key])]
    said = [(key.split("/")[-1], n) for key in keys for n in names.get(key, ("",) * numbers[key])]
    for form in ("{1}", "{0}_{1}"):
        dims = [form.format(*pair) if pair[1] else old for pair, old in zip(said, counted)] if len(said) == len(counted) else counted
        if len(set(dims)) == len(dims):
            return [d if d in counted else json.dumps(d, ensure_ascii=False) for d in dims]
    return counted


def _views(fields: dict[str, rlds.Feature]) -> dict[str, str]:
    """Cameras by what their keys say; the others are base and then sides, in the order of their names."""
    pictures, out = sorted(k for k, f in fields.items() if f.is_picture and not k.startswith(rlds.EPISODE)), {}
    free = lambda wanted: next((v for v in wanted if v not in out), None)
    on_wrist = [k for k in pictures if any(w in k.lower() for w in ("wrist", "hand", "gripper", "eye_in"))]
    for keys, wanted in ((on_wrist, ("wrist", "wrist_right")), ([k for k in pictures if k not in on_wrist], VIEWS[:4])):
        for key in keys:
            if view := free(wanted):
                out[view] = key
    return out
