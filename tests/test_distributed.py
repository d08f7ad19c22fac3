"""The environment contract, and two real processes on one machine."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from vla_jax import distributed
from vla_jax.distributed import Cluster, find
from vla_jax.types import UserError

ROOT = Path(__file__).resolve().parent.parent
VLA = {"VLA_COORDINATOR": "10.0.0.1:8476", "VLA_NUM_PROCESSES": "4", "VLA_PROCESS_ID": "2"}
SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NODELIST": "gpu[07-10]",
    "SLURM_STEP_NUM_NODES": "4",
}
JOBSET = {"JOBSET_NAME": "vla", "REPLICATED_JOB_NAME": "workers", "JOB_COMPLETION_INDEX": "1", "NNODES": "2"}
TPU = {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}


@pytest.mark.parametrize(
    "env, expected",
    [
        ({}, None),
        ({"VLA_NUM_PROCESSES": "1"}, None),
        ({"VLA_COORDINATOR": "", "VLA_PROCESS_ID": ""}, None),
        (VLA, ("VLA_* variables", "10.0.0.1:8476", 4, 2, None)),
        (VLA | SLURM | TPU, ("VLA_* variables", "10.0.0.1:8476", 4, 2, None)),
        (SLURM | {"VLA_NUM_PROCESSES": "1"}, None),
        (SLURM, ("Slurm", "gpu07:61441", 4, 3, None)),
        (SLURM | {"SLURM_STEP_NUM_NODES": "2", "SLURM_LOCALID": "1"}, ("Slurm", "gpu07:61441", 4, 3, (1,))),
        (SLURM | {"SLURM_STEP_NUM_NODES": "2", "JAX_LOCAL_DEVICE_IDS": "0,1"}, ("Slurm", "gpu07:61441", 4, 3, None)),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_NTASKS": "1", "SLURM_JOB_ID": "7"}, None),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "JOBSET_NAME": "vla"}, None),
        (JOBSET, ("JobSet", "vla-workers-0-0.vla:8476", 2, 1, None)),
        (JOBSET | {"NNODES": "1", "JOB_COMPLETION_INDEX": "0"}, None),
    ],
)
def test_find(env, expected):
    assert find(env) == (Cluster(*expected) if expected else None)


@pytest.mark.parametrize(
    "env",
    [
        {"VLA_COORDINATOR": "auto"},
        TPU,
        JOBSET | TPU,
        {"MEGASCALE_COORDINATOR_ADDRESS": "x:8080"},
        {"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"},
    ],
)
def test_tpu_is_left_to_jax(env):
    assert find(env).coordinator is None


@pytest.mark.parametrize(
    "env, words",
    [
        ({"VLA_COORDINATOR": "h:1"}, ["VLA_NUM_PROCESSES", "VLA_PROCESS_ID"]),
        ({"VLA_NUM_PROCESSES": "2", "VLA_PROCESS_ID": "0"}, ["VLA_COORDINATOR"]),
        ({"VLA_COORDINATOR": "auto", "VLA_NUM_PROCESSES": "2"}, ["VLA_PROCESS_ID"]),
        (VLA | {"VLA_COORDINATOR": "auto"}, ["'auto'", "host:port"]),
        (VLA | {"VLA_COORDINATOR": "10.0.0.1"}, ["10.0.0.1", "host:port"]),
        (VLA | {"VLA_COORDINATOR": "h:99999"}, ["65535"]),
        (VLA | {"VLA_COORDINATOR": "http://h:80"}, ["http://h:80", "holds / or a space", "host:port"]),
        (VLA | {"VLA_COORDINATOR": "a b:80"}, ["a b:80", "holds / or a space"]),
        (VLA | {"VLA_COORDINATOR": " h:80"}, ["holds / or a space"]),
        (SLURM | {"SLURM_STEP_NODELIST": "n[01"}, ["n[01", "SLURM_STEP_NODELIST"]),
        (VLA | {"VLA_PROCESS_ID": "4"}, ["VLA_PROCESS_ID=4", "0 to 3"]),
        (VLA | {"VLA_PROCESS_ID": "-1"}, ["VLA_PROCESS_ID='-1'"]),
        (VLA | {"VLA_NUM_PROCESSES": "two"}, ["VLA_NUM_PROCESSES='two'"]),
        ({"SLURM_NTASKS": "4", "SLURM_JOB_ID": "7", "SLURM_PROCID": "0"}, ["SLURM_STEP_NODELIST", "srun"]),
        ({"JOBSET_NAME": "vla", "JOB_COMPLETION_INDEX": "0"}, ["REPLICATED_JOB_NAME", "NNODES"]),
    ],
)
def test_half_set_variables_are_refused(env, words):
    with pytest.raises(UserError) as caught:
        find(env)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "nodelist, host",
    [
        ("node1", "node1"),
        ("node1,other", "node1"),
        ("n[001-015],h", "n001"),
        ("n[003,7-9]", "n003"),
        ("gpu[1-3]-ib,x", "gpu1-ib"),
        ("a-b[09]", "a-b09"),
    ],
)
def test_first_host(nodelist, host):
    assert distributed.first_host(nodelist) == host


def expand(parts: list) -> list[str]:
    """The cross product of a name's parts, a list of numbers in a bracket being (first, last, digits) each; the last runs fastest."""
    names = [""]
    for part in parts:
        numbers = [part] if isinstance(part, str) else [f"{n:0{digits}d}" for first, last, digits in part for n in range(first, last + 1)]
        names = [name + number for name in names for number in numbers]
    return names


@pytest.mark.parametrize(
    "parts",
    [
        ["rack", [(0, 1, 1)], "n", [(1, 4, 2)]],
        ["rack", [(2, 2, 1), (5, 7, 1)], "n", [(10, 12, 3), (1, 1, 3)], "-ib"],
        [[(1, 2, 1)], [(0, 9, 1)], "x"],
        ["a", [(1, 2, 1)], "b", [(3, 4, 1)], "c", [(98, 99, 2)]],
    ],
)
@pytest.mark.parametrize("more", ["", ",other", ",other[1-2]n[3,4]"])
def test_first_host_of_several_brackets(parts, more):
    ranges = lambda part: ",".join(f"{a:0{d}d}" if a == b else f"{a:0{d}d}-{b:0{d}d}" for a, b, d in part)
    nodelist = "".join(part if isinstance(part, str) else f"[{ranges(part)}]" for part in parts)
    assert distributed.first_host(nodelist + more) == expand(parts)[0]


def test_other_sources_are_noticed(tmp_path, monkeypatch):
    """A copy of the package has the same digest; an edit, a rename and a file more have another; a wheel's configs are not part of it."""
    mine, copy = distributed.sources_digest(), tmp_path / "vla_jax"
    shutil.copytree(ROOT / "vla_jax", copy, ignore=shutil.ignore_patterns("__pycache__"))
    assert len(mine) == 8 and distributed.sources_digest(copy) == mine
    (copy / "_assets" / "configs").mkdir(parents=True, exist_ok=True)
    (copy / "_assets" / "configs" / "x.py").write_text("x = 1")
    assert distributed.sources_digest(copy) == mine
    seen = {mine}
    text = (copy / "train" / "loop.py").read_text()
    for change in (
        lambda: (copy / "train" / "loop.py").write_text(text + "# x"),
        lambda: (copy / "train" / "loop.py").rename(copy / "train" / "loops.py"),
        lambda: (copy / "train" / "more.py").write_text(""),
    ):
        change()
        seen.add(distributed.sources_digest(copy))
    assert len(seen) == 4

    told = []
    monkeypatch.setattr(distributed, "gather_json", lambda value: told.append(value) or [value, told[0]])
    distributed.agree_versions()
    monkeypatch.setattr(distributed, "sources_digest", lambda: "ab12cd34")
    with pytest.raises(UserError, match=rf"vla_jax is \S+ \(sources ab12cd34\) on process 0, \S+ \(sources {mine}\) on process 1\."):
        distributed.agree_versions()


def test_one_process_needs_no_peer():
    code = """
import sys
from vla_jax import distributed as d
assert "jax" not in sys.modules
print(d.initialize())
assert "jax" not in sys.modules  # a single process pays nothing for this file
d.agree("config", "x"); d.barrier("b")
assert d.broadcast_json({"a": (1, 2)}) == {"a": [1, 2]} and d.gather_json("x") == ["x"] and d.is_main() and d.process_count() == 1
"""
    out = run([code], {})
    assert out[0].returncode == 0 and "1 process" in out[0].stdout, out[0]


# What one process does when launched by the tests below; a UserError is printed as the CLI would.
WORKER = """
import sys
from vla_jax import distributed as d
from vla_jax.types import UserError
try:
    print(d.initialize(timeout_s={timeout}))
    d.agree("config", "the same")
    got = d.broadcast_json({{"run": "r\\u00fcn", "steps": [1, 2]}} if d.is_main() else None)
    assert got == {{"run": "r\\u00fcn", "steps": [1, 2]}}, got
    assert d.gather_json("r\u00fc" * (1 + 5 * d.process_index())) == ["r\u00fc", "r\u00fc" * 6]
    d.barrier("after")
    print(d.initialize())
    d.agree("dataset card", {digest})
    print("agreed")
except UserError as e:
    print(type(e).__name__ + (" that passes" if getattr(e, "passes", False) else "") + ":", e)
    sys.exit(2)
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]


def run(codes: list[str], extra: dict[str, str]) -> list[subprocess.CompletedProcess]:
    cluster = ("VLA_", "SLURM_", "TPU_", "MEGASCALE_", "JOBSET_")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(cluster)}
    clean |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "2"} | extra
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=clean | ({"VLA_PROCESS_ID": str(i)} if "VLA_COORDINATOR" in extra else {}),
        )
        for i, code in enumerate(codes)
        if code
    ]
    try:
        results = [child.communicate(timeout=60) for child in children]
    finally:
        for child in children:
            child.kill()
    return [subprocess.CompletedProcess(c.args, c.returncode, *r) for c, r in zip(children, results)]


def test_two_processes_agree_and_then_differ():
    env = {"VLA_COORDINATOR": f"localhost:{free_port()}", "VLA_NUM_PROCESSES": "2"}
    out = run([WORKER.format(timeout=30, digest="'the same'")] * 2, env)
    for i, o in enumerate(out):
        assert o.returncode == 0, o
        assert f"distributed: 2 processes (this is {i}), coordinator {env['VLA_COORDINATOR']}" in o.stdout
        assert o.stdout.rstrip().endswith("agreed")

    env["VLA_COORDINATOR"] = f"localhost:{free_port()}"
    out = run([WORKER.format(timeout=30, digest="'mine ' + str(d.process_index())")] * 2, env)
    for i, o in enumerate(out):
        assert o.returncode == 2, o
        assert "dataset card is not the same on all 2 processes" in o.stdout and "process 1 holds" in o.stdout
        assert f"This is process {i}" in o.stdout


def test_what_fails_on_one_ends_all():
    """A fault on the second process is said by both, and neither waits for the other; a fault of the program keeps its kind."""
    code = """
import sys
from vla_jax import distributed as d
from vla_jax.types import UserError, may_pass
d.initialize(timeout_s=30)
with d.together("a good thing"):
    pass
try:
    with d.together("indexing bridge"):
        if d.process_index() == 1:
            raise {raised}
except Exception as e:
    print(type(e).__name__ + (" that passes" if getattr(e, "passes", False) else "") + ":", e)
"""
    kinds = (
        ("UserError('no such folder')", "UserError", "UserError"),
        ("FileNotFoundError(2, 'no such folder', 'x')", "FileNotFoundError", "UserError"),  # a path that somebody named
        ("OSError(116, 'no such folder', 'x')", "OSError", "UserError that passes"),  # a stale handle, at least where it is this number
        ("may_pass('no such folder')", "UserError that passes", "UserError that passes"),
        ("ValueError('no such folder')", "ValueError", "UserError that passes"),
    )
    for raised, own, other in kinds:
        env = {"VLA_COORDINATOR": f"localhost:{free_port()}", "VLA_NUM_PROCESSES": "2"}
        first, second = run([code.format(raised=raised)] * 2, env)
        assert first.returncode == second.returncode == 0, (first, second)
        assert re.search(rf"^{own}: .*no such folder", second.stdout, re.M), second
        assert f"\n{other}: indexing bridge failed on process 1: " in first.stdout and "no such folder" in first.stdout


@pytest.mark.parametrize("index, says", [(0, "others have not come"), (1, "Nothing answers at the coordinator")])
def test_missing_peer_is_a_clear_error(index, says):
    env = {"VLA_COORDINATOR": f"localhost:{free_port()}", "VLA_NUM_PROCESSES": "2"}
    codes = [WORKER.format(timeout=3, digest="''")]
    [out] = run(["", *codes] if index else codes, env)
    assert out.returncode == 2, out
    assert f"UserError that passes: Process {index} of 2" in out.stdout and "waited 3 s" in out.stdout and says in out.stdout


def test_a_taken_port_is_a_clear_error():
    with socket.socket() as s:
        s.bind(("", 0))
        s.listen()
        env = {"VLA_COORDINATOR": f"localhost:{s.getsockname()[1]}", "VLA_NUM_PROCESSES": "2"}
        [out] = run([WORKER.format(timeout=3, digest="''")], env)
    assert out.returncode == 2 and "UserError that passes: Process 0 of 2" in out.stdout and "cannot listen" in out.stdout, out
