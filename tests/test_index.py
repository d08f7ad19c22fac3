"""The scan: in parts, by several processes, cut short and gone on with; and the statistics that come out of it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import odd_rlds
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_jax.data import build, index, rlds, scan, stats
from vla_jax.data.store import Store
from vla_jax.types import UserError

ARRAYS = {**index.FRAME, **index.EPISODE, **index.LANGUAGE}


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
    one = build.ensure(card, str(many), str(tmp_path / "one"), workers=1)
    same(one, build.ensure(card, str(many), str(tmp_path / "three"), workers=3))
    place = rlds.dataset_dir(many, card.name, card.version)
    path = index.location(card, place, str(tmp_path / "hosts"))
    for host in range(3):
        build.scan_shards(card, place, path, share=(host, 3))
        assert len(list(build._parts(path).glob("*.npz"))) == [3, 6, 8][host]
    build.merge(card, place, path, holdout=0.1)
    same(one, index.open_index(card, place, path))
    assert not build._parts(path).exists()


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
        build.ensure(card, str(many), str(tmp_path))
    assert len(list(build._parts(path).glob("*.npz"))) == 5 and not path.exists()
    monkeypatch.setattr(scan, "shard", lambda store, name, *rest: done.append(name) or real(store, name, *rest))
    ix = build.ensure(card, str(many), str(tmp_path))
    assert sorted(done) == sorted(rlds.shards(place, "train")) and ix.episodes == 40
    same(ix, build.ensure(card, str(many), str(tmp_path / "fresh")))


def test_progress_counts_shards(many, tmp_path):
    seen = []
    for workers in (1, 2):
        show = lambda items, total: (seen.append((total, i)) or i for i in items)
        build.ensure(odd_rlds.card(), str(many), str(tmp_path / str(workers)), workers=workers, progress=show)
    assert len(seen) == 16 and {total for total, _ in seen} == {8}


def test_no_worker_outlives_a_killed_parent(tmp_path):
    """Shards that take minutes (a store that sleeps before each read), and a parent killed with SIGKILL at once, when its workers
    have not even begun to ask the kernel for the same end, and later."""
    odd_rlds.record(tmp_path, [odd_rlds.episode(0) for _ in range(64)], shards=64)
    code = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "import odd_rlds\nfrom vla_jax.data import build\n"
        "build.ensure(odd_rlds.card(), sys.argv[1], sys.argv[1] + '/ix' + sys.argv[3], workers=2)"
    )
    slow = "import time\nfrom vla_jax.data import store\nright = store.Store.read\nstore.Store.read = lambda *a, **k: time.sleep(0.5) or right(*a, **k)\n"
    (tmp_path / "sitecustomize.py").write_text(
        "import os\nif 'SLOW_READS' in os.environ and __import__('sys').orig_argv[1:3] == ['-m', 'vla_jax.data.scan']:\n    "
        + slow.replace("\n", "\n    ")
    )
    here = os.path.dirname(__file__)
    path = os.pathsep.join([str(tmp_path), os.path.dirname(here)])
    environment = os.environ | {"SLOW_READS": "1", "PYTHONPATH": path}
    for number, wait in enumerate((0.0, 2.5)):
        _kill_while_scanning([sys.executable, "-c", code, str(tmp_path), here, str(number)], environment, f"{tmp_path}/ix{number}/", wait)


def _kill_while_scanning(argv, environment, place, wait):
    workers = lambda: [int(p) for p in os.listdir("/proc") if p.isdigit() and place.encode() in _read(f"/proc/{p}/cmdline")]
    parent = subprocess.Popen(argv, cwd=os.path.dirname(os.path.dirname(__file__)), env=environment)
    try:
        _until(lambda: len(workers()) == 2, 60)
        time.sleep(wait)
        assert len(workers()) == 2  # they would go on for half a minute
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        _until(lambda: not workers(), 5)
    finally:
        parent.kill()


def test_programs_that_index_at_once(many, tmp_path):
    """Whoever is first makes the index, and all open it."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "import odd_rlds\nfrom vla_jax.data import build\n"
        "print(build.ensure(odd_rlds.card(), sys.argv[1], sys.argv[3], workers=2).digest)"
    )
    argv = [sys.executable, "-c", code, str(many), os.path.dirname(__file__), str(tmp_path)]
    running = [subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    said = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], said
    assert len({out for out, _ in said}) == 1 and [p.name[:9] for p in tmp_path.iterdir()] == ["odd_robot"]


def test_parts_that_another_program_has_merged_are_no_fault(many, tmp_path):
    """Two scan at once, and the slower one finds no part left to merge."""
    card = odd_rlds.card()
    place = rlds.dataset_dir(many, card.name, card.version)
    path = index.location(card, place, str(tmp_path))
    with pytest.raises(UserError, match="has no usable episode"):
        build.merge(card, place, path, holdout=0.1)  # nobody has scanned
    build.scan_shards(card, place, path, workers=1)
    build.merge(card, place, path, holdout=0.1)
    made = index.open_index(card, place, path)
    build.merge(card, place, path, holdout=0.1)
    same(made, index.open_index(card, place, path))


def test_a_shard_rewritten_at_its_size_is_refused(many, tmp_path):
    shutil.copytree(many, tmp_path / "data")
    ix = build.ensure(odd_rlds.card(), str(tmp_path / "data"), str(tmp_path / "ix"))
    shard = ix.place.path / ix.shards[0]
    data = shard.read_bytes()
    shard.write_bytes(data[len(data) // 2 :] + data[: len(data) // 2])
    with pytest.raises(UserError, match="has changed since it was indexed: at byte"):
        build.ensure(odd_rlds.card(), str(tmp_path / "data"), str(tmp_path / "ix"))


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_more_episodes_than_announced_are_used_and_said(many, tmp_path, scheme):
    shutil.copytree(many, tmp_path / "data")
    info = tmp_path / "data" / odd_rlds.NAME / odd_rlds.VERSION / "dataset_info.json"
    known = json.loads(info.read_text())
    (split,) = known["splits"]
    lengths = [int(n) for n in split["shardLengths"]]
    split["shardLengths"] = [str(lengths[0] - 2), *map(str, lengths[1:])]
    info.write_text(json.dumps(known))
    ix = build.ensure(odd_rlds.card(), f"{scheme}{tmp_path / 'data'}", str(tmp_path / "ix"))
    assert ix.episodes == 40 and ix.surplus == 2 and ix.skipped == {}
    shard = tmp_path / "data" / odd_rlds.NAME / odd_rlds.VERSION / ix.shards[1]
    shard.write_bytes(shard.read_bytes() + b"18 bytes, no record")
    shutil.rmtree(tmp_path / "ix")
    ix = build.ensure(odd_rlds.card(), f"{scheme}{tmp_path / 'data'}", str(tmp_path / "ix"))
    assert (ix.episodes, ix.surplus) == (40, 2) and list(ix.skipped.values()) == [1]  # what is no record is no surplus


def test_the_idle_first_step_is_dropped_where_the_card_says_so(tmp_path):
    """Only where its action is zero but for the gripper; pictures, states and instructions move with it."""
    still = odd_rlds.episode(3)
    still["steps"][0]["action"]["move"] = np.zeros(3, np.float32)
    odd_rlds.record(tmp_path, [still, odd_rlds.episode(4)], shards=1)
    dims = [{"name": f"a{i}", "unit": "1", "frame": "base", "kind": "binary" if i == 3 else "delta"} for i in range(4)]
    action = {**odd_rlds.CARD["action"], "dims": dims}
    kept, dropped = (
        build.ensure(odd_rlds.card(action=action, first_step=how), str(tmp_path), str(tmp_path / "ix")) for how in ("keep", "drop_if_idle")
    )
    assert np.diff(kept.episode_start).tolist() == [5, 6] and np.diff(dropped.episode_start).tolist() == [4, 6]
    for name in ("action", "state", "image", "language"):
        assert np.array_equal(getattr(dropped, name), np.delete(getattr(kept, name), 0, axis=0)) or name == "language"
    assert [dropped.instructions(i) for i in range(10)] == [kept.instructions(i) for i in range(1, 11)]


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
        build.ensure(odd_rlds.card(), str(many), str(tmp_path / "ix"), workers=2)


def test_another_card_or_place_is_another_index(many, tmp_path):
    place = rlds.dataset_dir(many, odd_rlds.NAME, odd_rlds.VERSION)
    a, b = (index.location(odd_rlds.card(**change), place, str(tmp_path)) for change in ({}, {"control_hz": 11}))
    assert a != b and a == index.location(odd_rlds.card(citation="x"), place, str(tmp_path))


def test_damaged_index_is_said(many, tmp_path):
    ix = build.ensure(odd_rlds.card(), str(many), str(tmp_path))
    for name, text in (("action.npy", "x"), ("meta.json", "{}"), ("meta.json", "no")):
        kept = (ix.path / name).read_bytes()
        (ix.path / name).write_text(text)
        with pytest.raises(UserError, match="is damaged"):
            build.ensure(odd_rlds.card(), str(many), str(tmp_path))
        (ix.path / name).write_bytes(kept)


def test_held_out_episodes(many, tmp_path):
    ix = build.ensure(odd_rlds.card(), str(many), str(tmp_path))
    assert ix.held_out(0).sum() == 0 and ix.held_out(0.25).sum() == 10 and ix.held_out(0.001).sum() == 1
    assert (ix.held_out(0.5) & ix.held_out(0.25)).sum() == 10  # more is a superset
    alone = index.held_out("x", ("s",), np.zeros(1, np.int32), np.zeros(1, np.int64), 0.5)
    assert alone.tolist() == [False]


# ---- statistics


def test_statistics_come_with_the_scan_and_leave_out_held_out_episodes(many, tmp_path, monkeypatch):
    ix = build.ensure(odd_rlds.card(), str(many), str(tmp_path), holdout=0.25)
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
    ix = build.ensure(odd_rlds.card(), str(many), str(tmp_path), holdout=0.25)
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
