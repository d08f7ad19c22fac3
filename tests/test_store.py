"""Bytes from local files, from TensorStore's file store, and from Google Cloud Storage's protocol spoken by a local server."""

import os
import subprocess
import sys

import gcs
import numpy as np
import pytest

from vla_jax.data import build, cards, sample
from vla_jax.data import store as store_module
from vla_jax.data.store import Store, Unreadable
from vla_jax.types import UserError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a").write_bytes(bytes(range(100)))
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "b").write_bytes(b"inner")
    return tmp_path


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_reads_ranges_and_says_what_is_gone(folder, scheme):
    store = Store(f"{scheme}{folder}")
    assert (
        store.read("a", 10, 5) == bytes(range(10, 15))
        and store.read("a") == bytes(range(100))
        and store.read("a", 90) == bytes(range(90, 100))
    )
    assert store.names() == ["a", "below", "empty"] and store.child("below").read("b", 0, 5) == b"inner"
    for name, at, length in (("a", 95, 10), ("a", 200, 1), ("none", 0, 1), ("empty", 0, 1)):
        with pytest.raises(Unreadable):
            store.read(name, at, length)
        with pytest.raises(Unreadable):
            store.start(name, at, length)()
    asked = [store.start("a", at, 5) for at in range(90)]  # all under way at once
    assert [bytes(wait()) for wait in asked] == [bytes(range(at, at + 5)) for at in range(90)]
    known = store.identities(["a", "empty", "none"])
    assert known["none"] is None and known["a"] and known["empty"]
    (folder / "a").write_bytes(b"other")
    assert Store(f"{scheme}{folder}").identity("a") != known["a"]


def test_a_simulated_latency_is_waited_for(folder, monkeypatch):
    """By whoever reads, and by whoever waits for a read that was started, less the time that has passed meanwhile."""
    slept, now = [], [100.0]
    monkeypatch.setattr(store_module.time, "sleep", slept.append)
    monkeypatch.setattr(store_module.time, "monotonic", lambda: now[0])
    slow = Store(folder, latency_s=0.25)
    assert slow.far and not Store(folder).far
    slow.read("a", 0, 5)
    wait = slow.start("a", 0, 5)
    assert slept == [0.25]
    now[0] += 0.1
    assert bytes(wait()) == bytes(range(5)) and slept[1:] == [pytest.approx(0.15)]
    now[0] += 1.0
    assert bytes(wait()) == bytes(range(5)) and len(slept) == 2


def test_a_place_that_cannot_be(tmp_path):
    assert Store(tmp_path / "none").names() == []
    with pytest.raises(UserError, match="cannot be opened"):
        Store("nothing://x/y")


@pytest.mark.parametrize("scheme", ["file://"])
def test_the_engine_reads_a_url_as_it_reads_a_folder(real_data, tmp_path, scheme):
    card = cards.load("bridge_dataset")
    here = build.ensure(card, str(real_data), str(tmp_path))
    there = build.ensure(card, f"{scheme}{real_data}", str(tmp_path))
    assert here.path != there.path and here.digest == there.digest
    for frame in (0, 77, 249):
        assert sample.fetch(here, sample.picture(here, frame, here.views[1])) == sample.fetch(
            there, sample.picture(there, frame, there.views[1])
        )


def test_google_cloud_storage(real_data, tmp_path):
    """The whole way from gs:// to the pixels of a batch, with TensorStore's own client, in a process of its own since the client
    reads its environment once. Only the other end is ours."""
    store = gcs.Store(real_data)
    code = (
        "import sys, numpy as np\nfrom vla_jax import config\nfrom vla_jax.data import source\nfrom vla_jax.data.stream import Stream\n"
        "c, _ = config.load('configs/debug.py', ['data.root=' + sys.argv[1], 'data.index_dir=' + sys.argv[2]])\n"
        "src = source.open_source(c, tokens_per_image=9)\n"
        "with Stream(src) as s: batches = [next(s)[0] for _ in range(3)]\n"
        "np.savez(sys.argv[3], images=np.stack([b.images for b in batches]), tokens=np.stack([b.tokens for b in batches]))"
    )
    env = os.environ | store.env()
    try:
        for root, out in ((str(real_data), "here"), ("gs://bucket", "there")):
            argv = [sys.executable, "-c", code, root, str(tmp_path / "ix"), str(tmp_path / out)]
            done = subprocess.run(
                argv, env=env, capture_output=True, text=True, timeout=120, check=False, cwd=os.path.dirname(os.path.dirname(__file__))
            )
            assert done.returncode == 0, done.stderr[-2000:]
    finally:
        store.close()
    here, there = (np.load(tmp_path / f"{n}.npz") for n in ("here", "there"))
    assert np.array_equal(here["images"], there["images"]) and np.array_equal(here["tokens"], there["tokens"])
