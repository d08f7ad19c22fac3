"""Scripts that act in the simulators, as their environments take actions. The tabletop world has its own (tabletop/expert.py)."""

from __future__ import annotations

import warnings

import numpy as np

_ABOVE, _NEAR = 0.08, 0.015  # m: from where the hand comes down, and how near counts as there


def metaworld(script, seen: np.ndarray) -> np.ndarray:
    """f32[4]: what MetaWorld's own scripted policy of a task does; its commands beyond the bounds are cut."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns whenever the bounds cut a command
        return np.clip(np.nan_to_num(script.get_action(np.asarray(seen, np.float64))), -1, 1).astype(np.float32)


def pusht(seen: np.ndarray, goal: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """f32[2], the next place of the agent on the 512 x 512 table: walk round the T, then push its middle towards the goal's.

    It turns nothing on purpose, so it seldom solves the task; its recordings show contact, not skill.
    """
    agent, block, target = np.asarray(seen[:2]), np.asarray(seen[2:4]), np.asarray(goal[:2], np.float64)
    way = target - block
    way = way / max(np.linalg.norm(way), 1e-6)
    behind = block - 110 * way
    off = agent - block
    beside = abs(float(off @ np.array([-way[1], way[0]])))
    if float(off @ way) < 0 and beside < 30:
        aim = agent + 40 * way  # behind it: push
    elif np.linalg.norm(off) < 105 and float(off @ way) > -60:
        aim = agent + 60 * off / max(np.linalg.norm(off), 1e-6)  # too near to walk round: step back
    else:
        round_it = np.arctan2(off[1], off[0])
        turn = (np.arctan2(*(behind - block)[::-1]) - round_it + np.pi) % (2 * np.pi) - np.pi
        angle = round_it + np.clip(turn, -0.5, 0.5)
        aim = block + 120 * np.array([np.cos(angle), np.sin(angle)])
    return np.clip(aim + rng.normal(0, 4, 2), 0, 512).astype(np.float32)


def lift(seen: dict) -> np.ndarray:
    """f32[7] of robosuite's OSC_POSE (position and rotation in shares of 0.05 m and 0.5 rad a step; the last closes): over the cube,
    down, close, up. A function of what is seen alone, so that a policy can learn it from single frames."""
    hand, cube, fingers = seen["robot0_eef_pos"], seen["cube_pos"], seen["robot0_gripper_qpos"]
    to, flat = cube - hand, float(np.linalg.norm((cube - hand)[:2]))
    at_it = flat < _NEAR and abs(to[2]) < _NEAR
    held = at_it and fingers[0] - fingers[1] < 0.055  # a cube of 4 cm stops the fingers, 8 cm apart when open
    if held:
        move, close = np.array([0.0, 0.0, 0.03]), 1.0
    elif at_it:
        move, close = np.zeros(3), 1.0
    elif flat < _NEAR:
        move, close = to, -1.0
    else:
        move, close = np.array([to[0], to[1], to[2] + _ABOVE]), -1.0
    return np.concatenate([np.clip(move * 4 / 0.05, -1, 1), np.zeros(3), [close]]).astype(np.float32)
