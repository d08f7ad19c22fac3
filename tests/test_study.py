"""The study: its plan holds together, its lines say what happened, and its table adds up. The numbers themselves are in docs/study.md."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from vla_jax import config, paths
from vla_jax.data import cards, mixture
from vla_jax.deploy import export, policy, rollout
from vla_jax.study import page, plan, run
from vla_jax.tabletop import record, world
from vla_jax.tabletop.env import EVAL_SEED, ROBOTS, TabletopEnv
from vla_jax.train import loop
from vla_jax.types import UserError

SCALES = pytest.mark.parametrize("scale", [plan.Scale(), plan.QUICK], ids=["full", "quick"])


@SCALES
def test_every_arm_finds_its_data_its_beginning_and_its_robots(scale, tmp_path):
    recorded, known = {(folder, robot) for folder, robot, _, _ in plan.recordings(scale)}, {}
    for arm in plan.arms(scale):
        made = run.settings(tmp_path, arm)
        trained = {card.name for card in mixture.load(made.data.mixture).cards}
        assert trained <= {robot for folder, robot in recorded if folder == arm.data}
        assert not arm.begins or arm.begins in known
        known[arm.name] = trained | (known[arm.begins] if arm.begins else set())
        assert {c.robot for c in arm.conditions} <= known[arm.name]
        assert made.model.init == (str(tmp_path / "export" / arm.begins) if arm.begins else "")
    assert len(known) == len(plan.arms(scale))


def test_pretrained_and_scratch_differ_in_nothing_but_where_they_begin(tmp_path):
    arms = {arm.name: arm for arm in plan.arms(plan.Scale())}
    for target in plan.TARGETS:
        for n in plan.Scale().sizes:
            one, two = (
                config.flatten(dataclasses.asdict(run.settings(tmp_path, arms[f"{target}-{n}-{how}"]))) for how in ("pretrained", "scratch")
            )
            # a policy brings its text model and tokenizer: from scratch they are what it was made with
            assert {k for k in one if one[k] != two[k]} == {"model.init", "tokens.text_model", "tokens.action_vocab", "tokens.action_scale"}
            before = run.settings(tmp_path, arms["pretrain-fast"]).tokens
            assert all(two[f"tokens.{k}"] == getattr(before, k) for k in ("text_model", "action_vocab", "action_scale", "action", "state"))


def test_what_is_held_out_is_not_recorded():
    """The recorder is told, and obeys; what is measured as held out is just that."""
    told = {(folder, robot): more for folder, robot, _, more in plan.recordings(plan.Scale())}
    assert all(told["pretrain", robot] == ["--without", "blue-left"] for robot in plan.PRETRAINED_ON)
    drawn = world.Drawn(without=plan.HELD_OUT)
    prompts = {record.rollout("tabletop_slider", seed, drawn)[0][0]["observation"]["prompt"] for seed in range(60)}
    assert len(prompts) == 10 and not any("blue" in p and "left" in p for p in prompts)
    (held_out,) = {c.drawn for c in plan.ZERO_SHOT if c.name == "held-out instruction"}
    said = {TabletopEnv("tabletop_slider", drawn=held_out).reset(EVAL_SEED + i)["prompt"] for i in range(20)}
    assert len(said) == 2 and not said & prompts
    assert all(c.camera != plan.Condition("", "tabletop_slider").camera for c in plan.ZERO_SHOT if c.name == "held-out camera")


def test_a_workdir_is_of_one_scale_and_a_torn_line_is_measured_again(tmp_path):
    """After --quick nothing of it is taken for the study itself."""
    run._claim(tmp_path / "scale.json", plan.QUICK)
    run._claim(tmp_path / "scale.json", plan.QUICK)
    with pytest.raises(UserError, match="holds a study of another scale: .*'steps': 8.* there, .*'steps': 1200.* now"):
        run._claim(tmp_path / "scale.json", plan.Scale())
    kept = tmp_path / "study.jsonl"
    assert run._lines(kept) == []
    kept.write_text('{"arm": "a"}\n{"arm": "b", "succ')
    assert run._lines(kept) == [{"arm": "a"}] and kept.read_text() == '{"arm": "a"}\n'


@pytest.fixture(scope="module")
def acted(tabletop, tmp_path_factory):
    base = tmp_path_factory.mktemp("study")
    small = [
        f"data.root={tabletop}",
        f"data.index_dir={base / 'ix'}",
        "data.mixture=tabletop_slider",
        "data.holdout=0",
        "model.preset=tiny",
    ]
    small += ["pack.rows=8", "train.steps=1", "mesh.data=8", "mesh.fsdp=1"]
    loop.train(loop.prepare(config.load("configs/demo.py", small)[0], base / "run"), quiet=True)
    export.export(base / "run", base / "export" / "x")
    return base


def test_a_line_says_what_happened(acted):
    """Against the closed loop written out, one scene at a time."""
    conditions = (plan.Condition("task", "tabletop_slider", world.Drawn(goal="into")), plan.ZERO_SHOT[0], plan.ZERO_SHOT[3])
    arm = plan.Arm("x", "configs/demo.py", (), "pretrain", conditions)
    lines, robot = list(run.act(acted, arm, list(conditions), 4)), policy.Policy.load(acted / "export" / "x")
    assert [(x["condition"], x["robot"]) for x in lines] == [(c.name, c.robot) for c in conditions]
    for line, c in zip(lines, conditions):
        won, progress = 0, []
        for i in range(4):
            env = TabletopEnv(c.robot, drawn=c.drawn, camera=c.camera)
            seen = env.reset(EVAL_SEED + i)
            start = np.linalg.norm(env._scene.blocks[0] - world.goal_of(env._scene.bowl, env._task.side))
            while not env.success and env.steps < ROBOTS[c.robot].max_steps:
                for action in robot.act([seen])[0][0]:
                    seen = env.step(action)
                    if env.success or env.steps == ROBOTS[c.robot].max_steps:
                        break
            won += env.success
            progress.append(1 - np.linalg.norm(env._scene.blocks[0] - world.goal_of(env._scene.bowl, env._task.side)) / start)
        assert line["successes"] == won and (line["low"], line["high"]) == pytest.approx(rollout.wilson(won, 4), abs=1e-4)
        assert line["progress"] == pytest.approx(np.mean(progress), abs=1e-3)
        assert line["progress_half"] == pytest.approx(1.96 * np.std(progress, ddof=1) / 2, abs=1e-3)
        assert 0 < line["action_s"] < line["answer_s"] and json.dumps(line)


def test_an_arm_that_goes_on_has_no_seconds(tmp_path, monkeypatch):
    """Those of its last part alone would look like a fast arm."""
    arm = plan.Arm("x", "configs/demo.py", ("train.steps=3",), "pretrain", ())
    monkeypatch.setattr(loop, "prepare", lambda config, folder, where: SimpleNamespace(config=config, workdir=folder))
    monkeypatch.setattr(loop, "train", lambda run, quiet: (run.workdir / "checkpoints" / "3").mkdir(parents=True, exist_ok=True))
    monkeypatch.setattr(export, "export", lambda run, out: out.mkdir(parents=True))
    took = run.train(tmp_path, arm)
    assert took["train_s"] >= 0 and took["train_cpu_s"] >= 0 and took["steps"] == 3 and run.train(tmp_path, arm) == took
    (tmp_path / "export" / "x" / "study.json").unlink()
    again = run.train(tmp_path, arm)
    assert again == {"train_s": None, "train_cpu_s": None, "steps": 3}
    line = {**next(iter(made_up())), **again}
    assert "| " + line["arm"] in page.table([line]) and " () " not in page.table([line])


def made_up():
    base = {
        "steps_to_success": 12.0,
        "train_s": 10.0,
        "train_cpu_s": 19.0,
        "action_s": 0.002,
        "begins": "",
        "target": "",
        "demonstrations": None,
    }
    line = lambda arm, condition, robot, won, progress, **more: {
        **base,
        **more,
        "arm": arm,
        "condition": condition,
        "robot": robot,
        "successes": won,
        "trials": 64,
        "low": rollout.wilson(won, 64)[0],
        "high": rollout.wilson(won, 64)[1],
        "progress": progress,
        "progress_half": 0.1,
    }
    yield line("pretrain-fast", "seen instruction", "tabletop_slider", 20, 0.3)
    yield line("pretrain-fast", "seen instruction", "tabletop_arm", 10, 0.1)
    yield line("pretrain-fast", "task, no demonstration", "tabletop_slider", 4, 0.1)
    for n, won in ((5, 3), (20, 9)):
        more = {"target": "task", "demonstrations": n}
        yield line(f"task-{n}-pretrained", "task", "tabletop_slider", 2 * won, 0.5, begins="pretrain-fast", **more)
        yield line(f"task-{n}-scratch", "task", "tabletop_slider", won, 0.2, **more)
    yield line("pretrain-fast", "seen instruction", "tabletop_arm", 12, 0.2)  # measured again


def test_robots_are_added_up_and_the_last_line_counts(tmp_path):
    lines = page.newest(made_up())
    assert [x["successes"] for x in lines if x["robot"] == "tabletop_arm"] == [12]
    planned, turned = [arm.name for arm in plan.arms(plan.Scale())], [x["arm"] for x in page.newest([*made_up()][::-1])]
    assert turned == sorted(turned, key=planned.index) and turned[0] == "pretrain-fast"  # whichever was measured first
    (both,) = page.pooled(lines)
    assert (both["robot"], both["successes"], both["trials"]) == ("all", 32, 128) and (both["low"], both["high"]) == rollout.wilson(32, 128)
    assert both["progress"] == pytest.approx(0.25) and both["progress_half"] == pytest.approx(0.1 / np.sqrt(2))
    text = page.table(made_up())
    assert "| pretrain-fast | seen instruction | all | 32/128 | 18% - 33% | 0.25 +- 0.07 |" in text
    assert "| task-20-scratch | task | slider | 9/64 | 8% - 25% | 0.20 +- 0.10 | 12 | 10 (19) | 2.0 |" in text
    pytest.importorskip("matplotlib")
    drawn = page.picture(made_up(), tmp_path / "a.svg").read_text()
    assert "from scratch" in drawn and "new task: success" in drawn and len(drawn) < 100_000


def test_published_lines_are_those_of_the_table_in_the_docs():
    """docs/study.md shows what docs/bench/study.jsonl holds."""
    docs = paths.assets("configs").parent / "docs"
    if not (docs / "bench" / "study.jsonl").is_file():
        pytest.skip("no docs beside an installed wheel")
    lines = [json.loads(line) for line in (docs / "bench" / "study.jsonl").read_text().splitlines()]
    assert page.table(lines) in (docs / "study.md").read_text()
    assert {x["robot"] for x in lines} <= set(cards.names())


def test_arms_are_started_when_what_they_begin_with_is_done():
    """As many at a time as there are jobs, each once, none before its beginning; and no further one behind one that fails."""
    arms, started, ended = plan.arms(plan.Scale()), [], []
    futures_of = {}

    def start(arm):
        started.append(arm.name)
        assert len(started) - len(ended) <= 2 and (not arm.begins or arm.begins in ended)
        futures_of[arm.name] = futures.Future()
        if len(started) - len(ended) == 2 or len(started) == len(arms):  # the one that was started first ends
            for name in [n for n in started if n not in ended][: 2 if len(started) == len(arms) else 1]:
                futures_of[name].set_result([{"arm": name}])
                ended.append(name)
        return futures_of[arm.name]

    lines = [line["arm"] for new in run.in_turn(arms, start, 2) for line in new]
    assert sorted(lines) == sorted(started) == sorted(arm.name for arm in arms)

    def gone(arm):
        started.append(arm.name)
        future = futures.Future()
        future.set_exception(BrokenProcessPool())
        return future

    def one_fails(arm):
        started.append(arm.name)
        future = futures.Future()
        if len(started) == 2:  # is still under way when the first one fails
            threading.Timer(0.2, future.set_result, [[{"arm": arm.name}]]).start()
        else:
            future.set_exception(UserError("no room"))
        return future

    started.clear()
    kept, turns = [], run.in_turn(arms, one_fails, 2)
    with pytest.raises(UserError, match="no room"):
        for new in turns:
            kept += new
    assert len(started) == 2 and [line["arm"] for line in kept] == started[1:]  # what the other measured is not lost

    started.clear()
    with pytest.raises(UserError, match="a process of the study is gone, .*: the same command goes on"):
        list(run.in_turn(arms, gone, 2))
    assert len(started) == 2


def test_no_process_of_a_study_outlives_it(tmp_path):
    """The study is killed while one of its processes is busy for ten minutes."""
    (tmp_path / "study.py").write_text(
        "import multiprocessing, os, time\nfrom concurrent import futures\nfrom vla_jax.study import run\nif __name__ == '__main__':\n"
        "    pool = futures.ProcessPoolExecutor(1, multiprocessing.get_context('spawn'), run._end_with_the_parent)\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n    pool.submit(time.sleep, 600).result()\n"
    )
    repo = str(paths.assets("configs").parent)
    with subprocess.Popen(
        [sys.executable, str(tmp_path / "study.py")], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": repo}
    ) as study:
        place = Path("/proc") / study.stdout.readline().strip() / "stat"
        alive = lambda: place.is_file() and place.read_text().rpartition(")")[2].split()[0] != "Z"
        assert alive()
        study.kill()
    until = time.monotonic() + 60
    while alive() and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive()
