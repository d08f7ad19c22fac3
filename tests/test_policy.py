"""Export, policy and closed loop."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from vla_jax import demo, tree
from vla_jax.deploy import export, policy, rollout
from vla_jax.models.decode import Sampling
from vla_jax.tabletop.env import EVAL_SEED, TabletopEnv
from vla_jax.tokens import actions
from vla_jax.train import checkpoint, loop
from vla_jax.types import UserError


@pytest.fixture(scope="module")
def exported(tabletop, tmp_path_factory):
    from vla_jax import config

    base = tmp_path_factory.mktemp("policy")
    c, _ = config.load(
        "configs/demo.py",
        [
            f"data.root={tabletop}",
            f"data.index_dir={base / 'ix'}",
            "data.holdout=0.2",
            "model.preset=tiny",
            "pack.rows=8",
            "train.steps=2",
            "train.eval_batches=1",
            "mesh.data=8",
            "mesh.fsdp=1",
        ],
    )
    run = loop.prepare(c, base / "run")
    state = loop.train(run, quiet=True)
    return run, state, export.export(base / "run", base / "out")


def test_weights_survive_bit_for_bit(exported):
    _, state, out = exported
    _, params, _ = export.read(out)
    ours, theirs = tree.flatten(state.params), tree.flatten(params)
    assert ours.keys() == theirs.keys() and all(np.array_equal(np.asarray(ours[k]), theirs[k]) for k in ours)


def test_policy_undoes_what_the_data_side_did(exported):
    """The policy's chunk is the model's own tokens, decoded and brought to robot units by hand."""
    run, _, out = exported
    env = TabletopEnv("tabletop_arm")
    obs = env.reset(EVAL_SEED)
    robot = policy.Policy.load(out, robot="tabletop_arm")
    ((chunk, valid),) = robot.act([obs])
    assert valid and chunk.shape == (2, 3) and set(np.unique(chunk[:, 2])) <= {0.0, 1.0}
    d = run.source.names.index("tabletop_arm")
    stats = run.source.statistics[d]["action"]
    ((raw, _),) = robot.actor([robot._request(obs)])
    by_hand = (raw[:, :2] + 1) / 2 * (stats.q99 - stats.q01)[:2] + stats.q01[:2]
    np.testing.assert_allclose(chunk[:, :2], by_hand, rtol=1e-5, atol=1e-6)
    # the observation itself is mapped as in training
    state = (
        2
        * (obs["state"] - run.source.statistics[d]["state"].q01)
        / (run.source.statistics[d]["state"].q99 - run.source.statistics[d]["state"].q01)
        - 1
    )
    np.testing.assert_allclose(robot._request(obs).state, np.clip(state, -1.5, 1.5), atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        ["tokens.layout=openpi", "tokens.state=text", "tokens.text_model=default", "tokens.action_vocab=64", "tokens.limit=250"],
        ["tokens.action=quantile", "tokens.action_vocab=32", "tokens.state=none", "tokens.describe=true"],
    ],
    ids=["openpi", "quantile"],
)
def test_every_way_of_tokens_from_training_to_acting(tiny, tmp_path, settings):
    """One step, export, a well-formed chunk for each robot: what was fitted and how it is laid out travels along."""
    run = loop.prepare(tiny("train.steps=1", "pack.length=192", "pack.targets=192", *settings), tmp_path / "run")
    loop.train(run, quiet=True)
    found = policy.load_all(export.export(tmp_path / "run", tmp_path / "out"))
    assert len(found) == 3
    for name, robot in found.items():
        assert robot.layout == run.source.layout and robot.layout.action == run.source.layout.action
        ((chunk, valid),) = robot.act([TabletopEnv(name).reset(EVAL_SEED)], malformed="raise")
        assert valid and chunk.shape == (robot.steps, len(robot.card.action.dims)) and np.isfinite(chunk).all()


def test_what_a_caller_gets_for_a_malformed_chunk(exported, monkeypatch):
    _, _, out = exported
    robot = policy.Policy.load(out, robot="tabletop_arm")
    obs = TabletopEnv("tabletop_arm").reset(EVAL_SEED)
    monkeypatch.setattr(type(robot.layout), "action_tokens", lambda self, ids: np.array([-1]))  # as if the model had said nothing
    assert not robot.act([obs])[0][1]
    with pytest.raises(actions.MalformedTokens):
        robot.act([obs], malformed="raise")
    with pytest.raises(ValueError, match=r"last_action must be 3 finite numbers .* got \[\]"):
        robot.act([obs], malformed="hold")
    last = np.array([0.05, -7.0, 1.0])  # to hold is to stand still: changes are 0, the gripper stays as it is
    ((chunk, valid),) = robot.act([{**obs, "last_action": last}], malformed="hold")
    assert not valid and chunk.tolist() == [[0, 0, 1]] * 2
    told = policy.Policy.load(out, robot="tabletop_bimanual")
    obs2, where = TabletopEnv("tabletop_bimanual").reset(EVAL_SEED), np.array([0.05, -7.0, 1.0, 9.0, 0.5, 0.0])
    ((chunk, valid),) = told.act([{**obs2, "last_action": where}], malformed="hold")  # targets beyond what normalising keeps, and yet held
    assert not valid and np.array_equal(chunk, np.tile(where.astype(np.float32), (told.steps, 1)))
    for odd in (np.nan, 0.5, last[:2], last * np.nan):
        with pytest.raises(ValueError, match="last_action must be 3 finite numbers"):
            robot.act([{**obs, "last_action": odd}], malformed="hold")
    monkeypatch.undo()
    assert robot.act([obs])[0][1]
    with pytest.raises(ValueError, match="allowed: repair, hold, raise"):
        robot.act([obs], malformed="riase")  # at once, not at the first malformed chunk
    with pytest.raises(ValueError, match="prompt must be text"):
        robot.act([{**obs, "prompt": b"push"}])
    assert robot.act([{**obs, "prompt": "push \ud800"}])[0][1]


def test_an_instruction_that_is_cut_is_said_when_acting(exported):
    _, _, out = exported
    robot = policy.Policy.load(out, robot="tabletop_arm")
    limited = dataclasses.replace(robot, layout=dataclasses.replace(robot.layout, limit=12))
    limited.actor.layout = limited.layout
    seen = TabletopEnv("tabletop_arm").reset(EVAL_SEED)
    with pytest.warns(UserWarning, match=r"^\d+ tokens of an instruction do not fit tokens.limit 12 and are not seen$") as said:
        limited.act([{**seen, "prompt": "push it left 1 " * 3}])
        limited.act([{**seen, "prompt": "push it left 2 " * 3}])
    # Python keeps each text that it has warned by: one that held the instruction would fill a server's memory
    cut = [str(w.message) for w in said if "do not fit" in str(w.message)]
    assert len(cut) == 2 and len(set(cut)) == 1


def test_policy_acts_in_a_process_that_never_trained(exported):
    """What a downstream lab's robot program imports, and no more."""
    code = f"""
import sys
from vla_jax.deploy.policy import Policy
from vla_jax.models.decode import Sampling
from vla_jax.tabletop.env import TabletopEnv
((chunk, valid),) = Policy.load({str(exported[2])!r}, robot="tabletop_arm").act([TabletopEnv("tabletop_arm").reset(0)])
assert valid and chunk.shape == (2, 3)
heavy = [m for m in sys.modules if m.startswith("vla_jax.train") or m in ("tensorflow", "optax", "orbax")]
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_batched_answers_equal_single_ones(exported):
    _, _, out = exported
    robot = policy.Policy.load(out, robot="tabletop_slider")
    observations = [TabletopEnv("tabletop_slider").reset(EVAL_SEED + i) for i in range(3)]
    together = robot.act(observations)
    for obs, (chunk, _) in zip(observations, together):
        np.testing.assert_allclose(robot.act([obs])[0][0], chunk, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda o: o.pop("state"), "observation lacks state"),
        (lambda o: o["images"].pop("wrist"), r"lacks images\['wrist'\]"),
        (lambda o: o.update(state=np.zeros(5)), r"state must be 3 finite numbers \(q1, q2, gripper\), got shape \(5,\)"),
        (lambda o: o.update(state=np.full(3, np.nan)), "finite"),
        (lambda o: o["images"].update(base=np.zeros((48, 48, 3))), "must be uint8"),
    ],
)
def test_wrong_observations_are_answered_with_what_was_expected(exported, change, message):
    obs = TabletopEnv("tabletop_arm").reset(EVAL_SEED)
    change(obs)
    with pytest.raises(ValueError, match=message):
        policy.Policy.load(exported[2], robot="tabletop_arm").act([obs])


def test_a_head_that_was_not_trained_is_refused(exported):
    with pytest.raises(UserError, match=r"head is 'flow', and .* was trained for tokens"):
        policy.Policy.load(exported[2], robot="tabletop_arm", head="flow")


def test_answers_are_drawn_if_asked_for(exported):
    """The likeliest by default, others at a high temperature, the likeliest again among one."""
    obs = TabletopEnv("tabletop_arm").reset(EVAL_SEED)
    answer = lambda **how: policy.Policy.load(exported[2], robot="tabletop_arm", **how).act([obs])[0][0]
    greedy, hot = answer(), answer(sampling=Sampling(50.0))
    assert not np.array_equal(greedy, hot) and np.array_equal(greedy, answer(sampling=Sampling(50.0, top_k=1)))


def test_unknown_robot_and_damage(exported, tmp_path):
    import shutil

    with pytest.raises(UserError, match="robot '' is not in .*; it has: tabletop_slider"):
        policy.Policy.load(exported[2])
    copy = tmp_path / "copy"
    shutil.copytree(exported[2], copy)
    data = bytearray((copy / "params.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "params.safetensors").write_bytes(data)
    with pytest.raises(UserError, match="params.safetensors is damaged"):
        policy.Policy.load(copy, robot="tabletop_arm")
    (copy / "SHA256SUMS").write_text("0  ../../etc/passwd\n")
    with pytest.raises(UserError, match="not a file of this folder"):
        policy.Policy.load(copy, robot="tabletop_arm")


def test_expert_as_a_policy_succeeds_in_the_loop(exported):
    """The rollout itself: driven by the scripted expert, chunk by chunk, it must succeed."""
    envs = []

    def make():
        envs.append(TabletopEnv("tabletop_slider"))
        return envs[-1]

    class Expert:
        steps = 2

        def act(self, observations):
            active = [e for e in envs if not e.success]
            return [(np.tile(e.expert_action(), (2, 1)), True) for e in active[: len(observations)]]

    out = rollout.rollouts(Expert(), make, range(EVAL_SEED, EVAL_SEED + 4), max_steps=60, film=1)
    assert all(o.success for o in out) and len(out[0].frames) == out[0].steps + 1 and not out[1].frames


def test_wilson_interval():
    low, high = rollout.wilson(8, 10)
    assert (round(low, 3), round(high, 3)) == (0.490, 0.943)  # R: binom::binom.wilson(8, 10)
    assert rollout.wilson(0, 20)[0] == pytest.approx(0, abs=1e-9)
    for n in (*range(1, 200), 768):  # a rate outside its interval cannot be drawn
        for won in {0, 1, n // 2, n}:
            low, high = rollout.wilson(won, n)
            assert 0 <= low <= won / n <= high <= 1


def test_checkpoint_holds_all_that_a_policy_needs(exported):
    run, _, _ = exported
    saved = checkpoint.Checkpointer(run.workdir)
    meta = saved.meta(saved.latest())
    saved.close()
    assert [c["name"] for c in meta.cards] == list(run.source.names) and len(meta.stats) == 3
    assert meta.mixture == run.source.fingerprint() and meta.digest == run.config.digest()
    assert len(meta.stream) == run.config.pack.rows // run.config.pack.group


def test_demo_from_end_to_end_in_small(tmp_path):
    """Every stage of `make demo`, with a few steps; its claims are the full demo's."""
    import os

    done = subprocess.run(
        [sys.executable, "-m", "vla_jax.cli", "demo", f"--workdir={tmp_path / 'd'}", "--steps=4", "--episodes=24", "--trials=2"],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "untrained" in done.stdout and all(r in done.stdout for r in demo.ROBOTS)
    assert (tmp_path / "d" / "demo.png").stat().st_size > 20_000
