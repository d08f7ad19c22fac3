"""A training run of real processes under attack, finished by restarts, and held against a run that nothing happened to.

Each fault gets a run of its own: it strikes at a random step, the job is started again as a launcher would until it is done, and
what is compared are the checksums of the final state, the order of the samples, and the loss of every step.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from vla_jax.data import mixture
from vla_jax.launch import RESUMABLE
from vla_jax.train import checkpoint, metrics
from vla_jax.types import UserError

STEPS, SAVE_EVERY, DEVICES = 24, 4, 4
_HEARTBEAT_S = 10  # after which jax finds that a process no longer moves
_RESTARTS = 5
_TRIES = 3  # of a fault that found its run past the place where it was to strike


@dataclasses.dataclass
class Job:
    """The processes of one run, each with its share of DEVICES simulated devices, as a launcher would start and restart them."""

    root: Path
    workdir: Path
    processes: int = 2
    more: tuple[str, ...] = ()
    env: dict[str, str] = dataclasses.field(default_factory=dict)
    logs: Path | None = None  # a folder for its output; None: the workdir
    starts: int = 0

    def start(self) -> None:
        with socket.create_server(("", 0)) as free:
            port = free.getsockname()[1]
        pairs = {
            "data.root": self.root,
            "data.index_dir": self.workdir.parent / "index",
            "model.preset": "tiny",
            "pack.group": 2,
            "train.steps": STEPS,
            "train.save_every": SAVE_EVERY,
            "train.log_every": 1,
            "train.eval_batches": 1,
            "train.save_timeout_s": 15.0,
        }
        command = [sys.executable, "-m", "vla_jax.cli", "train", "--config=configs/demo.py", f"--workdir={self.workdir}"]
        command += [*(f"--config.{key}={value}" for key, value in pairs.items()), *(f"--config.{item}" for item in self.more)]
        base = {k: v for k, v in os.environ.items() if not k.startswith(("VLA_", "SLURM_"))} | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(DEVICES // self.processes),
            "VLA_COORDINATOR": f"localhost:{port}",
            "VLA_NUM_PROCESSES": str(self.processes),
            "VLA_HEARTBEAT_S": str(_HEARTBEAT_S),
            "VLA_RESUMABLE_EXIT": str(RESUMABLE),
        }
        self.workdir.mkdir(parents=True, exist_ok=True)
        self.log, self.starts, self.running = (self.logs or self.workdir) / f"start{self.starts}.log", self.starts + 1, []
        with open(self.log, "w") as out:  # through a pipe, so that a limit on the job's files is none on its log
            log = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=out)
        for i in range(self.processes):
            env = base | {"VLA_PROCESS_ID": str(i)} | self.env
            self.running.append(subprocess.Popen(command, env=env, stdout=log.stdin, stderr=log.stdin))
        log.stdin.close()

    def ended(self) -> bool:
        return all(p.poll() is not None for p in self.running)

    def wait(self, timeout_s: float = 300) -> list[int]:
        """Exit codes. When one fails, the others get as long as jax needs to notice, and are then killed, as launchers do. Raises:
        UserError when nothing has ended in time."""
        deadline = time.monotonic() + timeout_s
        while not self.ended():
            if any(p.poll() not in (None, 0) for p in self.running):
                deadline = min(deadline, time.monotonic() + 2 * _HEARTBEAT_S)
            if time.monotonic() > deadline:
                late = all(p.poll() is None for p in self.running)
                self.signal(signal.SIGKILL)
                for p in self.running:
                    p.wait()
                if late:
                    raise UserError(f"a job did not end in {timeout_s:g} s: {self.log}")
            time.sleep(0.05)
        return [p.returncode for p in self.running]

    def signal(self, number: int, which: int | None = None) -> None:
        for p in self.running if which is None else [self.running[which]]:
            if p.poll() is None:
                p.send_signal(number)

    def step(self) -> int:
        """The last one that was logged, by any start."""
        return max((line["step"] for line in metrics.read(self.workdir)), default=0)

    def until(self, reached: Callable[[], bool], timeout_s: float = 300) -> bool:
        """Waits for something to be so while the job runs; False when it ended before."""
        deadline = time.monotonic() + timeout_s
        while not reached():
            if self.ended() or time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True


# Each fault strikes a job that runs and has come to the chosen step; afterwards the job has ended, or runs on. It returns what else is
# to be told, or None when it came too late.


def kill(job: Job, pick: random.Random) -> dict | None:
    """SIGKILL of a random process."""
    job.signal(signal.SIGKILL, pick.randrange(job.processes))
    return {"codes": job.wait()}


def kill_in_save(job: Job, pick: random.Random) -> dict | None:
    """SIGKILL of a random process while a checkpoint is being written."""
    if not job.until(lambda: any((job.workdir / "checkpoints").glob("*orbax-checkpoint-tmp*"))):
        return None
    job.signal(signal.SIGKILL, pick.randrange(job.processes))
    return {"codes": job.wait()}


def terminate(job: Job, pick: random.Random, number: int = signal.SIGTERM) -> dict | None:
    """SIGTERM to a random process, as before a preemption: all save at the same step and end with the code that launchers ask for."""
    job.signal(number, pick.randrange(job.processes))
    codes = job.wait()
    if set(codes) != {RESUMABLE}:
        raise UserError(f"after a signal the processes ended with {codes}, not {RESUMABLE}: {job.log}")
    return {"codes": codes}


def interrupt(job: Job, pick: random.Random) -> dict | None:
    """SIGINT to a random process: likewise."""
    return terminate(job, pick, signal.SIGINT)


def stop(job: Job, pick: random.Random) -> dict | None:
    """SIGSTOP of a random process: the others notice, and the restarter kills it."""
    which = pick.randrange(job.processes)
    others = [p for i, p in enumerate(job.running) if i != which]
    job.signal(signal.SIGSTOP, which)
    before = time.monotonic()
    noticed = job.until(lambda: all(p.poll() is not None for p in others), timeout_s=12 * _HEARTBEAT_S)
    took = time.monotonic() - before
    job.signal(signal.SIGKILL)
    codes = job.wait()
    if others and not noticed:
        raise UserError(f"the others had not noticed a stopped process after {took:.0f} s: {job.log}")
    return {"codes": codes, "noticed_s": round(took, 1)}


def flip(job: Job, pick: random.Random) -> dict | None:
    """All killed, and a bit flipped in the largest file of arrays of the newest checkpoint."""
    return _damage(job, lambda data: data.__setitem__(i := pick.randrange(len(data)), data[i] ^ 1 << pick.randrange(8)))


def truncate(job: Job, pick: random.Random) -> dict | None:
    """All killed, and the largest file of the newest checkpoint cut to half."""
    return _damage(job, lambda data: data.__delitem__(slice(len(data) // 2, None)))


def _damage(job: Job, change: Callable[[bytearray], None]) -> dict | None:
    saved = lambda: sorted(int(d.name) for d in (job.workdir / "checkpoints").glob("*") if d.name.isdigit())
    if not job.until(lambda: len(saved()) > 1):  # what it falls back to is what is tried here
        return None
    job.signal(signal.SIGKILL)
    codes = job.wait()
    newest = job.workdir / "checkpoints" / str(saved()[-1])
    file = max((f for f in newest.rglob("d/*") if f.is_file()), key=lambda f: f.stat().st_size)  # of arrays, in OCDBT's folders
    whole, step = file.read_bytes(), int(newest.name)
    before = _read(job.workdir, step)
    while _read(job.workdir, step) == before:  # one byte in twenty belongs to nothing that is read
        data = bytearray(whole)
        change(data)
        file.write_bytes(data)
    return {"codes": codes, "damaged": step}


def _read(workdir: Path, step: int) -> dict[str, bytes] | None:
    """The arrays of a checkpoint as they are, None where they cannot be read."""
    try:
        return {path: x.tobytes() for path, x in checkpoint.host_arrays(workdir, step).items()}
    except Exception:  # Orbax and TensorStore raise many kinds
        return None


def shard(job: Job, pick: random.Random) -> dict | None:
    """All killed, and a file of the data gone: refused with 2 and its name; then it comes back."""
    job.signal(signal.SIGKILL)
    codes = job.wait()
    read = [job.root / card.name for card in mixture.load("tabletop").cards]  # a recording has more robots than the demo's mixture
    lost = pick.choice(sorted(file for folder in read for file in folder.rglob("*.tfrecord-*")))
    away = job.workdir / lost.name
    shutil.move(lost, away)
    try:
        job.start()
        refused = job.wait()
    finally:
        shutil.move(away, lost)
    if refused != [2] * job.processes or lost.name not in job.log.read_text():
        raise UserError(f"without {lost} the processes ended with {refused}, not 2 and its name: {job.log}")
    return {"codes": codes}


def full(job: Job, pick: random.Random) -> dict | None:
    """No file may grow beyond 4 KiB while one or two checkpoints are due: the run goes on, says so, and ends whole."""
    before, hard = job.step(), resource.RLIM_INFINITY
    for p in job.running:
        resource.prlimit(p.pid, resource.RLIMIT_FSIZE, (4096, hard))
    time.sleep(0.5)
    said = job.until(lambda: "could not be written" in job.log.read_text())
    for p in (p for p in job.running if p.poll() is None):
        resource.prlimit(p.pid, resource.RLIMIT_FSIZE, (hard, hard))
    if not said:
        return None
    codes = job.wait()
    if any(codes):
        raise UserError(f"with its disk full the run ended with {codes}: {job.log}")
    return {"codes": codes, "full_from": before}


def full_one(job: Job, pick: random.Random) -> dict | None:
    """The same of a random process alone: the others wait for its part, and give the step up with it."""
    (p,) = pick.sample(job.running, 1)
    before, hard = job.step(), resource.RLIM_INFINITY
    resource.prlimit(p.pid, resource.RLIMIT_FSIZE, (4096, hard))
    said = job.until(lambda: "could not be written" in job.log.read_text())
    if p.poll() is None:
        resource.prlimit(p.pid, resource.RLIMIT_FSIZE, (hard, hard))
    if not said:
        return None
    codes = job.wait()
    if any(codes):
        raise UserError(f"with the disk of one process full the run ended with {codes}: {job.log}")
    return {"codes": codes, "full_from": before}


def clock(job: Job, pick: random.Random) -> dict | None:
    """The wall clock jumps by a day, forward or back."""
    (job.workdir / "clock").write_text(str(pick.choice((-1, 1)) * 86400))
    codes = job.wait()
    if any(codes):
        raise UserError(f"with its clock turned the run ended with {codes}: {job.log}")
    return {"codes": codes}


FAULTS = {f.__name__: f for f in (kill, kill_in_save, terminate, interrupt, stop, flip, truncate, shard, full, full_one, clock)}


def finish(job: Job) -> list[list[int]]:
    """Starts a job until it is done; the exit codes of each start. Raises: UserError when it does not come to its end."""
    codes: list[list[int]] = []
    for _ in range(_RESTARTS):
        job.start()
        codes.append(job.wait())
        if not any(codes[-1]):
            return codes
    raise UserError(f"not done after {_RESTARTS} restarts, exit codes {codes}: {job.log}")


def outcome(workdir: Path) -> dict:
    """What two runs are compared by: {arrays: SHA-256 of each of the final state, stream, losses: by step, of the last start that came to it}."""
    meta = json.loads((workdir / "checkpoints" / str(STEPS) / "meta" / "metadata").read_text())
    losses = {line["step"]: line["train/loss"] for line in metrics.read(workdir) if "train/loss" in line}
    arrays = {path: hashlib.sha256(np.asarray(x).tobytes()).hexdigest() for path, x in checkpoint.host_arrays(workdir, STEPS).items()}
    return {"arrays": arrays, "stream": meta["stream"], "losses": losses}


def differences(found: dict, expected: dict, *, lines_lost: bool = False) -> list[str]:
    """In what a finished run is not the undisturbed one. lines_lost: steps whose line could not be written are not compared."""
    out = [
        f"array {path}"
        for path in sorted(expected["arrays"] | found["arrays"])
        if found["arrays"].get(path) != expected["arrays"].get(path)
    ]
    out += ["the order of the samples"] if found["stream"] != expected["stream"] else []
    steps = found["losses"] if lines_lost else expected["losses"]
    return out + [f"loss of step {step}" for step in steps if found["losses"].get(step) != expected["losses"].get(step)]


_TURNED = """import os, time
real, file = time.time, os.environ["VLA_TURNED_CLOCK"]
def turned():
    try:
        with open(file) as f: return real() + float(f.read() or 0)
    except (OSError, ValueError): return real()
time.time = turned
"""


def record(folder: Path) -> Path:
    """A few episodes of the tabletop's robots below `folder`, once."""
    root = folder / "data"
    if not root.exists():
        subprocess.run([sys.executable, "-m", "vla_jax.tabletop.record", str(root), "--episodes", "12", "--seed", "1"], check=True)
    return root


def run(folder: Path, *, n: int, processes: int = 2, seed: int = 0, only: tuple[str, ...] = ()) -> Iterator[dict]:
    """n faults on a small model and the tabletop's data, which are made below `folder`. Yields {fault, survived, why, lost_steps, lost_s: more
    than the undisturbed run took, ..} for each, and {faults, survived, lost} at the end. Raises: UserError when the undisturbed run fails."""
    if unknown := set(only) - FAULTS.keys():
        raise UserError(f"no fault {', '.join(sorted(unknown))}; there are: {', '.join(FAULTS)}")
    jax.config.update("jax_platforms", "cpu")  # what is compared is read here, and the device is no business of this process
    folder, pick = folder.resolve(), random.Random(seed)
    (folder / "turned").mkdir(parents=True, exist_ok=True)
    (folder / "turned" / "sitecustomize.py").write_text(_TURNED)
    root = record(folder)
    finish(Job(root, folder / "first", processes))  # compiles, and makes the index
    before = time.monotonic()
    finish(Job(root, folder / "undisturbed", processes))
    usual, expected = time.monotonic() - before, outcome(folder / "undisturbed")
    lost, names = 0, list(only or FAULTS)
    for i in range(n):
        name = names[i % len(names)] if i < len(names) else pick.choice(names)
        for attempt in range(_TRIES):
            here = folder / f"fault{i}_{attempt}"
            line = one(Job(root, here, processes), name, pick, expected, usual)
            if line["survived"] or line.get("late"):
                shutil.rmtree(here)
            if not line.get("late"):
                break
        lost += not line["survived"]
        yield {"fault": name, "processes": processes, **line}
    yield {"fault": "all", "processes": processes, "faults": n, "survived": n - lost, "lost": lost, "undisturbed_s": round(usual, 1)}


def one(job: Job, name: str, pick: random.Random, expected: dict, usual_s: float = 0.0) -> dict:
    """One run with one fault, and what became of it; {late: True} when the run was past the place before the fault could strike."""
    at, told, before, resumed = pick.randrange(1, STEPS - 2 * SAVE_EVERY), None, time.monotonic(), 0
    if name in ("flip", "truncate"):
        at = max(at, 2 * SAVE_EVERY + 1)
    if name == "clock":
        job.env |= {"PYTHONPATH": f"{job.workdir.parent / 'turned'}:{os.environ.get('PYTHONPATH', '')}"}
        job.env |= {"VLA_TURNED_CLOCK": str(job.workdir / "clock")}
    try:
        job.start()
        if job.until(lambda: job.step() >= at):
            struck = job.step()
            told = FAULTS[name](job, pick)
        if told is None:
            return {"survived": False, "late": True, "why": f"the job was past the place for this fault: {job.log}"}
        after, logged = 0.0, len(metrics.read(job.workdir))
        if not (job.workdir / "checkpoints" / str(STEPS)).exists():
            finish(job)
            lines = metrics.read(job.workdir)[logged:]
            resumed, after = lines[0]["step"], lines[0]["time"]
        wrong = differences(outcome(job.workdir), expected, lines_lost=name.startswith("full"))
    except (UserError, OSError) as e:
        return {"survived": False, "why": str(e)}
    finally:
        for p in job.running:
            if p.poll() is None:
                p.kill()
    line = {"survived": not wrong, "why": ", ".join(wrong[:4]), "at": struck, **told}
    if after:
        line |= {"lost_steps": max(struck - resumed, 0)}
    return line | {"lost_s": round(time.monotonic() - before - usual_s, 1)}
