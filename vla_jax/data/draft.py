"""A card's first draft, from what a dataset says of itself. What only a person can know is left as "?", which no check lets pass."""

from __future__ import annotations

import json
import math

from vla_jax.data import rlds
from vla_jax.data.cards import VIEWS
from vla_jax.data.store import Store
from vla_jax.types import UserError

_LANGUAGE = ("instruction", "language", "task", "prompt")
_STATE = ("state", "proprio", "pose", "joint", "gripper", "eef", "position")


def draft(place: Store, name: str, version: str) -> str:
    """The text of a YAML card for the dataset at `place`: its fields sorted into views, language, state and action by their names
    and types, every guess open to correction, and units, frames, kinds, rate and the gripper's sense to be filled in.

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
    # what tensorflow-datasets puts into a citation that nobody wrote holds a TODO
    quoted = lambda text: json.dumps("" if "TODO" in str(text) else " ".join(str(text or "").split()), ensure_ascii=False)
    lines = [
        f'# A draft: replace every "?" (data/README.md says by what), then `vla-jax data check {name} --root ROOT`.',
        f"# Fields that it does not use: {', '.join(left) or 'none'}",
        f"name: {name}",
        f"version: {version}",
        f"source: {quoted(' '.join((info.get('location') or {}).get('urls') or []))}",
        f"licence: {quoted((info.get('redistributionInfo') or {}).get('license'))}",
        f"citation: {quoted(info.get('citation'))}",
        'robot: "?"',
        'control_hz: "?"  # actions a second, as recorded',
        f"splits: [{', '.join(['train'] if 'train' in splits else sorted(splits))}]",
        f"views: {{{', '.join(f'{view}: {key}' for view, key in views.items())}}}",
        f"language: [{', '.join(said)}]",
        'gripper: {state: "?", action: "?"}  # the sense as recorded; the ops must turn it to 1 = open',
    ]
    for label, keys in (("state", chosen), ("action", chosen_actions)):
        dims = [f"{key.split('/')[-1]}_{i}" if numbers[key] > 1 else key.split("/")[-1] for key in keys for i in range(numbers[key])]
        lines += [f"{label}:", "  ops:" if keys else "  ops: []", *(f"    - pick: {key}" for key in keys)]
        lines += ["  dims:" if keys else "  dims: []", *(f'    - {{name: {d}, unit: "?", frame: "?", kind: "?"}}' for d in dims)]
    return "\n".join([*lines, f"filters: {'[{labelled: true}]' if said else '[]'}", ""])


def _is_numbers(key: str, feature: rlds.Feature) -> bool:
    return feature.kind == "tensor" and feature.dtype.startswith(("float", "int", "bool")) and not key.startswith(rlds.EPISODE)


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
