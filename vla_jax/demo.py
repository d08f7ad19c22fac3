"""The whole way on one page: record three robots, index, train on four virtual devices, export, act, compare, draw."""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from pathlib import Path

from vla_jax import config
from vla_jax.tabletop import recordings
from vla_jax.types import UserError

DEVICES = 4
# robots, and how many times --episodes are recorded: slow robots have fewer frames in an episode, and scenes are what generalises
ROBOTS = {"tabletop_slider": 4, "tabletop_arm": 2, "tabletop_bimanual": 1}


def main(workdir: Path, *, steps: int | None, episodes: int, trials: int) -> int:
    """Runs everything below `workdir`; a second run goes on from what the first one finished. Returns the exit code."""
    began = time.time()
    for package, extra in (("tensorflow_datasets", "rlds"), ("matplotlib", "plots")):
        if not _has(package):
            raise UserError(f"the demo needs {package}. Install it: pip install 'vla-jax[{extra}]'")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax

    jax.config.update("jax_num_cpu_devices", DEVICES)
    root = workdir / "data"
    _say(began, f"recording {', '.join(f'{k * episodes} {robot}' for robot, k in ROBOTS.items())} episodes to {root}")
    wanted = [(root / robot, robot, times * episodes, ()) for robot, times in ROBOTS.items()]
    recordings.make(wanted, workdir / "record.log", at_once=3)

    from vla_jax.deploy import export, policy
    from vla_jax.train import evaluate, loop

    overrides = [f"data.root={root}", f"data.index_dir={workdir / 'index'}", *([f"train.steps={steps}"] if steps else [])]
    settings, _ = config.load("configs/demo.py", overrides)
    _say(began, "indexing, statistics, action tokenizer")
    run = loop.prepare(settings, workdir / "run", where="configs/demo.py")
    frames = ", ".join(f"{n} {len(f)}" for n, f in zip(run.source.names, run.source.frames))
    _say(began, f"training on frames: {frames}; mesh {dict(run.mesh.shape)}")
    state = loop.train(run)

    _say(began, "held-out episodes")
    held_out = run.source.held_out()
    errors = evaluate.action_errors(run.cfg, held_out, state.params, frames=64, mesh=run.mesh)
    shutil.rmtree(workdir / "export", ignore_errors=True)
    exported = export.export(workdir / "run", workdir / "export")
    _say(began, f"exported to {exported}; closed loop, {trials} scenes per robot never seen")
    policies = policy.load_all(exported)
    trained = {name: _drive(p, name, trials, film=12) for name, p in policies.items()}
    untrained = {name: _drive(p, name, trials, film=0) for name, p in _untrained(policies, run.cfg).items()}

    from vla_jax import report

    table = report.table(run.workdir, errors, trained, untrained)
    dims = {name: [d.name for d in p.card.action.dims] for name, p in policies.items()}
    picture = report.picture(run.workdir, errors, dims, trained, workdir / "demo.png")
    (workdir / "demo.txt").write_text(table + "\n")
    print(table)
    _say(began, f"picture: {picture}")
    return 0


def _has(package: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(package) is not None


def _say(began: float, text: str) -> None:
    print(f"[{time.time() - began:4.0f} s] {text}", flush=True)


def _untrained(policies: dict, cfg) -> dict:
    """The same policies with freshly initialised weights."""
    import jax

    from vla_jax.models import vla
    from vla_jax.models.act import Actor

    params = jax.jit(lambda: vla.init(cfg, jax.random.key(1)))()
    actor = Actor(cfg, next(iter(policies.values())).layout, params)
    return {name: dataclasses.replace(p, actor=actor) for name, p in policies.items()}


def _drive(policy, name: str, trials: int, *, film: int) -> list:
    from vla_jax.deploy import rollout
    from vla_jax.tabletop.env import EVAL_SEED, ROBOTS, TabletopEnv

    seeds = range(EVAL_SEED, EVAL_SEED + trials)
    return rollout.rollouts(policy, lambda: TabletopEnv(name), seeds, max_steps=ROBOTS[name].max_steps, execute=1.0, film=film)
