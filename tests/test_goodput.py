"""The simulation of a week against what can be said without one."""

import dataclasses

import numpy as np
import pytest

from vla_jax.bench import restart
from vla_jax.bench.goodput import Fleet, simulate
from vla_jax.types import UserError


def test_without_failures_only_stalls_are_lost():
    fleet = Fleet(mtbf_h=1e12, save_every=100, step_s=0.5, stall_s=10.0)
    assert simulate(fleet)["goodput"] == pytest.approx(50 / 60, abs=1e-3)
    assert simulate(fleet)["failures"] == 0


def test_against_the_expectation():
    """Unannounced failures lose half a cycle and the save that was under way, and wait to be noticed and started again; announced
    ones lose nothing and wait for their save. Over many weeks."""
    fleet = Fleet(
        hosts=32,
        mtbf_h=400.0,
        announced=0.5,
        step_s=1.0,
        save_every=1000,
        stall_s=5.0,
        save_s=60.0,
        detect_s=100.0,
        restart_s=300.0,
        notice_s=60.0,
    )
    found = [simulate(fleet, seed=s) for s in range(1500)]
    mean, cycle = 400 * 3600 / 32, 1005.0
    each = mean + 0.5 * 60 + 0.5 * 100 + 300 + 300 * 300 / mean  # from failure to failure
    lost = 0.5 * (cycle / 2 + 60)
    assert np.mean([f["goodput"] for f in found]) == pytest.approx((mean * 1000 / cycle - lost) / each, abs=0.004)
    assert np.mean([f["failures"] for f in found]) == pytest.approx(7 * 86400 / each, rel=0.03)
    hours = sum(f["lost_h"] for f in found) / sum(f["failures"] for f in found)
    assert hours * 3600 == pytest.approx(lost * 1000 / cycle, rel=0.03)
    for f in found:
        assert f["goodput"] * 168 + f["lost_h"] + f["waiting_h"] == pytest.approx(168)


def test_a_notice_that_is_too_short_for_a_save_saves_nothing():
    long, short, none = (Fleet(announced=a, notice_s=n, save_s=60.0, mtbf_h=200.0) for a, n in ((1.0, 60.0), (1.0, 59.0), (0.0, 60.0)))
    assert simulate(long)["lost_h"] == 0 < simulate(short)["lost_h"] and simulate(short)["goodput"] < simulate(long)["goodput"]
    gone = [np.mean([simulate(f, seed=s)["lost_h"] for s in range(60)]) for f in (short, none)]
    assert gone[0] == pytest.approx(gone[1], rel=0.15)


def test_youngs_interval_is_about_the_best():
    fleet = Fleet(hosts=128, mtbf_h=500.0, announced=0.0, stall_s=5.0)
    best = simulate(fleet)["daly_steps"]
    at = lambda steps: np.mean([simulate(dataclasses.replace(fleet, save_every=steps), seed=s)["goodput"] for s in range(40)])
    assert at(best) > at(best * 8) and at(best) > at(max(best // 8, 1))


def test_the_same_seed_gives_the_same_week():
    assert simulate(Fleet(), seed=3) == simulate(Fleet(), seed=3) != simulate(Fleet(), seed=4)
    for odd in (Fleet(hosts=0), Fleet(announced=2.0), Fleet(mtbf_h=0.0), Fleet(save_every=0), Fleet(restart_s=-1.0), Fleet(stall_s=np.nan)):
        with pytest.raises(UserError, match="nothing to simulate"):
            simulate(odd)


def test_what_a_save_makes_the_loop_wait():
    """Of four windows two began a save; the usual step is the median of all."""
    line = lambda share, seconds, step_s: {"train/step_s": step_s, "train/seconds": seconds, "train/time/checkpoint": share}
    lines = [line(0.0, 1.0, 1.0), line(0.5, 4.0, 2.0), {"step": 3}, line(0.0, 1.0, 1.0), line(0.25, 2.0, 1.5)]
    assert restart._waits(lines) == [(2.0, 1.25), (0.5, 1.25)]
