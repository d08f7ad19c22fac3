"""A run whose workdir is gs://bucket/path, of two processes that share no folder, against Google's protocol spoken by a local stand-in."""

import json
import os
import re
import socket
import subprocess
import sys

import gcs
import pytest

from vla_jax.train import workdir
from vla_jax.types import UserError

pytest.importorskip("gcsfs")
URL = "gs://vla/runs/a"


def free_port() -> int:
    with socket.create_server(("", 0)) as free:
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def store():
    made = gcs.Store()
    yield made
    made.close()


def run(args, env, expect=0) -> str:
    """Its output; args: of the command line, or a program."""
    command = [sys.executable, "-c", args] if isinstance(args, str) else [sys.executable, "-m", "vla_jax.cli", *args]
    done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == expect, done.stderr[-3000:]
    return done.stdout + done.stderr


def train(tabletop, folder, place, env, *, processes, steps, expect=0, more=()) -> str:
    """Each process has a cache, and so a local folder, of its own, as on machines of its own."""
    pairs = {"data.root": tabletop, "model.preset": "tiny", "pack.group": 2}
    pairs |= {"train.steps": steps, "train.save_every": 2, "train.log_every": 1, "train.eval_batches": 1}
    command = [sys.executable, "-m", "vla_jax.cli", "train", "--config=configs/demo.py", f"--workdir={place}"]
    command += [f"--config.{k}={v}" for k, v in pairs.items()] + list(more)
    port, running = free_port(), []
    for i in range(processes):
        own = {"VLA_COORDINATOR": f"localhost:{port}", "VLA_NUM_PROCESSES": str(processes), "VLA_PROCESS_ID": str(i)}
        own |= {"VLA_CACHE": str(folder / f"host{i}-{processes}"), "JAX_NUM_CPU_DEVICES": str(4 // processes)}
        running.append(subprocess.Popen(command, env=os.environ | env | own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    said = "".join(p.communicate(timeout=300)[0] for p in running)
    assert [p.returncode for p in running] == [expect] * processes, said[:6000]
    return said


def test_a_run_in_a_bucket(store, tabletop, tmp_path):
    env, objects = store.env(), store.objects
    train(tabletop, tmp_path, tmp_path / "here", env, processes=2, steps=4)
    train(tabletop, tmp_path, URL, env, processes=2, steps=4)
    here = json.loads((tmp_path / "here/checkpoints/4/meta/metadata").read_text())
    there = json.loads(objects["runs/a/checkpoints/4/meta/metadata"][0])
    assert here["sums"] == there["sums"] and here["stream"] == there["stream"]  # bit for bit
    names = {name.removeprefix("runs/a/").partition("/")[0] for name in objects}
    assert names >= {"action_tokenizer.json", "checkpoints", "config.json", "metrics.jsonl", "tensorboard"}
    assert {name.split("/")[3] for name in objects if "/checkpoints/" in name} >= {"2", "4"}

    # another config is refused, by every process, before anything is written
    before = dict(objects)
    refused = train(tabletop, tmp_path, URL, env, processes=2, steps=6, expect=2, more=["--config.train.lr=0.5"])
    assert "holds a run with another config" in refused and "Traceback" not in refused and objects == before

    # a flipped bit in the newest step: the one before it is taken, and what was set aside is still there
    arrays = re.compile("runs/a/checkpoints/4/state/ocdbt.process_[0-9]+/d/.+")
    largest = max(filter(arrays.fullmatch, objects), key=lambda name: len(objects[name][0]))
    data = bytearray(objects[largest][0])
    data[len(data) // 2] ^= 1
    store.put(largest, data)
    # on another machine, whose cache is empty; and one process fewer
    said = train(tabletop, tmp_path, URL, env, processes=1, steps=6)
    assert f"{URL}/checkpoints/4 is damaged" in said and "Event loop" not in said
    assert objects[largest.replace("/checkpoints/", "/damaged/")][0] == bytes(data)
    lines = [json.loads(line) for line in objects["runs/a/metrics.jsonl"][0].decode().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3, 4, 3, 4, 5, 6]  # of both starts, on several machines

    run(["export", URL, str(tmp_path / "exported")], env)
    assert (tmp_path / "exported" / "policy.json").is_file()
    run(["runs", URL, "--out", str(tmp_path / "page.html")], env)
    assert (tmp_path / "page.html").stat().st_size > 5000


def test_a_store_that_refuses_to_write_costs_a_step_and_not_the_run(store, tabletop, tmp_path):
    """From the second checkpoint on nothing is taken but the fourth."""
    url, steps = "gs://vla/runs/b", re.compile("runs%2Fb%2Fcheckpoints%2F4%2F|name=runs/b/(checkpoints/4/|metrics)")
    store.fail = lambda line: not line.startswith("GET") and steps.search(line) and "runs/b/config.json" in store.objects
    try:
        said = train(tabletop, tmp_path, url, store.env(), processes=1, steps=6)
    finally:
        store.fail = lambda line: False
    assert f"checkpoint {url}/checkpoints/4 could not be written" in said
    kept = {name.split("/")[3] for name in store.objects if name.startswith("runs/b/checkpoints/")}
    assert kept == {"2", "6"}, said


def test_a_bucket_that_cannot_be_reached(tmp_path):
    """One line, before a device is touched. Nothing listens on the address."""
    env = {"STORAGE_EMULATOR_HOST": f"http://localhost:{free_port()}", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false", "JAX_PLATFORMS": "cpu"}
    said = run(["train", "--config=configs/demo.py", "--workdir=gs://vla/a"], env, expect=1)  # a restarter starts again
    assert "vla-jax: workdir gs://vla/a cannot be reached" in said


def test_what_another_host_writes_is_seen_after_a_look_at_the_folder(store):
    """gcsfs keeps the listings of folders; nothing of ours may be told from one that is old."""
    code = """
import sys, urllib.request
from vla_jax import paths
folder = paths.place("gs://vla/late", "folder")
(folder / "a").write_text("ours")
assert [p.name for p in folder.iterdir()] == ["a"] and not (folder / "b").exists()
url = sys.argv[1] + "/upload/storage/v1/b/vla/o?uploadType=media&name=late%2Fb"
urllib.request.urlopen(urllib.request.Request(url, data=b"theirs", method="POST")).read()
assert (folder / "b").exists() and sorted(p.name for p in folder.iterdir()) == ["a", "b"]
"""
    done = subprocess.run(
        [sys.executable, "-c", code, store.address], env=os.environ | store.env(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_urls_of_other_stores(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="mount it"):
        workdir.place("s3://bucket/a")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"pip install 'vla-jax\[gcs\]'"):
        workdir.place("gs://bucket/a")


class Unsteady:
    """A store that loses some of what is asked of it."""

    def __init__(self, folder, url):
        self.folder, self.url, self.down = folder, url, True

    def __fspath__(self):
        return self.url

    def __truediv__(self, name):
        return Unsteady.Object(self, self.folder / name)

    class Object:
        def __init__(self, store, path):
            self.store, self.path = store, path

        def exists(self):
            return self.path.exists()

        def read_bytes(self):
            return self.path.read_bytes()

        def stat(self):
            return type("Stat", (), {"length": self.path.stat().st_size})

        def write_bytes(self, data):
            if self.store.down:
                raise ConnectionError("no answer")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_bytes(data)


def test_lines_wait_for_a_store_that_does_not_answer(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VLA_CACHE", str(tmp_path / "cache"))
    far = Unsteady(tmp_path / "bucket", "gs://vla/b")
    mirror, here = workdir.Mirror(far, ("metrics.jsonl",)), workdir.local(far)
    (here / "tensorboard").mkdir()
    (here / "metrics.jsonl").write_text("1\n")
    (here / "tensorboard" / "events1").write_text("e")
    for _ in range(3):
        mirror.copy()
    assert capsys.readouterr().err.count("could not be copied") == 1
    mirror.clear()  # what is nowhere else stays
    assert (here / "metrics.jsonl").is_file()
    far.down = False
    mirror.copy()
    assert (tmp_path / "bucket/metrics.jsonl").read_text() == "1\n" and (tmp_path / "bucket/tensorboard/events1").is_file()

    # started again here, with more than was copied; and on another machine, with nothing
    (here / "metrics.jsonl").write_text("1\n2\n")
    workdir.Mirror(far, ("metrics.jsonl",))
    assert (here / "metrics.jsonl").read_text() == "1\n2\n"
    monkeypatch.setenv("VLA_CACHE", str(tmp_path / "other"))
    again = workdir.Mirror(far, ("metrics.jsonl",))
    assert (workdir.local(far) / "metrics.jsonl").read_text() == "1\n"
    again.copy()
    again.clear()
    assert not workdir.local(far).exists()
