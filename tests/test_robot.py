"""From a real export to a robot: the sheet, the dry run, the program of docs/robot.md on a robot that is not there, and the load test."""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import cv2
import numpy as np
import pytest

from vla_jax import cli
from vla_jax.data import svg
from vla_jax.deploy import export, policy
from vla_jax.deploy import served as served_robots
from vla_jax.models import act
from vla_jax.tabletop.env import EVAL_SEED, TabletopEnv
from vla_jax.train import loop

REPO = Path(__file__).resolve().parent.parent
has_serve = all(importlib.util.find_spec(m) for m in ("websockets", "msgpack"))
needs_serve = pytest.mark.skipif(not has_serve, reason="the extra `serve` is not installed")


@pytest.fixture(scope="module")
def exported(tabletop, tmp_path_factory):
    from vla_jax import config

    base = tmp_path_factory.mktemp("robot")
    small = ["model.preset=tiny", "pack.rows=8", "train.steps=2", "train.eval_batches=1", "mesh.data=8", "mesh.fsdp=1", "data.holdout=0.2"]
    c, _ = config.load("configs/demo.py", [f"data.root={tabletop}", f"data.index_dir={base / 'ix'}", *small])
    loop.train(loop.prepare(c, base / "run"), quiet=True)
    return export.export(base / "run", base / "out")


def test_the_sheet(exported, capsys):
    assert cli.main(["spec", str(exported), "--robot=tabletop_bimanual", "--max-step", "xl=0.01"]) == 0
    shown, p = capsys.readouterr().out, policy.Policy.load(exported, robot="tabletop_bimanual")
    assert "20 actions a second; a chunk is 5 steps = 0.25 s" in shown and "recorded as observation/image" in shown
    rows = [line.split() for line in shown.split("action, in this order")[1].splitlines() if re.match(r"\s+\d+  ", line)]
    assert [r[1:5] for r in rows] == [[d.name, d.unit, d.frame, d.kind] for d in p.card.action.dims]
    s = p.stats["action"]
    for i, row in enumerate(rows):
        assert (row[5], row[7]) == (svg.number(float(s.q01[i])), svg.number(float(s.q99[i])))
    assert rows[0][-1] == "0.01" and rows[1][-1] == svg.number(float(s.change[1])) and rows[2][-4:] == ["as", "it", "is", "-"]
    assert cli.main(["spec", str(exported), "--max-step=xl=0.01", "--max-step=dq1=0.02"]) == 0  # each robot has its own
    shown = capsys.readouterr().out.splitlines()
    most = {row.split()[1]: row.split() for row in shown if re.match(r"\s+\d+  ", row)}
    assert most["xl"][-1] == "0.01" and "0.02" in most["dq1"] and "0.02" not in most["dq2"]  # of a delta it is the size
    assert cli.main(["spec", str(exported), "--no-limits"]) == 0
    out, err = capsys.readouterr()
    assert out.count("actions a second") == 3 and "limits    none" in out and "limits are OFF" in err
    for argv, said in (
        (["--robot=r2d2"], "it has: tabletop_slider"),
        (["--robot=tabletop_arm", "--max-step=y=1"], "max_step names y"),
        (["--max-step=yaw=1"], "max_step names yaw"),
        (["--max-step=dq1=fast"], "--max-step is DIM=NUMBER"),
        (["--max-step=dq1"], "write NAME=VALUE"),
        (["--margin=-1"], "margin -1"),
    ):
        assert cli.main(["spec", str(exported), *argv]) == 2
        assert said in capsys.readouterr().err


def test_a_dry_run(exported, capsys, tmp_path):
    seen = TabletopEnv("tabletop_bimanual").reset(EVAL_SEED)
    cv2.imwrite(str(tmp_path / "now.png"), seen["images"]["base"][..., ::-1])
    state = ",".join(f"{x:.6f}" for x in seen["state"])
    argv = [
        "dry-run",
        str(exported),
        "--robot=tabletop_bimanual",
        f"--image=base={tmp_path / 'now.png'}",
        f"--state={state}",
        f"--prompt={seen['prompt']}",
    ]
    assert cli.main([*argv, f"--out={tmp_path / 'p.svg'}", "--max-step=xl=0.0001", "--max-step=yl=10"]) == 0
    said = capsys.readouterr().out
    robot = policy.Policy.load(exported, robot="tabletop_bimanual")
    ((chunk, _),) = robot.act([{**seen, "state": np.array(state.split(","), np.float32)}])
    row = next(line for line in said.splitlines() if line.split()[0] == "xl")
    sent, model = row.split("(the model: ")
    assert model.rstrip(")").split() == [f"{x:.4g}" for x in chunk[:, 0]]
    sent = np.array(sent.split()[2:], float)
    assert len(sent) == 5 and (np.abs(np.diff([seen["state"][0], *sent])) < 1.2e-4).all()  # four digits are printed
    drawn = xml.etree.ElementTree.parse(tmp_path / "p.svg").getroot()
    texts = ["".join(e.itertext()) for e in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert {"xl [m]", "gl [1]", "absolute, base", "5 of 5 changed"} <= set(texts)
    assert len(list(drawn.iter("{http://www.w3.org/2000/svg}svg"))) == 1 + 2 * 6
    assert "OUTSIDE" not in said
    far = [f"--state={','.join(['9', *state.split(',')[1:]])}" if x.startswith("--state") else x for x in argv]
    assert cli.main([*far, f"--out={tmp_path / 'f.svg'}"]) == 0
    assert "OUTSIDE of all that training had: xl of the state" in capsys.readouterr().out
    # one that sees two steps is shown the start of an episode: the state again, and no picture of before
    with pytest.MonkeyPatch.context() as m:
        asked = []
        m.setattr(policy.Policy, "load", lambda *a, **k: dataclasses.replace(robot, history=2))
        m.setattr(policy.Policy, "act", lambda self, seen: asked.extend(seen) or [(chunk, True)])
        assert cli.main([*argv, f"--out={tmp_path / 'h.svg'}"]) == 0
    capsys.readouterr()
    (given,) = asked
    assert set(given["images"]) == {"base"} and given["state"].shape == (2, 6) and np.array_equal(*given["state"])
    for change, told in (
        ({4: f"--state={state},1"}, r"state must have shape [6]"),
        ({4: "--state=a,b"}, "could not convert"),
        ({3: f"--image=wrist={tmp_path / 'now.png'}"}, "there is no picture of 'base'"),
        ({3: f"--image=base={tmp_path / 'p.svg'}"}, "is no picture that can be read"),
        ({3: f"--image=base={tmp_path / 'none.png'}"}, "none.png"),
    ):
        assert cli.main([change.get(i, x) for i, x in enumerate(argv)] + [f"--out={tmp_path / 'q.svg'}"]) == 2
        assert told in capsys.readouterr().err and not (tmp_path / "q.svg").exists()
    assert cli.main([*argv, "--out=/no/such/p.svg"]) == 2 and cli.main([*argv, f"--out={tmp_path / 'p.png'}"]) == 2


ROBOT = """
import json
import numpy as np
from vla_jax.tabletop.env import TabletopEnv

class Robot:
    ACTION = [("dq1", "rad", "joint", "delta"), ("dq2", "rad", "joint", "delta"), ("gripper", "1", "ee", "binary")]
    def __init__(self):
        self.env, self.log = TabletopEnv("tabletop_arm"), open("log.jsonl", "a")
        self.seen = self.env.reset(10_000_000)
    def write(self, **what):
        print(json.dumps(what), file=self.log, flush=True)
    def observe(self):
        self.write(prompt=self.seen["prompt"], state=self.seen["state"].tolist())
        return {"images": self.seen["images"], "state": self.seen["state"]}
    def send(self, action):
        self.write(action=np.asarray(action, float).tolist())
        self.seen = self.env.step(action)
    def stop(self):
        self.write(stopped=True)
"""


@pytest.fixture(scope="module")
def served(exported):
    from vla_jax.bench import serve

    with serve.server(str(exported), robots="tabletop_arm,tabletop_slider", max_batch=1) as (url, _):
        yield url


def limited(robot, chunk):
    """Of a robot that moves by deltas, by hand: q01..q99 and a twentieth of their width, not beyond what was recorded, nought within."""
    s = robot.stats["action"]
    margin, moves = 0.05 * (s.q99 - s.q01), [d.kind == "delta" for d in robot.card.action.dims]
    low, high = np.minimum(np.maximum(s.min, s.q01 - margin), 0), np.maximum(np.minimum(s.max, s.q99 + margin), 0)
    return np.where(moves, np.clip(chunk, low, high), chunk)


def program(folder, url, *more):
    """The program of the page, beside a robot that is not there -> (the finished process, what the robot wrote down)."""
    text = (REPO / "docs" / "robot.md").read_text()
    assert re.search(r"ACTION = .*", ROBOT)[0] in text  # as the page writes it
    (block,) = re.findall(r"```python\n(.*?)```", text, re.S)
    (folder / "robot.py").write_text(block)
    if not (folder / "my_robot.py").exists():
        (folder / "my_robot.py").write_text(ROBOT)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])}
    argv = [sys.executable, "robot.py", url, "--prompt=push it", *more]
    done = subprocess.run(argv, cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False)
    return done, [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@needs_serve
def test_the_page_s_program_drives_a_robot(served, exported, tmp_path):
    """At the control rate, with the actions that the policy has for what the robot saw; and it is stopped at the end."""
    done, log = program(tmp_path, served, "--robot=tabletop_arm", "--seconds=2", "--execute=1")
    assert done.returncode == 0, done.stderr
    actions = [x["action"] for x in log if "action" in x]
    assert log[-1] == {"stopped": True} and 5 <= len(actions) <= 20  # 10 Hz for two seconds; the machine may be slow
    robot, env = policy.Policy.load(exported, robot="tabletop_arm"), TabletopEnv("tabletop_arm")
    seen = env.reset(EVAL_SEED)
    for got in actions[:5]:
        ((chunk, _),) = robot.act([{**seen, "prompt": "push it"}])
        np.testing.assert_allclose(got, limited(robot, chunk)[0], atol=1e-5)
        seen = env.step(np.array(got))


@needs_serve
def test_the_page_s_program_refuses_another_robot_and_a_server_that_is_gone(served, tmp_path):
    (tmp_path / "my_robot.py").write_text(ROBOT.replace('"dq2", "rad"', '"dq2", "m"'))
    done, log = program(tmp_path, served, "--robot=tabletop_arm")
    assert done.returncode == 1 and "this robot takes" in done.stderr and log == [{"stopped": True}]
    done, log = program(tmp_path, served)  # two robots, none named
    assert done.returncode == 1 and "stopped: robot: name one of" in done.stderr and log[-1] == {"stopped": True}
    (tmp_path / "my_robot.py").unlink()
    done, log = program(tmp_path, served, "--robot=r2d2")
    assert done.returncode == 1 and "there are: tabletop_arm, tabletop_slider" in done.stderr
    assert log[-1] == {"stopped": True}


@needs_serve
def test_what_is_sent_is_what_the_policy_says_and_nothing_is_compiled_for_it(served, exported):
    from urllib.request import urlopen

    from vla_jax.deploy.client import Client, ServerError

    metrics = lambda: urlopen(served.replace("ws:", "http:") + "/metrics").read().decode()
    with Client(served, timeout_s=60) as client:
        for name in ("tabletop_slider", "tabletop_arm"):
            robot, seen = policy.Policy.load(exported, robot=name), TabletopEnv(name).reset(EVAL_SEED)
            reply = client.act({**seen, "robot": name})
            np.testing.assert_allclose(reply["actions"], limited(robot, robot.act([seen])[0][0]), atol=1e-5)
            assert set(reply["limits"]) == {"range", "rate", "of", "dims", "unanchored"}
        assert "vla_compiled_while_serving" not in metrics()  # what was usual had been compiled for
        assert client.metadata["robots"][name]["prompt_tokens"] == 64 and "64 tokens" in client.metadata["robots"][name]["spec"]["prompt"]
        count = lambda said: len(robot.layout.text.encode(said.strip()))
        said = [("push " * words).strip() for words in range(65)]
        for prompt in (p for p in said if count(p) <= 64):  # every length that is taken
            client.act({**seen, "robot": name, "prompt": prompt})
        for prompt in ("push " * 150, "block " * 333, "a" * 4096):  # and none beyond
            with pytest.raises(ServerError, match=rf"has {count(prompt)} tokens, and \d+ in all precede the actions; .* of 64 ") as caught:
                client.act({**seen, "robot": name, "prompt": prompt})
            assert caught.value.code == "observation"
        assert "vla_compiled_while_serving" not in metrics()


@pytest.mark.parametrize("layout", ["native", "openpi"])
def test_what_is_let_through_has_a_length_that_was_compiled_for(exported, openpi_run, tmp_path, layout):
    """Of any state (layout openpi writes it into the prompt), and every instruction of the stated number of tokens is let through."""
    place = exported if layout == "native" else export.export(openpi_run, tmp_path / "out")
    rng, passed = np.random.default_rng(0), 0
    for robot in served_robots.load(place, prompt_tokens=40).values():
        p, seen = robot.policy, robot.example(lag=0)
        (lengths,), dims = robot.lengths, len(p.card.state.dims)
        for _ in range(150):
            words = " ".join(rng.choice(["push", "the", "block", "carefully", "7", "Zürich", "_"], rng.integers(0, 60)))
            state = (p.stats["state"].mean + p.stats["state"].std * rng.normal(size=dims) * rng.choice([0, 1, 100])).astype(np.float32)
            message = seen | {"prompt": words, "state": state}
            try:
                robot.check(message)
            except ValueError as e:
                assert "the prompt is too long" in str(e) and len(p.layout.text.encode(words)) > 40, words
                continue
            request = p._request(message)
            length = len(p.layout.prefix(images=len(request.images), prompt=request.prompt))
            assert act.padded(max(lengths[0], length)) in lengths
            passed += 1
    assert passed > 100


@needs_serve
def test_the_load_test_in_short(exported, capsys, tmp_path):
    """A few hundred requests of four clients, a fifth of them wrong: none lost, none different."""
    argv = ["bench", "serve", str(exported), "--robot=tabletop_slider", "--requests=400", "--clients=4", "--wrong=0.2", "--max-batch=2"]
    assert cli.main([*argv, f"--out={tmp_path / 'b.jsonl'}"]) == 0
    bare, alone, load = map(json.loads, capsys.readouterr().out.splitlines())
    assert [json.loads(x) for x in (tmp_path / "b.jsonl").read_text().splitlines()] == [bare, alone, load]
    assert (bare["what"], alone["what"], load["what"]) == ("bare", "served", "served") and load["machine"] and load["commit"]
    assert (alone["clients"], alone["requests"], alone["answered"], alone["lost"]) == (1, 40, 40, 0)
    assert load["requests"] == 400 == load["answered"] + load["refused"] and load["lost"] == load["different"] == 0
    assert (
        40 <= load["refused"] <= 130 and len([k for k in load["outcomes"] if k.startswith("refused: ")]) >= 6
    )  # 80 expected, of ten kinds
    assert 0 < load["p50_ms"] <= load["p90_ms"] <= load["p99_ms"] <= load["max_ms"] and load["outcomes"]["batched"] > 0
    assert load["rss_mb"]["last_quarter"] < load["rss_mb"]["before"] * 1.25 + 50


@needs_serve
def test_serving_is_refused_before_it_begins(exported, capsys, monkeypatch):
    monkeypatch.setenv("VLA_SERVE_TOKEN", "short")
    for argv, said in (
        (["--port=99999"], "must be 0 to 65535"),
        (["--timeout-s=0"], "--timeout-s is 0"),
        ([], "VLA_SERVE_TOKEN has 5 characters"),
    ):
        assert cli.main(["serve", str(exported), *argv]) == 2
        assert said in capsys.readouterr().err
    monkeypatch.delenv("VLA_SERVE_TOKEN")
    for argv, said in (
        (["--robots=r2d2"], "robot 'r2d2' is not in"),
        (["--key=front=cam"], "--key names front; this policy takes: state, base"),
        (["--key=base=a+b"], "one key for a view"),
        (["--head=flow"], "was trained for tokens"),
        (["--token-file=/no/such/file"], "/no/such/file"),
    ):
        assert cli.main(["serve", str(exported), *argv]) == 2
        assert said in capsys.readouterr().err
