"""The scan: in parts, by several processes, cut short and gone on with; and the statistics that come out of it."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import odd_rlds
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_jax.data import index, rlds, scan, stats
from vla_jax.data.store import Store
from vla_jax.types import UserError

ARRAYS = {**index._FRAME, **index._EPISODE, **index._LANGUAGE}


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Forty short episodes in eight shards."""
    root = tmp_path_factory.mktemp("many")
    odd_rlds.record(root, [odd_rlds.episode(i % 5) for i in range(40)], shards=8)
    return root


def same(a, b):
    assert a.digest == b.digest and all(np.array_equal(getattr(a, k), getattr(b, k)) for k in ARRAYS)


def test_processes_and_hosts_make_the_same_index(many, tmp_path):
    card = odd_rlds.card()
    one = index.ensure(card, str(many), str(tmp_path / "one"), workers=1)
    same(one, index.ensure(card, str(many), str(tmp_path / "three"), workers=3))
    place = rlds.dataset_dir(many, card.name, card.version)
    path = index.location(card, place, str(tmp_path / "hosts"))
    for host in range(3):
        index.scan_shards(card, place, path, share=(host, 3))
        assert len(list(index._parts(path).glob("*.npz"))) == [3, 6, 8][host]
    index.merge(card, place, path, holdout=0.1)
    same(one, index.open_index(card, place, path))
    assert not index._parts(path).exists()


def test_a_scan_cut_short_goes_on_with_what_is_left(many, tmp_path, monkeypatch):
    card = odd_rlds.card()
    place = rlds.dataset_dir(many, card.name, card.version)
    path = index.location(card, place, str(tmp_path))
    real, done = scan.shard, []

    def failing(store, name, *rest):
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(name)
        return real(store, name, *rest)

    monkeypatch.setattr(scan, "shard", failing)
    with pytest.raises(KeyboardInterrupt):
        index.ensure(card, str(many), str(tmp_path))
    assert len(list(index._parts(path).glob("*.npz"))) == 5 and not path.exists()
    monkeypatch.setattr(scan, "shard", lambda store, name, *rest: done.append(name) or real(store, name, *rest))
    ix = index.ensure(card, str(many), str(tmp_path))
    assert sorted(done) == sorted(rlds.shards(place, "train")) and ix.episodes == 40
    same(ix, index.ensure(card, str(many), str(tmp_path / "fresh")))


def test_progress_counts_shards(many, tmp_path):
    seen = []
    for workers in (1, 2):
        show = lambda items, total: (seen.append((total, i)) or i for i in items)
        index.ensure(odd_rlds.card(), str(many), str(tmp_path / str(workers)), workers=workers, progress=show)
    assert len(seen) == 16 and {total for total, _ in seen} == {8}


def test_no_worker_outlives_a_killed_parent(tmp_path):
    """The parent scans a shard that never ends (a pipe that nobody writes to), and is killed with SIGKILL."""
    folder = tmp_path / odd_rlds.NAME / odd_rlds.VERSION
    odd_rlds.record(tmp_path, [odd_rlds.episode(0) for _ in range(4)], shards=2)
    for name in rlds.shards(folder, "train"):
        (folder / name).unlink()
        os.mkfifo(folder / name)
    code = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "import odd_rlds\nfrom vla_jax.data import index\n"
        "from vla_jax.data.store import Store\n"
        "index.ensure(odd_rlds.card(), sys.argv[1], sys.argv[1] + '/ix', workers=2)"
    )
    here = os.path.dirname(__file__)
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), here], cwd=os.path.dirname(here))
    workers = lambda: [
        int(p)
        for p in os.listdir("/proc")
        if p.isdigit() and f"{tmp_path}/ix".encode() in _read(f"/proc/{p}/cmdline") and int(p) != parent.pid
    ]
    try:
        _until(lambda: len(workers()) == 2, 60)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        _until(lambda: not workers(), 10)
    finally:
        parent.kill()


def _read(path):
    try:
        with open(path, "rb") as f:
            return f.read()
    except OSError:
        return b""


def _until(true, seconds):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "still waiting"
        time.sleep(0.05)


def test_a_failing_worker_is_said(many, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # workers start with this module in front
    (tmp_path / "google_crc32c.py").write_text("raise ImportError('broken on purpose')")
    with pytest.raises(RuntimeError, match=r"a scanning process ended with \[1"):
        index.ensure(odd_rlds.card(), str(many), str(tmp_path / "ix"), workers=2)


def test_another_card_or_place_is_another_index(many, tmp_path):
    place = rlds.dataset_dir(many, odd_rlds.NAME, odd_rlds.VERSION)
    a, b = (index.location(odd_rlds.card(**change), place, str(tmp_path)) for change in ({}, {"control_hz": 11}))
    assert a != b and a == index.location(odd_rlds.card(citation="x"), place, str(tmp_path))


def test_damaged_index_is_said(many, tmp_path):
    ix = index.ensure(odd_rlds.card(), str(many), str(tmp_path))
    for name, text in (("action.npy", "x"), ("meta.json", "{}"), ("meta.json", "no")):
        kept = (ix.path / name).read_bytes()
        (ix.path / name).write_text(text)
        with pytest.raises(UserError, match="is damaged"):
            index.ensure(odd_rlds.card(), str(many), str(tmp_path))
        (ix.path / name).write_bytes(kept)


def test_held_out_episodes(many, tmp_path):
    ix = index.ensure(odd_rlds.card(), str(many), str(tmp_path))
    assert ix.held_out(0).sum() == 0 and ix.held_out(0.25).sum() == 10 and ix.held_out(0.001).sum() == 1
    assert (ix.held_out(0.5) & ix.held_out(0.25)).sum() == 10  # more is a superset
    alone = index.held_out("x", ("s",), np.zeros(1, np.int32), np.zeros(1, np.int64), 0.5)
    assert alone.tolist() == [False]


# ---- statistics


def test_statistics_come_with_the_scan_and_leave_out_held_out_episodes(many, tmp_path, monkeypatch):
    ix = index.ensure(odd_rlds.card(), str(many), str(tmp_path), holdout=0.25)
    assert (ix.path / "stats-0.25.json").is_file()
    found = stats.compute(ix, 0.25)
    keep = np.repeat(~ix.held_out(0.25), np.diff(ix.episode_start))
    for key in ("state", "action"):
        x, s = np.asarray(getattr(ix, key))[keep].astype(np.float64), found[key]
        assert s.count == len(x)
        np.testing.assert_allclose(s.mean, x.mean(0), rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(s.std, x.std(0), rtol=1e-5)
        assert np.array_equal(s.min, x.min(0).astype(np.float32)) and np.array_equal(s.max, x.max(0).astype(np.float32))
        _close_to_quantiles(s, x)
    again = stats.compute(ix, 0.1)  # another holdout: from the index's arrays
    assert again["action"].count != found["action"].count


def _close_to_quantiles(s, x):
    """2^-11 of the values between which a quantile lies: what a bucket may blur."""
    for got, q in ((s.q01, 0.01), (s.q99, 0.99)):
        low, high = (np.quantile(x, q, axis=0, method=m) for m in ("lower", "higher"))
        slack = 2.0**-11 * np.maximum(np.abs(low), np.abs(high)) + 1e-12
        want = np.quantile(x, q, axis=0)
        assert (np.abs(got - want) <= slack + 1e-6 * np.abs(want)).all()


def test_stale_statistics_are_refused(many, tmp_path):
    ix = index.ensure(odd_rlds.card(), str(many), str(tmp_path), holdout=0.25)
    file = ix.path / "stats-0.25.json"
    body = json.loads(file.read_text())
    for key in ("card", "index"):
        file.write_text(json.dumps({**body, key: "0123"}))
        with pytest.raises(UserError, match=f"stale: made for {key} 0123"):
            stats.compute(ix, 0.25)
    file.write_text("{}")
    with pytest.raises(UserError, match="damaged"):
        stats.compute(ix, 0.25)


floats = st.floats(-1e6, 1e6, width=32) | st.sampled_from([0.0, 1.0, -0.0, 1e-30])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(floats, floats), min_size=1, max_size=200), st.lists(st.integers(0, 200), max_size=4))
def test_parts_add_up_to_the_whole(rows, cuts):
    x = np.array(rows, np.float32)
    parts = np.split(x, sorted(c for c in cuts if c <= len(x)))
    merged, streamed = stats.Running(), stats.Running()
    for part in parts:
        one = stats.Running()
        one.update(part)
        merged.merge(one)
        streamed.update(part)
    whole = stats.of(x)
    x64 = x.astype(np.float64)
    scale = np.abs(x64).max(0) + 1e-30
    for got in (whole, merged.stats(), streamed.stats()):
        assert got.count == len(x)
        assert (np.abs(got.mean - x64.mean(0)) <= 1e-6 * scale).all() and (np.abs(got.std - x64.std(0)) <= 1e-6 * scale).all()
        assert np.array_equal(got.min, x.min(0)) and np.array_equal(got.max, x.max(0))
        _close_to_quantiles(got, x64)


def test_few_values_are_exact():
    x = np.array([[0.0, 0.7], [1.0, 0.7], [1.0, 0.7]] * 50, np.float32)
    s = stats.of(x)
    assert s.q01.tolist() == [0, np.float32(0.7)] and s.q99.tolist() == [1, np.float32(0.7)] and s.std[1] == 0
    with pytest.raises(UserError, match="no training frames"):
        stats.of(x[:0])


def test_store_is_closed_by_nobody_and_still_bounded(many):
    """More shards than handles are kept open: reading goes on."""
    from vla_jax.data import store as module

    place = rlds.dataset_dir(many, odd_rlds.NAME, odd_rlds.VERSION)
    names = rlds.shards(place, "train")
    before, module._OPEN_FILES = module._OPEN_FILES, 3
    try:
        small = Store(place.path)
        assert [small.read(n, 0, 12) for n in names] == [place.read(n, 0, 12) for n in names] and len(small._handles) == 3
    finally:
        module._OPEN_FILES = before
