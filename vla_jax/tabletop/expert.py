"""The scripted expert: go to the block, close, go to the goal, open, stay.

It is a function of what the world looks like now and of the instruction, without memory or timers. So the recorded
actions are ones that a policy can in principle predict from one observation, and after any disturbance the expert
simply carries on.
"""

from __future__ import annotations

import numpy as np

from vla_jax.tabletop.robots import Robot
from vla_jax.tabletop.world import Scene, Task, goal_of, solved


def act(robot: Robot, q: np.ndarray, scene: Scene, task: Task) -> np.ndarray:
    """The expert's action f32[a], in robot units."""
    tools = robot.forward(q)
    block = scene.blocks[task.block]
    target, opening = np.asarray(robot.home, float), np.ones(len(tools))
    if len(tools) == 1:
        target = tools.copy()
    holders = np.flatnonzero(scene.held == task.block)
    # The holder, else the nearest tool, acts; every other one stays open at its home.
    active = holders[0] if len(holders) else np.linalg.norm(tools - block, axis=-1).argmin()

    if len(holders):
        to_goal = goal_of(scene.bowl, task.side) - block
        target[active] = tools[active] + to_goal
        opening[active] = np.linalg.norm(to_goal) < robot.tolerance
    elif solved(scene, task):
        target[active] = tools[active]
    elif scene.held[active] >= 0:
        target[active] = tools[active]  # the wrong block: put it down here
    else:
        # A hand that is still open, or on its way down, closes; one that closed on nothing has to open first.
        target[active] = block
        near = np.linalg.norm(tools[active] - block) < robot.tolerance
        opening[active] = not (near and scene.opening[active] > 0.5)
    return np.concatenate([robot.command(q, target), opening[:, None]], -1).ravel().astype(np.float32)
