"""The table of environments: what is made for `--env NAME[:TASK]`, how it is read, and the card that says what its numbers mean.

Simulators are imported when one is made; each needs the extra `sim` (launch/sims.sh). All draw without a screen: MUJOCO_GL=egl or osmesa.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import os
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from vla_jax.sims import experts, instructions
from vla_jax.sims.adapter import GymEnv, Mapping
from vla_jax.tabletop.env import ROBOTS, TabletopEnv
from vla_jax.tabletop.robots import IMAGE_KEYS
from vla_jax.types import UserError

PIXELS = 224  # of the pictures of MetaWorld and robosuite
PUSHT_PIXELS = 96  # as published
PUSHT_TABLE = 512.0  # Push-T's own unit of length: its table is so wide


@dataclasses.dataclass(frozen=True)
class Environment:
    """card: of what is recorded; "" where the task is the card. make: task -> (environment, mapping). needs: packages, in the order of import.
    max_steps: after which an episode counts as failed; a number, or one for each task."""

    card: str
    tasks: Callable[[], tuple[str, ...]]
    make: Callable[[str], tuple[Any, Mapping]]
    max_steps: Callable[[str], int]
    needs: tuple[str, ...] = ()


def parse(spec: str) -> tuple[str, tuple[str, ...]]:
    """`metaworld:reach-v3,push-v3` -> ("metaworld", tasks); no task: the only one, or all. Raises: UserError naming what there is."""
    name, _, said = spec.partition(":")
    if name not in ENVIRONMENTS:
        raise UserError(f"there is no environment {name!r}; there are: {', '.join(ENVIRONMENTS)}")
    entry = ENVIRONMENTS[name]
    check_installed(name)
    known = entry.tasks()
    tasks = tuple(dict.fromkeys(task for task in said.split(",") if task)) or known
    if unknown := [task for task in tasks if task not in known]:
        raise UserError(f"{name} has no task {', '.join(unknown)}; it has: {', '.join(known)}")
    return name, tasks


def card_of(name: str, task: str) -> str:
    """The card of what is recorded there."""
    return ENVIRONMENTS[name].card or task


def check_installed(name: str) -> None:
    """Raises: UserError naming the packages that are missing."""
    if missing := [p for p in ENVIRONMENTS[name].needs if importlib.util.find_spec(p) is None]:
        raise UserError(f"the environment {name} needs {', '.join(missing)}: run `sh launch/sims.sh`, or see docs/evaluation.md")


def make(name: str, task: str, card) -> GymEnv:
    """One environment, seen through `card`. Raises: UserError when it is not installed, cannot draw here, or does not fit the card."""
    check_installed(name)
    os.environ.setdefault("MUJOCO_GL", "egl")  # no screen is needed; another choice stays
    env, mapping = ENVIRONMENTS[name].make(task)
    return GymEnv(env, mapping, card)


class _Tabletop:
    """The tabletop world with Gymnasium's signatures."""

    action_space = None  # the world cuts motion to the robot's limits itself

    def __init__(self, robot: str):
        self.world = TabletopEnv(robot)

    def reset(self, *, seed: int):
        return self.world.reset(seed), {}

    def step(self, action):
        return self.world.step(action), 0.0, False, False, {}


def _tabletop(robot: str) -> tuple[Any, Mapping]:
    env = _Tabletop(robot)
    return env, Mapping(
        numbers=lambda env, seen: {"observation/state": seen["state"]},
        pictures=lambda env: {f"observation/{IMAGE_KEYS[view]}": x for view, x in env.world.observe()["images"].items()},
        success=lambda env, info: env.world.success,
        prompt=lambda env: env.world.prompt,
        expert=lambda env, seen, rng: env.world.expert_action(),
        view=lambda env: env.world.render(),
    )


def _metaworld(task: str, *, stock: bool = False) -> tuple[Any, Mapping]:
    """stock: as MetaWorld draws, with multisampling, shadows and reflections: what published numbers were taken with, and 22 times as slow."""
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS
    from metaworld.policies import ENV_POLICY_MAP

    env = ALL_V3_ENVIRONMENTS[task](render_mode="rgb_array", camera_name="corner2", width=PIXELS, height=PIXELS)
    # As its own goal-observable variants are set up: goals drawn by the seed, and shown to the expert (the policy's state leaves them out).
    env._partially_observable, env._freeze_rand_vec, env.seeded_rand_vec, env._set_task_called = False, False, True, True
    env.__dict__.pop("sawyer_observation_space", None)
    if not stock:
        _plain(env.model)
    script = ENV_POLICY_MAP[task]()
    return _Seeded(env), Mapping(
        numbers=lambda env, seen: {"observation/state": np.asarray(seen[:4], np.float32)},
        pictures=lambda env: {"observation/image": np.ascontiguousarray(env.render()[::-1, ::-1])},  # corner2 hangs upside down
        success=lambda env, info: bool(info.get("success", False)),
        prompt=lambda env: instructions.METAWORLD[task],
        expert=lambda env, seen, rng: experts.metaworld(script, seen),
    )


class _Seeded:
    """A MetaWorld environment whose reset takes the seed, which its own ignores."""

    def __init__(self, env):
        self.env, self.action_space, self.render = env, env.action_space, env.render

    def reset(self, *, seed: int):
        self.env.seed(seed)
        return self.env.reset()

    def step(self, action):
        return self.env.step(action)


def _pusht(task: str) -> tuple[Any, Mapping]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pygame's, about pkg_resources
        import gym_pusht  # noqa: F401  registers itself
        import gymnasium

    size = {"observation_width": PUSHT_PIXELS, "observation_height": PUSHT_PIXELS}
    env = gymnasium.make("gym_pusht/PushT-v0", obs_type="state", render_mode="rgb_array", disable_env_checker=True, **size)
    picture = lambda env: np.ascontiguousarray(env.unwrapped._render())  # at the observation's size, without the mark of the last action
    return env, Mapping(
        numbers=lambda env, seen: {"observation/state": np.asarray(seen[:2], np.float32)},
        pictures=lambda env: {"observation/image": picture(env)},
        success=lambda env, info: bool(info.get("is_success", False)),
        prompt=lambda env: instructions.PUSHT,
        expert=lambda env, seen, rng: experts.pusht(seen, env.unwrapped.goal_pose, rng),
        view=lambda env: np.ascontiguousarray(env.render()[::2, ::2]),
    )


class _Robosuite:
    """A robosuite environment with Gymnasium's signatures; its pictures are drawn when asked for."""

    def __init__(self, task: str):
        import robosuite
        from gymnasium.spaces import Box

        cameras = {"use_camera_obs": False, "has_offscreen_renderer": True, "has_renderer": False}
        with _numpy_seed(0):  # the size of the cube is drawn here: the same in all scenes
            # hard_reset compiles the model anew (seconds); the horizon is the caller's
            self.env = robosuite.make(task, robots="Panda", control_freq=20, hard_reset=False, ignore_done=True, **cameras)
        self.action_space = Box(*(np.asarray(x, np.float32) for x in self.env.action_spec))
        self.env.reset()
        _plain(self.env.sim.model._model)

    def reset(self, *, seed: int):
        for robot in self.env.robots:
            for gripper in robot.gripper.values():  # else the fingers begin with what the last episode told them
                gripper.current_action = np.zeros(gripper.dof)
        with _numpy_seed(seed):  # robosuite draws scenes from numpy's global generator
            return self.env.reset(), {}

    def step(self, action):
        seen, reward, done, info = self.env.step(action)
        return seen, reward, False, bool(done), info

    def picture(self, camera: str) -> np.ndarray:
        return np.ascontiguousarray(self.env.sim.render(camera_name=camera, width=PIXELS, height=PIXELS)[::-1])  # OpenGL's rows go up


def _robosuite(task: str) -> tuple[Any, Mapping]:
    cameras = {"observation/image": "agentview", "observation/wrist_image": "robot0_eye_in_hand"}
    join = lambda seen: np.concatenate([seen[k] for k in ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")])
    return _Robosuite(task), Mapping(
        numbers=lambda env, seen: {"observation/state": join(seen).astype(np.float32)},
        pictures=lambda env: {key: env.picture(camera) for key, camera in cameras.items()},
        success=lambda env, info: bool(env.env._check_success()),
        prompt=lambda env: instructions.ROBOSUITE[task],
        expert=lambda env, seen, rng: experts.lift(seen),
    )


def _plain(model) -> None:
    """MuJoCo's pictures without multisampling, shadows and reflections, which a software renderer takes most of its time for."""
    model.vis.quality.offsamples, model.vis.quality.shadowsize = 0, 0
    model.mat_reflectance[:] = 0
    model.light_castshadow[:] = 0


@contextlib.contextmanager
def _numpy_seed(seed: int):
    before = np.random.get_state()
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        np.random.set_state(before)


_METAWORLD = Environment(
    "metaworld_mt50", lambda: tuple(sorted(instructions.METAWORLD)), _metaworld, lambda task: 500, ("metaworld", "mujoco")
)
ENVIRONMENTS: dict[str, Environment] = {
    "tabletop": Environment("", lambda: tuple(ROBOTS), _tabletop, lambda robot: ROBOTS[robot].max_steps),
    "metaworld": _METAWORLD,
    "metaworld_stock": dataclasses.replace(_METAWORLD, make=functools.partial(_metaworld, stock=True)),
    "pusht": Environment("pusht", lambda: ("push",), _pusht, lambda task: 300, ("gymnasium", "gym_pusht")),
    "robosuite": Environment(
        "robosuite_lift", lambda: tuple(instructions.ROBOSUITE), _robosuite, lambda task: 200, ("robosuite", "mujoco")
    ),
}
