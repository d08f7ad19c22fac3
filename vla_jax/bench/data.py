"""`vla-jax bench data`: ours, a bare ceiling and others on the same files, each in processes of its own on the same cores.

This file only starts them one after another and collects their lines; what is counted is said in data_rates, data_costs and
data_peers. Nothing else should run on the machine meanwhile: every ratio has its ceiling beside it, but memory and times do not.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator

from vla_jax.types import UserError

SETS = ("jpeg256", "jpeg480", "png256", "png480")  # bench.data_sets.SETS
PEERS = ("linear", "lanczos3")  # ways that others resize: as ours by default, and as Octo does
_SECONDS = 2.0  # length of one window
_STORE_REPEATS = 3  # at most: nine windows each


def run(
    root: str,
    *,
    sets=SETS,
    cores=(1, 2),
    repeats: int = 5,
    peers=(),
    seconds: float = _SECONDS,
    frames: int = 0,
    latencies_ms=(0, 30, 100),
) -> Iterator[dict]:
    """Yields one line a result, in an order that a reader can follow. peers: the ways to resize (of PEERS) that others are
    measured with; seconds, frames: length of a window and size of a set, for trying it out. The scan is measured on one core,
    memory and slow stores on the largest number.

    Raises: UserError when there are fewer cores, no Bridge data or an unknown set.
    """
    from vla_jax.bench import data_sets

    available = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if not available:
        raise UserError("bench data pins its processes to cores, which this system cannot (Linux only)")
    if max(cores) > len(available):
        raise UserError(f"--cores asks for {max(cores)}, but {len(available)} are available here. Give --cores {len(available)}.")
    unknown = [s for s in sets if s not in SETS]
    if unknown:
        raise UserError(f"--sets: no set {', '.join(unknown)}; there are {', '.join(SETS)}")
    for name in sets:
        folder, kind = data_sets.ensure(root, name, frames=frames), data_sets.SETS[name]
        base = {"folder": str(folder), "name": name}
        most, expected = max(cores), None
        for what in ({"fresh": True}, {"fresh": False}):
            for line in _measure("data_costs", {**base, "what": "start", "threads": most, **what}, available[:most]):
                expected = line.get("frames", expected)
                yield {"set": name, "cores": most, **line}
        for line in _measure("data_costs", {**base, "what": "scan", "repeats": repeats}, available[:1]):
            yield {"set": name, "cores": 1, **line}
        for n in cores:
            timing = {"threads": n, "repeats": repeats, "seconds": seconds}
            for line in _measure("data_rates", {**base, **timing}, available[:n]):
                yield {"set": name, "cores": n, **line}
            for resize in peers:
                job = {"place": str(data_sets.place(folder, name)), "views": list(data_sets.VIEWS.values()), "encoding": kind.encoding}
                job |= {"resize": resize, "size": data_sets.IMAGE_SIZE, **timing} | ({"shuffle": frames} if frames else {})
                for line in _measure("data_peers", job, available[:n]):
                    if line["frames"] != expected:
                        raise RuntimeError(f"{name}: {line['who']} reads {line['frames']} frames, our index has {expected}")
                    yield {"set": name, "cores": n, **line}
        job = {
            **base,
            "what": "stores",
            "threads": most,
            "repeats": min(repeats, _STORE_REPEATS),
            "seconds": seconds,
            "latencies_ms": latencies_ms,
        }
        for line in _measure("data_costs", job, available[:most]):
            yield {"set": name, "cores": most, **line}


def _measure(module: str, job: dict, cores: list[int]) -> list[dict]:
    """The lines that `python -m vla_jax.bench.<module> JOB` prints last, run on these cores alone."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-m", f"vla_jax.bench.{module}", json.dumps(job)]
    with _pinned(cores):
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if "No module named 'tensorflow" in done.stderr:
        raise UserError("others are measured with tensorflow and tensorflow-datasets: pip install 'vla-jax[rlds]', or leave out --peers")
    if done.returncode:
        raise RuntimeError(f"{module} {job} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


@contextlib.contextmanager
def _pinned(cores: list[int]):
    """Processes started inside inherit these cores (the calling thread's)."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def table(lines: list[dict]) -> str:
    """What a person reads: rates by set and cores, then the costs."""
    out = ["set      cores  who              resize     augment  pictures/s  per CPU-s  of ceiling (min-max)    first s    MB"]
    for x in (x for x in lines if x["what"] == "rate"):
        ratio = f"{x['ratio_per_cpu']:.3f} ({x['ratio_min']:.2f}-{x['ratio_max']:.2f})" if "ratio_per_cpu" in x else x.get("decoder", "")
        out.append(
            f"{x['set']:8} {x['cores']:5}  {x['who']:16} {x.get('resize', 'linear'):10} {x.get('augment', ''):7} {x['pictures_per_s']:11.0f} "
            f"{x['pictures_per_cpu_s']:10.0f}  {ratio:20} {x.get('first_batch_s', ''):>10} {x.get('peak_resident_mb', ''):>5}"
        )
    skip = {"bench", "set", "cores", "what", "who", "repeats", "time", "machine", "commit"}
    for x in (x for x in lines if x["what"] != "rate"):
        out.append(f"{x['set']} {x['what']}: " + ", ".join(f"{k} {v}" for k, v in x.items() if k not in skip))
    return "\n".join(out)
