"""What a run loses to machines that come and go: a seeded simulation. It measures nothing; what it assumes is in its arguments, and is printed."""

from __future__ import annotations

import dataclasses
import math

from vla_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class Fleet:
    """hosts, each of which fails once in mtbf_h hours on average, at times that know nothing of one another; `announced` is the share of
    failures before which all processes are told to save, notice_s before the machine goes (30 on spot machines of Google Cloud; up to 300, if the pod
    is asked to leave): a save that takes longer saves nothing. step_s: of a step; stall_s: what the loop waits for a save; save_s: from its
    beginning until it is whole; detect_s: until the others notice that a host is gone; restart_s: from then to the first step again
    (new machines, start, restore, first batch, compiled programs from the cache)."""

    hosts: int = 64
    mtbf_h: float = 2000.0
    announced: float = 0.8
    notice_s: float = 30.0
    step_s: float = 0.37
    save_every: int = 1000
    stall_s: float = 1.0
    save_s: float = 60.0
    detect_s: float = 100.0
    restart_s: float = 300.0


def simulate(fleet: Fleet, *, days: float = 7.0, seed: int = 0) -> dict:
    """{goodput: share of the time that went into steps that count, failures, lost_h: of work done again, waiting_h: for saves, detection and
    restarts, daly_steps: the save_every at which stalls and lost work are least by Young's formula}. Raises: UserError."""
    numbers = (*dataclasses.astuple(fleet), days)
    positive = (fleet.hosts, fleet.mtbf_h, fleet.step_s, fleet.save_every, days)
    if not all(map(math.isfinite, numbers)) or min(numbers) < 0 or min(positive) <= 0 or fleet.announced > 1:
        raise UserError(f"nothing to simulate: {fleet}, {days:g} days")
    import numpy as np

    rng, end = np.random.default_rng(seed), days * 86400
    mean = fleet.mtbf_h * 3600 / fleet.hosts
    now = kept = lost = 0.0
    failures = 0
    cycle = fleet.save_every * fleet.step_s + fleet.stall_s
    while now < end:
        up = min(rng.exponential(mean), end - now)  # until the next failure, from the first step after a start
        over = now + up >= end
        saves = math.floor(up / cycle)
        worked = saves * fleet.save_every * fleet.step_s + min(up - saves * cycle, fleet.save_every * fleet.step_s)
        now += up
        if over:
            kept += worked
            break
        failures += 1
        if rng.random() < fleet.announced and fleet.notice_s >= fleet.save_s:
            safe, waited = worked, fleet.save_s
        else:  # a save counts once it is whole
            whole = math.floor(max(up - fleet.save_s, 0) / cycle)
            safe, waited = whole * fleet.save_every * fleet.step_s, fleet.detect_s
        kept, lost = kept + safe, lost + worked - safe
        now += waited + fleet.restart_s + (rng.exponential(fleet.restart_s) if rng.random() < 1 - math.exp(-fleet.restart_s / mean) else 0)
    goodput = kept / end
    unsaved = 1 - (fleet.announced if fleet.notice_s >= fleet.save_s else 0)
    young = math.sqrt(2 * fleet.stall_s * mean / max(unsaved, 1e-9)) / fleet.step_s
    waiting = (end - kept - lost) / 3600
    return {"goodput": goodput, "failures": failures, "lost_h": lost / 3600, "waiting_h": waiting, "daly_steps": round(young)}
