"""The robots of an export as a server has them: a policy each, with its limits, made ready before the first request."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from vla_jax.data import sample
from vla_jax.deploy import limits, observation
from vla_jax.deploy.counters import Counters
from vla_jax.deploy.limits import Limits
from vla_jax.deploy.policy import Policy, load_all
from vla_jax.types import UserError

_WORD = "block "  # of the instructions that are compiled for
_WORDS = 24


@dataclasses.dataclass(frozen=True)
class Served:
    """names: keys of observations, as deploy.observation has them. limits None: actions are given as the model has them."""

    policy: Policy
    limits: Limits | None
    names: Mapping[str, tuple[str, ...]]
    malformed: str

    def check(self, message: Mapping) -> dict:
        """An observation for `answers`. Raises: observation.Unfit."""
        found = observation.of(message, self.policy, self.names)
        if self.malformed == "hold" and "last_action" not in found:
            raise observation.Unfit("last_action is missing: this server holds it where the model's answer is malformed")
        return found

    def answers(self, observations: list[dict], counters: Counters) -> list[dict]:
        """-> for each {"actions": f32[k a], "well_formed", "limits": what was done}, counted. Raises as Policy.act, and ValueError where an
        action is not finite."""
        name, out = self.policy.card.name, []
        for seen, (chunk, valid) in zip(observations, self.policy.act(observations, malformed=self.malformed)):
            counters.add("vla_chunks", robot=name, well_formed=str(valid).lower())
            done = {}
            if self.limits:
                state = np.asarray(seen["state"]).reshape(-1, len(self.policy.card.state.dims))[-1]
                chunk, applied = self.limits(chunk, state=state, last_action=seen.get("last_action"))
                dims = [d.name for d, n in zip(self.limits.dims, applied.range + applied.rate) if n]
                done = {"range": int(applied.range.sum()), "rate": int(applied.rate.sum()), "of": chunk.size}
                for kind in ("range", "rate"):
                    counters.add("vla_limited", done[kind], robot=name, kind=kind)
                done |= {"dims": dims, "unanchored": list(applied.unanchored)}
            counters.add("vla_action_numbers", chunk.size, robot=name)
            out.append({"actions": chunk, "well_formed": bool(valid), "limits": done})
        return out

    def example(self, *, words: int, lag: int) -> dict:
        """An observation like those to come: black pictures (`lag` steps of history), the mean state, an instruction of so many words."""
        p = self.policy
        images = {sample.lagged(v, n): np.zeros((p.image_size, p.image_size, 3), np.uint8) for n in range(lag + 1) for v in p.views}
        state = np.broadcast_to(p.stats["state"].mean, (p.history, len(p.card.state.dims)))
        made = {"images": images, "state": state if p.history > 1 else state[0], "prompt": (_WORD * words).strip()}
        return made | {"last_action": p.stats["action"].mean}


def load(
    folder: str | Path,
    *,
    robots: tuple[str, ...] = (),
    head: str = "",
    malformed: str = "repair",
    names: Mapping[str, tuple[str, ...]] | None = None,
    limit: limits.Settings | None = None,
) -> dict[str, Served]:
    """robots: of the export (none: all). limit None: no limits. Raises: UserError."""
    found = load_all(folder, head=head)
    if odd := [r for r in robots if r not in found]:
        raise UserError(f"robot {odd[0]!r} is not in {folder}; it has: {', '.join(found)}")
    out = {}
    for name, policy in ((r, found[r]) for r in robots or found):
        observation.check_names(names or {}, policy.views)
        out[name] = Served(policy, limits_of(policy, limit) if limit else None, names or {}, malformed)
    return out


def limits_of(policy: Policy, settings: limits.Settings) -> Limits:
    """Raises: UserError."""
    card = policy.card
    return Limits.make(card.action.dims, card.state.dims, policy.stats["action"], hz=card.control_hz, settings=settings)


def warm(served: Served, *, most: int, say: Callable[[str], None], go_on: Callable[[], bool] = lambda: True) -> int:
    """Compiles for what is to come: batches of 1, 2, 4 .. up to `most`, each with instructions of up to 24 words; -> how many calls that took.
    An instruction that is longer is compiled for when it comes. go_on() is asked before each call."""
    calls = 0
    for lag in range(served.policy.history):
        by_length = {}
        for words in range(1, _WORDS + 1):
            seen = served.example(words=words, lag=lag)
            by_length.setdefault(served.policy.prefix(seen), seen)
        rows = 1
        while True:
            rows = min(rows, most)
            for seen in by_length.values():
                if not go_on():
                    return calls
                served.policy.act([seen] * rows, malformed="repair")
                calls += 1
            say(f"{served.policy.card.name}: ready for {rows} at once, prefixes of {', '.join(map(str, by_length))} tokens")
            if rows == most:
                break
            rows *= 2
    return calls
