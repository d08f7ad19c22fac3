"""The scene, the instruction, and what the tools do to the blocks.

Metres, in the base frame: the table is 0.6 x 0.6, its centre is the origin, x points right and y up in every image, so
"left of the bowl" is towards -x. There is no contact physics: blocks neither collide nor slide.
"""

from __future__ import annotations

import dataclasses

import numpy as np

TABLE = 0.60
BLOCK = 0.08
BOWL_RADIUS = 0.06
REACH_LIMIT = 0.28  # a tool stays within +- this in x and y
GRASP_REACH = 0.10  # a tool that closes this near to a block's centre takes it
PITCH = 0.20  # things stand on a 3 x 3 grid of places, this far apart
JITTER = 0.01  # and up to this far off
GOAL_OFFSET = PITCH  # the goal lies this far left or right of the bowl
GOAL_RADIUS = 0.10  # and counts as reached within this
HOLDING = 0.5  # opening at which a tool's fingers touch the block between them
COLOURS = ("red", "green", "blue")
SIDES = ("left", "right")
PHRASES = {
    "beside": ("move the {colour} block {side} of the bowl", "put the {colour} block {side} of the bowl"),
    "into": ("drop the {colour} block into the bowl", "put the {colour} block into the bowl"),
}
GOALS = tuple(PHRASES)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Which instructions are given. goal: one of GOALS. without, only: (colour, side) of "beside" that never, or always, are."""

    goal: str = "beside"
    without: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    def allows(self, colour: str, side: str) -> bool:
        return (colour, side) != self.without and (not self.only or (colour, side) == self.only)


ANY = Drawn()


@dataclasses.dataclass(frozen=True)
class Task:
    """Which block goes to which side (or into the bowl), and the words that say so. `block` indexes `Scene.blocks`."""

    block: int
    side: str
    prompt: str


@dataclasses.dataclass(frozen=True)
class Scene:
    """Where things are, and what each of the robot's `t` tools holds.

    bowl f64[2]; blocks f64[blocks 2] (their centres) with their colours; opening f64[t] in [0, 1], 1 = open,
    0 = closed on nothing; held i64[t], the index of the block in each tool, -1 = none.
    """

    bowl: np.ndarray
    blocks: np.ndarray
    colours: tuple[str, ...]
    opening: np.ndarray
    held: np.ndarray


def draw(rng: np.random.Generator, tools: int, *, blocks: int = 1, drawn: Drawn = ANY) -> tuple[Scene, Task]:
    """A scene that no instruction finds solved already: bowl and goals are free of blocks.

    Places are few, so that a model of a million parameters learns to see them within minutes. With one block a policy
    deaf to language succeeds in half of the scenes at most; with two, whose colours it must tell apart, in a quarter.
    """
    while True:
        scene, task = _draw(rng, tools, blocks, drawn.goal)
        if drawn.allows(scene.colours[task.block], task.side):
            return scene, task


def _draw(rng: np.random.Generator, tools: int, blocks: int, goal: str) -> tuple[Scene, Task]:
    row = rng.integers(3)  # of the bowl, which stands in the middle column; its neighbours are the goals
    free = [(i, j) for i in range(3) for j in range(3) if j != row]
    places = np.array([(1, row), *(free[i] for i in rng.permutation(len(free))[:blocks])])
    xy = (places - 1) * PITCH + rng.uniform(-JITTER, JITTER, places.shape)
    bowl, at = xy[0], xy[1:]
    colours = tuple(COLOURS[i] for i in rng.permutation(3)[:blocks])
    block, side = int(rng.integers(blocks)), SIDES[rng.integers(2)]
    side = side if goal == "beside" else goal
    prompt = PHRASES[goal][rng.integers(len(PHRASES[goal]))].format(colour=colours[block], side=side)
    scene = Scene(bowl, at, colours, opening=np.ones(tools), held=np.full(tools, -1))
    return scene, Task(block, side, prompt)


def goal_of(bowl: np.ndarray, side: str) -> np.ndarray:
    """The point f64[2] that "{side} of the bowl", or "into the bowl", names."""
    if side == "into":
        return bowl
    return bowl + [-GOAL_OFFSET if side == "left" else GOAL_OFFSET, 0.0]


def solved(scene: Scene, task: Task) -> bool:
    """The named block lies at its goal and no tool holds it."""
    away = np.linalg.norm(scene.blocks[task.block] - goal_of(scene.bowl, task.side))
    return bool(away <= GOAL_RADIUS and task.block not in scene.held)


def advance(scene: Scene, tools: np.ndarray, moved: np.ndarray, opening: np.ndarray) -> Scene:
    """The scene after the tools, now at `tools` f64[t 2], moved by `moved` f64[t 2] and reached for `opening` f64[t].

    Held blocks ride along. A tool takes the nearest free block within reach at the moment its opening passes
    `HOLDING` on the way down, and lets go when it passes it on the way up.
    """
    blocks, held, opening = scene.blocks.copy(), scene.held.copy(), opening.copy()
    for i in range(len(tools)):
        if held[i] >= 0:
            blocks[held[i]] = np.clip(blocks[held[i]] + moved[i], -TABLE / 2, TABLE / 2)
            if opening[i] > HOLDING:
                held[i] = -1
            else:
                opening[i] = HOLDING  # the block stops the fingers
        elif opening[i] <= HOLDING < scene.opening[i]:
            away = np.linalg.norm(blocks - tools[i], axis=-1)
            away[[block for block in held if block >= 0]] = np.inf  # the other arm has that one
            if away.min() <= GRASP_REACH:
                held[i], opening[i] = away.argmin(), HOLDING
    return dataclasses.replace(scene, blocks=blocks, opening=opening, held=held)
