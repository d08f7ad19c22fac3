"""Several processes as one job: who is there, and do they agree. launch/README.md is the contract for the variables.

`find` reads the environment and nothing else; `initialize` connects; with one process all that follows is a no-op.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from . import paths
from .types import WRONG_PATH, UserError, may_pass


class Cluster(NamedTuple):
    source: str
    coordinator: str | None = None  # None: jax asks the TPU environment for coordinator, count and index
    count: int = 1
    index: int = 0
    local_device_ids: tuple[int, ...] | None = None  # None: all accelerators of the machine


def find(env: Mapping[str, str]) -> Cluster | None:
    """The first of VLA_*, Slurm, TPU, JobSet to describe several processes; None: one. Half a set is refused."""
    env = {k: v for k, v in env.items() if v}  # empty counts as unset: launchers pass on what they do not have
    vla = [k for k in ("VLA_COORDINATOR", "VLA_NUM_PROCESSES", "VLA_PROCESS_ID") if k in env]
    if vla == ["VLA_COORDINATOR"] and env["VLA_COORDINATOR"] == "auto":
        return Cluster("jax's own detection (VLA_COORDINATOR=auto)")
    if vla == ["VLA_NUM_PROCESSES"] and env["VLA_NUM_PROCESSES"] == "1":
        return None
    if vla:
        _complete(
            env,
            "VLA_COORDINATOR",
            "VLA_NUM_PROCESSES",
            "VLA_PROCESS_ID",
            hint="Set all three on every process, "
            "VLA_COORDINATOR=auto alone on a TPU pod, or VLA_NUM_PROCESSES=1 alone for a single process.",
        )
        return _numbered("VLA_* variables", env["VLA_COORDINATOR"], env, "VLA_NUM_PROCESSES", "VLA_PROCESS_ID")

    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
    if tasks in env and _number(env, tasks, 1) > 1:
        _complete(
            env,
            "SLURM_JOB_ID",
            "SLURM_PROCID",
            "SLURM_LOCALID",
            "SLURM_STEP_NODELIST",
            "SLURM_STEP_NUM_NODES",
            hint=f"{tasks}={env[tasks]}, but only srun sets these: start with `srun vla-jax ...`, or set "
            "VLA_NUM_PROCESSES=1 for a single process in this allocation.",
        )
        # The port that jax itself would take: another job on the same node is unlikely to have it.
        port = _number(env, "SLURM_JOB_ID") % 4096 + 61440
        found = _numbered("Slurm", f"{first_host(env['SLURM_STEP_NODELIST'])}:{port}", env, tasks, "SLURM_PROCID")
        # jax's own detection gives a task one accelerator, which leaves the rest idle where a node runs one task.
        if found.count > _number(env, "SLURM_STEP_NUM_NODES", 1) and "JAX_LOCAL_DEVICE_IDS" not in env:
            found = found._replace(local_device_ids=(_number(env, "SLURM_LOCALID"),))
        return found

    tpu_hosts = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES", "")
    if "," in tpu_hosts or "MEGASCALE_COORDINATOR_ADDRESS" in env or env.get("MEGASCALE_NUM_SLICES", "1") != "1":
        return Cluster("the TPU environment (TPU_WORKER_HOSTNAMES, MEGASCALE_*)")
    if "JOBSET_NAME" in env and not tpu_hosts:
        _complete(
            env,
            "REPLICATED_JOB_NAME",
            "JOB_COMPLETION_INDEX",
            "NNODES",
            hint="A JobSet without TPUs needs them in every pod; or set VLA_NUM_PROCESSES=1 for a single process.",
        )
        # JobSet's stable pod names: <jobset>-<replicated job>-<job>-<pod>.<subdomain>, the subdomain being the JobSet.
        host = f"{env['JOBSET_NAME']}-{env['REPLICATED_JOB_NAME']}-0-0.{env['JOBSET_NAME']}"
        found = _numbered("JobSet", f"{host}:8476", env, "NNODES", "JOB_COMPLETION_INDEX")
        return found if found.count > 1 else None
    return None


def _complete(env: Mapping[str, str], *keys: str, hint: str) -> None:
    if missing := [k for k in keys if k not in env]:
        raise UserError(f"The environment describes several processes but lacks {', '.join(missing)}. {hint}")


def _number(env: Mapping[str, str], key: str, low: int = 0) -> int:
    if not env[key].isdecimal() or int(env[key]) < low:
        raise UserError(f"{key}={env[key]!r} in the environment is not a whole number of {low} or more.")
    return int(env[key])


def _numbered(source: str, coordinator: str, env: Mapping[str, str], count_key: str, index_key: str) -> Cluster:
    host, _, port = coordinator.rpartition(":")
    if re.search(r"[/\s]", host):
        raise UserError(f"Coordinator {coordinator!r} (from {source}) holds / or a space: write host:port alone, such as 10.0.0.1:8476.")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(
            f"Coordinator {coordinator!r} (from {source}) is not host:port with a port of 1 to 65535. Give "
            "the address of process 0, such as 10.0.0.1:8476, the same on every process."
        )
    count, index = _number(env, count_key, 1), _number(env, index_key)
    if index >= count:
        raise UserError(f"{index_key}={index}, but {count_key}={count}: processes are numbered 0 to {count - 1}.")
    return Cluster(source, coordinator, count, index)


def first_host(nodelist: str) -> str:
    """`rack[0-1]n[003-010,12]-ib,login` -> `rack0n003-ib`. Raises: UserError for a bracket that does not end."""
    first = re.match(r"(?:[^,\[\]]|\[[^\[\]]+\])*", nodelist)[0]  # up to a comma outside brackets
    if not first or nodelist[len(first) :][:1] not in ("", ","):
        raise UserError(f"the list of nodes {nodelist!r} (SLURM_STEP_NODELIST) cannot be read; set VLA_COORDINATOR and its like instead.")
    return re.sub(r"\[([^,\-\]]+)[^\]]*\]", r"\1", first)


def initialize(*, timeout_s: float = 300) -> str:
    """Connects the processes that the environment describes, before any use of jax. Returns a line for the log. timeout_s: unless VLA_CONNECT_S
    says how long to wait for the others. Raises: UserError, one that passes where others do not come."""
    if os.environ.get("VLA_CONNECT_S"):
        timeout_s = _number(os.environ, "VLA_CONNECT_S", 1)
    found = find(os.environ)
    if found is None:
        return "distributed: 1 process (no VLA_*, Slurm, TPU pod or JobSet variables that describe more)"
    import jax

    if not jax.distributed.is_initialized():
        # CPUs of several processes cannot reduce without it. It is jax's default today; a choice of mpi is left alone.
        if jax.config.jax_cpu_collectives_implementation in (None, "none"):
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
        _connect(jax.distributed.initialize, found, timeout_s)
    where = f", coordinator {found.coordinator}" if found.coordinator else ""
    return f"distributed: {jax.process_count()} processes (this is {jax.process_index()}){where}, from {found.source}"


def keep_compiled() -> None:
    """Keeps compiled programs in the user's cache folder, so that a run that starts again does not compile again. JAX_COMPILATION_CACHE_DIR
    chooses another folder (a gs:// one, too); empty: none."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(paths.cache_dir() / "compiled"))


def _connect(connect: Any, found: Cluster, timeout_s: float) -> None:
    """jax aborts the process (SIGABRT, no exception) at its own timeout and crashes on a taken port, so the port is
    tried first, and jax connects in a thread with a timeout later than ours."""
    arguments: dict[str, Any] = {"initialization_timeout": int(timeout_s) + 600}
    if os.environ.get("VLA_HEARTBEAT_S"):
        arguments["heartbeat_timeout_seconds"] = _number(os.environ, "VLA_HEARTBEAT_S", 1)
    me, hint = f"This process (from {found.source})", "Does the same command run on every worker of the TPU slice?"
    if found.coordinator:
        me = f"Process {found.index} of {found.count} (from {found.source}, coordinator {found.coordinator})"
        arguments |= dict(
            coordinator_address=found.coordinator,
            num_processes=found.count,
            process_id=found.index,
            local_device_ids=found.local_device_ids,
            cluster_detection_method="deactivate",
        )
        host, _, port = found.coordinator.rpartition(":")
        if found.index == 0:
            hint = "It listens, but others have not come. Do they all run, with this coordinator and count?"
            try:
                socket.create_server(("", int(port))).close()
            except OSError as e:
                raise may_pass(
                    f"{me} cannot listen on port {port}: {e.strerror}. Stop what holds the port, or choose another on every process."
                ) from None
    failed: list[Exception] = []

    def target() -> None:
        try:
            connect(**arguments)
        except Exception as e:
            failed.append(e)

    thread = threading.Thread(target=target, daemon=True, name="jax.distributed.initialize")
    thread.start()
    thread.join(timeout_s)
    if failed:
        raise may_pass(f"{me} could not join the others: {failed[0]}") from failed[0]
    if thread.is_alive():
        if found.index > 0:
            try:
                socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
                hint = "The coordinator answers, but another process has not come: see the others' logs."
            except OSError as e:
                hint = f"Nothing answers at the coordinator ({e}). Does process 0 run there, and is the port open?"
        whom = f"processes 0 to {found.count - 1}" if found.coordinator else "the others"
        raise may_pass(f"{me} has waited {timeout_s:g} s for {whom} (VLA_CONNECT_S). {hint}")


def several() -> bool:
    """Whether this process has joined others; loads nothing."""
    return "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized() and process_count() > 1


def process_index() -> int:
    import jax

    return jax.process_index()


def process_count() -> int:
    import jax

    return jax.process_count()


def is_main() -> bool:
    return process_index() == 0


def barrier(name: str) -> None:
    """Returns once every process has called it with this name."""
    if process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def agree(name: str, digest: str) -> None:
    """Every process must hold the same `digest` of the thing called `name`; else every process raises UserError."""
    if process_count() > 1:
        import numpy as np
        from jax.experimental import multihost_utils

        mine = np.frombuffer(hashlib.sha256(digest.encode()).digest(), np.uint8)
        held = [bytes(row).hex() for row in np.asarray(multihost_utils.process_allgather(mine))]
        if differ := [f"process {i} holds {h[:12]}" for i, h in enumerate(held) if h != held[0]]:
            raise UserError(
                f"{name} is not the same on all {len(held)} processes: process 0 holds {held[0][:12]}, but "
                f"{', '.join(differ)}. This is process {process_index()}. Start all of them with the same "
                "code, config and data."
            )


PACKAGES = ("vla_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorstore", "numpy", "sentencepiece")
PACKAGES += ("libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "opencv-python-headless", "simplejpeg", "pillow")  # compile; make pixels


def sources_digest(package: Path = Path(__file__).parent) -> str:
    """Of all that is ours and runs: the version stays the same from commit to commit. configs/ of a wheel is not part of it, since the config itself
    is agreed."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        if not name.startswith("_assets/"):
            data = path.read_bytes()
            digest.update(f"{name} {len(data)}\n".encode() + data)
    return digest.hexdigest()[:8]


def agree_versions() -> None:
    """Every process must run the same versions of Python and of PACKAGES, and the same sources of ours. Raises: UserError, on all of them,
    naming what differs."""
    from importlib import metadata

    held = {"python": "{}.{}".format(*sys.version_info)}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            held[name] = metadata.version(name)
    held["vla_jax"] = f"{held.get('vla_jax', 'not installed')} (sources {sources_digest()})"
    told = gather_json(held)
    names = sorted({name for of in told for name in of if len({other.get(name) for other in told}) > 1})
    if names:
        says = lambda name: ", ".join(f"{told[i].get(name, 'missing')} on process {i}" for i in _one_of_each([of.get(name) for of in told]))
        raise UserError(
            f"the processes run different software: {'; '.join(f'{name} is {says(name)}' for name in names)}. Install the same commit with its constraints.txt on all."
        )


def _one_of_each(values: list) -> list[int]:
    """Where each value occurs first."""
    return sorted({value: i for i, value in reversed(list(enumerate(values)))}.values())


@contextlib.contextmanager
def together(doing: str) -> Iterator[None]:
    """A block that every process runs; all leave it together. What goes wrong on one is raised on all, so that none waits for a process that has
    ended: as a UserError where it is one somewhere, else as one that may pass."""
    problem: BaseException | None = None
    try:
        yield
    except Exception as e:
        problem = e
    if process_count() > 1:
        import numpy as np
        from jax.experimental import multihost_utils

        wrong = isinstance(problem, OSError) and problem.filename is not None and problem.errno in WRONG_PATH
        final = wrong or isinstance(problem, UserError) and not problem.passes
        text = f"{type(problem).__name__}: {problem}" if problem and not isinstance(problem, UserError) else str(problem or "")
        line = np.frombuffer((b"2" if final else b"1" if problem else b"0") + text.encode()[:2000].ljust(2000, b"\0"), np.uint8)
        said = [bytes(row).rstrip(b"\0").decode("utf-8", "replace") for row in np.asarray(multihost_utils.process_allgather(line))]
        worst = max(said, key=lambda t: t[0])  # the first of those
        if worst[0] == "2" and not final or worst[0] == "1" and problem is None:
            kind = UserError if worst[0] == "2" else may_pass
            raise kind(f"{doing} failed on process {said.index(worst)}: {worst[1:]}") from problem
    if problem is not None:
        raise problem


def blind(folder: Any, wait_s: float) -> list[int]:
    """The processes that do not see within wait_s what process 0 writes into `folder`, a path: none where it is the same place for all. Every process
    calls it; a network's folder may be listed late. Raises: UserError."""
    if process_count() == 1:
        return []
    file = folder / f".shared-{broadcast_json(secrets.token_hex(8))}"
    with together(f"opening {folder}"):
        if is_main():
            file.write_text("Here for a moment, to see that all processes share this folder.")
    try:
        with together(f"opening {folder}"):
            until = time.monotonic() + wait_s
            while not (seen := file.exists()) and time.monotonic() < until:
                time.sleep(0.2)
        return [i for i, sees in enumerate(gather_json(seen)) if not sees]
    finally:
        if is_main():
            file.unlink()


def broadcast_json(value: Any = None) -> Any:
    """Process 0's value on every process; through JSON on process 0 too, so that all see the same types."""
    text = json.dumps(value if is_main() else None)
    if process_count() > 1:
        import numpy as np
        from jax.experimental import multihost_utils

        data = np.frombuffer(text.encode(), np.uint8)
        size = int(multihost_utils.broadcast_one_to_all(np.int32(data.size)))  # the others must offer the same shape
        data = data if is_main() else np.zeros(size, np.uint8)
        text = bytes(np.asarray(multihost_utils.broadcast_one_to_all(data))).decode()
    return json.loads(text)


def gather_json(value: Any) -> list:
    """The values of all processes, in their order, on every process; through JSON."""
    mine = json.dumps(value).encode()
    if process_count() == 1:
        return [json.loads(mine)]
    import numpy as np
    from jax.experimental import multihost_utils

    sizes = np.asarray(multihost_utils.process_allgather(np.int32(len(mine)))).reshape(-1).tolist()
    padded = np.frombuffer(mine.ljust(max(sizes), b"\0"), np.uint8)
    lines = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(sizes), -1)
    return [json.loads(bytes(line[:n])) for line, n in zip(lines, sizes)]
