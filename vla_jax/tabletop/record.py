"""Records the expert as RLDS, with TFDS's own writer.

    python -m vla_jax.tabletop.record OUT --episodes 400 --seed 0 [--robots tabletop_arm,tabletop_slider]

writes OUT/<robot>/1.0.0/, which `tfds.builder_from_directory` reads. TensorFlow is imported when it starts writing.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from typing import Any

import cv2
import numpy as np
import simplejpeg
from tqdm import tqdm

from vla_jax.data import write
from vla_jax.tabletop.env import EVAL_SEED, IMAGE_SIZE, ROBOTS, TabletopEnv
from vla_jax.tabletop.robots import IMAGE_KEYS, Robot
from vla_jax.tabletop.world import ANY, COLOURS, GOALS, SIDES, Drawn

VERSION = "1.0.0"
EPISODES_MAX = 10_000  # a recording's robots and episodes get seeds of their own below EVAL_SEED
SEEDS_MAX = EVAL_SEED // (EPISODES_MAX * len(ROBOTS))
DISTURBED = 0.7  # share of the episodes in which something pushes the robot
STAY_S = 0.2  # recorded after success, so that the end of a task is in the data


def episode_seed(seed: int, robot: str, episode: int) -> int:
    """The scene seed of one recorded episode: no two recordings share one, and none reaches `EVAL_SEED`."""
    if not (0 <= seed < SEEDS_MAX and 0 <= episode < EPISODES_MAX):
        raise ValueError(f"need 0 <= seed < {SEEDS_MAX} and 0 <= episode < {EPISODES_MAX}, got {seed} and {episode}")
    return (seed * len(ROBOTS) + list(ROBOTS).index(robot)) * EPISODES_MAX + episode


def rollout(robot: str, seed: int, drawn: Drawn = ANY) -> tuple[list[dict[str, Any]], bool]:
    """One expert episode: [{"observation", "action" f32[a], "executed" f32[a]}], and whether it succeeded.

    In some episodes what is executed differs from the recorded action for a while (as in DART, Laskey et al. 2017):
    the data then shows the expert getting back from where a policy's own errors would take it.
    """
    env = TabletopEnv(robot, drawn=drawn)
    spec = env.robot
    observation = env.reset(seed)
    pushes = draw_pushes(np.random.default_rng([seed, 2]), spec)
    steps, stayed = [], 0
    while True:
        action = env.expert_action()
        executed = action if env.success else push(action, pushes, env.steps, tools=len(spec.home))
        steps.append({"observation": observation, "action": action, "executed": executed})
        stayed = stayed + 1 if env.success else 0
        if stayed > STAY_S * spec.control_hz or env.steps == spec.max_steps:
            return steps, env.success
        observation = env.step(executed)


def draw_pushes(rng: np.random.Generator, robot: Robot) -> list[tuple[int, int, np.ndarray, int | None]]:
    """[(first step, last step + 1, offset f64[t m] of the command, tool whose gripper does the opposite or None)]."""
    tools = len(robot.home)
    pushes = []
    for _ in range(2 if rng.random() < DISTURBED else 0):
        start, duration = rng.uniform(0.0, 2.5), rng.uniform(0.2, 0.7)
        offset = rng.normal(0.0, robot.disturbance, [tools, len(robot.action_dims) // tools - 1])
        slip = int(rng.integers(tools)) if rng.random() < 0.4 else None
        first = round(start * robot.control_hz)
        pushes.append((first, first + max(1, round(duration * robot.control_hz)), offset, slip))
    return pushes


def push(action: np.ndarray, pushes: list[tuple[int, int, np.ndarray, int | None]], step: int, *, tools: int) -> np.ndarray:
    """What is executed in place of `action` f32[a] at `step`."""
    by_tool = action.reshape(tools, -1)
    executed = by_tool.copy()
    for first, end, offset, slip in pushes:
        if first <= step < end:
            executed[:, :-1] += offset
            if slip is not None:
                executed[slip, -1] = 1.0 - by_tool[slip, -1]
    return executed.ravel()


def encode(image: np.ndarray, image_format: str) -> bytes:
    """u8[h w 3] RGB -> a file's bytes. JPEG keeps full colour resolution: at 48 x 48 halving it would blur blocks."""
    if image_format == "jpeg":
        return simplejpeg.encode_jpeg(image, quality=95, colorsubsampling="444")
    return cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes()


def example(robot: str, seed: int, episode: int, drawn: Drawn = ANY) -> dict[str, Any]:
    """One episode as TFDS's features take it, images already encoded."""
    recorded, success = rollout(robot, episode_seed(seed, robot, episode), drawn)
    steps = []
    for t, step in enumerate(recorded):
        seen, last = step["observation"], t == len(recorded) - 1
        images = {IMAGE_KEYS[view]: io.BytesIO(encode(image, ROBOTS[robot].image_format)) for view, image in seen["images"].items()}
        steps.append(
            {
                "observation": {**images, "state": seen["state"]},
                "action": step["action"],
                "language_instruction": seen["prompt"],
                "is_first": t == 0,
                "is_last": last,
                "is_terminal": last and success,
                "reward": float(last and success),
                "discount": 1.0,
            }
        )
    return {"steps": steps, "episode_metadata": {"episode_id": episode, "success": success}}


def features_of(robot: Robot) -> Any:
    """The TFDS features of one robot's episodes."""
    from tensorflow_datasets import features

    def numbers(names):
        return features.Tensor(shape=(len(names),), dtype=np.float32)

    images = {
        IMAGE_KEYS[view]: features.Image(shape=(IMAGE_SIZE, IMAGE_SIZE, 3), encoding_format=robot.image_format) for view in robot.views
    }
    step = {
        "observation": features.FeaturesDict({**images, "state": numbers(robot.state_dims)}),
        "action": numbers(robot.action_dims),
        "language_instruction": features.Text(),
        **{flag: features.Scalar(np.bool_) for flag in ("is_first", "is_last", "is_terminal")},
        **{number: features.Scalar(np.float32) for number in ("reward", "discount")},
    }
    metadata = {"episode_id": features.Scalar(np.int32), "success": features.Scalar(np.bool_)}
    return features.FeaturesDict({"steps": features.Dataset(step), "episode_metadata": metadata})


def record(out: str, robot: str, *, episodes: int, seed: int, drawn: Drawn = ANY) -> None:
    """Writes OUT/<robot>/1.0.0 with a train split of `episodes` episodes, 25 to a shard but at least two shards."""
    write.write(
        out,
        robot,
        VERSION,
        features_of(ROBOTS[robot]),
        (example(robot, seed, episode, drawn) for episode in tqdm(range(episodes), desc=robot, unit="episode")),
        shards=min(episodes, max(2, episodes // 25)),
        description=f"{robot}: a scripted expert in vla_jax's tabletop world, seed {seed}.",
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vla_jax.tabletop.record", description=__doc__.split("\n")[0])
    parser.add_argument("out", help="data directory; OUT/<robot>/1.0.0 must not exist")
    parser.add_argument("--episodes", type=int, default=400, help="per robot (default 400)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--robots", default=",".join(ROBOTS), help="comma-separated (default: all)")
    parser.add_argument("--goal", default="beside", choices=GOALS, help="where blocks go: beside the bowl, or into it (default beside)")
    parser.add_argument("--without", default="", metavar="COLOUR-SIDE", help="an instruction never given, such as blue-left")
    args = parser.parse_args(argv)
    robots, without = args.robots.split(","), tuple(args.without.split("-"))[:2] if args.without else ()
    if without and (len(without) != 2 or without[0] not in COLOURS or without[1] not in SIDES or args.without.count("-") != 1):
        parser.error(f"--without {args.without}: write COLOUR-SIDE, of {', '.join(COLOURS)} and {', '.join(SIDES)}")
    if unknown := [robot for robot in robots if robot not in ROBOTS]:
        parser.error(f"--robots: no robot called {', '.join(unknown)}; there are {', '.join(ROBOTS)}")
    if not (1 <= args.episodes <= EPISODES_MAX and 0 <= args.seed < SEEDS_MAX):
        parser.error(f"need 1 <= --episodes <= {EPISODES_MAX} and 0 <= --seed < {SEEDS_MAX}")
    for robot in robots:
        path = os.path.join(args.out, robot, VERSION)
        if os.path.exists(path):
            parser.error(f"{path} exists; remove it or name another directory")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow as tf
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()  # ours counts episodes
    tf.config.set_visible_devices([], "GPU")  # TensorFlow only writes files here; the GPU is JAX's
    for robot in robots:
        record(args.out, robot, episodes=args.episodes, seed=args.seed, drawn=Drawn(goal=args.goal, without=without))
    return 0


if __name__ == "__main__":
    sys.exit(main())
