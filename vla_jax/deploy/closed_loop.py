"""`vla-jax rollout`: an exported policy in simulators, by task: success with its interval, speed, what the sequences were; lines, videos, a page."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from vla_jax.data import cards
from vla_jax.deploy import film, policy, rollout, rollout_page
from vla_jax.deploy.policy import Policy
from vla_jax.deploy.rollout import Call, Outcome
from vla_jax.sims import environments
from vla_jax.tabletop.env import EVAL_SEED
from vla_jax.types import UserError

MOST_FPS = 10  # of videos; a robot at 80 Hz is filmed every eighth step


@dataclasses.dataclass(frozen=True)
class Settings:
    """episodes: of each task; seed: the first scene is the one numbered EVAL_SEED + seed, and recordings stay below EVAL_SEED. execute, ensemble:
    see rollout.rollouts; execute None: half a chunk, or with an ensemble one step. parallel: episodes at once, a batch for the policy.
    film: episodes of each task. max_steps: 0: as the environment has it. malformed: see Policy.act."""

    episodes: int = 20
    seed: int = 0
    execute: float | None = None
    ensemble: float | None = None
    parallel: int = 8
    film: int = 8
    max_steps: int = 0

    @property
    def share(self) -> float:
        return self.execute if self.execute is not None else 0.5 if self.ensemble is None else 0.0


def run(
    export: str | Path, env: str, out: str | Path, settings: Settings, *, robot: str = "", head: str = "", say: Callable = print
) -> dict:
    """Writes OUT/rollouts.jsonl (a line an episode), OUT/summary.json, OUT/videos/ and OUT/index.html; returns the summary:
    {task: rollout.summary, and "all" where there are several}.

    Raises: UserError for an unknown environment or task, a simulator that is not installed, a robot that the export lacks, or a folder
    that holds rollouts already.
    """
    out = Path(out).expanduser()
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty. Give a new folder.")
    name, tasks = environments.parse(env)
    found = policy.load_all(export, head=head)
    if name == "tabletop" and ":" not in env:  # a task is a robot there
        tasks = tuple(t for t in tasks if t in ([robot] if robot else found)) or tasks
    acting = {task: _robot(found, robot, environments.card_of(name, task), export) for task in tasks}
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[Outcome]] = {}
    calls: dict[str, list[Call]] = {}
    videos: dict[tuple[str, int], Path] = {}
    with open(out / "rollouts.jsonl", "w") as lines:
        for task in tasks:
            hz = acting[task].card.control_hz
            every = max(1, round(hz / MOST_FPS))
            results[task], calls[task] = _task(acting[task], name, task, settings, every)
            for o in results[task]:
                if o.frames:
                    file = film.write(o.frames, out / "videos" / f"{task}-{o.seed}", fps=hz / every)
                    videos[task, o.seed] = file
                line = {"env": name, "task": task, **{k: v for k, v in vars(o).items() if k != "frames"}}
                lines.write(json.dumps({**line, "video": str(file.relative_to(out)) if o.frames else None}) + "\n")
            lines.flush()
            say(sentence(f"{name}:{task}", rollout.summary(results[task], calls[task])))
    made = {task: rollout.summary(results[task], calls[task]) for task in tasks}
    if len(tasks) > 1:
        made["all"] = rollout.summary(sum(results.values(), []), sum(calls.values(), []))
        say(sentence("all", made["all"]))
    how = {"env": env, "export": str(export), "robot": ", ".join(dict.fromkeys(p.card.name for p in acting.values()))}
    how |= {"execute": settings.share, "ensemble": settings.ensemble, "seed": settings.seed}
    (out / "summary.json").write_text(json.dumps({**how, "tasks": made}, indent=1) + "\n")
    rollout_page.write(out / "index.html", how, made, results, videos)
    return made


def _robot(found: dict[str, Policy], chosen: str, wanted: str, export) -> Policy:
    """The policy of the chosen card, else of the environment's own; of an export that has one robot only, that one: its card may have a name
    of its own, but its numbers must mean what they mean there."""
    name = chosen or wanted
    if name not in found and (chosen or len(found) > 1):
        raise UserError(f"robot {name!r} is not in {export}; it has: {', '.join(found)}. Name one with --robot.")
    acting = found.get(name) or next(iter(found.values()))
    theirs, ours = cards.load(wanted), acting.card
    said = lambda card: {
        "state": [(d.unit, d.frame, d.kind) for d in card.state.dims],
        "action": [(d.unit, d.frame, d.kind) for d in card.action.dims],
        "control_hz": card.control_hz,
    }
    for (what, mine), there in zip(said(ours).items(), said(theirs).values()):
        if mine != there:
            raise UserError(
                f"{export} has {ours.name}, whose {what} is {mine}, and this environment's own card {wanted} says {there}: "
                "its numbers would mean something else there"
            )
    return acting


def _task(acting: Policy, name: str, task: str, settings: Settings, every: int) -> tuple[list[Outcome], list[Call]]:
    outcomes, calls = [], []
    envs = [environments.make(name, task, acting.card) for _ in range(min(settings.parallel, settings.episodes))]
    most = settings.max_steps or environments.ENVIRONMENTS[name].max_steps(task)
    first = EVAL_SEED + settings.seed
    for begin in range(0, settings.episodes, len(envs)):
        seeds = range(first + begin, first + min(begin + len(envs), settings.episodes))
        filmed = min(max(settings.film - begin, 0), len(seeds))
        outcomes += rollout.rollouts(
            acting,
            iter(envs).__next__,
            seeds,
            max_steps=most,
            execute=settings.share,
            ensemble=settings.ensemble,
            film=filmed,
            film_every=every,
            calls=calls,
        )
    return outcomes, calls


def sentence(label: str, s: dict) -> str:
    """One task's summary in words."""
    low, high = s["interval_95"]
    said = [f"{label}: {s['successes']} of {s['episodes']} ({s['success_rate']:.0%}; 95 % {low:.0%} - {high:.0%})"]
    if s["mean_steps_to_success"] is not None:
        said.append(f"{s['mean_steps_to_success']:.1f} steps to success")
    if s["seconds_per_action"] is not None:
        said.append(f"{s['seconds_per_call'] * 1000:.1f} ms an answer (up to {s['at_once']} at once)")
    said.append(f"{s['malformed']} of {s['chunks']} chunks malformed")
    if s["clipped"] > 0:
        said.append(f"{s['clipped']:.1%} of the numbers cut by the environment's bounds")
    return ", ".join(said)
