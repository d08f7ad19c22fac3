"""Offline errors, ensembling, the adapter and the closed-loop command: on the tabletop world, with no simulator installed."""

import dataclasses
import json

import numpy as np
import pytest
from pages import Parsed

from vla_jax import cli
from vla_jax.data import cards, standardize
from vla_jax.deploy import closed_loop, export, film, policy, rollout
from vla_jax.sims import adapter, environments, record
from vla_jax.tabletop.env import EVAL_SEED, ROBOTS, TabletopEnv
from vla_jax.train import chunk_errors, evaluate, loop
from vla_jax.types import Dim, UserError


@pytest.fixture(scope="module")
def exported(tabletop, tmp_path_factory):
    """A run of two steps on the tabletop mixture, and its export."""
    from vla_jax import config

    base = tmp_path_factory.mktemp("evaluation")
    small = ["data.holdout=0.2", "model.preset=tiny", "pack.rows=8", "train.steps=2", "train.eval_batches=1", "mesh.data=8", "mesh.fsdp=1"]
    c, _ = config.load("configs/demo.py", [f"data.root={tabletop}", f"data.index_dir={base / 'ix'}", *small])
    run = loop.prepare(c, base / "run")
    loop.train(run, quiet=True)
    return run, export.export(base / "run", base / "out")


# ---- offline


def loop_oracle(c: chunk_errors.Chunks, most: int):
    """The same numbers by plain loops over frames, steps and dimensions."""
    binary = [d.kind == "binary" for d in c.dims]
    given = lambda x, j: float(x > 0.5) if binary[j] else float(x)
    unit = [("gripper" if b else d.unit) for b, d in zip(binary, c.dims)]
    pairs = [(i, k) for i in range(len(c.recorded)) for k in range(c.recorded.shape[1]) if c.mask[i, k]]
    error = lambda i, k, j: abs(float(c.predicted[i, k, j]) - float(c.recorded[i, k, j]))
    average = lambda xs: sum(xs) / len(xs)
    dims = {
        d.name: (
            average([error(i, k, j) for i, k in pairs]),
            average([abs(given(c.mean[j], j) - float(c.recorded[i, k, j])) for i, k in pairs]),
        )
        for j, d in enumerate(c.dims)
    }
    per_unit = lambda some: {
        u: average([average([error(i, k, j) for i, k in some]) for j in range(len(c.dims)) if unit[j] == u]) for u in dict.fromkeys(unit)
    }
    horizon = {u: [] for u in dict.fromkeys(unit)}
    for k in range(c.recorded.shape[1]):
        if some := [(i, at) for i, at in pairs if at == k]:
            for u, e in per_unit(some).items():
                horizon[u].append(e)
    texts = sorted(set(c.prompts), key=lambda t: (-c.prompts.count(t), c.prompts.index(t)))
    groups = {t: [t] for t in texts[:most]} | ({f"({len(texts[most:])} others)": texts[most:]} if texts[most:] else {})
    said = {}
    for name, members in groups.items():
        frames = [i for i, p in enumerate(c.prompts) if p in members]
        said[name] = (len(frames), per_unit([(i, k) for i, k in pairs if i in frames]), average([float(c.valid[i]) for i in frames]))
    return dims, horizon, said


def test_errors_by_dimension_horizon_and_instruction_equal_plain_loops():
    rng = np.random.default_rng(0)
    n, k = 40, 6
    dims = (Dim("x", "m", "base", "delta"), Dim("y", "m", "base", "delta"), Dim("r", "rad", "ee", "delta"), Dim("g", "1", "ee", "binary"))
    lengths = rng.integers(1, k, n)  # no frame reaches the sixth step
    chunks = chunk_errors.Chunks(
        dims=dims,
        recorded=np.concatenate([rng.normal(size=(n, k, 3)), rng.integers(0, 2, (n, k, 1))], -1).astype(np.float32),
        predicted=np.concatenate([rng.normal(size=(n, k, 3)), rng.integers(0, 2, (n, k, 1))], -1).astype(np.float32),
        mask=np.arange(k) < lengths[:, None],
        valid=rng.random(n) < 0.7,
        prompts=tuple(rng.choice(["push", "pull", "lift", "turn", "a <b>"], n, p=[0.4, 0.3, 0.1, 0.1, 0.1])),
        mean=np.array([0.1, -0.2, 0.3, 0.6], np.float32),
    )
    found = chunk_errors.detail(chunks, most=2)
    dims, horizon, said = loop_oracle(chunks, 2)
    near = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6)  # sums of float32 differences, taken in float64 by both
    for name, (own, naive) in dims.items():
        near([found["dims"][name]["mae"], found["dims"][name]["baseline"]], [own, naive])
    assert found["horizon"].keys() == horizon.keys() and all(len(x) == 5 for x in found["horizon"].values())
    for unit in horizon:
        near(found["horizon"][unit], horizon[unit])
    assert found["instructions"].keys() == said.keys() and len(said) == 3 and "(3 others)" in said
    for text, (frames, errors, valid) in said.items():
        got = found["instructions"][text]
        assert got["frames"] == frames and got["valid"] == pytest.approx(valid)
        near([got["mae"][u] for u in errors], list(errors.values()))


def test_an_export_is_evaluated_as_its_run_is(exported, capsys, tmp_path):
    """Weights, statistics, tokenizer and views come from the export alone; every number equals the run's."""
    run, out = exported
    here = [
        "--config=configs/demo.py",
        f"--config.data.root={run.config.data.root}",
        f"--config.data.index_dir={run.config.data.index_dir}",
    ]
    here += ["--config.data.holdout=0.2", "--config.mesh.data=8", "--config.mesh.fsdp=1", "--config.train.eval_batches=1", "--frames=6"]
    want = evaluate.run(run.config, run.workdir, frames=6)
    assert cli.main(["eval", *here, f"--export={out}", f"--out={tmp_path / 'e.json'}"]) == 0
    shown = capsys.readouterr().out
    found = json.loads((tmp_path / "e.json").read_text())
    assert json.loads(shown) == found and found["step"] == want["step"] == 2
    for name in run.source.names:
        mine, theirs = found[name], want[name]
        assert mine.keys() == theirs.keys() >= {"nll", "accuracy", "mae", "baseline", "valid", "dims", "horizon", "instructions", "frames"}
        assert mine["nll"] == pytest.approx(theirs["nll"], rel=1e-5) and mine["targets"] == theirs["targets"]
        assert set(mine["dims"]) == set(ROBOTS[name].action_dims) and len(shown) < 40_000
        for unit, ahead in mine["horizon"].items():
            np.testing.assert_allclose(ahead, theirs["horizon"][unit], atol=1e-5)
        assert sum(x["frames"] for x in mine["instructions"].values()) == mine["frames"] == 6
    # all frames reach the first step: its error is the mean over frames of what open_loop gives
    chunks = evaluate.open_loop(run.cfg, run.source.held_out(), export.read(out)[1], frames=6)["tabletop_arm"]
    np.testing.assert_allclose(
        want["tabletop_arm"]["horizon"]["rad"][0], np.abs(chunks.predicted - chunks.recorded)[:, 0, :2].mean(), atol=1e-5
    )


def test_an_export_is_held_against_other_data(exported, tmp_path):
    from vla_jax.deploy import offline

    run, out = exported
    other = dataclasses.replace(run.config, data=dataclasses.replace(run.config.data, mixture="pusht"))
    with pytest.raises(UserError, match="pusht"):
        offline.run(other, out, frames=2)
    found = policy.load_all(out)
    arm = found["tabletop_arm"].card
    turned = dataclasses.replace(arm, action=dataclasses.replace(arm.action, dims=arm.action.dims[::-1]))
    offline._check(arm, found, out)
    with pytest.raises(UserError, match="card tabletop_arm has another action than in"):
        offline._check(turned, found, out)
    with pytest.raises(UserError, match="was not trained on metaworld_mt50; its robots are: tabletop_slider"):
        offline._check(cards.load("metaworld_mt50"), found, out)


# ---- the loop


class Script:
    """A policy that says, at its n-th call, the chunk n of `chunks` for all episodes."""

    def __init__(self, chunks, card, history=1):
        self.chunks, self.card, self.history, self.steps, self.seen = chunks, card, history, chunks.shape[1], []

    def act(self, observations):
        self.seen.append(observations)
        return [(self.chunks[len(self.seen) - 1], True) for _ in observations]


class Log:
    """An environment that keeps what it is told; lazy: it shows itself only when asked."""

    def __init__(self, ends=0, lazy=False):
        self.success, self.ended, self.told, self.ends, self.lazy, self.looks = False, False, [], ends, lazy, 0

    def observe(self):
        self.looks += 1
        return {
            "images": {"base": np.full((2, 2, 3), len(self.told), np.uint8)},
            "state": np.full(2, len(self.told), np.float32),
            "prompt": "go",
        }

    def reset(self, seed):
        return self.observe()

    def step(self, action):
        self.told.append(action)
        self.ended = len(self.told) == self.ends
        return None if self.lazy else self.observe()


@pytest.mark.parametrize(("execute", "decay"), [(0.0, 0.01), (0.0, 1.0), (0.5, 0.3), (0.0, -0.5)])
def test_ensembling_equals_a_plain_loop(execute, decay):
    """ACT's rule by hand: of all chunks that reach a step, oldest first, weights exp(-decay * i), normalised; the gripper by majority."""
    rng = np.random.default_rng(1)
    card, k, most = cards.load("tabletop_arm"), 6, 15
    chunks = np.concatenate([rng.normal(size=(most, k, 2)), rng.integers(0, 2, (most, k, 1))], -1).astype(np.float32)
    env, acting = Log(), Script(chunks, card)
    rollout.rollouts(acting, lambda: env, [0], max_steps=most, execute=execute, ensemble=decay)
    every = max(1, round(k * execute))
    for t in range(most):
        total, weight, i = np.zeros(3), 0.0, 0
        for call in range(most):
            if 0 <= t - call * every < k and call * every <= t:
                w = np.exp(-decay * i)
                total, weight, i = total + w * chunks[call, t - call * every], weight + w, i + 1
        want = total / weight
        want[2] = float(want[2] > 0.5)
        np.testing.assert_allclose(env.told[t], want, atol=1e-6)
    assert len(env.told) == most and len(acting.seen) == -(-most // every)
    with pytest.raises(ValueError, match="no chunk reaches step 9"):
        rollout.blend([(0, chunks[0])], 9, decay, np.zeros(3, bool))


def test_receding_horizon_without_an_ensemble_carries_out_chunks_as_they_are():
    chunks = np.arange(5 * 4 * 3, dtype=np.float32).reshape(5, 4, 3)
    env, calls = Log(ends=9), []
    (o,) = rollout.rollouts(Script(chunks, None), lambda: env, [7], max_steps=50, execute=0.5, calls=calls)
    want = [chunks[c, i] for c in range(5) for i in range(2)][:9]
    np.testing.assert_array_equal(np.stack(env.told), want)
    assert (o.steps, o.success, o.chunks) == (9, False, 5) and [c.actions for c in calls] == [2, 2, 2, 2, 1]


@pytest.mark.parametrize("lazy", [False, True])
def test_history_is_shown_as_in_training(lazy):
    """Two steps, oldest first; before the start no picture and the first state again (as sample.states and sample.pictures have it)."""
    chunks = np.zeros((4, 2, 3), np.float32)
    env, acting = Log(lazy=lazy), Script(chunks, None, history=2)
    rollout.rollouts(acting, lambda: env, [0], max_steps=4, execute=1.0)
    first, second = acting.seen[0][0], acting.seen[1][0]
    assert set(first["images"]) == {"base"} and first["state"].tolist() == [[0, 0], [0, 0]]
    assert (
        second["images"]["base@-1"][0, 0, 0] == 1
        and second["images"]["base"][0, 0, 0] == 2
        and second["state"].tolist() == [[1, 1], [2, 2]]
    )


def test_pictures_are_drawn_only_when_the_policy_looks():
    env = Log(lazy=True)
    rollout.rollouts(Script(np.zeros((4, 10, 3), np.float32), None), lambda: env, [0], max_steps=20, execute=0.5)
    assert env.looks == 1 + 4 and len(env.told) == 20  # the start, and after each half chunk


def test_wilson_equals_another_implementation():
    stats = pytest.importorskip("scipy.stats")
    for won, n in ((0, 7), (3, 7), (7, 7), (30, 72), (1, 1000)):
        want = stats.binomtest(won, n).proportion_ci(0.95, method="wilson")
        # 1.96 instead of 1.95996..: less than a thousandth of the interval's width
        np.testing.assert_allclose(rollout.wilson(won, n), [want.low, want.high], atol=2e-5)


def test_speed_leaves_out_the_calls_that_compile():
    calls = [rollout.Call(4, 9.0, 40), rollout.Call(4, 1.0, 40), rollout.Call(2, 5.0, 20), rollout.Call(4, 3.0, 40)]
    o = [rollout.Outcome(i, i < 2, 10 * (i + 1), i, "", [], 4, 0.5 * (i == 0)) for i in range(4)]
    s = rollout.summary(o, calls)
    assert s["seconds_per_action"] == pytest.approx(4 / 80) and s["first_call_seconds"] == 9.0 and s["seconds_per_call"] == 2.0
    assert (s["successes"], s["mean_steps_to_success"], s["malformed"], s["chunks"], s["clipped"]) == (2, 15.0, 6, 16, 0.125)


# ---- the adapter


@pytest.mark.parametrize("name", ["metaworld_mt50", "pusht", "robosuite_lift", "tabletop_arm", "bridge_dataset"])
def test_actions_undone_are_what_was_recorded(name):
    """apply(undo(x)) = x and undo(apply(raw)) = raw, or the card is refused."""
    card, rng = cards.load(name), np.random.default_rng(2)
    n = len(card.action.dims)
    try:
        adapter.check_actions(card)
    except UserError as e:
        assert name == "bridge_dataset" and "cannot be undone" in str(e)
        return
    raw = rng.uniform(-1, 1, (50, n)).astype(np.float32)
    made = standardize.apply(card.action.ops, {"action": raw})
    np.testing.assert_allclose(adapter.undo(card.action.ops, made), raw, atol=1e-6)
    np.testing.assert_allclose(standardize.apply(card.action.ops, {"action": adapter.undo(card.action.ops, raw)}), raw, atol=1e-6)


def test_undo_turns_orders_and_rotations_back():
    ops = (
        {"pick": {"key": "action", "dims": [2, 0, 1, 3]}},
        {"rotate": {"at": 1, "from": "euler_xyz", "to": "rot6d"}},
        {"invert": {"dims": [0]}},
    )
    raw = np.random.default_rng(3).uniform(-1, 1, (20, 4)).astype(np.float32)
    made = standardize.apply(ops, {"action": raw})
    assert made.shape == (20, 7)
    np.testing.assert_allclose(adapter.undo(ops, made), raw, atol=1e-5)
    for odd in ({"binarise": {"dims": [0], "threshold": 0.5}}, {"delta": {"dims": [0]}}, {"pick": "other"}):
        with pytest.raises(UserError, match="cannot be undone|must begin with"):
            adapter.undo((*ops[:1], odd), raw)
    with pytest.raises(UserError, match="must begin with all columns of 'action'"):
        adapter.undo(({"pick": {"key": "action", "dims": [1, 2]}},), raw[:, :2])


class Box:
    shape = (4,)
    low, high = np.full(4, -1, np.float32), np.full(4, 1, np.float32)


class Plain:
    """A Gymnasium environment with MetaWorld's action space."""

    action_space = Box

    def __init__(self):
        self.told = []

    def reset(self, *, seed):
        return np.arange(4.0), {}

    def step(self, action):
        self.told.append(action)
        return np.arange(4.0) + 1, 0.0, False, len(self.told) == 3, {"success": len(self.told) == 2}


def plain(card, field="observation/state"):
    mapping = adapter.Mapping(
        numbers=lambda env, seen: {field: seen},
        pictures=lambda env: {"observation/image": np.zeros((4, 4, 3), np.uint8)},
        success=lambda env, info: bool(info.get("success")),
        prompt=lambda env: "press",
        expert=lambda env, seen, rng: np.zeros(4),
    )
    return adapter.GymEnv(Plain(), mapping, card)


def test_robot_units_become_the_environment_s_and_are_cut_and_counted():
    env = plain(cards.load("metaworld_mt50"))
    assert env.reset(0)["state"].tolist() == [0, 1, 2, 3] and env.observe()["images"].keys() == {"base"}
    env.step(np.array([0.005, -0.01, 0.03, 1.0]))  # metres; 3 cm are more than a step can be; 1 opens, and MetaWorld closes at +1
    np.testing.assert_allclose(env.env.told[0], [0.5, -1, 1, -1], atol=1e-6)
    assert (env.clipped, env.commanded, env.success) == (1, 4, False)
    env.step(np.array([0, 0, 0, 0.0]))
    assert env.env.told[1][3] == 1 and env.success and not env.ended
    env.step(np.zeros(4))
    assert env.ended and not env.success  # success is of now
    with pytest.raises(ValueError, match=r"4 finite numbers \(dx, dy, dz, gripper\)"):
        env.step(np.array([0, 0, np.nan, 0]))
    with pytest.raises(UserError, match="reads observation/state, and this environment gives observation/image, other"):
        plain(cards.load("metaworld_mt50"), "other").reset(0)


def test_another_robot_s_card_does_not_drive_it(exported, tmp_path):
    """Metres are not radians, though there are as many of them; and an export of one robot is not taken for any environment."""
    _, out = exported
    found = policy.load_all(out)
    one = {"tabletop_slider": found["tabletop_slider"]}
    assert closed_loop._robot(one, "", "tabletop_slider", out) is found["tabletop_slider"]
    renamed = dataclasses.replace(one["tabletop_slider"], card=dataclasses.replace(one["tabletop_slider"].card, name="ours"))
    assert closed_loop._robot({"ours": renamed}, "", "tabletop_slider", out) is renamed
    with pytest.raises(UserError, match="its numbers would mean something else there"):
        closed_loop._robot(one, "", "tabletop_arm", out)
    with pytest.raises(UserError, match="commands 3 numbers, and this environment takes"):
        plain(cards.load("tabletop_slider"))
    with pytest.raises(UserError, match="has a state of 3 numbers, and here it has 6"):
        environments.make("tabletop", "tabletop_bimanual", cards.load("tabletop_slider")).reset(0)
    slow = dataclasses.replace(renamed, card=dataclasses.replace(renamed.card, control_hz=1.0))
    with pytest.raises(UserError, match="whose control_hz is 1.0"):
        closed_loop._robot({"ours": slow}, "", "tabletop_slider", out)


@pytest.mark.parametrize("robot", list(ROBOTS))
def test_the_tabletop_world_through_the_adapter_is_the_world_itself(robot):
    env, world = environments.make("tabletop", robot, cards.load(robot)), TabletopEnv(robot)
    seen, want = env.reset(EVAL_SEED), world.reset(EVAL_SEED)
    while True:
        assert seen["prompt"] == want["prompt"] and seen["images"].keys() == want["images"].keys()
        np.testing.assert_array_equal(seen["state"], want["state"])
        assert all(np.array_equal(seen["images"][v], want["images"][v]) for v in want["images"])
        if world.success or world.steps == ROBOTS[robot].max_steps:
            break
        action = world.expert_action()
        np.testing.assert_array_equal(env.expert(np.random.default_rng(0)), action)
        assert env.step(action) is None
        seen, want = env.observe(), world.step(action)
        assert env.success == world.success
    assert env.success


def test_the_table_of_environments_names_what_there_is():
    assert environments.parse("tabletop:tabletop_arm") == ("tabletop", ("tabletop_arm",))
    with pytest.raises(UserError, match="no environment 'mujoco'; there are: tabletop, metaworld"):
        environments.parse("mujoco:x")
    with pytest.raises(UserError, match="tabletop has no task arm; it has: tabletop_slider"):
        environments.parse("tabletop:arm")
    for entry in environments.ENVIRONMENTS.values():
        for task in entry.tasks():
            adapter.check_actions(cards.load(entry.card or task))
            assert entry.max_steps(task) > 0


# ---- the command


@pytest.mark.parametrize("settings", [[], ["--ensemble=0.01", "--execute=0.5"]], ids=["plain", "ensemble"])
def test_rollout_writes_lines_a_page_and_videos(exported, tmp_path, capsys, settings):
    _, out = exported
    to = tmp_path / "ro"
    argv = ["rollout", str(out), "--env=tabletop", "--robot=tabletop_slider", "--episodes=3", "--parallel=2", "--film=2", "--max-steps=6"]
    assert cli.main([*argv, f"--out={to}", *settings]) == 0
    said = capsys.readouterr().out
    lines = [json.loads(x) for x in (to / "rollouts.jsonl").read_text().splitlines()]
    assert [x["seed"] for x in lines] == [EVAL_SEED, EVAL_SEED + 1, EVAL_SEED + 2] and all(x["task"] == "tabletop_slider" for x in lines)
    assert [bool(x["video"]) for x in lines] == [True, True, False] and all((to / x["video"]).stat().st_size > 500 for x in lines[:2])
    won = sum(x["success"] for x in lines)
    summary = json.loads((to / "summary.json").read_text())
    made = summary["tasks"]["tabletop_slider"]
    assert (
        made["successes"] == won and made["episodes"] == 3 and f"{won} of 3" in said and made["interval_95"] == list(rollout.wilson(won, 3))
    )
    assert summary["execute"] == 0.5 and summary["ensemble"] == (0.01 if settings else None)
    page = Parsed((to / "index.html").read_text())
    assert page.tags.count("article") == 2 and all(x.startswith("data:") for x in page.loads) and lines[0]["prompt"] in page.text
    assert cli.main([*argv, f"--out={to}"]) == 2 and "is not empty" in capsys.readouterr().err


def test_rollout_is_deterministic_and_seeds_move_the_scenes(exported, tmp_path):
    _, out = exported
    settings = closed_loop.Settings(episodes=2, film=0, max_steps=6)
    read = lambda d: [json.loads(x) for x in (tmp_path / d / "rollouts.jsonl").read_text().splitlines()]
    for d, seed in (("a", 0), ("b", 0), ("c", 1)):
        closed_loop.run(out, "tabletop:tabletop_bimanual", tmp_path / d, dataclasses.replace(settings, seed=seed), say=str)
    assert read("a") == read("b") and read("c")[0] == read("a")[1]


def test_rollout_says_what_is_wrong(exported, tmp_path, capsys):
    _, out = exported
    begin = ["rollout", str(out), f"--out={tmp_path / 'x'}"]
    for more, message in (
        (["--env=tabletop:tabletop_arm", "--robot=arm"], "robot 'arm' is not in"),
        (["--env=tabletop:tabletop_arm", "--robot=tabletop_slider"], "has tabletop_slider, whose state is [('m', "),
        (["--env=moon"], "there is no environment 'moon'"),
        (["--env=tabletop", "--execute=2"], "must be from 0 to 1"),
        (["--env=tabletop", "--ensemble=nan"], "must be finite"),
    ):
        assert cli.main([*begin, *more]) == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "x").exists() or not any((tmp_path / "x").iterdir())


def test_the_page_escapes_what_it_shows(tmp_path):
    from vla_jax.deploy import rollout_page

    frames = [np.full((30, 41, 3), i, np.uint8) for i in range(4)]
    o = rollout.Outcome(1, True, 4, 1, "<script>alert(1)</script>", frames, 2)
    file = film.write(frames, tmp_path / "v" / "a", fps=5)
    how = {"env": "<b>", "export": "/x/<i>", "robot": "r", "execute": 0.5, "ensemble": None, "seed": 0}
    rollout_page.write(tmp_path / "p.html", how, {"<u>": rollout.summary([o], [])}, {"<u>": [o]}, {("<u>", 1): file})
    page = Parsed((tmp_path / "p.html").read_text())
    assert not {"script", "b", "i", "u"} & set(page.tags) and "<script>alert(1)</script>" in page.text


def test_a_video_holds_every_frame(tmp_path, monkeypatch):
    """Both kinds, read back: their number, size, and their pictures within what compression takes."""
    from PIL import Image, ImageSequence

    ramp = np.linspace(0, 200, 48).astype(np.uint8)
    frames = [
        np.stack([np.tile(ramp, (48, 1)), np.tile(ramp[:, None], (1, 48)), np.full((48, 48), 20 * i, np.uint8)], -1) for i in range(7)
    ]
    find = film.importlib.util.find_spec
    monkeypatch.setattr(film.importlib.util, "find_spec", lambda name: None if name == "av" else find(name))
    file = film.write(frames, tmp_path / "a", fps=10)
    assert file.suffix == ".webp"
    back = [np.asarray(x.convert("RGB")) for x in ImageSequence.Iterator(Image.open(file))]
    assert len(back) == 7 and back[0].shape == (192, 192, 3)
    near = lambda shown, frame: np.abs(shown[2::4, 2::4].astype(int) - frame).mean() < 6
    assert all(map(near, back, frames)) and not near(back[0], frames[6])
    monkeypatch.undo()
    av = pytest.importorskip("av")
    file = film.write(frames, tmp_path / "b", fps=10)
    with av.open(str(file)) as box:
        back = [f.to_ndarray(format="rgb24") for f in box.decode(video=0)]
        assert box.streams.video[0].average_rate == 10
    assert len(back) == 7 and all(map(near, back, frames)) and not near(back[0], frames[6])


# ---- recording


def test_a_recording_through_two_processes_reads_back(tmp_path):
    """Drawn by one process and written by another; our index, with the environment's card, gives the scenes again."""
    pytest.importorskip("tensorflow_datasets")
    import subprocess
    import sys

    from vla_jax.data import build, sample

    command = [sys.executable, "-m", "vla_jax.sims.record", str(tmp_path / "d"), "--env=tabletop:tabletop_arm", "--episodes=3", "--seed=4"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    card = cards.load("tabletop_arm")
    ix = build.ensure(card, str(tmp_path / "d"), str(tmp_path / "ix"), holdout=0.0, max_skipped=0.0)
    assert ix.episodes == 3
    starts = {}
    for seed in range(4 * record.STRIDE, 4 * record.STRIDE + 3):
        starts[tuple(TabletopEnv("tabletop_arm").reset(seed)["state"].tolist())] = seed
    for e in range(3):
        first, end = (int(x) for x in ix.episode_start[e : e + 2])
        env = environments.make("tabletop", "tabletop_arm", card)
        seen = env.reset(starts[tuple(ix.state[first].tolist())])
        for frame in range(first, end):
            np.testing.assert_array_equal(ix.state[frame], seen["state"])
            np.testing.assert_array_equal(ix.action[frame], env.expert(None))
            got = sample.make(ix, frame, steps=2, dataset=0, sample_id=0, size=48, wanted=("base", "wrist"))
            assert got.prompt == seen["prompt"]
            assert all(np.abs(got.images[v].astype(int) - seen["images"][v]).mean() < 3 for v in ("base", "wrist"))
            env.step(ix.action[frame])
            seen = env.observe()
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 2 and "exists; remove it" in again.stderr
    assert sorted(p.name for p in (tmp_path / "d").iterdir()) == ["tabletop_arm"]


def test_a_pipe_that_ends_within_an_episode_is_said(tmp_path):
    import io

    data = io.BytesIO()
    np.savez(data, action=np.zeros((2, 3)))
    whole = record._LENGTH.pack(data.tell()) + data.getvalue()
    assert len(list(record.received(io.BytesIO(whole + whole)))) == 2
    for cut in (whole[:-1], whole + whole[:20], whole + b"\x01", record._LENGTH.pack(1 << 60) + whole):
        with pytest.raises(UserError, match="in the middle of an episode"):
            list(record.received(io.BytesIO(cut)))
