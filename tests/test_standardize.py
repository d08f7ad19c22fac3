"""Ops against scipy and plain loops."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from vla_jax.data import filters, rotations, standardize
from vla_jax.types import UserError

FORMATS = list(rotations.WIDTH)


def as_scipy(r: Rotation, fmt: str) -> np.ndarray:
    m = r.as_matrix()
    return {
        "quat_xyzw": lambda: r.as_quat(),
        "quat_wxyz": lambda: np.roll(r.as_quat(), 1, -1),
        "matrix": lambda: m.reshape(-1, 9),
        "rot6d": lambda: np.concatenate([m[:, :, 0], m[:, :, 1]], -1),
        "euler_xyz": lambda: r.as_euler("xyz"),
        "axis_angle": lambda: r.as_rotvec(),
    }[fmt]()


@pytest.mark.parametrize("source", FORMATS)
@pytest.mark.parametrize("target", FORMATS)
def test_rotations_equal_scipy(source, target):
    special = np.concatenate(
        [np.eye(3) * np.pi, np.zeros((1, 3)), np.eye(3) * np.pi / 2, np.eye(3) * 1e-10, [[0, np.pi / 2, 0], [0.3, -np.pi / 2, 0]]]
    )
    for r in (Rotation.random(200, random_state=0), Rotation.from_rotvec(special), Rotation.from_euler("xyz", special)):
        with np.errstate(all="raise", under="ignore"):
            got = rotations.convert(as_scipy(r, source), source, target)
        back = rotations.to_matrix(got, target)
        np.testing.assert_allclose(back, r.as_matrix(), atol=1e-7)
    r = Rotation.random(200, random_state=1)
    want, got = as_scipy(r, target), rotations.convert(as_scipy(r, source), source, target)
    if target.startswith("quat"):  # q and -q are the same rotation
        want = want * np.sign((want * got).sum(-1, keepdims=True))
    np.testing.assert_allclose(got, want, atol=1e-7)


def test_unnormalised_and_zero_quaternions():
    r = Rotation.random(5, random_state=2)
    np.testing.assert_allclose(rotations.to_matrix(r.as_quat() * 3, "quat_xyzw"), r.as_matrix(), atol=1e-12)
    assert np.isnan(rotations.convert(np.zeros((2, 4)), "quat_xyzw", "euler_xyz")).all()


def run(x, *ops, **fields):
    x = np.asarray(x, np.float32)
    return standardize.apply([{"pick": "x"}, *ops], {"x": x.reshape(len(x), -1), **fields})


def test_simple_ops():
    x = np.array([[0, 1, 2], [3, 4, 5.0]])
    assert run(x, {"slice": [1, 3]}).tolist() == [[1, 2], [4, 5]]
    assert run(x, {"scale": {"dims": [0, 2], "by": 2}}).tolist() == [[0, 1, 4], [6, 4, 10]]
    assert run(x, {"offset": {"dims": [1], "by": -1}}).tolist() == [[0, 0, 2], [3, 3, 5]]
    assert run(x, {"clip": {"dims": [0, 1, 2], "low": 1, "high": 4}}).tolist() == [[1, 1, 2], [3, 4, 4]]
    assert run(x, {"invert": {"dims": [0]}}).tolist() == [[1, 1, 2], [-2, 4, 5]]
    assert run(x, {"binarise": {"dims": [2], "threshold": 2}}).tolist() == [[0, 1, 0], [3, 4, 1]]
    assert run(x, {"next": {"dims": [0]}}).tolist() == [[3, 1, 2], [3, 4, 5]]
    assert run(x, {"delta": {"dims": [0]}}).tolist() == [[3, 1, 2], [0, 4, 5]]
    y = np.array([[10, 20], [30, 40.0]])
    assert run(x, {"concat": ["y", "x"]}, y=y)[0].tolist() == [0, 1, 2, 10, 20, 0, 1, 2]
    assert run(x, {"pick": {"key": "y", "dims": [1]}}, y=y)[1].tolist() == [3, 4, 5, 40]
    assert run(x, {"absolute": {"dims": [0, 1], "from": "y", "at": [1, 0]}}, y=y).tolist() == [[20, 11, 2], [43, 34, 5]]
    np.testing.assert_allclose(
        run([[3.5], [-4.0], [np.pi]], {"wrap": {"dims": [0]}})[:, 0], [3.5 - 2 * np.pi, 2 * np.pi - 4, -np.pi], atol=1e-6
    )
    assert standardize.apply([], {}, 3).shape == (3, 0)


def latch_loop(values, low, high):
    """The definition, from the end of the episode backwards, as a plain loop."""
    out, coming = [], None
    for v in reversed(values):
        if v >= high:
            coming = 1.0
        elif v <= low:
            coming = 0.0
        out.append(coming)
    out.reverse()
    last = next((v for v in reversed(out) if v is not None), None)
    return [float(v > 0.5) for v in values] if last is None else [last if v is None else v for v in out]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=30))
def test_latch_equals_a_loop(values):
    got = run(values, {"latch": {"dims": [0], "low": 0.05, "high": 0.95}})
    # compared in float32, in which the recording is
    assert got[:, 0].tolist() == latch_loop([float(np.float32(v)) for v in values], np.float32(0.05), np.float32(0.95))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([-1.0, -0.5, 0.0, 0.5, 1.0]), min_size=1, max_size=30), st.sampled_from([1, -1]))
def test_accumulate_equals_a_loop(pulses, close):
    opens = [-p * close for p in pulses]
    first = next((o for o in opens if o), -1.0)
    now, want = float(first < 0), []
    for o in opens:
        now = now if not o else float(o > 0)
        want.append(now)
    assert run(pulses, {"accumulate": {"dims": [0], "close": close}})[:, 0].tolist() == want


def test_rotating_ops():
    r = Rotation.random(6, random_state=3)
    x = np.concatenate([np.arange(6)[:, None], r.as_quat(), np.ones((6, 1))], axis=1)
    got = run(x, {"rotate": {"at": 1, "from": "quat_xyzw", "to": "euler_xyz"}})
    np.testing.assert_allclose(got, np.concatenate([np.arange(6)[:, None], r.as_euler("xyz"), np.ones((6, 1))], axis=1), atol=1e-5)
    turn = run(r.as_euler("xyz"), {"pose_delta": {"at": 0, "format": "euler_xyz"}})
    want = (r[1:] * r[:-1].inv()).as_euler("xyz")
    np.testing.assert_allclose(turn[:-1], want, atol=1e-5)
    np.testing.assert_allclose(turn[-1], 0, atol=1e-6)


def test_nan_is_never_hidden():
    x = np.array([[np.nan], [1.0]])
    for op in (
        {"binarise": {"dims": [0], "threshold": 0.5}},
        {"latch": {"dims": [0], "low": 0.1, "high": 0.9}},
        {"accumulate": {"dims": [0], "close": 1}},
    ):
        assert np.isnan(run(x, op)[0, 0])


@pytest.mark.parametrize(
    ("op", "message"),
    [
        ({"rotate": {"at": 0, "from": "quat", "to": "matrix"}}, "needs from out of quat_xyzw"),
        ({"scale": {"dims": [], "by": 1}}, "needs dims as a list of column numbers"),
        ({"scale": {"dims": [0], "by": "x"}}, "needs a number for by"),
        ({"accumulate": {"dims": [0], "close": 2}}, "needs close: 1 or -1"),
        ({"slice": [1]}, "needs [start, stop]"),
        ({"pick": {"dims": [0]}}, "needs a key, or"),
        ({"function": "exec"}, "needs one of"),
        ({"absolute": {"dims": [0], "from": "y", "at": [0, 1]}}, "as many columns"),
    ],
)
def test_faults_of_ops_are_named(op, message):
    with pytest.raises(UserError) as e:
        standardize.check([{"pick": "x"}, op], "x: action")
    assert message in str(e.value) and "ops[1]" in str(e.value)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"min_steps": 0}, "needs a number"),
        ({"matches": {"key": "a", "pattern": "("}}, "no regular expression"),
        ({"labelled": False}, "needs true"),
        ({"x": 1}, "a filter is one of"),
    ],
)
def test_faults_of_filters_are_named(item, message):
    with pytest.raises(UserError, match=message):
        filters.check([item], "x")


def test_filters():
    action = np.zeros((3, 2), np.float32)
    why = lambda item, **fields: filters.left_out([item], fields, action=action, labelled=False)
    assert why({"min_steps": 4}) == "shorter than 4 steps" and not why({"min_steps": 3})
    assert (
        why({"is_true": "ok"}, ok=np.array([1, 0]))
        and not why({"is_true": "ok"}, ok=np.array([0, 1]))
        and why({"is_true": "ok"}, ok=np.zeros(0))
    )
    assert why({"matches": {"key": "p", "pattern": "success"}}, p=["a/failure"]) and not why(
        {"matches": {"key": "p", "pattern": "success"}}, p=["a/success/b"]
    )
    assert why({"labelled": True}) == "no instruction" and why({"moves": 1e-6}) == "no motion"
