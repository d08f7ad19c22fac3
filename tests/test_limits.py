"""Limits against an oracle that is written number by number."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_jax.data import cards, stats
from vla_jax.deploy.limits import Limits, Settings
from vla_jax.tabletop import record
from vla_jax.types import Dim, Stats, UserError

HZ = 10.0
ACTION = (
    Dim("x", "m", "base", "absolute"),
    Dim("yaw", "rad", "base", "absolute"),
    Dim("q", "rad", "joint", "absolute"),
    Dim("dz", "m", "ee", "delta"),
    Dim("v", "m/s", "base", "velocity"),
    Dim("gripper", "1", "ee", "binary"),
)
STATE = (Dim("yaw", "rad", "base", "absolute"), Dim("x", "m", "base", "absolute"), Dim("q", "rad", "base", "absolute"))
f32 = lambda *x: np.array(x, np.float32)
SEEN = Stats(
    mean=f32(0, 0, 0, 0.02, 0, 0.5),
    std=f32(1, 1, 1, 1, 1, 1),
    q01=f32(-0.5, -3.0, -1, 0.01, -0.2, 0),
    q99=f32(0.5, 3.0, 1, 0.05, 0.3, 1),
    min=f32(-0.52, -3.14, -2, 0.005, -0.4, 0),
    max=f32(2.0, 3.14, 2, 0.09, 0.31, 1),
    count=100,
    change=f32(0.1, 0.2, 0.3, 1, 1, 1),
)


def make(settings=None, seen=SEEN):
    return Limits.make(ACTION, STATE, seen, hz=HZ, settings=settings or Settings())


def oracle(chunk, state, last, *, low, high, most):
    """A number at a time, in float64. low, high, most: of each dimension; None for no limit."""
    out, moved, held = [[0.0] * len(ACTION) for _ in chunk], [0] * len(ACTION), [0] * len(ACTION)
    anchors = {"x": state[1], "yaw": state[0]}
    for d, dim in enumerate(ACTION):
        at = anchors.get(dim.name, None if last is None else last[d])
        for k, row in enumerate(chunk):
            value = float(row[d])
            if low[d] is not None and not low[d] <= value <= high[d]:
                value = low[d] if value < low[d] else high[d]
                moved[d] += 1
            if most[d] is not None and at is not None:
                change = value - at
                if dim.name == "yaw":
                    change = math.remainder(change, 2 * math.pi)
                if abs(change) > most[d] * (1 + 1e-6):
                    value = at + math.copysign(most[d], change)
                    value = math.remainder(value, 2 * math.pi) if dim.name == "yaw" else value
                    held[d] += 1
            out[k][d] = at = value
    return np.array(out), moved, held


# by hand from SEEN: q01 - 5 % of the width, but not below min; and so on; nought is within a delta's range
LOW = [-0.52, -3.14, -1.1, 0.0, -0.225, None]
HIGH = [0.55, 3.14, 1.1, 0.052, 0.31, None]
MOST = [0.1, 0.2, 0.3, None, None, None]


def test_what_the_limits_are():
    for found, low, high, most in zip(make().describe(), LOW, HIGH, MOST):
        for got, want in ((found["low"], low), (found["high"], high), (found["max_step"], most)):
            assert (got is None) == (want is None) and (want is None or got == pytest.approx(want, abs=1e-6)), found


values = st.floats(-4, 4, width=32)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(*[values] * 6), min_size=1, max_size=6), st.tuples(*[values] * 3), st.none() | st.tuples(*[values] * 6))
def test_as_the_oracle(chunk, state, last):
    limits, chunk = make(), f32(*chunk)
    got, applied = limits(chunk, state=f32(*state), last_action=None if last is None else f32(*last))
    own = lambda x: [None if not np.isfinite(v) else float(v) for v in x]  # the limits as they are in float32
    want, moved, held = oracle(chunk, f32(*state).astype(float), last, low=own(limits.low), high=own(limits.high), most=own(limits.most))
    turned = np.abs(got - want)
    turned[:, 1] = np.minimum(turned[:, 1], np.abs(turned[:, 1] - 2 * np.pi))  # pi and -pi are one
    # float32 of numbers up to 4, and as many roundings as there are steps
    np.testing.assert_allclose(turned, 0, atol=3e-6)
    assert applied.range.tolist() == moved
    # where a change lies at the limit to the last bit the two may disagree by one
    assert np.abs(applied.rate - held).max() <= 1
    assert applied.unanchored == (("q",) if last is None else ())
    steps = np.diff(np.concatenate([f32(state[1])[None, :].reshape(1, 1), got[:, :1]]), axis=0)
    assert (np.abs(steps) <= 0.1 + 1e-5).all()
    again, more = limits(got, state=f32(*state), last_action=None if last is None else f32(*last))
    if all(abs(s) <= 0.5 for s in state) and (last is None or abs(last[2]) <= 1):  # from within, what is limited is left alone
        np.testing.assert_allclose(again, got, atol=3e-6)


def test_what_is_within_stays_to_the_last_bit():
    chunk = f32([0.1, 3.1, 0.5, 0.02, -0.1, 1], [0.05, -3.1, 0.4, 0.01, 0.3, 0])
    got, applied = make()(chunk, state=f32(3.0, 0.1, 9))
    assert np.array_equal(got, chunk) and not applied.range.any() and not applied.rate.any()


def test_an_angle_goes_the_shorter_way():
    got, applied = make()(f32([0, -3.0, 0, 0, 0, 0]), state=f32(3.0, 0, 0))
    assert got[0, 1] == pytest.approx(3.2 - 2 * np.pi, abs=1e-5) and applied.rate.tolist() == [0, 1, 0, 0, 0, 0]


def test_stated_steps_and_other_settings():
    found = make(Settings(max_step={"x": 0.01, "dz": 0.02, "v": 0.1})).describe()
    assert found[0]["max_step"] == pytest.approx(0.01) and found[3]["high"] == pytest.approx(0.02) and found[3]["max_step"] is None
    assert (found[4]["low"], found[4]["high"]) == (pytest.approx(-0.1), pytest.approx(0.1))
    assert [f["high"] for f in make(Settings(range="minmax")).describe()][:3] == pytest.approx([2.0, 3.14, 2.0])
    free = make(Settings(range="off", rate="off"))
    assert all(f[k] is None for f in free.describe() for k in ("low", "high", "max_step"))
    cross = make(Settings(rate="cross", cross_s=2.0)).describe()
    assert [f["max_step"] for f in cross][:3] == pytest.approx([1 / 20, 6 / 20, 2 / 20])
    # an export that does not know what was seen, and an angle that went around
    assert [f["max_step"] for f in make(seen=dataclasses.replace(SEEN, change=None)).describe()][:3] == pytest.approx([0.1, 0.6, 0.2])
    around = make(seen=dataclasses.replace(SEEN, change=f32(0.1, 6.28, 3.5, 1, 1, 1))).describe()
    assert [f["max_step"] for f in around][:3] == pytest.approx([0.1, 0.6, 3.5])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (lambda: Settings(range="wide"), "allowed: quantile, minmax, off"),
        (lambda: Settings(rate="fast"), "allowed: seen, cross, off"),
        (lambda: Settings(margin=-1), "margin -1"),
        (lambda: Settings(cross_s=0), "cross_s 0"),
        (lambda: Settings(margin=math.nan), "margin nan"),
        (lambda: Settings(max_step={"x": 0.0}), "above 0"),
        (lambda: make(Settings(max_step={"gripper": 1})), "the dimensions that have one are: x, yaw, q, dz, v"),
        (lambda: make(Settings(max_step={"y": 1})), "max_step names y"),
        (lambda: make(seen=dataclasses.replace(SEEN, change=f32(1, 2))), "no 6 finite numbers as change"),
        (lambda: make(seen=dataclasses.replace(SEEN, q99=f32(0, 0, np.nan, 0, 0, 0))), "no 6 finite numbers as q99"),
    ],
)
def test_odd_settings_are_refused(settings, said):
    with pytest.raises(UserError, match=said):
        settings()


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_never_sent(odd):
    with pytest.raises(ValueError, match="not finite in q"):
        make()(f32([0, 0, odd, 0, 0, 0]), state=f32(0, 0, 0))


def test_a_constant_dimension_keeps_its_mean():
    """The policy gives it back as the mean, which outliers may have drawn out of the quantiles."""
    dims = (Dim("x", "m", "base", "delta"),)
    seen = stats.of(np.array([[0.5]] * 995 + [[3.0]] * 5, np.float32))
    assert seen.q99[0] == seen.q01[0] == 0.5
    got, applied = Limits.make(dims, (), seen, hz=5, settings=Settings())(seen.mean[None, :], state=f32())
    assert np.array_equal(got[0], seen.mean) and not applied.range.any()


def test_an_expert_is_left_alone():
    """Deltas of the tabletop's expert in other scenes than those of the statistics pass as they are; of targets most do."""
    share = {}
    for name in ("tabletop_slider", "tabletop_arm", "tabletop_bimanual"):
        card, episode = cards.load(name), lambda seed, name=name: [np.float32(s["action"]) for s in record.rollout(name, seed)[0]]
        known = [np.stack(episode(seed)) for seed in range(10)]
        seen = stats.of(np.concatenate(known))
        change = np.max([np.abs(np.diff(x, axis=0)).max(0) for x in known], axis=0)
        keep = Limits.make(card.action.dims, (), dataclasses.replace(seen, change=change), hz=card.control_hz, settings=Settings())
        changed = total = 0
        for seed in range(100, 108):
            chunk = np.stack(episode(seed))
            _, applied = keep(chunk, state=np.zeros(0, np.float32), last_action=chunk[0])
            changed, total = changed + int((applied.range + applied.rate).sum()), total + chunk.size
        share[name] = changed / total
    assert share["tabletop_slider"] == share["tabletop_arm"] == 0 and 0 < share["tabletop_bimanual"] < 0.15, share


def test_the_largest_change_is_that_within_episodes(tabletop, tmp_path):
    """Of the statistics that the scan leaves, of those of a pass over the index, and by hand."""
    from vla_jax import config
    from vla_jax.data import source

    c, _ = config.load("configs/demo.py", [f"data.root={tabletop}", f"data.index_dir={tmp_path}", "data.holdout=0.2", "model.preset=tiny"])
    opened = source.open_source(c, tokens_per_image=9)
    for index, scanned in zip(opened.indexes, opened.statistics):
        for holdout in (0.2, 0.4):
            keep, want = ~index.held_out(holdout), {}
            for key in ("action", "state"):
                rows = np.asarray(getattr(index, key), np.float64)
                ends = zip(index.episode_start[:-1], index.episode_start[1:])
                want[key] = np.max([np.abs(np.diff(rows[a:b], axis=0)).max(0) for (a, b), k in zip(ends, keep) if k], axis=0)
            found = scanned if holdout == 0.2 else stats.compute(index, holdout)
            for key, value in want.items():
                np.testing.assert_allclose(found[key].change, value, rtol=1e-6)
        assert np.array_equal(stats.from_json(stats.to_json(scanned))["action"].change, scanned["action"].change)
    old = stats.to_json(scanned)
    old["action"].pop("change")
    assert stats.from_json(old)["action"].change is None


def test_parts_that_do_not_know_changes_leave_the_whole_not_knowing():
    a, b, x = stats.Running(), stats.Running(), f32([0], [5], [9], [2])
    a.update(x, first=np.array([1, 0, 1, 0], bool))
    assert a.stats().change.tolist() == [7]
    b.update(x, first=np.ones(4, bool))
    assert b.stats().change.tolist() == [0]
    b.merge(a)
    assert b.stats().change.tolist() == [7]
    a.update(x)
    assert a.stats().change is None
