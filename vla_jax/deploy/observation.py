"""From what a client sends to an observation as Policy.act takes it, checked against the robot's spec. numpy only.

Keys, in this order of precedence (`names` are the server's own, {view or "state": key or keys to be joined}):
    images      {"images": {VIEW: ..}}, or flat: the stated key, the key of the card (such as observation/exterior_image_1_left), observation/VIEW, VIEW
    state       "state", the stated keys one behind the other, or observation/state; always in the units and order of the spec
    prompt      "prompt"; last_action: "last_action"
Values are arrays; a picture is u8[h w 3] RGB (u8[3 h w] is turned, where that is what it must be), a state may be a list of numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from vla_jax.types import UserError

_LARGEST = 4096  # pixels of a side
_LONGEST = 4096  # characters of an instruction
META = ("robot", "request_id")


class Unfit(ValueError):
    """An observation that this robot's policy does not take; what, and what was expected."""


def check_names(names: Mapping[str, tuple[str, ...]], views: tuple[str, ...]) -> None:
    """Raises: UserError for a view that the robot's policy has not."""
    if odd := sorted(set(names) - {"state", *views}):
        raise UserError(f"--key names {', '.join(odd)}; this policy takes: state, {', '.join(views)}")
    for view, keys in names.items():
        if not keys or not all(keys) or view != "state" and len(keys) > 1:
            raise UserError(f"--key {view}={'+'.join(keys)}: one key for a view, one or several for the state")


def of(message: Mapping, policy, names: Mapping[str, tuple[str, ...]]) -> dict:
    """policy: has card, views, history and spec(), as deploy.policy.Policy. Raises: Unfit, saying what was expected."""
    spare = {k for k in message if isinstance(k, str)} - {"images", "state", "prompt", "last_action", *META}
    images = message.get("images", {})
    if not isinstance(images, Mapping):
        raise Unfit(f"images must be a map from views to pictures, got {_kind(images)}")
    out = {"images": {}, "prompt": message.get("prompt")}
    for name in _wanted(policy):
        view, _, lag = name.partition("@")
        known = [*names.get(view, ()), policy.card.views.get(view, ""), f"observation/{view}", view]
        keys = [key + ("@" + lag if lag else "") for key in known if key]
        found = images.get(name, next((message[key] for key in keys if key in message), None))
        spare -= set(keys)
        if found is not None:
            out["images"][name] = _picture(found, name)
        elif not lag:
            raise Unfit(f"there is no picture of {name!r}: send it as images[{name!r}] or as one of {', '.join(keys)}")
    for lag in range(1, policy.history):  # of no step some: each number of pictures is a shape of its own to the model
        of = [f"{view}@-{lag}" for view in policy.views]
        if 0 < len(there := [name for name in of if name in out["images"]]) < len(of):
            raise Unfit(f"of a step before now send all pictures ({', '.join(of)}) or none, got {', '.join(there)}")
    out["state"] = _state(message, policy, names.get("state", ()))
    spare -= {"observation/state", *names.get("state", ())}
    if not isinstance(out["prompt"], str) or len(out["prompt"]) > _LONGEST:
        raise Unfit(f"prompt must be text of at most {_LONGEST} characters, got {_kind(out['prompt'])}")
    if (last := message.get("last_action")) is not None:
        out["last_action"] = _numbers(last, "last_action", [d.name for d in policy.card.action.dims], ())
    if extra := sorted(set(images) - set(out["images"]), key=str):  # a picture under a wrong name would be missed silently
        raise Unfit(f"images holds {str(extra[0])[:60]!r}, which this policy does not take; it takes {', '.join(_wanted(policy))}")
    return out | ({"unused": [key[:60] for key in sorted(spare)[:20]]} if spare else {})


def with_history(seen: Sequence[Mapping], history: int) -> dict:
    """The observations of the last steps, oldest first, as one of a policy that sees `history` steps: of steps before the first no pictures, and
    the first state again, as in training. Each {"images": {view: u8[h w 3]}, "state": f32[s], ..}; what else is sent is the last one's."""
    if history == 1:
        return dict(seen[-1])
    past = [seen[-1 - lag] for lag in range(min(history, len(seen)))]  # the newest first
    images = {view if not lag else f"{view}@-{lag}": x for lag, o in enumerate(past) for view, x in o["images"].items()}
    states = [past[min(lag, len(past) - 1)]["state"] for lag in range(history - 1, -1, -1)]
    return {**seen[-1], "images": images, "state": np.stack(states)}


def outside(policy, state: np.ndarray) -> list[str]:
    """f32[s] or f32[t s] -> the dimensions that are beyond the smallest and largest that any training episode had, by more than a
    hundredth of what lies between them: there the policy has seen nothing. policy: has card and stats."""
    s = (policy.stats or {}).get("state")
    if s is None:
        return []
    dims, room = policy.card.state.dims, 0.01 * (s.max - s.min) + 1e-6
    state = np.asarray(state).reshape(-1, len(dims))
    beyond = ((state < s.min - room) | (state > s.max + room)).any(axis=0)
    return [d.name for d, out in zip(dims, beyond) if out]


def _wanted(policy) -> list[str]:
    return [v if not lag else f"{v}@-{lag}" for lag in range(policy.history) for v in policy.views]


def _picture(x, name: str) -> np.ndarray:
    if not isinstance(x, np.ndarray) or x.dtype != np.uint8 or x.ndim != 3 or 3 not in (x.shape[0], x.shape[2]):
        raise Unfit(f"picture {name!r} must be uint8 [h, w, 3] RGB, got {_kind(x)}")
    x = x if x.shape[2] == 3 else x.transpose(1, 2, 0)
    if not all(1 <= n <= _LARGEST for n in x.shape[:2]):
        raise Unfit(f"picture {name!r} must have sides of 1 to {_LARGEST} pixels, got {x.shape[:2]}")
    return np.ascontiguousarray(x)


def _state(message: Mapping, policy, keys: tuple[str, ...]) -> np.ndarray:
    names = [d.name for d in policy.card.state.dims]
    if "state" not in message and keys and all(k in message for k in keys):
        parts = [_numbers(message[k], k, None, ()) for k in keys]
        if len({x.ndim for x in parts}) > 1 or len({x.shape[:-1] for x in parts}) > 1:
            raise Unfit(f"the state's parts {', '.join(keys)} have shapes {[list(x.shape) for x in parts]}, which cannot be joined")
        found = np.concatenate(parts, -1)
    else:
        found = message.get("state", message.get("observation/state"))
    if found is None:
        others = f" or as {', '.join(keys)}" if keys else ""
        raise Unfit(f"there is no state: send {len(names)} numbers as 'state'{others}")
    return _numbers(found, "state", names, (policy.history,))


def _numbers(x, key: str, names: list[str] | None, lead: tuple[int, ...]) -> np.ndarray:
    """f32[dims], or with `lead` f32[lead dims] (where lead is 1: either). names None: any number of dimensions."""
    try:
        found = np.asarray(x)
    except ValueError:  # lists of different lengths
        found = np.zeros(0, object)
    if found.dtype.kind not in "iuf":
        raise Unfit(f"{key} must be numbers, got {_kind(x)}")
    found = np.atleast_1d(found) if names is None else found
    with np.errstate(over="ignore"):  # becomes infinite, which is said
        found = found.astype(np.float32)
    if names is not None:
        shapes = [(*lead, len(names))] + ([(len(names),)] if lead == (1,) else [])
        if found.shape not in shapes:
            raise Unfit(f"{key} must have shape {list(shapes[-1])} ({', '.join(names)}), got {list(found.shape)}")
    if not np.isfinite(found).all():
        raise Unfit(f"{key} holds a number that is not finite")
    return found


def _kind(x) -> str:
    return f"{x.dtype} {list(x.shape)}" if isinstance(x, np.ndarray) else type(x).__name__
