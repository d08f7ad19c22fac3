"""The tabletop world: the expert obeys the instruction, the rules hold, and a recording says what happened."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest
import yaml

from vla_jax.tabletop import record, robots, world
from vla_jax.tabletop.env import EVAL_SEED, ROBOTS, TabletopEnv

ROOT = pathlib.Path(__file__).parents[1]
each_robot = pytest.mark.parametrize("robot", list(ROBOTS))


def play(env, policy, seed):
    env.reset(seed)
    while not env.success and env.steps < env.robot.max_steps:
        env.step(policy(env))
    return env.success


@each_robot
def test_expert_does_what_the_instruction_says(robot):
    env, solved, others = TabletopEnv(robot, blocks=2), 0, 0
    for seed in range(EVAL_SEED, EVAL_SEED + 60):
        if play(env, TabletopEnv.expert_action, seed):
            solved += 1
            named, side = env._task.block, env._task.side
            # The words themselves, not only the task they came from.
            assert env._scene.colours[named] in env._task.prompt and side in env._task.prompt
            assert env._scene.colours[1 - named] not in env._task.prompt
            x = env._scene.blocks[named, 0] - env._scene.bowl[0]
            assert (x < 0) == (side == "left")
            for block, to in ((1 - named, side), (named, "right" if side == "left" else "left")):
                others += world.solved(env._scene, world.Task(block, to, ""))
    assert solved >= 58 and others == 0, (solved, others)


@each_robot
def test_acting_without_looking_fails(robot):
    env, rng = TabletopEnv(robot), np.random.default_rng(0)
    dims = len(env.robot.action_dims)
    scale = np.where([name.startswith("g") for name in env.robot.action_dims], 1.0, 0.25)
    seeds = range(EVAL_SEED, EVAL_SEED + 15)
    assert sum(play(env, lambda env: rng.uniform(-1, 1, dims) * scale, seed) for seed in seeds) <= 1
    assert sum(play(env, lambda env: np.zeros(dims), seed) for seed in seeds) == 0


@each_robot
def test_reset_is_deterministic_and_seeds_differ(robot):
    first, again, other = (TabletopEnv(robot).reset(seed) for seed in (3, 3, 4))
    assert first["prompt"] == again["prompt"]
    np.testing.assert_array_equal(first["state"], again["state"])
    for view in first["images"]:
        np.testing.assert_array_equal(first["images"][view], again["images"][view])
        assert (first["images"][view] != other["images"][view]).any()


def test_no_instruction_is_satisfied_at_the_start():
    for seed in range(300):
        scene, _ = world.draw(np.random.default_rng(seed), 1, blocks=2)
        assert not any(world.solved(scene, world.Task(block, side, "")) for block in (0, 1) for side in world.SIDES)


def test_arm_forward_and_inverse_agree_with_trigonometry():
    tools = np.random.default_rng(0).uniform(-world.REACH_LIMIT, world.REACH_LIMIT, [500, 2])
    q = robots.arm_inverse(tools)
    first = np.exp(1j * q[:, 0])  # rotations in the plane as complex numbers
    tip = complex(*robots.ARM_BASE) + robots.ARM_LINK * first * (1 + np.exp(1j * q[:, 1]))
    np.testing.assert_allclose(np.stack([tip.real, tip.imag], -1), tools, atol=1e-12)
    np.testing.assert_allclose(robots.arm_forward(q), tools, atol=1e-12)
    # One elbow branch, far from straight and from folded: the Jacobian's determinant is L^2 sin(q2).
    assert (q[:, 1] > 0).all() and np.sin(q[:, 1]).min() > 0.25


@each_robot
def test_observations_match_the_card(robot):
    card = yaml.safe_load((ROOT / "data" / "cards" / f"{robot}.yaml").read_text())
    spec, env = ROBOTS[robot], TabletopEnv(robot)
    assert (card["name"], card["version"], card["control_hz"]) == (robot, record.VERSION, spec.control_hz)
    assert tuple(dim["name"] for dim in card["state"]["dims"]) == spec.state_dims
    assert tuple(dim["name"] for dim in card["action"]["dims"]) == spec.action_dims
    assert card["views"] == {view: f"observation/{record.IMAGE_KEYS[view]}" for view in spec.views}
    observation = env.reset(0)
    assert tuple(observation["images"]) == spec.views
    for _ in range(5):
        assert {(image.shape, image.dtype.name) for image in observation["images"].values()} == {((48, 48, 3), "uint8")}
        assert observation["state"].shape == (len(spec.state_dims),) and observation["state"].dtype == np.float32
        action = env.expert_action()
        assert action.shape == (len(spec.action_dims),) and action.dtype == np.float32
        observation = env.step(action)
    assert env.steps == 5 and env.render(96).shape == (96, 96, 3)


@each_robot
def test_each_block_looks_its_colour_where_it_is(robot):
    env = TabletopEnv(robot, blocks=2)
    for seed in range(20):
        image = env.reset(seed)["images"]["base"].astype(int)
        for (x, y), colour in zip(env._scene.blocks, env._scene.colours):
            if np.abs(robots.ROBOTS[robot].forward(env._q) - [x, y]).max(-1).min() > 0.1:  # no finger over it
                row, column = int((0.32 - y) / 0.64 * 48), int((x + 0.32) / 0.64 * 48)
                channel = world.COLOURS.index(colour)
                assert image[row, column, channel] > 1.5 * np.delete(image[row, column], channel).max()


def test_a_tool_takes_the_nearest_block_and_drops_it():
    scene, _ = world.draw(np.random.default_rng(0), 1, blocks=2)
    tool = scene.blocks[1:] + [0.03, 0.0]
    shut, still = np.array([0.0]), np.zeros([1, 2])
    taken = world.advance(scene, tool, still, shut)
    assert taken.held[0] == 1 and taken.opening[0] == world.HOLDING
    carried = world.advance(taken, tool + 0.01, still + 0.01, shut)
    np.testing.assert_allclose(carried.blocks[1], scene.blocks[1] + 0.01)
    dropped = world.advance(carried, tool + 0.01, still, np.array([0.9]))
    assert dropped.held[0] == -1
    away = world.advance(scene, scene.blocks[1:] + [world.GRASP_REACH + 0.01, 0.0], still, shut)
    assert away.held[0] == -1 and away.opening[0] == 0.0


def test_bad_actions_are_refused():
    env = TabletopEnv("tabletop_arm")
    with pytest.raises(ValueError, match="reset"):
        env.step(np.zeros(3))
    env.reset(0)
    with pytest.raises(ValueError, match=r"expected an action of shape \(3,\).*dq1.*got \(6,\)"):
        env.step(np.zeros(6))
    with pytest.raises(ValueError, match="finite.*dq2"):
        env.step([0.0, np.nan, 1.0])
    with pytest.raises(ValueError, match="tabletop_slider"):
        TabletopEnv("tabletop")


def test_recording_seeds_are_distinct_and_below_evaluation():
    seeds = [record.episode_seed(s, robot, e) for s in (0, 1, 249) for robot in ROBOTS for e in (0, 1, 9_999)]
    assert len(set(seeds)) == len(seeds) and max(seeds) < EVAL_SEED
    with pytest.raises(ValueError, match="250"):
        record.episode_seed(250, "tabletop_arm", 0)


@each_robot
def test_disturbed_experts_recover(robot):
    rollouts = [record.rollout(robot, seed) for seed in range(30)]
    differs = [any((step["action"] != step["executed"]).any() for step in steps) for steps, _ in rollouts]
    assert sum(success for _, success in rollouts) >= 28
    assert 8 <= sum(differs) <= 27


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    out = tmp_path_factory.mktemp("tabletop")
    command = [sys.executable, "-m", "vla_jax.tabletop.record", str(out), "--episodes", "2", "--seed", "5"]
    subprocess.run(command, check=True, cwd=ROOT, timeout=120)
    again = subprocess.run(command, cwd=ROOT, timeout=120, capture_output=True, text=True)
    assert again.returncode == 2 and "exists; remove it" in again.stderr
    return out


@each_robot
def test_a_recording_reads_back_with_tfds(recording, robot):
    tfds = pytest.importorskip("tensorflow_datasets")
    spec = ROBOTS[robot]
    builder = tfds.builder_from_directory(str(recording / robot / record.VERSION))
    assert builder.info.splits["train"].shard_lengths == [1, 1]
    episodes = list(tfds.as_numpy(builder.as_dataset(split="train")))
    assert sorted(int(episode["episode_metadata"]["episode_id"]) for episode in episodes) == [0, 1]
    for episode in episodes:
        seed = record.episode_seed(5, robot, int(episode["episode_metadata"]["episode_id"]))
        env, steps = TabletopEnv(robot), list(episode["steps"])
        expected, success = record.rollout(robot, seed)
        assert success == bool(episode["episode_metadata"]["success"]) and len(expected) == len(steps)
        observation = env.reset(seed)
        for t, (step, want) in enumerate(zip(steps, expected)):
            np.testing.assert_array_equal(step["observation"]["state"], observation["state"])
            np.testing.assert_array_equal(step["action"], env.expert_action())
            assert step["language_instruction"].decode() == observation["prompt"]
            for view, image in observation["images"].items():
                error = np.abs(step["observation"][record.IMAGE_KEYS[view]].astype(int) - image)
                assert error.max() == 0 if spec.image_format == "png" else error.mean() < 3
            ends = t == len(steps) - 1
            assert (step["is_first"], step["is_last"], step["is_terminal"]) == (t == 0, ends, ends and success)
            assert step["reward"] == float(ends and success)
            observation = env.step(want["executed"])


@each_robot
def test_the_expert_puts_blocks_into_the_bowl_and_progress_says_how_far(robot):
    env, solved = TabletopEnv(robot, drawn=world.Drawn(goal="into")), 0
    for seed in range(EVAL_SEED, EVAL_SEED + 30):
        prompt = env.reset(seed)["prompt"]
        assert "into the bowl" in prompt and env.progress == 0.0 and not env.success
        if play(env, TabletopEnv.expert_action, seed):
            solved += 1
            away = np.linalg.norm(env._scene.blocks[env._task.block] - env._scene.bowl)
            assert away <= world.GOAL_RADIUS and env.progress > 0.4  # the nearest start is 0.2 m off
    assert solved >= 28


def test_an_instruction_can_be_left_out_or_alone_be_given():
    said = {"without": set(), "only": set()}
    for seed in range(120):
        for how, found in said.items():
            scene, task = world.draw(np.random.default_rng(seed), 1, drawn=world.Drawn(**{how: ("blue", "left")}))
            found.add((scene.colours[task.block], task.side))
    every = {(colour, side) for colour in world.COLOURS for side in world.SIDES}
    assert said["only"] == {("blue", "left")} and said["without"] == every - said["only"]


def test_three_wheels_move_the_tool_as_they_are_told():
    q, target = np.array([[0.0, 0.0]]), np.array([[0.2, -0.2]])
    rolled = robots.omni_command(q, target)
    np.testing.assert_allclose(rolled, [[-0.06, -0.06 * (0.75**0.5 - 0.5), 0.06 * (0.75**0.5 + 0.5)]], atol=1e-9)
    np.testing.assert_allclose(robots.omni_move(q, rolled), [[0.06, -0.06]], atol=1e-9)
    np.testing.assert_allclose(robots.omni_move(q, np.full([1, 3], 0.1)), q, atol=1e-9)  # all alike: it would turn on the spot


def test_a_camera_elsewhere_and_one_from_the_side():
    env, moved = TabletopEnv("tabletop_omni"), TabletopEnv("tabletop_omni", camera=(0.04, 0.0, 0.64))
    seen, shifted = env.reset(3)["images"], moved.reset(3)["images"]
    np.testing.assert_array_equal(seen["side"], np.rot90(seen["base"], -1))
    np.testing.assert_array_equal(shifted["base"][:, :-3], seen["base"][:, 3:])  # 0.04 m are three pixels
