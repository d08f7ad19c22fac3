"""Closed loop: a policy drives environments in chunks, replanning before each chunk has run out (receding horizon), and where asked for
blending what overlapping chunks say of the same moment (temporal ensembling, as in ACT: Zhao et al. 2023, Learning Fine-Grained Bimanual
Manipulation with Low-Cost Hardware)."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

import numpy as np

from vla_jax.deploy.observation import with_history
from vla_jax.deploy.policy import Policy


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Of one episode. frames: u8[h w 3] pictures, if asked for; malformed: of the `chunks` those that were no well-formed sequence;
    clipped: share of the commanded numbers that the environment's bounds cut."""

    seed: int
    success: bool
    steps: int
    malformed: int
    prompt: str
    frames: list[np.ndarray]
    chunks: int = 0
    clipped: float = 0.0


@dataclasses.dataclass(frozen=True)
class Call:
    """Of the policy: how many episodes it was asked for at once, how long it took, and how many actions came of it."""

    rows: int
    seconds: float
    actions: int


def rollouts(
    policy: Policy,
    make_env: Callable[[], object],
    seeds: Sequence[int],
    *,
    max_steps: int,
    execute: float = 0.5,
    film: int = 0,
    ensemble: float | None = None,
    film_every: int = 1,
    calls: list[Call] | None = None,
) -> list[Outcome]:
    """Runs one episode per seed, all at once, so that each replanning is one batch for the model.

    An environment has reset(seed) and step(action), both returning an observation as Policy.act takes it (step may return None where
    observe() gives it, when pictures are dear), `success`, render() where `film` > 0 (the number of episodes filmed, every `film_every`
    steps), and may have `ended` (no step can follow). execute: the share of a chunk carried out before replanning; 0: one step.
    ensemble: decay of the weights by which all chunks that reach a step are blended; see `blend`. calls: filled with a Call for each
    call of the policy.
    """
    envs = [make_env() for _ in seeds]
    n, history = len(envs), getattr(policy, "history", 1)
    seen = [[env.reset(int(seed))] for env, seed in zip(envs, seeds)]  # of each episode the last observations, oldest first
    prompts = [o[-1]["prompt"] for o in seen]
    steps, malformed, chunks = (np.zeros(n, int) for _ in range(3))
    frames: list[list[np.ndarray]] = [[env.render()] if i < film else [] for i, env in enumerate(envs)]
    plans: list[list[tuple[int, np.ndarray]]] = [[] for _ in envs]  # (the step that a chunk begins at, chunk), oldest first
    binary = np.array([d.kind == "binary" for d in policy.card.action.dims]) if ensemble is not None else np.zeros(0, bool)
    horizon = max(1, round(policy.steps * execute))
    while active := [i for i, env in enumerate(envs) if _goes_on(env) and steps[i] < max_steps]:
        began, before = time.perf_counter(), int(steps.sum())
        answers = policy.act([with_history(seen[i], history) for i in active])
        seconds = time.perf_counter() - began
        for i, (chunk, valid) in zip(active, answers):
            malformed[i], chunks[i] = malformed[i] + (not valid), chunks[i] + 1
            keep = plans[i] if ensemble is not None else []
            plans[i] = [*((at, old) for at, old in keep if at + len(old) > steps[i]), (int(steps[i]), chunk)]
            for turn in range(min(horizon, len(chunk), max_steps - steps[i])):
                action = chunk[turn] if ensemble is None else blend(plans[i], int(steps[i]), ensemble, binary)
                shown = envs[i].step(action)
                steps[i] += 1
                if shown is None and (history > 1 or turn + 1 == min(horizon, len(chunk))):  # the policy looks at this one
                    shown = envs[i].observe()
                if shown is not None:
                    seen[i] = [*seen[i], shown][-history:]
                if i < film and (steps[i] % film_every == 0 or not _goes_on(envs[i])):
                    frames[i].append(envs[i].render())
                if not _goes_on(envs[i]):
                    break
        if calls is not None:
            calls.append(Call(len(active), seconds, int(steps.sum()) - before))
    cut = [getattr(env, "clipped", 0) / max(getattr(env, "commanded", 0), 1) for env in envs]
    return [
        Outcome(int(seed), bool(env.success), int(k), int(bad), prompt, film, int(c), float(share))
        for seed, env, k, bad, prompt, film, c, share in zip(seeds, envs, steps, malformed, prompts, frames, chunks, cut)
    ]


def _goes_on(env) -> bool:
    return not env.success and not getattr(env, "ended", False)


def blend(plans: Sequence[tuple[int, np.ndarray]], now: int, decay: float, binary: np.ndarray) -> np.ndarray:
    """[(first step, chunk f32[k a])], oldest first -> f32[a] for step `now`: the mean of all that reach it, weighted exp(-decay * i) where
    i = 0 is the oldest. So a larger decay trusts older predictions more, as ACT has it (0.01 there); below 0 the newest count most.
    binary: bool[a], numbers that the majority decides. Raises: ValueError when no chunk reaches `now`."""
    said = [chunk[now - at] for at, chunk in plans if 0 <= now - at < len(chunk)]
    if not said:
        raise ValueError(f"no chunk reaches step {now}")
    weights = np.exp(-decay * np.arange(len(said)))
    mean = np.average(np.stack(said).astype(np.float64), axis=0, weights=weights)
    return np.where(binary, mean > 0.5, mean).astype(np.float32)


def wilson(successes: int, trials: int, *, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a success rate (Wilson, 1927): honest at few trials, unlike mean +- error."""
    p, n = successes / trials, trials
    centre, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (float(x / (1 + z * z / n)) for x in (centre - half, centre + half))
    return min(max(low, 0.0), p), max(min(high, 1.0), p)  # rounding must not leave the rate outside


def summary(outcomes: Sequence[Outcome], calls: Sequence[Call]) -> dict:
    """What a set of episodes comes to. seconds_per_action is throughput: of all that act at once (at_once at most); seconds_per_call is what
    one of them waits for, the median. Both leave out the first call of each batch size, which compiles; None if there were no others. Raises: ValueError without episodes."""
    if not outcomes:
        raise ValueError("no episodes")
    won, n = sum(o.success for o in outcomes), len(outcomes)
    taken = [o.steps for o in outcomes if o.success]
    known: set[int] = set()
    warm = [c for c in calls if c.rows in known or known.add(c.rows)]
    low, high = wilson(won, n)
    return {
        "episodes": n,
        "successes": won,
        "success_rate": won / n,
        "interval_95": [low, high],
        "mean_steps_to_success": float(np.mean(taken)) if taken else None,
        "chunks": sum(o.chunks for o in outcomes),
        "malformed": sum(o.malformed for o in outcomes),
        "clipped": float(np.mean([o.clipped for o in outcomes])),
        "seconds_per_action": sum(c.seconds for c in warm) / max(sum(c.actions for c in warm), 1) if warm else None,
        "seconds_per_call": float(np.median([c.seconds for c in warm])) if warm else None,
        "at_once": max((c.rows for c in warm), default=0),
        "first_call_seconds": calls[0].seconds if calls else None,
    }
