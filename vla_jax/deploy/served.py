"""The robots of an export as a server has them: a policy each, with its limits, made ready before the first request."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from vla_jax.data import sample
from vla_jax.deploy import limits, observation
from vla_jax.deploy.counters import Counters
from vla_jax.deploy.limits import Limits
from vla_jax.deploy.policy import Policy, load_all
from vla_jax.types import UserError

PROMPT_TOKENS = 64  # of an instruction: 24 English words, of the default text model (1.0 to 1.4 a word) as of the tiny one (1.5 to 2.5)


@dataclasses.dataclass(frozen=True)
class Served:
    """names: keys of observations, as deploy.observation has them. limits None: actions are given as the model has them. prompt_tokens: of
    the longest instruction that is compiled for; a longer one is refused, since compiling while serving would keep every robot waiting."""

    policy: Policy
    limits: Limits | None
    names: Mapping[str, tuple[str, ...]]
    malformed: str
    prompt_tokens: int = PROMPT_TOKENS

    def spec(self) -> dict:
        return self.policy.spec() | {"prompt": f"text of at most {self.prompt_tokens} tokens"}

    @functools.cached_property
    def lengths(self) -> list[range]:
        """By how many steps before now have pictures."""
        return [self.policy.lengths(lag=lag, instruction=self.prompt_tokens) for lag in range(self.policy.history)]

    def check(self, message: Mapping) -> dict:
        """An observation for `answers`. Raises: observation.Unfit."""
        found = observation.of(message, self.policy, self.names)
        if self.malformed == "hold" and "last_action" not in found:
            raise observation.Unfit("last_action is missing: this server holds it where the model's answer is malformed")
        (before, words), most = self.policy.tokens(found), self.lengths[self._lag(found)][-1]
        if before > most:
            raise observation.Unfit(
                f"the prompt is too long: the instruction has {words} tokens, and {before} in all precede the actions; this server takes "
                f"instructions of {self.prompt_tokens} (--prompt-tokens), and {most} in all. Say it shorter."
            )
        return found

    def _lag(self, seen: dict) -> int:
        return max(len(seen["images"]) // max(len(self.policy.views), 1) - 1, 0)

    def answers(self, observations: list[dict], counters: Counters) -> list[dict]:
        """-> for each {"actions": f32[k a], "well_formed", "limits": what was done, "outside": dimensions of the state}, counted. Raises as Policy.act, and ValueError where an
        action is not finite."""
        name, out = self.policy.card.name, []
        length = max(self.lengths[self._lag(seen)][0] for seen in observations)
        for seen, (chunk, valid) in zip(observations, self.policy.act(observations, malformed=self.malformed, length=length)):
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
            outside = observation.outside(self.policy, seen["state"])
            for dim in outside:
                counters.add("vla_outside", robot=name, dim=dim)
            out.append({"actions": chunk, "well_formed": bool(valid), "limits": done, "outside": outside})
        return out

    def example(self, *, lag: int) -> dict:
        """An observation like those to come: black pictures (`lag` steps of history), the mean state, a short instruction."""
        p = self.policy
        images = {sample.lagged(v, n): np.zeros((p.image_size, p.image_size, 3), np.uint8) for n in range(lag + 1) for v in p.views}
        state = np.broadcast_to(p.stats["state"].mean, (p.history, len(p.card.state.dims)))
        made = {"images": images, "state": state if p.history > 1 else state[0], "prompt": "block"}
        return made | {"last_action": p.stats["action"].mean}


def load(
    folder: str | Path,
    *,
    robots: tuple[str, ...] = (),
    head: str = "",
    malformed: str = "repair",
    names: Mapping[str, tuple[str, ...]] | None = None,
    limit: limits.Settings | None = None,
    prompt_tokens: int = PROMPT_TOKENS,
) -> dict[str, Served]:
    """robots: of the export (none: all). limit None: no limits. Raises: UserError."""
    found = load_all(folder, head=head)
    if odd := [r for r in robots if r not in found]:
        raise UserError(f"robot {odd[0]!r} is not in {folder}; it has: {', '.join(found)}")
    chosen, out = {r: found[r] for r in robots or found}, {}
    views = {view for policy in chosen.values() for view in policy.views}
    for name, policy in chosen.items():
        own = {view: keys for view, keys in (names or {}).items() if view not in views - set(policy.views)}  # not what is another robot's
        observation.check_names(own, policy.views)
        out[name] = Served(policy, limits_of(policy, limit, chosen.values()) if limit else None, own, malformed, prompt_tokens)
    return out


def limits_of(policy: Policy, settings: limits.Settings, among: Iterable[Policy] = ()) -> Limits:
    """among: robots that have the same settings; a max_step of a dimension that only others of them have is theirs. Raises: UserError."""
    card, moves = policy.card, lambda p: {d.name for d in p.card.action.dims if d.kind != "binary"}
    others = set().union(*map(moves, among)) - moves(policy)
    settings = dataclasses.replace(settings, max_step={dim: x for dim, x in settings.max_step.items() if dim not in others})
    return Limits.make(card.action.dims, card.state.dims, policy.stats["action"], hz=card.control_hz, settings=settings)


def warm(served: Served, *, most: int, say: Callable[[str], None], go_on: Callable[[], bool] = lambda: True) -> int:
    """Compiles for all that is to come: batches of 1, 2, 4 .. up to `most`, each with every length of prefix that `check` lets through; -> how
    many calls that took. go_on() is asked before each call."""
    calls = 0
    for lag, lengths in enumerate(served.lengths):
        seen, rows = served.example(lag=lag), 1
        while True:
            rows = min(rows, most)
            for length in lengths:
                if not go_on():
                    return calls
                served.policy.act([seen] * rows, malformed="repair", length=length)
                calls += 1
            say(f"{served.policy.card.name}: ready for {rows} at once, prefixes of {', '.join(map(str, lengths))} tokens")
            if rows == most:
                break
            rows *= 2
    return calls
