"""Runs the arms of plan.py, two at a time, each where an earlier start left off, and keeps a JSON line per arm and condition."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np

from vla_jax import config
from vla_jax.study import plan
from vla_jax.study.plan import Arm, Condition, Scale
from vla_jax.tabletop import recordings
from vla_jax.types import Interrupted, UserError

DEVICES = 4  # virtual ones, as in the demo


def main(workdir: Path, *, quick: bool, out: Path | None, only: tuple[str, ...] = (), jobs: int = 2) -> list[dict]:
    """Returns all lines, also those of earlier starts. only: names of arms; jobs: arms at a time, a process for each: one leaves a third
    of two cores idle. Raises: UserError when a recording fails, or one of these processes ends."""
    scale = plan.QUICK if quick else Scale()
    chosen = plan.arms(scale)
    if unknown := set(only) - {arm.name for arm in chosen}:
        raise UserError(f"no arm called {', '.join(sorted(unknown))}; there are: {', '.join(arm.name for arm in chosen)}")
    workdir.mkdir(parents=True, exist_ok=True)
    _claim(workdir / "scale.json", scale)
    kept = workdir / "study.jsonl"
    lines = _lines(kept)
    began = time.time()
    record(workdir, scale)
    print(f"[{time.time() - began:5.0f} s] recorded", flush=True)
    done = {(line["arm"], line["condition"], line["robot"]) for line in lines}
    left = {arm.name: tuple(c for c in arm.conditions if (arm.name, c.name, c.robot) not in done) for arm in chosen}
    todo = [dataclasses.replace(arm, conditions=left[arm.name]) for arm in chosen if left[arm.name] and (not only or arm.name in only)]
    # Fresh interpreters: JAX does not survive a fork.
    with futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _end_with_the_parent) as pool:
        for new in in_turn(todo, lambda arm: pool.submit(one, workdir, arm, scale, began), jobs):
            lines += new
            for file in (kept, *([out] if out else ())):
                with open(file, "a") as f:
                    f.writelines(json.dumps(line) + "\n" for line in new)
    return lines


def in_turn(arms: Sequence[Arm], start: Callable[[Arm], futures.Future], jobs: int) -> Iterator[list[dict]]:
    """Starts each arm, `jobs` at a time, once the one that it begins with is done, and yields the lines of each that is. Raises: what an
    arm raises, and UserError when its process is gone; no other arm is started then, and those under way are waited for."""
    waiting, running, failed = list(arms), {}, None
    while running or waiting and not failed:
        ahead = {arm.name for arm in (*waiting, *running.values())}
        for arm in [] if failed else [a for a in waiting if a.begins not in ahead][: jobs - len(running)]:
            waiting.remove(arm)
            running[start(arm)] = arm
        for future in futures.wait(running, return_when=futures.FIRST_COMPLETED).done:
            arm, found = running.pop(future), future.exception()
            if found is None:
                yield future.result()
            elif isinstance(found, BrokenProcessPool):
                failed = failed or UserError(
                    f"a process of the study is gone, {arm.name} perhaps for want of memory: the same command goes on"
                )
            else:
                failed = failed or found
    if failed:
        raise failed


def _end_with_the_parent() -> None:
    """A process that trains on for nobody would keep the cores from the next start."""

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def one(workdir: Path, arm: Arm, scale: Scale, began: float) -> list[dict]:
    """Trains an arm, lets it act, and says so; in a process of the study. began: time.time() of its start. Raises: UserError."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax

    jax.config.update("jax_num_cpu_devices", DEVICES)
    from vla_jax import distributed

    distributed.keep_compiled()
    try:
        trained = train(workdir, arm)
    except Interrupted as e:  # which is not one that can be sent to the parent
        raise UserError(f"{arm.name}: {e}") from None
    say = lambda text: print(f"[{time.time() - began:5.0f} s] {arm.name}: {text}", flush=True)
    say("trained" + (f" in {trained['train_s']:.0f} s" if trained["train_s"] else ", going on from a checkpoint"))
    lines = []
    for line in act(workdir, arm, arm.conditions, scale.trials):
        say(f"{line['condition']}, {line['robot']}: {line['successes']} of {line['trials']}, progress {line['progress']:.2f}")
        lines.append({**line, **trained, **stamp(scale)})
    return lines


def _claim(file: Path, scale: Scale) -> None:
    """What is kept in a workdir is of one scale. Raises: UserError when it is of another."""
    ours = json.loads(json.dumps(dataclasses.asdict(scale)))
    if not file.is_file():
        file.write_text(json.dumps(ours) + "\n")
    elif (theirs := json.loads(file.read_text())) != ours:
        raise UserError(f"{file.parent} holds a study of another scale: {theirs} there, {ours} now. Give another --workdir.")


def _lines(kept: Path) -> list[dict]:
    """Those of earlier starts. A last one that was cut off is removed: what it said is measured again."""
    text = kept.read_text() if kept.is_file() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        kept.write_text(whole)
    return [json.loads(line) for line in whole.splitlines()]


def stamp(scale: Scale) -> dict:
    """What the line was measured on, and how busy that machine was: mean number of running processes over a minute."""
    from vla_jax.bench import run

    return {"pretrain_steps": scale.steps, "finetune_steps": scale.finetune_steps, "load": round(os.getloadavg()[0], 1), **run.stamp()}


def record(workdir: Path, scale: Scale) -> None:
    """All that the arms train on. Raises: UserError."""
    wanted = [(workdir / "data" / folder / robot, robot, episodes, tuple(more)) for folder, robot, episodes, more in plan.recordings(scale)]
    recordings.make(wanted, workdir / "record.log")


def settings(workdir: Path, arm: Arm) -> config.Config:
    """The resolved config of an arm."""
    where = [f"data.root={workdir / 'data' / arm.data}", f"data.index_dir={workdir / 'index' / arm.data}"]
    where += [f"model.init={workdir / 'export' / arm.begins}"] if arm.begins else []
    last = next(item.partition("=")[2] for item in arm.overrides if item.startswith("train.steps="))
    return config.load(arm.config, [*arm.overrides, *where, f"train.save_every={last}"])[0]


def train(workdir: Path, arm: Arm) -> dict:
    """Trains and exports the arm, if that is not done -> {train_s, train_cpu_s, steps}: seconds on the wall and of all cores, with
    compiling, indexing and fitting; None for an arm that went on from a checkpoint, since what came before it was not timed."""
    out = workdir / "export" / arm.name
    if not (out / "study.json").is_file():
        from vla_jax.deploy import export
        from vla_jax.train import loop

        shutil.rmtree(out, ignore_errors=True)
        wall, cpu = time.time(), time.process_time()
        folder = workdir / "runs" / arm.name
        whole = not any(folder.glob("checkpoints/[0-9]*"))
        run = loop.prepare(settings(workdir, arm), folder, where=arm.config)
        loop.train(run, quiet=True)
        took = {
            "train_s": round(time.time() - wall, 1) if whole else None,
            "train_cpu_s": round(time.process_time() - cpu, 1) if whole else None,
            "steps": run.config.train.steps,
        }
        export.export(run.workdir, out)
        (out / "study.json").write_text(json.dumps(took))
    return json.loads((out / "study.json").read_text())


class Steady:
    """A policy that is always asked for as many robots at once, so that one shape is compiled; it notes what it took."""

    def __init__(self, policy, rows: int):
        self.policy, self.rows, self.steps, self.card = policy, rows, policy.steps, policy.card

    def act(self, observations: list[dict]) -> list:
        fill = [observations[0]] * (self.rows - len(observations))
        return self.policy.act([*observations, *fill])[: len(observations)]


def act(workdir: Path, arm: Arm, conditions: Sequence[Condition], trials: int) -> Iterator[dict]:
    """Yields a line for each condition: successes with Wilson's interval, progress (see TabletopEnv) and the half width of its 95 %
    interval, steps to success, malformed chunks, and the time of an answer for one robot alone."""
    from vla_jax.deploy import policy, rollout
    from vla_jax.tabletop.env import EVAL_SEED, ROBOTS, TabletopEnv

    robots = policy.load_all(workdir / "export" / arm.name)
    for condition in conditions:
        envs, robot, spec = [], robots[condition.robot], ROBOTS[condition.robot]

        def make(condition=condition, envs=envs):
            envs.append(TabletopEnv(condition.robot, drawn=condition.drawn, camera=condition.camera))
            return envs[-1]

        seeds = range(EVAL_SEED, EVAL_SEED + trials)
        found = rollout.rollouts(Steady(robot, trials), make, seeds, max_steps=spec.max_steps, execute=1.0)
        won, progress = [o for o in found if o.success], np.array([env.progress for env in envs])
        low, high = rollout.wilson(len(won), trials)
        yield {
            "arm": arm.name,
            "head": arm.head,
            "begins": arm.begins,
            "target": arm.target,
            "demonstrations": arm.demonstrations,
            "condition": condition.name,
            "robot": condition.robot,
            "trials": trials,
            "successes": len(won),
            "low": round(low, 4),
            "high": round(high, 4),
            "progress": round(float(progress.mean()), 4),
            "progress_half": round(float(1.96 * progress.std(ddof=1) / np.sqrt(trials)), 4),
            "steps_to_success": round(float(np.mean([o.steps for o in won])), 2) if won else None,
            "malformed": sum(o.malformed for o in found),
            **timed(robot, envs[0].reset(EVAL_SEED)),
        }


def timed(robot, observation: dict, *, calls: int = 9) -> dict:
    """Of one observation at a time, compiled: the median seconds of an answer, and of one of its actions."""
    took = []
    for _ in range(calls + 1):
        began = time.perf_counter()
        robot.act([observation])
        took.append(time.perf_counter() - began)
    answer = float(np.median(took[1:]))
    return {"answer_s": round(answer, 4), "action_s": round(answer / robot.steps, 4)}
