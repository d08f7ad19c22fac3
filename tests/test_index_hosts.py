"""Who builds an index where hosts share a folder, a bucket or nothing: two processes, which scan what they must and open the same."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import gcs
import pytest

from vla_jax.data import build, cards
from vla_jax.types import UserError

REPO = Path(__file__).resolve().parent.parent
WORKER = """
import json, os, sys
from vla_jax import distributed
from vla_jax.data import build, cards, scan
made = []
if "merge" in sys.argv:  # taken away before it merges
    build._PARTS, build.merge = 1, lambda *a, **k: os._exit(9)
if "give" in sys.argv:  # or before it gives away what it has scanned
    build.shelves.Shelf.give_parts = lambda self, parts: any(parts.glob("*.npz")) and os._exit(9)
real = scan.Job.run
scan.Job.run = lambda self: (made.extend(job[0] for job in self.shards), real(self))[1]
distributed.initialize(timeout_s=60)
found = build.ensure(cards.load("tabletop_slider"), sys.argv[1], sys.argv[2])
print(json.dumps({"digest": found.digest, "scanned": made, "path": str(found.path)}), flush=True)
distributed.barrier("done")
"""


def start(tabletop, index_dir, cache, *more, **env) -> subprocess.Popen:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("VLA_", "SLURM_", "TPU_", "JOBSET_"))}
    clean |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPO), "VLA_CACHE": str(cache), **env}
    argv = [sys.executable, "-c", WORKER, str(tabletop), str(index_dir), *more]
    return subprocess.Popen(argv, env=clean, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ensure(tabletop, index_dir, caches, **env) -> list[dict]:
    """What each of two processes says, in their order."""
    with socket.socket() as s:
        s.bind(("", 0))
        env |= {"VLA_COORDINATOR": f"localhost:{s.getsockname()[1]}", "VLA_NUM_PROCESSES": "2"}
    children = [start(tabletop, index_dir, cache, **env, VLA_PROCESS_ID=str(i)) for i, cache in enumerate(caches)]
    try:
        told = [child.communicate(timeout=120) for child in children]
    finally:
        for child in children:
            child.kill()
    assert all(child.returncode == 0 for child in children), "\n".join(out[-500:] + err[-2500:] for out, err in told)
    return [json.loads(out.splitlines()[-1]) | {"said": err} for out, err in told]


@pytest.fixture
def store():
    pytest.importorskip("gcsfs")
    made = gcs.Store()
    yield made
    made.close()


@pytest.fixture(scope="module")
def alone(tabletop, tmp_path_factory):
    """(digest, its shards) of one process."""
    card = cards.load("tabletop_slider")
    found = build.ensure(card, str(tabletop), str(tmp_path_factory.mktemp("alone")))
    return found.digest, [n for n, _, _ in build.todo(card, found.place)]


def test_a_shared_folder_is_scanned_once(tabletop, tmp_path, alone):
    digest, shards = alone
    first, second = ensure(tabletop, tmp_path / "ix", [tmp_path / "a", tmp_path / "b"])
    assert first["digest"] == second["digest"] == digest and first["path"] == second["path"]
    assert sorted(first["scanned"] + second["scanned"]) == shards and len(shards) > 1 and second["scanned"]
    again = ensure(tabletop, tmp_path / "ix", [tmp_path / "a", tmp_path / "b"])
    assert [x["scanned"] for x in again] == [[], []]


def test_hosts_with_disks_of_their_own_scan_everything(tabletop, tmp_path, alone, monkeypatch):
    """The default of a pod: data.index_dir is left empty, and each host has its own cache. One that has an index waits for those without."""
    digest, shards = alone
    caches = [tmp_path / "a", tmp_path / "b"]
    told = ensure(tabletop, "", caches)
    assert [x["digest"] for x in told] == [digest] * 2 and [x["scanned"] for x in told] == [shards] * 2
    assert "is another folder on each host: each indexes all of tabletop_slider by itself" in told[0]["said"]
    told = ensure(tabletop, "", [caches[0], tmp_path / "new"])
    assert [x["digest"] for x in told] == [digest] * 2 and [x["scanned"] for x in told] == [[], shards]


def test_a_bucket_is_scanned_once_and_copied(tabletop, tmp_path, alone, store):
    digest, shards = alone
    caches = [tmp_path / "a", tmp_path / "b"]
    told = ensure(tabletop, "gs://vla/index", caches, **store.env())
    assert [x["digest"] for x in told] == [digest] * 2 and sorted(told[0]["scanned"] + told[1]["scanned"]) == shards
    assert told[0]["path"].startswith(str(caches[0])) and told[1]["path"].startswith(str(caches[1]))
    assert told[0]["scanned"] and told[1]["scanned"]
    told = ensure(tabletop, "gs://vla/index", [tmp_path / "c", caches[1]], **store.env())  # a new machine
    assert [x["digest"] for x in told] == [digest] * 2 and [x["scanned"] for x in told] == [[], []]
    assert any("meta.json" in name for name in store.objects) and not any(".parts/" in name for name in store.objects)
    store.objects.clear()  # another bucket: who has the index gives it
    told = ensure(tabletop, "gs://vla/index", [tmp_path / "d", caches[1]], **store.env())
    assert [x["digest"] for x in told] == [digest] * 2 and [x["scanned"] for x in told] == [[], []]


def test_what_a_scan_left_in_the_bucket_is_not_scanned_again(tabletop, tmp_path, alone, store):
    """A machine that is taken away has given its parts."""
    digest, shards = alone
    gone = start(tabletop, "gs://vla/index", tmp_path / "gone", "merge", **store.env())
    gone.communicate(timeout=120)
    assert gone.returncode == 9 and sum(".parts/" in name for name in store.objects) == len(shards)
    told = ensure(tabletop, "gs://vla/index", [tmp_path / "a", tmp_path / "b"], **store.env())
    assert [x["digest"] for x in told] == [digest] * 2 and [x["scanned"] for x in told] == [[], []]


def test_what_a_host_has_scanned_and_not_given_is_given_by_its_next_start(tabletop, tmp_path, alone, store):
    """Its disk is still there, and its parts are not scanned again, nor left out of the index. Afterwards no host keeps any."""
    digest, shards = alone
    caches = [tmp_path / "a", tmp_path / "b"]
    cut = start(tabletop, "gs://vla/index", caches[1], "give", **store.env())
    cut.communicate(timeout=120)
    assert cut.returncode == 9 and len(list(caches[1].rglob("*.parts/*.npz"))) == len(shards) and not store.objects
    told = ensure(tabletop, "gs://vla/index", caches, **store.env())
    assert [x["digest"] for x in told] == [digest] * 2 and told[1]["scanned"] == []
    assert not list(tmp_path.rglob("*.parts"))


def test_other_stores_are_refused(tabletop):
    with pytest.raises(UserError, match="data.index_dir s3://b/x: it is kept in a folder or at gs://"):
        build.ensure(cards.load("tabletop_slider"), str(tabletop), "s3://b/x")
