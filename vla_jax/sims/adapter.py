"""A Gymnasium environment, seen through a dataset card: what a policy is shown and commands is what a recording would have held.

An environment gives raw fields under the names that its RLDS set has (observation/image, observation/state); the card's own ops make
the state of them, and its action ops, undone, turn the policy's robot units into what the environment takes. So units, frames and the
sense of the gripper are said once, in the card, for recording, training and acting.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from vla_jax.data import rotations, standardize
from vla_jax.data.cards import DatasetCard
from vla_jax.types import UserError

ACTION = "action"  # the field of a recording that holds what the environment was told


@dataclasses.dataclass(frozen=True)
class Mapping:
    """How one kind of environment is read. `env` is anything with Gymnasium's reset(seed=..), step(action) and action_space.

    numbers: (env, its observation) -> {field: f32[n]}, cheap. pictures: env -> {field: u8[h w 3] RGB, upright}, dear, so it is asked for
    only when a policy looks. success: (env, info) -> whether the task is done now. prompt: env -> the instruction. expert: (env, its
    observation, random numbers) -> a scripted action as the environment takes it. view: env -> u8[h w 3] for people; None: the first picture.
    """

    numbers: Callable[[Any, Any], dict[str, np.ndarray]]
    pictures: Callable[[Any], dict[str, np.ndarray]]
    success: Callable[[Any, dict], bool]
    prompt: Callable[[Any], str]
    expert: Callable[[Any, Any, np.random.Generator], np.ndarray]
    view: Callable[[Any], np.ndarray] | None = None


class GymEnv:
    """One environment as deploy.rollout drives it: reset(seed), step(action), observe(), success, ended, render().

    An observation is {"images": {view: u8[h w 3] RGB}, "state": f32[s], "prompt": str}, as Policy.act takes it; actions are f32[a] in
    the card's units. `clipped` counts numbers that the environment's action space cut, of `commanded`.
    """

    def __init__(self, env: Any, mapping: Mapping, card: DatasetCard):
        check_actions(card)
        space, wide = getattr(env, "action_space", None), undo(card.action.ops, np.zeros((1, len(card.action.dims)), np.float32)).shape[1]
        if space is not None and space.shape != (wide,):
            raise UserError(
                f"card {card.name} commands {wide} numbers, and this environment takes {space.shape}: it is another robot's card"
            )
        self.env, self.mapping, self.card = env, mapping, card
        self.success = self.ended = False
        self.steps = self.clipped = self.commanded = 0
        self.raw: Any = None  # the environment's own observation
        self._checked = False

    def reset(self, seed: int) -> dict[str, Any]:
        """The seed decides scene and start. Raises: UserError when the card reads fields that the environment does not give."""
        self.raw, info = self.env.reset(seed=int(seed))
        self.success, self.ended, self.steps, self.clipped, self.commanded = False, False, 0, 0, 0
        self.success = bool(self.mapping.success(self.env, info))
        return self.observe()

    def step(self, action: np.ndarray) -> None:
        """Carries out f32[a] in the card's units. Raises: ValueError for another shape or numbers that are not finite."""
        dims, action = self.card.action.dims, np.asarray(action, np.float32)
        if action.shape != (len(dims),) or not np.isfinite(action).all():
            raise ValueError(f"an action is {len(dims)} finite numbers ({', '.join(d.name for d in dims)}), got {action.tolist()}")
        self.tell(undo(self.card.action.ops, action[None])[0])

    def tell(self, raw: np.ndarray) -> np.ndarray:
        """Carries out an action as the environment takes it, within its bounds; returns what was carried out, f32."""
        space, raw = getattr(self.env, "action_space", None), np.asarray(raw, np.float32)
        told = raw if space is None else np.clip(raw, space.low, space.high).astype(np.float32)
        beyond = np.abs(told - raw) > 1e-5 * np.maximum(np.abs(raw), 1.0)  # not what rounding leaves
        self.clipped, self.commanded = self.clipped + int(beyond.sum()), self.commanded + raw.size
        self.raw, _, terminated, truncated, info = self.env.step(told)
        self.success = bool(self.mapping.success(self.env, info))
        self.ended = bool(terminated or truncated)
        self.steps += 1
        return told

    def observe(self) -> dict[str, Any]:
        """What the policy is shown now; draws the pictures."""
        fields = self.fields()
        if not self._checked:
            self._check(fields)
            self._checked = True
        return {
            "images": {view: fields[key] for view, key in self.card.views.items()},
            "state": self._state(fields),
            "prompt": self.mapping.prompt(self.env),
        }

    def fields(self) -> dict[str, np.ndarray]:
        """What a recording holds of this moment: numbers and pictures, by field."""
        return {**self.mapping.numbers(self.env, self.raw), **self.mapping.pictures(self.env)}

    def expert(self, rng: np.random.Generator) -> np.ndarray:
        """What a script would tell the environment now."""
        return np.asarray(self.mapping.expert(self.env, self.raw, rng), np.float32)

    def render(self) -> np.ndarray:
        """u8[h w 3], for people to look at."""
        if self.mapping.view:
            return self.mapping.view(self.env)
        return next(iter(self.mapping.pictures(self.env).values()))

    def _check(self, fields: dict[str, np.ndarray]) -> None:
        wanted = [*self.card.views.values(), *standardize.keys(self.card.state.ops)]
        if missing := sorted(set(wanted) - set(fields)):
            raise UserError(
                f"card {self.card.name} reads {', '.join(missing)}, and this environment gives {', '.join(sorted(fields))}: "
                "take an export that was trained on recordings of it (python -m vla_jax.sims.record), or name its --robot"
            )
        try:
            wide = self._state(fields).size
        except (IndexError, ValueError) as e:
            raise UserError(
                f"the state ops of card {self.card.name} do not fit what this environment gives ({e}): another robot's card"
            ) from e
        if wide != (dims := len(self.card.state.dims)):
            raise UserError(f"card {self.card.name} has a state of {dims} numbers, and here it has {wide}: it is another robot's card")

    def _state(self, fields: dict[str, np.ndarray]) -> np.ndarray:
        """f32[s] in the card's units."""
        one = {key: np.asarray(x, np.float32)[None] for key, x in fields.items() if key in standardize.keys(self.card.state.ops)}
        return standardize.apply(self.card.state.ops, one, 1)[0].astype(np.float32)


def check_actions(card: DatasetCard) -> None:
    """Raises: UserError when the card's action ops cannot be undone for a single step."""
    undo(card.action.ops, np.zeros((1, len(card.action.dims)), np.float32))


def undo(ops: tuple[dict, ...], actions: np.ndarray) -> np.ndarray:
    """f32[n a] in the card's units -> f32[n a] as it was recorded: the inverse of `standardize.apply` over the field `action`.

    Raises: UserError for an op that loses something (binarise) or needs more than the step itself (delta, latch, ..), and for several fields.
    """
    x = np.array(actions, np.float32)
    for op in reversed(ops):
        ((name, arg),) = op.items()
        match name:
            case "scale":
                x[:, arg["dims"]] /= np.float32(arg["by"])
            case "offset":
                x[:, arg["dims"]] -= np.float32(arg["by"])
            case "invert":
                x[:, arg["dims"]] = 1 - x[:, arg["dims"]]
            case "clip":  # the environment has bounds of its own
                pass
            case "rotate":
                at, width, wide = arg["at"], rotations.WIDTH[arg["to"]], x.shape[1]
                turned = rotations.convert(x[:, at : at + width], arg["to"], arg["from"]).astype(np.float32)
                x = np.concatenate([x[:, :at], turned, x[:, at + width : wide]], axis=1)
            case "pick" if op is ops[0]:
                key, dims = (arg["key"], arg.get("dims")) if isinstance(arg, dict) else (arg, None)
                dims = list(range(x.shape[1])) if dims is None else list(dims)
                if key != ACTION or sorted(dims) != list(range(x.shape[1])):
                    raise UserError(
                        f"the action ops pick columns {dims} of {key!r}; to act, they must begin with all columns of {ACTION!r}"
                    )
                x = x[:, np.argsort(dims)]
            case _:
                raise UserError(f"the action op {name!r} cannot be undone one step at a time, so a policy of this card cannot act here")
    return x
