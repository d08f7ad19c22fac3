"""The closed loop: reset to a seeded scene, act, observe.

env = TabletopEnv("tabletop_arm")
obs = env.reset(EVAL_SEED + 7)
while not env.success and env.steps < ROBOTS["tabletop_arm"].max_steps:
    obs = env.step(policy(obs))
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vla_jax.tabletop import expert, render, world
from vla_jax.tabletop.robots import ROBOTS, on_table
from vla_jax.tabletop.world import ANY, Drawn

__all__ = ["EVAL_SEED", "IMAGE_SIZE", "ROBOTS", "TabletopEnv"]

IMAGE_SIZE = 48
EVAL_SEED = 10_000_000  # recorded episodes use seeds below; an evaluation that starts here sees only new scenes


class TabletopEnv:
    """One robot at the table. Deterministic: the seed of `reset` and the actions decide everything.

    An observation is {"images": {view: u8[48 48 3] RGB}, "state": f32[s], "prompt": str}; state and action are in
    robot units, in the order of `ROBOTS[robot].state_dims` and `.action_dims`.

    drawn: which instructions are given. camera: where the fixed cameras look, x and y, and how wide, in metres.
    """

    def __init__(
        self, robot: str, *, blocks: int = 1, drawn: Drawn = ANY, camera: tuple[float, float, float] = (0.0, 0.0, render.BASE_WIDTH)
    ):
        if robot not in ROBOTS:
            raise ValueError(f"no robot called {robot!r}; there are {', '.join(ROBOTS)}")
        self.name, self.robot, self.steps, self._blocks = robot, ROBOTS[robot], 0, blocks
        self._drawn, self._camera, self._scene = drawn, camera, None

    def reset(self, seed: int) -> dict[str, Any]:
        """A new scene, instruction and start pose. Robots given the same seed get the same scene and instruction."""
        home = np.array(self.robot.home)
        self._scene, self._task = world.draw(np.random.default_rng([seed, 0]), len(home), blocks=self._blocks, drawn=self._drawn)
        spread = np.random.default_rng([seed, 1]).uniform(-1.0, 1.0, home.shape) * self.robot.start_spread
        self._q = self.robot.inverse(on_table(home + spread))
        self.steps, self._way = 0, self._left()
        return self.observe()

    def step(self, action: np.ndarray) -> dict[str, Any]:
        """Executes `action` f32[a] for 1 / control_hz seconds; motion beyond the robot's limits is cut to them.

        The gripper number is a switch: above 0.5 the fingers open, else they close, at a fixed rate.
        """
        self._started()
        names = self.robot.action_dims
        action = np.asarray(action, np.float64)
        if action.shape != (len(names),):
            raise ValueError(f"{self.name}: expected an action of shape ({len(names)},) = {names}, got {action.shape}")
        if not np.isfinite(action).all():
            raise ValueError(f"{self.name}: expected finite numbers for {names}, got {action.tolist()}")
        command = action.reshape(len(self._q), -1)
        before = self.robot.forward(self._q)
        self._q = self.robot.move(self._q, command[:, :-1])
        tools = self.robot.forward(self._q)
        fingers = np.where(command[:, -1] > 0.5, 1.0, -1.0) * self.robot.gripper_rate / self.robot.control_hz
        opening = np.clip(self._scene.opening + fingers, 0.0, 1.0)
        self._scene = world.advance(self._scene, tools, tools - before, opening)
        self.steps += 1
        return self.observe()

    @property
    def success(self) -> bool:
        """Whether the named block lies at its goal, let go of, now."""
        self._started()
        return world.solved(self._scene, self._task)

    @property
    def progress(self) -> float:
        """The share of its way to the goal that the named block has come, now: 0 untouched, 1 there, below 0 further off than at first."""
        self._started()
        return 1.0 - self._left() / self._way

    def _left(self) -> float:
        """Metres between the named block and its goal."""
        return float(np.linalg.norm(self._scene.blocks[self._task.block] - world.goal_of(self._scene.bowl, self._task.side)))

    def expert_action(self) -> np.ndarray:
        """What the scripted expert would do now, f32[a]."""
        self._started()
        return expert.act(self.robot, self._q, self._scene, self._task)

    def render(self, size: int = 192) -> np.ndarray:
        """The base camera's picture, u8[size size 3], for people to look at."""
        self._started()
        return self._picture("base", size)

    @property
    def prompt(self) -> str:
        self._started()
        return self._task.prompt

    def observe(self) -> dict[str, Any]:
        """What reset and step return, now."""
        self._started()
        state = np.concatenate([self._q, self._scene.opening[:, None]], -1).ravel().astype(np.float32)
        images = {view: self._picture(view, IMAGE_SIZE) for view in self.robot.views}
        return {"images": images, "state": state, "prompt": self._task.prompt}

    def _picture(self, view: str, size: int) -> np.ndarray:
        tools = self.robot.forward(self._q)
        framing = {"centre": self._camera[:2], "width": self._camera[2], "turned": view == "side"}
        if view == "wrist":
            framing = {"centre": tools[0], "width": render.WRIST_WIDTH}
        return render.picture(self._scene, robot=self.name, q=self._q, tools=tools, size=size, **framing)

    def _started(self) -> None:
        if self._scene is None:
            raise ValueError(f"{self.name}: call reset(seed) first")
