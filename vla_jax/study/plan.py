"""What the study compares, as data: recordings, arms, and the conditions under which each arm acts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from vla_jax.tabletop import render
from vla_jax.tabletop.world import Drawn

HELD_OUT = ("blue", "left")  # never said in pretraining: blue blocks go right, and others go left
SHIFTED = (0.03, 0.02, 0.70)  # where a camera looks and how wide, in metres; in training 0, 0 and 0.64
PRETRAINED_ON = {"tabletop_slider": 4, "tabletop_arm": 2, "tabletop_bimanual": 1}  # times `Scale.episodes`, as in the demo
TARGETS = {"task": "tabletop_slider", "robot": "tabletop_omni"}  # a robot of before with another goal; a robot that was not there
HEADS = {"fast": (), "bins": ("tokens.action=bins", "tokens.action_vocab=32"), "flow": ("model.expert=demo", "train.objective=flow")}


@dataclasses.dataclass(frozen=True)
class Scale:
    """episodes: recorded of the robot with the fewest; trials: closed-loop episodes of each condition."""

    episodes: int = 400
    steps: int = 1200
    finetune_steps: int = 250
    sizes: tuple[int, ...] = (5, 20, 100)
    trials: int = 64


QUICK = Scale(episodes=4, steps=8, finetune_steps=4, sizes=(2,), trials=2)


@dataclasses.dataclass(frozen=True)
class Condition:
    """Where an arm acts. name: of the condition, for the table."""

    name: str
    robot: str
    drawn: Drawn = Drawn()
    camera: tuple[float, float, float] = (0.0, 0.0, render.BASE_WIDTH)


@dataclasses.dataclass(frozen=True)
class Arm:
    """One training run. data: the recording's folder; begins: the arm whose export it begins with, empty for random weights;
    demonstrations: episodes of the target, None while pretraining."""

    name: str
    config: str
    overrides: tuple[str, ...]
    data: str
    conditions: tuple[Condition, ...]
    begins: str = ""
    head: str = "fast"
    target: str = ""
    demonstrations: int | None = None


SEEN = {robot: Condition("seen instruction", robot, Drawn(without=HELD_OUT)) for robot in PRETRAINED_ON}
ZERO_SHOT = (
    *(Condition("held-out instruction", robot, Drawn(only=HELD_OUT)) for robot in PRETRAINED_ON),
    *(Condition("held-out camera", robot, Drawn(without=HELD_OUT), SHIFTED) for robot in PRETRAINED_ON),
    Condition("task, no demonstration", "tabletop_slider", Drawn(goal="into")),
)
GOALS = {"task": Condition("task", "tabletop_slider", Drawn(goal="into")), "robot": Condition("robot", "tabletop_omni")}


def recordings(scale: Scale) -> Iterator[tuple[str, str, int, list[str]]]:
    """(folder, robot, episodes, further arguments of the recorder)."""
    for robot, times in PRETRAINED_ON.items():
        yield "pretrain", robot, times * scale.episodes, ["--without", "-".join(HELD_OUT)]
    for n in scale.sizes:  # the first n of the same episodes
        yield f"task-{n}", TARGETS["task"], n, ["--seed", "1", "--goal", "into"]
        yield f"robot-{n}", TARGETS["robot"], n, ["--seed", "1"]
    yield "pretrain", TARGETS["robot"], scale.sizes[-1], ["--seed", "1"]  # beside the old data, to be mixed with it


def arms(scale: Scale) -> list[Arm]:
    """In the order in which they are run: each behind the one that it begins with."""
    steps, views = f"train.steps={scale.steps}", "data.views=('base','side')"
    pretrain = lambda head, more: Arm(
        f"pretrain-{head}", "configs/demo.py", (steps, "data.views=('base',)", *HEADS[head]), "pretrain", more, head=head
    )
    out = [pretrain("fast", (*SEEN.values(), *ZERO_SHOT))]
    short = (f"train.steps={scale.finetune_steps}", views, "data.holdout=0", "train.keep_best=0", "train.eval_every=0")
    scratch = ("tokens.text_model=tiny", "tokens.action_vocab=32", "tokens.action_scale=4.0")
    for target, robot in TARGETS.items():
        for n in scale.sizes:
            most, what = n == scale.sizes[-1], dict(config="configs/finetune.py", data=f"{target}-{n}", target=target, demonstrations=n)
            here, before = (GOALS[target],), ((SEEN["tabletop_slider"],) if most else ())
            mine = (*short, f"data.mixture={robot}")
            out.append(Arm(f"{target}-{n}-pretrained", overrides=mine, conditions=(*here, *before), begins="pretrain-fast", **what))
            out.append(Arm(f"{target}-{n}-scratch", overrides=(*mine, *scratch), conditions=here, **what))
            if most:  # as many steps as pretraining and fine-tuning have together: what is not learned then is not for want of steps
                longer = (f"train.steps={scale.steps + scale.finetune_steps}", *mine[1:], *scratch)
                out.append(Arm(f"{target}-{n}-scratch-long", overrides=longer, conditions=here, **what))
    n, mixed = scale.sizes[-1], "configs/finetune.py:how=full,mix=true"
    what = dict(data="pretrain", target="robot", demonstrations=n, begins="pretrain-fast")
    out.append(Arm(f"robot-{n}-mixed", mixed, short, conditions=(GOALS["robot"], SEEN["tabletop_slider"]), **what))
    return [*out, pretrain("bins", tuple(SEEN.values())), pretrain("flow", tuple(SEEN.values()))]
