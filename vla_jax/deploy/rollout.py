"""Closed loop: a policy drives environments in chunks, replanning before each chunk has run out (receding horizon)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from vla_jax.deploy.policy import Policy


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Of one episode. frames: u8[h w 3] pictures, if asked for; malformed: chunks that were no well-formed sequence."""

    seed: int
    success: bool
    steps: int
    malformed: int
    prompt: str
    frames: list[np.ndarray]


def rollouts(
    policy: Policy, make_env: Callable[[], object], seeds: Sequence[int], *, max_steps: int, execute: float = 0.5, film: int = 0
) -> list[Outcome]:
    """Runs one episode per seed, all at once, so that each replanning is one batch for the model.

    An environment has reset(seed) and step(action), both returning an observation as Policy.act takes it, `success`, and
    render() where `film` > 0 (the number of episodes filmed). execute: the share of a chunk carried out before replanning.
    """
    envs = [make_env() for _ in seeds]
    observations = [env.reset(int(seed)) for env, seed in zip(envs, seeds)]
    prompts = [o["prompt"] for o in observations]
    steps, malformed = np.zeros(len(envs), int), np.zeros(len(envs), int)
    frames: list[list[np.ndarray]] = [[env.render()] if i < film else [] for i, env in enumerate(envs)]
    horizon = max(1, round(policy.steps * execute))
    while active := [i for i, env in enumerate(envs) if not env.success and steps[i] < max_steps]:
        for i, (chunk, valid) in zip(active, policy.act([observations[i] for i in active])):
            malformed[i] += not valid
            for action in chunk[: min(horizon, max_steps - steps[i])]:
                observations[i] = envs[i].step(action)
                steps[i] += 1
                if i < film:
                    frames[i].append(envs[i].render())
                if envs[i].success:
                    break
    return [
        Outcome(int(seed), bool(env.success), int(n), int(bad), prompt, film)
        for seed, env, n, bad, prompt, film in zip(seeds, envs, steps, malformed, prompts, frames)
    ]


def wilson(successes: int, trials: int, *, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a success rate (Wilson, 1927): honest at few trials, unlike mean +- error."""
    p, n = successes / trials, trials
    centre, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return float((centre - half) / (1 + z * z / n)), float((centre + half) / (1 + z * z / n))
