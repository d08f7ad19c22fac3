"""Cameras that look straight down: pictures of the world, u8[h w 3] RGB, up is +y."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from vla_jax.tabletop.robots import ARM_BASE, WHEELS, arm_elbow
from vla_jax.tabletop.world import BLOCK, BOWL_RADIUS, HOLDING, TABLE, Scene

BASE_WIDTH = 0.64  # m across: the table and a margin
WRIST_WIDTH = 0.30
SUPERSAMPLE = 4  # drawn that much larger and averaged down: smooth edges at any position
# A mid-grey table is about zero once pixels are scaled to [-1, 1], so that only what matters excites a network. In one
# pair of runs a small transformer's loss after 600 steps was 0.36 with this table and 0.40 with a dark one.
FLOOR, TABLETOP, LINK = (100, 100, 104), (126, 126, 130), (152, 152, 158)
BOWL, BOWL_INSIDE = (255, 255, 255), (30, 30, 30)
BLOCKS = {"red": (240, 30, 30), "green": (30, 220, 50), "blue": (50, 90, 255)}
OPEN, CLOSED = np.array([255, 225, 0]), np.array([255, 0, 230])


def picture(
    scene: Scene,
    *,
    robot: str,
    q: np.ndarray,
    tools: np.ndarray,
    size: int,
    centre: Sequence[float] = (0.0, 0.0),
    width: float = BASE_WIDTH,
    turned: bool = False,
) -> np.ndarray:
    """What a camera `width` metres wide sees above `centre`, at `size` x `size` pixels; turned: from the right edge, so that up is -x."""
    canvas_size = size * SUPERSAMPLE
    scale = canvas_size / width
    canvas = np.empty([canvas_size, canvas_size, 3], np.uint8)
    canvas[:] = FLOOR

    def pixel(x, y):
        return round((x - centre[0] + width / 2) * scale), round((centre[1] - y + width / 2) * scale)

    def box(x, y, half_x, half_y, colour):
        (left, top), (right, bottom) = pixel(x - half_x, y + half_y), pixel(x + half_x, y - half_y)
        cv2.rectangle(canvas, (left, top), (right - 1, bottom - 1), colour, -1)

    box(0.0, 0.0, TABLE / 2, TABLE / 2, TABLETOP)
    # Links lie under everything: an arm tells where it is without hiding what it works on.
    for chain in links(robot, q, tools):
        points = np.array([pixel(*point) for point in chain], np.int32)
        cv2.polylines(canvas, [points], False, LINK, max(1, round(0.014 * scale)))
    cv2.circle(canvas, pixel(*scene.bowl), round(BOWL_RADIUS * scale), BOWL, -1)
    cv2.circle(canvas, pixel(*scene.bowl), round(0.6 * BOWL_RADIUS * scale), BOWL_INSIDE, -1)
    for (x, y), colour in zip(scene.blocks, scene.colours):
        box(x, y, BLOCK / 2, BLOCK / 2, BLOCKS[colour])
    # A tool is two fingers, far apart and yellow when open, touching the block and magenta when closed.
    for (x, y), opening in zip(tools, scene.opening):
        openness = np.clip((opening - HOLDING) / (1.0 - HOLDING), 0.0, 1.0)
        colour = tuple((openness * OPEN + (1.0 - openness) * CLOSED).tolist())
        apart = 0.016 + 0.032 * opening
        for side in (-1.0, 1.0):
            box(x + side * apart, y, 0.009, 0.032, colour)
    canvas = np.rot90(canvas, -1) if turned else canvas
    return cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA)


def links(robot: str, q: np.ndarray, tools: np.ndarray) -> list[list[np.ndarray]]:
    """The robot's body as chains of points: a gantry beam, two links, or one strut from either edge."""
    edge = TABLE / 2
    match robot:
        case "tabletop_slider":
            return [[np.array([tools[0, 0], -edge]), np.array([tools[0, 0], edge])]]
        case "tabletop_arm":
            return [[ARM_BASE, arm_elbow(q[0]), tools[0]]]
        case "tabletop_bimanual":
            return [[np.array([-edge, 0.0]), tools[0]], [np.array([edge, 0.0]), tools[1]]]
        case "tabletop_omni":
            return [[tools[0], tools[0] + 0.05 * wheel] for wheel in WHEELS]
    raise ValueError(f"no drawing of a robot called {robot!r}")
