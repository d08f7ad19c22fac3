"""What a restart and a checkpoint cost: a real job that is told to stop and started again, with and without its compiled programs."""

from __future__ import annotations

import shutil
import signal
import statistics
from collections.abc import Iterator
from pathlib import Path

from vla_jax.bench.faults import Job, record
from vla_jax.launch import RESUMABLE
from vla_jax.train import metrics
from vla_jax.types import UserError

_PARTS = ("init_s", "create_s", "restore_s", "batch_s", "compile_s")


def run(folder: Path, *, preset: str = "demo", processes: int = 1, repeats: int = 3) -> Iterator[dict]:
    """Yields, for each kind of start (`first`: nothing is there; `cached`: a restart; `uncached`: a restart on a machine without compiled
    programs), medians in seconds: init_s (interpreter, imports, devices, indexes), create_s or restore_s (the state), batch_s, compile_s
    (tracing and compiling, or loading what was compiled, and the first step). Then what the loop waits for a save: stall_s, and stall_steps,
    its share of a step. Raises: UserError when a job does not do as told."""
    root, found, waits = record(folder), {"first": [], "cached": [], "uncached": []}, []
    for i in range(repeats):
        here = folder / f"restart{i}"
        shutil.rmtree(here, ignore_errors=True)
        for kind in found:
            job = Job(root, here / ("copy" if kind == "uncached" else "run"), processes, more=(f"model.preset={preset}",))
            job.logs, job.starts = here, len(list(here.glob("*.log"))) if here.exists() else 0
            job.env["JAX_COMPILATION_CACHE_DIR"] = str(here / ("compiled" if kind != "uncached" else "none"))
            before = len(metrics.read(job.workdir))
            job.start()
            if kind == "first":  # it is stopped once it has saved
                if not job.until(lambda job=job: any(d.name.isdigit() for d in (job.workdir / "checkpoints").glob("*"))):
                    raise UserError(f"the job ended before its first checkpoint: {job.log}")
                job.signal(signal.SIGTERM, 0)
            codes = job.wait()
            if codes != [RESUMABLE if kind == "first" else 0] * processes:
                raise UserError(f"the job ended with {codes}: {job.log}")
            lines = metrics.read(job.workdir)[before:]
            found[kind].append(next(line for line in lines if "start/init_s" in line))
            waits += _waits(lines) if kind == "cached" else []
            if kind == "first":
                shutil.copytree(job.workdir, here / "copy")
        shutil.rmtree(here)
    for kind, starts in found.items():
        parts = {part: [s[f"start/{part}"] for s in starts] for part in _PARTS if f"start/{part}" in starts[0]}
        total = [sum(of) for of in zip(*parts.values())]
        medians = {part: round(statistics.median(of), 2) for part, of in (*parts.items(), ("total_s", total))}
        yield {"start": kind, "preset": preset, "processes": processes, "repeats": repeats, **medians}
    stall, step = (statistics.median(of) for of in zip(*waits))
    yield {
        "what": "save",
        "preset": preset,
        "processes": processes,
        "saves": len(waits),
        "stall_s": round(stall, 4),
        "step_s": round(step, 4),
    } | {"stall_steps": round(stall / step, 2)}


def _waits(lines: list[dict]) -> list[tuple[float, float]]:
    """(what the loop waited for a save, duration of a step) of each window in which one was begun; every step is a window here."""
    logged = [line for line in lines if "train/step_s" in line]
    usual = statistics.median(line["train/step_s"] for line in logged)
    spent = (line["train/time/checkpoint"] * line["train/seconds"] for line in logged)
    return [(seconds, usual) for seconds in spent if seconds > 0]
