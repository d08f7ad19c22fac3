"""Four robots that share a table and nothing else: action space, control rate, cameras and state all differ.

A robot has `t` tools, for each of them two numbers of motion and the gripper (1 = open) in its state, and as many or more in its action.
`q` f64[t 2] is the motion part of the state: tool positions, but joint angles for the arm. The wheeled robot is there to be
fine-tuned to: the demo does not train on it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from vla_jax.tabletop.world import REACH_LIMIT

IMAGE_KEYS = {"base": "image", "wrist": "wrist_image", "side": "side_image"}  # what a view is called under observation/ in a recording
SLIDER_MAX = 0.12  # m a step
ARM_MAX = 0.20  # rad a step
BIMANUAL_MAX = 0.03  # m a step
OMNI_MAX = 0.10  # m a step
WHEELS = np.array([[0.0, 1.0], [-(0.75**0.5), -0.5], [0.75**0.5, -0.5]])  # the ways in which three wheels roll, 120 degrees apart
ARM_BASE = np.array([0.0, -1.0])  # far from the table: a joint then moves the tool in much the same direction everywhere
ARM_LINK = 0.80  # m, both links; the far corners are 1.31 m away, so the elbow is never straight


@dataclasses.dataclass(frozen=True)
class Robot:
    """What is fixed about a robot.

    forward: q f64[t 2] -> tool positions f64[t 2]. inverse: the other way. move: (q, command f64[t m]) -> the next q,
    within the robot's limits; m is 2, and 3 with wheels. command: (q, target f64[t 2]) -> the motion command f64[t m] with which the expert
    brings the tools towards `target`. home: tool positions (t of them) in metres, from which an episode starts within
    +- start_spread. disturbance: typical size of the push that recording adds to a command, in the command's own unit.
    max_steps is about three expert episodes. tolerance: how near to a block or a goal, in metres, the expert counts a
    tool as there: inside the world's reach and goal radius, so that a learner has room for error. gripper_rate: opening per
    second; slow at a high control rate, or the moment of closing would be one frame in a whole episode.
    """

    control_hz: int
    views: tuple[str, ...]
    image_format: str
    state_dims: tuple[str, ...]
    action_dims: tuple[str, ...]
    max_steps: int
    tolerance: float
    gripper_rate: float
    home: tuple[tuple[float, float], ...]
    start_spread: float
    disturbance: float
    forward: Callable[[np.ndarray], np.ndarray]
    inverse: Callable[[np.ndarray], np.ndarray]
    move: Callable[[np.ndarray, np.ndarray], np.ndarray]
    command: Callable[[np.ndarray, np.ndarray], np.ndarray]


def on_table(position: np.ndarray) -> np.ndarray:
    """The nearest position that a tool may take."""
    return np.clip(position, -REACH_LIMIT, REACH_LIMIT)


def step_towards(position: np.ndarray, target: np.ndarray, most: float) -> np.ndarray:
    """`position` f[.. 2] moved straight towards `target` by `most` metres, or onto it if it is nearer."""
    delta = target - position
    length = np.linalg.norm(delta, axis=-1, keepdims=True)
    return position + delta * np.minimum(1.0, most / np.maximum(length, 1e-9))


def arm_forward(q: np.ndarray) -> np.ndarray:
    """Joint angles f[.. 2] in radians (q2 relative to the first link) -> tool position f[.. 2] in metres."""
    return arm_elbow(q) + ARM_LINK * np.stack([np.cos(q.sum(-1)), np.sin(q.sum(-1))], -1)


def arm_elbow(q: np.ndarray) -> np.ndarray:
    """Where the first link ends, f[.. 2]."""
    return ARM_BASE + ARM_LINK * np.stack([np.cos(q[..., 0]), np.sin(q[..., 0])], -1)


def arm_inverse(tool: np.ndarray) -> np.ndarray:
    """Tool position f[.. 2] -> joint angles f[.. 2], always with the elbow on the right (q2 > 0)."""
    x, y = np.moveaxis(tool - ARM_BASE, -1, 0)
    q2 = np.arccos(np.clip((x**2 + y**2) / (2 * ARM_LINK**2) - 1.0, -1.0, 1.0))
    return np.stack([np.arctan2(y, x) - q2 / 2, q2], -1)  # links of equal length: the elbow halves q2


def slider_move(q: np.ndarray, delta: np.ndarray) -> np.ndarray:
    """Tool position after a displacement in metres, at most `SLIDER_MAX` long."""
    return on_table(step_towards(q, q + delta, SLIDER_MAX))


def arm_move(q: np.ndarray, delta: np.ndarray) -> np.ndarray:
    """Joint angles after joint deltas in radians; a step that would leave the table ends at its edge."""
    return arm_inverse(on_table(arm_forward(q + np.clip(delta, -ARM_MAX, ARM_MAX))))


def bimanual_move(q: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Tool positions one step closer to the absolute target."""
    return step_towards(q, on_table(target), BIMANUAL_MAX)


def jog(remaining: np.ndarray, step: float) -> np.ndarray:
    """Full speed along every axis that is more than half a step off, none along the others: most actions then say
    plainly where the target lies, where a share of the remaining way would mostly be small numbers."""
    return np.where(np.abs(remaining) > step / 2, np.sign(remaining) * step, 0.0)


def slider_command(q: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Displacement in metres, axis by axis."""
    return jog(target - q, 0.08)


def arm_command(q: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The same in joint space, in radians."""
    return jog(arm_inverse(target) - q, 0.06)


def omni_move(q: np.ndarray, rolled: np.ndarray) -> np.ndarray:
    """Tool position after each wheel f[.. 3] has rolled so many metres: the least-squares motion, at most `OMNI_MAX` long."""
    return on_table(step_towards(q, q + rolled @ WHEELS * (2 / 3), OMNI_MAX))


def omni_command(q: np.ndarray, target: np.ndarray) -> np.ndarray:
    """What each wheel rolls in metres, to jog the tool along x and y."""
    return jog(target - q, 0.06) @ WHEELS.T


ROBOTS: dict[str, Robot] = {
    "tabletop_slider": Robot(
        control_hz=5,
        views=("base",),
        image_format="jpeg",
        state_dims=("x", "y", "gripper"),
        action_dims=("dx", "dy", "gripper"),
        max_steps=30,
        tolerance=0.07,
        gripper_rate=2.5,
        home=((0.0, 0.0),),
        start_spread=0.25,
        disturbance=0.04,
        forward=lambda q: q,
        inverse=lambda tool: tool,
        move=slider_move,
        command=slider_command,
    ),
    "tabletop_arm": Robot(
        control_hz=10,
        views=("base", "wrist"),
        image_format="jpeg",
        state_dims=("q1", "q2", "gripper"),
        action_dims=("dq1", "dq2", "gripper"),
        max_steps=60,
        tolerance=0.07,
        gripper_rate=2.5,
        home=((0.0, 0.0),),
        start_spread=0.25,
        disturbance=0.03,
        forward=arm_forward,
        inverse=arm_inverse,
        move=arm_move,
        command=arm_command,
    ),
    "tabletop_bimanual": Robot(
        control_hz=20,
        views=("base",),
        image_format="png",
        state_dims=("xl", "yl", "gl", "xr", "yr", "gr"),
        action_dims=("xl", "yl", "gl", "xr", "yr", "gr"),
        max_steps=90,
        tolerance=0.05,
        gripper_rate=1.0,
        home=((-0.25, 0.0), (0.25, 0.0)),
        start_spread=0.03,
        disturbance=0.12,
        forward=lambda q: q,
        inverse=lambda tool: tool,
        move=bimanual_move,
        # The goal of the motion, not the next point on the way: were it one step ahead, copying the state would look
        # like skill.
        command=lambda q, target: target,
    ),
    "tabletop_omni": Robot(
        control_hz=8,
        views=("base", "side"),
        image_format="jpeg",
        state_dims=("x", "y", "gripper"),
        action_dims=("w1", "w2", "w3", "gripper"),
        max_steps=48,
        tolerance=0.07,
        gripper_rate=2.5,
        home=((0.0, 0.0),),
        start_spread=0.25,
        disturbance=0.03,
        forward=lambda q: q,
        inverse=lambda tool: tool,
        move=omni_move,
        command=omni_command,
    ),
}
