"""`vla-jax serve` under load beside the bare model: several clients, requests that are wrong in every way mixed in, memory at intervals.

Every answer is compared with what the policy itself says to the same observation in this process, so an answer that is lost, late, or
another's is counted as such.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np

from vla_jax.deploy import wire
from vla_jax.deploy.client import Client, ServerError
from vla_jax.deploy.counters import resident_bytes
from vla_jax.deploy.policy import Policy
from vla_jax.types import UserError

_KINDS = 8  # different observations
_CLOSE = 1e-4  # of a batch's answer to a single one's, in widths of the training range


def run(export: str, *, robot: str = "", requests: int = 4000, clients: int = 8, wrong: float = 0.1, max_batch: int = 8) -> Iterator[dict]:
    """Yields what the bare model takes, what is served under load, and the memory. Raises: UserError."""
    policy = Policy.load(export, robot=robot)
    seen = observations(policy)
    policy.act(seen[:1])
    bare = []
    for i in range(max(50, min(requests // 10, 500))):
        started = time.perf_counter()
        policy.act([seen[i % _KINDS]])
        bare.append(time.perf_counter() - started)
    expected = [policy.act([o])[0][0] for o in seen]
    yield {"what": "bare", "robot": policy.card.name, "calls": len(bare), **_percentiles(bare)}
    with server(export, robots=policy.card.name, max_batch=max_batch, more=("--no-limits",)) as (url, pid):
        for at_once, asked, share in (
            (1, max(requests // 10, 20), 0.0),
            (clients, requests, wrong),
        ):  # one alone: what serving itself costs
            yield _load(policy, url, pid, seen, expected, asked, at_once, share, float(np.median(bare)))


def observations(policy: Policy) -> list[dict]:
    """Some that differ, of noise, in the robot's ranges."""
    rng, out, s = np.random.default_rng(0), [], policy.stats["state"]
    for i in range(_KINDS):
        side = policy.image_size + i  # resized by the server
        images = {v: rng.integers(0, 256, (side, side, 3), np.uint8) for v in policy.views}
        state = rng.uniform(s.q01, s.q99, (policy.history, len(s.q01))).astype(np.float32)
        out.append({"images": images, "state": state if policy.history > 1 else state[0], "prompt": f"push block {i}"})
    return out


@contextlib.contextmanager
def server(export: str, *, robots: str, max_batch: int, more: tuple[str, ...] = (), wait_s: float = 600.0):
    """(url, process id) of a `vla-jax serve` of its own. Raises: UserError when it does not become ready; RuntimeError when it does not end well."""
    command = [sys.executable, "-m", "vla_jax.cli", "serve", export, "--port=0", f"--robots={robots}", f"--max-batch={max_batch}", *more]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    url, said, ready = "", [], threading.Event()

    def read() -> None:
        nonlocal url
        for line in process.stderr:
            said.append(line)
            if "listening on " in line:
                url = line.split("listening on ")[1].strip()
            if ": ready after " in line:
                ready.set()
        ready.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        if not ready.wait(wait_s) or process.poll() is not None or not url:
            raise UserError(f"the server did not become ready: {''.join(said)[-2000:]}")
        yield url, process.pid
        process.send_signal(signal.SIGTERM)
        if (code := process.wait(60)) != 0:
            raise RuntimeError(f"the server ended with {code}: {''.join(said)[-2000:]}")
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        reader.join(5)
        process.stderr.close()


def _load(policy, url, pid, seen, expected, requests, clients, wrong, bare_s) -> dict:
    lock, counts, took = threading.Lock(), collections.Counter(), []
    memory, done = [resident_bytes(pid)], threading.Event()
    stats, each = policy.stats["action"], requests // clients
    width = np.maximum(stats.q99 - stats.q01, 1e-6)

    def client(number: int) -> None:
        rng, mine, times = np.random.default_rng([1, number]), collections.Counter(), []
        with Client(url, timeout_s=120) as link:
            for _ in range(each):
                which = int(rng.integers(_KINDS))
                if rng.random() < wrong:
                    mine[_wrong(link, seen[which], rng)] += 1
                    continue
                started = time.perf_counter()
                try:
                    reply = link.act(seen[which])
                except (ServerError, TimeoutError) as e:
                    mine[f"lost: {getattr(e, 'code', 'timeout')}"] += 1
                    continue
                times.append(time.perf_counter() - started)
                same = reply["well_formed"] and np.abs((reply["actions"] - expected[which]) / width).max() < _CLOSE
                mine["answered" if same else "answered differently"] += 1
                mine["batched"] += reply["server_timing"]["batch"] > 1
        with lock:
            counts.update(mine)
            took.extend(times)

    def watch() -> None:
        while not done.wait(0.25):
            memory.append(resident_bytes(pid))

    watching = threading.Thread(target=watch)
    watching.start()
    started = time.perf_counter()
    try:
        with concurrent.futures.ThreadPoolExecutor(clients) as pool:
            list(pool.map(client, range(clients)))
    finally:
        done.set()
        watching.join()
    seconds = time.perf_counter() - started
    quarter = max(len(memory) // 4, 1)
    mb = [round(x / 2**20, 1) for x in (memory[0], max(memory[:quarter]), max(memory[-quarter:]))]
    sound = sum(n for k, n in counts.items() if k.startswith("answered"))
    refused, asked = sum(n for k, n in counts.items() if k.startswith("refused")), each * clients
    made = {"what": "served", "robot": policy.card.name, "clients": clients, "requests": asked, "answered": sound, "refused": refused}
    made |= {"lost": asked - counts["answered"] - refused, "different": counts["answered differently"]}
    made |= {"outcomes": dict(sorted(counts.items())), "per_s": round(asked / seconds, 1), **_percentiles(took)}
    made |= {
        "p50_to_bare": round(float(np.median(took)) / bare_s, 2),
        "rss_mb": {"before": mb[0], "first_quarter": mb[1], "last_quarter": mb[2]},
    }
    return made | {"rss_samples": len(memory), "cores": os.cpu_count()}


def _wrong(link: Client, seen: dict, rng: np.random.Generator) -> str:
    """Sends one of several wrong messages: it must be answered with the error that it deserves, on a connection that stays usable."""
    one = next(iter(seen["images"]))
    kind, message, code = [
        ("random bytes", rng.bytes(int(rng.integers(1, 2000))), "malformed|observation"),
        ("text", "hello", "malformed"),
        ("shape", wire.pack({**seen, "state": np.zeros(99, np.float32)}), "observation"),
        ("dtype", wire.pack({**seen, "images": {**seen["images"], one: np.zeros((8, 8, 3), np.float32)}}), "observation"),
        ("lacking", wire.pack({k: v for k, v in seen.items() if k != "prompt"}), "observation"),
        ("not finite", wire.pack({**seen, "state": np.full_like(seen["state"], np.nan)}), "observation"),
        ("robot", wire.pack({**seen, "robot": "r2d2"}), "observation"),
        ("object array", wire.pack({"state": {b"__ndarray__": True, b"data": b"x", b"dtype": "|O", b"shape": [1]}}), "malformed"),
        ("prompt too long", wire.pack({**seen, "prompt": _words(rng)}), "observation"),
        ("cut short", wire.pack(seen)[: int(rng.integers(1, 400))], "malformed"),
    ][int(rng.integers(10))]
    try:
        answer = link.exchange(message, timeout_s=120)
    except (TimeoutError, OSError) as e:
        return f"lost: {kind}: {type(e).__name__}"
    fits = isinstance(answer, str) and any(answer.startswith(f"vla-jax error {c}: ") for c in code.split("|"))
    return f"refused: {kind}" if fits else f"lost: {kind}: answered with {str(answer)[:80]!r}"


def _words(rng: np.random.Generator) -> str:
    """An instruction that is too long and never came before: nothing that is kept of it may pile up."""
    return "".join(rng.choice(list("abcdefghij klmnop"), int(rng.integers(200, 2000))))


def _percentiles(seconds: list[float]) -> dict[str, float]:
    p50, p90, p99 = np.quantile(np.array(seconds) * 1e3, (0.5, 0.9, 0.99)).round(3)
    return {"p50_ms": float(p50), "p90_ms": float(p90), "p99_ms": float(p99), "max_ms": round(max(seconds) * 1e3, 3)}
