"""Real processes under attack: each fault once, and the finished run is the undisturbed one, bit for bit."""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vla_jax.bench import faults, restart
from vla_jax.types import UserError

ODD = """import os, sys, threading, time
def wait_for_it():
    while not hasattr(sys.modules.get("vla_jax.data.stream"), "initial_state"):
        time.sleep(0.005)
    stream, made = sys.modules["vla_jax.data.stream"].Stream, [0]
    real = stream._finish
    def odd_in_here(self, pending):
        made[0] += 1
        if made[0] > 5:
            WHAT
        return real(self, pending)
    stream._finish = odd_in_here
if os.environ.get("VLA_PROCESS_ID") == "1":
    threading.Thread(target=wait_for_it, daemon=True).start()
"""  # what a process is made to do with its sixth batch
soak = pytest.mark.skipif(not os.environ.get("VLA_SOAK"), reason="the long form: VLA_SOAK=1, as .ci/run sets it")


@pytest.fixture(scope="module")
def undisturbed(tabletop, tmp_path_factory):
    """(folder, what came of a run of two processes that nothing happened to)."""
    folder = tmp_path_factory.mktemp("faults")
    (folder / "turned").mkdir()
    (folder / "turned" / "sitecustomize.py").write_text(faults._TURNED)
    faults.finish(faults.Job(tabletop, folder / "undisturbed"))
    return folder, faults.outcome(folder / "undisturbed")


@pytest.mark.parametrize("name", ["kill_in_save", "terminate", "flip"])
def test_a_run_survives(name, undisturbed, tabletop):
    folder, expected = undisturbed
    job = faults.Job(tabletop, folder / name)
    line = faults.one(job, name, random.Random(3), expected)
    assert line["survived"], line
    log = "".join(p.read_text() for p in sorted(job.workdir.glob("start*.log")))
    says = {
        "kill_in_save": "",
        "terminate": "stopped on request after step",
        "flip": f"checkpoints/{line.get('damaged')} is damaged",
    }
    assert says[name] in log
    if name == "flip":
        assert (job.workdir / "damaged" / str(line["damaged"])).is_dir()
    if name == "terminate":  # to one process; both saved the same step, and nothing was lost
        assert line["codes"] == [75, 75] and line["lost_steps"] == 0


@soak
@pytest.mark.parametrize("name", ["kill", "interrupt", "stop", "truncate", "shard", "full", "full_one", "clock"])
def test_a_run_survives_also(name, undisturbed, tabletop):
    folder, expected = undisturbed
    line = faults.one(faults.Job(tabletop, folder / name), name, random.Random(4), expected)
    assert line["survived"], line


@soak
def test_four_processes_survive(undisturbed, tabletop):
    """Of one device each; their undisturbed run is one of their own, whose losses are those of two processes but for the order of sums."""
    folder, two = undisturbed
    faults.finish(faults.Job(tabletop, folder / "four", 4))
    expected = faults.outcome(folder / "four")
    assert expected["stream"] == two["stream"] and expected["losses"] == pytest.approx(two["losses"], rel=1e-5)
    for name in ("kill", "terminate", "flip"):
        line = faults.one(faults.Job(tabletop, folder / f"{name}_of_four", 4), name, random.Random(5), expected)
        assert line["survived"], line


def test_a_workdir_that_is_not_shared_is_said(tmp_path):
    """By both processes, before anything is trained."""
    program = (
        "import sys\nfrom vla_jax import distributed\nfrom vla_jax.types import UserError\ndistributed.initialize()\n"
        "from vla_jax.train import workdir\nfor name in sys.argv[1:]:\n"
        "    place = workdir.open_(name.replace('OWN', str(distributed.process_index())))\n"
        "    try: workdir.check_shared(place, wait_s=1.0); print(name, 'shared', flush=True)\n"
        "    except UserError as e: print(name, e, flush=True)"
    )
    with socket.create_server(("", 0)) as free:
        port = free.getsockname()[1]
    base = os.environ | {"VLA_COORDINATOR": f"localhost:{port}", "VLA_NUM_PROCESSES": "2", "JAX_NUM_CPU_DEVICES": "1"}
    argv = [sys.executable, "-c", program, f"{tmp_path}/one", f"{tmp_path}/OWN"]
    jobs = [subprocess.Popen(argv, env=base | {"VLA_PROCESS_ID": str(i)}, stdout=subprocess.PIPE, text=True) for i in range(2)]
    for job in jobs:
        said = job.communicate(timeout=200)[0]
        assert f"{tmp_path}/one shared" in said and "is not the same place on all hosts" in said and "OWN shared" not in said, said
    assert not list(tmp_path.glob("*/.shared*"))


def test_a_start_in_which_nothing_moves_ends(tabletop, tmp_path):
    """Before the first step, too: a process that waits for a checkpoint's storage is ended with its stacks."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, threading, time\ndef patch():\n    while not hasattr(sys.modules.get('vla_jax.train.resume'), 'newest'): time.sleep(0.005)\n"
        "    sys.modules['vla_jax.train.resume'].newest = lambda *args: time.sleep(600)\nthreading.Thread(target=patch, daemon=True).start()\n"
    )
    env = {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    job = faults.Job(tabletop, tmp_path / "run", 1, more=("train.hang_s=3.0",), env=env)
    job.start()
    assert job.wait() == [124]
    assert "step 0, looking for a checkpoint" in job.log.read_text()


@soak
def test_a_run_goes_on_with_another_number_of_processes(undisturbed, tabletop):
    """Killed with two processes of two devices, finished with four of one, then with one of four: the same samples, and losses that differ
    by no more than the order of sums."""
    folder, expected = undisturbed
    job = faults.Job(tabletop, folder / "other")
    for processes, until in ((2, 7), (4, 15), (1, faults.STEPS)):
        job.processes = processes
        job.start()
        if until < faults.STEPS:
            assert job.until(lambda until=until: job.step() >= until), job.log.read_text()[-2000:]
            job.signal(signal.SIGKILL)
            job.wait()
        else:
            assert job.wait() == [0], job.log.read_text()[-2000:]
    found = faults.outcome(job.workdir)
    assert found["stream"] == expected["stream"] and found["losses"].keys() == expected["losses"].keys()
    for step, loss in found["losses"].items():
        assert abs(loss - expected["losses"][step]) <= 1e-5 * abs(loss), step


def test_what_differs_is_named(undisturbed):
    _, expected = undisturbed
    losses = {step: loss for step, loss in expected["losses"].items() if step != 5} | {3: 0.5}
    other = {"arrays": {**expected["arrays"], "step": "1"}, "losses": losses, "stream": []}
    assert len(expected["arrays"]) > 50 and sorted(expected["losses"]) == list(range(1, faults.STEPS + 1))
    assert faults.differences(expected, expected) == []
    assert faults.differences(other, expected) == ["array step", "the order of the samples", "loss of step 3", "loss of step 5"]
    assert "loss of step 5" not in faults.differences(other, expected, lines_lost=True)
    with pytest.raises(UserError, match="no fault flood; there are: kill"):
        next(faults.run(Path("/nowhere"), n=1, only=("flood",)))


def odd(folder: Path, name: str, what: str, tabletop, *more: str) -> tuple[list[int], str]:
    """(exit codes, log) of a job whose second process does that."""
    (folder / name).mkdir()
    (folder / name / "sitecustomize.py").write_text(ODD.replace("WHAT", what))
    env = {"PYTHONPATH": f"{folder / name}:{os.environ.get('PYTHONPATH', '')}"}
    job = faults.Job(tabletop, folder / f"{name}_run", more=more, env=env)
    job.start()
    return job.wait(), job.log.read_text()


def test_a_hung_peer_ends_the_others(undisturbed, tabletop):
    """A process that lives and does nothing: every process waits, for it or with it, and is ended by its own watch, with stacks."""
    codes, text = odd(undisturbed[0], "hung", "time.sleep(600)", tabletop, "train.hang_s=25.0")
    assert 124 in codes and 0 not in codes, text[-3000:]
    assert "has not moved for" in text and "odd_in_here" in text and "step 6" in text


def test_an_error_of_one_ends_all(undisturbed, tabletop):
    """With its traceback, and at once: nobody waits for it in a collective, and it waits for nobody at its end."""
    before = time.monotonic()
    codes, text = odd(undisturbed[0], "wrong", "raise ZeroDivisionError('of one alone')", tabletop)
    assert codes[1] == 1 and codes[0] != 0, text[-3000:]
    assert "ZeroDivisionError: of one alone" in text and "has not moved" not in text
    assert time.monotonic() - before < 100  # the start, and less than jax's shutdown would wait for the others


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
def test_a_full_file_system(undisturbed, tabletop, tmp_path):
    """A tmpfs on which two checkpoints fit and a third does not: steps are lost, the run is not; with more room its last one is there."""
    _, expected = undisturbed
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)], capture_output=True, check=False).returncode:
        pytest.skip("this system mounts no tmpfs for us")
    try:
        job = faults.Job(tabletop, place / "run", logs=tmp_path)
        job.start()
        assert job.until(lambda: (job.workdir / "checkpoints" / "4").exists())
        room = shutil.disk_usage(place).free
        with open(place / "ballast", "wb") as f:
            f.write(b"\0" * (room - 100_000))
        assert job.until(lambda: "could not be written" in job.log.read_text()), job.log.read_text()[-2000:]
        (place / "ballast").unlink()
        assert job.wait() == [0, 0]
        assert faults.differences(faults.outcome(job.workdir), expected) == []
    finally:
        subprocess.run(["umount", "-l", str(place)], check=False)


@soak
def test_what_a_restart_costs(tabletop, tmp_path):
    """Each kind of start is told apart in its parts; with what was compiled nothing is created, and the save's stall is a share of a step."""
    (tmp_path / "data").symlink_to(tabletop)
    *starts, save = restart.run(tmp_path, preset="tiny", processes=2, repeats=1)
    assert [line["start"] for line in starts] == ["first", "cached", "uncached"]
    for line in starts:
        made = "create_s" if line["start"] == "first" else "restore_s"
        assert line["total_s"] == pytest.approx(sum(line[k] for k in ("init_s", made, "batch_s", "compile_s")), abs=0.03)
        assert min(line["init_s"], line[made], line["compile_s"]) > 0
    assert save["saves"] >= 4 and save["stall_s"] > 0
    assert not list(tmp_path.glob("restart*"))
