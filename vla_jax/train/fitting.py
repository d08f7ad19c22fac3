"""What fits: the largest batch of a config on a topology, and what to change where it does not fit; every answer was compiled."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator

from vla_jax import sharding
from vla_jax.config import Config
from vla_jax.hardware import GIB
from vla_jax.train.compile_check import Compiled, Plan, better_mesh, compiled, report
from vla_jax.types import UserError


def largest_rows(plan: Plan, done: Compiled, say: Callable[[str], None]) -> int:
    """The most rows that fit, all else as it is: what fits and what does not are brought together by compiling between them, first where
    memory, taken as a straight line through what is known, says."""
    unit = _unit(plan)
    units = plan.config.pack.rows // unit
    room = plan.chip.hbm_bytes - sum(plan.kept.values())
    known = {units: done}
    fits = lambda n: not known[n].error

    while True:
        good, bad = max(n for n in known if fits(n)), min((n for n in known if not fits(n)), default=0)
        if bad == good + 1:
            return good * unit
        # twice as many until some do not fit; then between the two, where memory, taken as a straight line from the last
        # that fit, says: at most a quarter of the way from either end, since the compiler trades time for memory as it runs short
        n = 2 * good
        if bad:
            below = max((n for n in known if n < good), default=0)
            slope = (known[good].temp - known[below].temp) / (good - below) if below else known[good].temp / good
            n = good + int((room - known[good].temp) / max(slope, 1))
            edge = (bad - good) // 4
            n = min(max(n, good + max(edge, 1)), bad - max(edge, 1))
        known[n] = compiled(plan.changed(_with(plan.config, pack={"rows": n * unit})))
        say(f"{n * unit} rows: {_told(plan, known[n])}")


def _unit(plan: Plan) -> int:
    """Rows that a batch may have more or less."""
    return math.lcm(plan.mesh.shape["data"] * plan.mesh.shape["fsdp"] * plan.config.train.accumulate, plan.config.pack.group)


def _told(plan: Plan, done: Compiled) -> str:
    """For the progress line."""
    total = (done.temp + sum(plan.kept.values())) / GIB
    return f"{'does not fit' if done.error else 'fits'}, {total:.2f} of {plan.chip.hbm_bytes / GIB:.2f} GiB ({done.seconds:.0f} s)"


def _with(config: Config, **groups: dict) -> Config:
    return dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **values) for group, values in groups.items()})


def remedies(plan: Plan, say: Callable[[str], None], *, most: int = 3) -> list[dict]:
    """Changes with which the run fits, each compiled, the fastest a sample first: {change, report}."""
    found: list[dict] = []
    for change in _changes(plan):
        if len(found) == most:
            break
        label = " ".join(f"--config.{group}.{key}={value}" for group, values in change.items() for key, value in values.items())
        try:
            other = plan.changed(_with(plan.config, **change))
        except UserError:
            continue
        done = compiled(other)
        say(f"{label}: {_told(other, done)}")
        if not done.error:
            found.append({"change": label, "report": report(other, done)})
    return sorted(found, key=lambda x: -x["report"]["samples_per_s"])


def _changes(plan: Plan) -> Iterator[dict]:
    """Those that change least first: how it is computed, then the optimizer's precision, then the batch."""
    config, policies = plan.config, ("none", "dots", "attention", "full", "offload")
    stronger = policies[policies.index(config.model.remat) + 1 :]
    if (better := better_mesh(plan)) is not None:
        yield {"mesh": {axis: better[axis] for axis in sharding.AXES}}
    yield from ({"model": {"remat": name}} for name in stronger if name != "offload")
    each = config.pack.rows // (plan.mesh.shape["data"] * plan.mesh.shape["fsdp"])  # rows of a device, of which parts are taken
    parts = [n for n in range(config.train.accumulate + 1, each + 1) if each % n == 0]
    parts = [parts[0], *parts[1 : len(parts) - 1 : 2], parts[-1]] if len(parts) > 2 else parts
    yield from ({"train": {"accumulate": n}} for n in parts)
    strong = "full" if "full" in stronger else config.model.remat
    if strong != config.model.remat:
        yield from ({"model": {"remat": strong}, "train": {"accumulate": n}} for n in parts)
    if config.train.moment_dtype == "float32":
        yield {"train": {"moment_dtype": "bfloat16"}}
        yield {
            "model": {"remat": strong},
            "train": {"moment_dtype": "bfloat16", "accumulate": parts[-1] if parts else config.train.accumulate},
        }
    unit = _unit(plan)
    yield from ({"model": {"remat": strong}, "pack": {"rows": n * unit}} for n in (4, 2, 1) if n * unit < config.pack.rows)
    if config.train.optimizer != "adafactor":
        change = {"optimizer": "adafactor", "moment_dtype": "bfloat16"}
        yield {"model": {"remat": strong}, "train": change, "pack": {"rows": unit}}


def run(config: Config, topology: str, *, slices: int = 1, where: str = "config", quick: bool = False, say=None) -> dict:
    """The report of a config on a topology, with the largest batch (unless quick), or with remedies where it does not fit.

    Raises: UserError.
    """
    say = say or (lambda line: print(f"compile-check: {line}", file=sys.stderr, flush=True))
    plan = Plan.make(config, topology, slices, where=where)
    say(f"compiling for {plan.mesh.size} devices of {topology}{f' in {slices} slices' if slices > 1 else ''}")
    done = compiled(plan)
    say(_told(plan, done))
    made = report(plan, done, where=where)
    if done.error:
        made["remedies"] = remedies(plan, say)
    elif not quick:
        made["largest_rows"] = largest_rows(plan, done, say)
    return made
