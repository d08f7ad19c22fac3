"""Bytes from local files, from TensorStore's file store, and from Google Cloud Storage's protocol spoken by a local server."""

import http.server
import json
import os
import subprocess
import sys
import threading
import urllib.parse

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


class Bucket(http.server.BaseHTTPRequestHandler):
    """As much of Google Cloud Storage's JSON interface as a reader needs: list, and get with ranges."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes; the second would wait 40 ms for the client's acknowledgement
    root = ""

    def do_GET(self):
        url = urllib.parse.urlparse(self.path)
        _, found, key = url.path.partition("/o/")
        file = os.path.join(self.root, urllib.parse.unquote(key))
        if found and os.path.isfile(file):
            with open(file, "rb") as f:
                data = f.read()
            first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
            first, last = int(first), min(int(last or len(data)), len(data) - 1)
            part = "Range" in self.headers
            self.answer(
                206 if part else 200, data[first : last + 1], {"Content-Range": f"bytes {first}-{last}/{len(data)}"} if part else {}
            )
        elif url.path.endswith("/o"):
            asked = urllib.parse.parse_qs(url.query)
            keys = sorted(os.path.relpath(os.path.join(d, f), self.root) for d, _, files in os.walk(self.root) for f in files)
            low, high = asked.get("startOffset", [""])[0], asked.get("endOffset", ["\uffff"])[0]
            self.answer(200, json.dumps({"items": [{"name": k} for k in keys if low <= k < high]}).encode(), {})
        else:
            self.answer(404, b"", {})

    def answer(self, code, body, headers):
        self.send_response(code)
        for key, value in {"Content-Length": len(body), "x-goog-generation": "7", **headers}.items():
            self.send_header(key, str(value))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def test_google_cloud_storage(real_data, tmp_path):
    """The whole way from gs:// to the pixels of a batch, with TensorStore's own client, in a process of its own since the client
    reads its environment once. Only the other end is ours."""
    # room for all reads that are asked for at once: those that a queue of five turns away come back a minute later
    several = type("Several", (http.server.ThreadingHTTPServer,), {"request_queue_size": 1024})
    server = several(("127.0.0.1", 0), type("Here", (Bucket,), {"root": str(real_data)}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"127.0.0.1:{server.server_address[1]}"
    code = (
        "import sys, numpy as np\nfrom vla_jax import config\nfrom vla_jax.data import source\nfrom vla_jax.data.stream import Stream\n"
        "c, _ = config.load('configs/debug.py', ['data.root=' + sys.argv[1], 'data.index_dir=' + sys.argv[2]])\n"
        "src = source.open_source(c, tokens_per_image=9)\n"
        "with Stream(src) as s: batches = [next(s)[0] for _ in range(3)]\n"
        "np.savez(sys.argv[3], images=np.stack([b.images for b in batches]), tokens=np.stack([b.tokens for b in batches]))"
    )
    env = {**os.environ, "TENSORSTORE_GCS_HTTP_URL": f"http://{address}", "GCE_METADATA_ROOT": address, "JAX_PLATFORMS": "cpu"}
    try:
        for root, out in ((str(real_data), "here"), ("gs://bucket", "there")):
            argv = [sys.executable, "-c", code, root, str(tmp_path / "ix"), str(tmp_path / out)]
            done = subprocess.run(
                argv, env=env, capture_output=True, text=True, timeout=120, check=False, cwd=os.path.dirname(os.path.dirname(__file__))
            )
            assert done.returncode == 0, done.stderr[-2000:]
    finally:
        server.shutdown()
    here, there = (np.load(tmp_path / f"{n}.npz") for n in ("here", "there"))
    assert np.array_equal(here["images"], there["images"]) and np.array_equal(here["tokens"], there["tokens"])
