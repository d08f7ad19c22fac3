"""Measurements, each as a ratio against a ceiling taken in the same run. A result is one JSON-able dict."""

from __future__ import annotations

import functools
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from vla_jax import paths


def step(config, *, repeats: int, where: str = "config", peer: str = "", peer_arguments: str = "", **options) -> Iterator[dict]:
    """The training step of a config, others beside it, and another program's; options as `bench.step.run` takes them. Yields results as
    they come. Raises: UserError as training would."""
    from vla_jax.bench import step as measured

    # first, while the device's memory is not ours yet: JAX takes most of it, and keeps it
    theirs = measured.peer(peer, peer_arguments) if peer else []
    first = None
    for line in measured.run(config, repeats=repeats, where=where, **options):
        first = first or line
        yield {"bench": "step", **line, "repeats": repeats, **stamp()}
    for line in theirs:
        if "samples_s" in line:
            line["ours_to_peer"] = round(first["samples_per_s"] / line["samples_s"], 3)
        yield {"bench": "step_peer", **line, **stamp()}


def data(root: str, *, repeats: int, **options) -> Iterator[dict]:
    """The data path on generated datasets, ours and others'; options as `bench.data.run` takes them.

    Yields results as they come. Raises: UserError when they cannot be made here.
    """
    from vla_jax.bench import data as measured

    for line in measured.run(root, repeats=repeats, **options):
        yield {"bench": "data", **line, "repeats": repeats, **stamp()}


def tokens(*, repeats: int) -> Iterator[dict]:
    """Action tokenizers. Yields results as they come. Raises: UserError when what they are measured beside is not installed."""
    from vla_jax.bench import tokens as measured

    for line in measured.run(repeats=repeats):
        yield {"bench": "tokens", **line, "repeats": repeats, **stamp()}


def decode(*, repeats: int, **options) -> Iterator[dict]:
    """Decoding against the bound of memory; options as `bench.decode.run` takes them. Yields results as they come. Raises: UserError."""
    from vla_jax.bench import decode as measured

    for line in measured.run(repeats=repeats, **options):
        yield {"bench": "decode", **line, "repeats": repeats, **stamp()}


def serve(export: str, **options) -> Iterator[dict]:
    """The server beside the bare model; options as `bench.serve.run` takes them. Yields results as they come. Raises: UserError."""
    from vla_jax.bench import serve as measured

    for line in measured.run(export, **options):
        yield {"bench": "serve", **line, **stamp()}


def attention(*, repeats: int) -> Iterator[dict]:
    """Attention's kernels beside plain XLA. Yields results as they come."""
    from vla_jax.bench import attention as measured

    for line in measured.run(repeats=repeats):
        yield {"bench": "attention", **line, "repeats": repeats, **stamp()}


def seconds(repeats: int, call, *args) -> float:
    """What call(*args) takes, its results waited for: the median, after one call that compiles."""
    import jax

    times = []
    for _ in range(repeats + 1):
        before = time.perf_counter()
        jax.block_until_ready(call(*args))
        times.append(time.perf_counter() - before)
    return median(times[1:])


def product_rate(dtype, repeats: int) -> float:
    """FLOP/s of this device's own matrix product: several in a row of 8192 x 8192 (2048 on CPU), so that the call has no part in it."""
    chain, x, flops = _products(dtype)
    return flops / seconds(repeats, chain, x)


@functools.cache
def _products(dtype):
    """(some products in a row, of what, how many FLOP): compiled once, though their rate is taken often."""
    import jax

    side, times = (2048, 2) if jax.default_backend() == "cpu" else (8192, 20)
    x = jax.random.normal(jax.random.key(0), (side, side), dtype) * side**-0.5
    chain = jax.jit(lambda x: jax.lax.fori_loop(0, times, lambda _, y: y @ x, x))
    return chain, x, 2 * side**3 * times


def stamp() -> dict:
    """When, on what and with which code."""
    model = (
        next((x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")), "")
        if Path("/proc/cpuinfo").is_file()
        else ""
    )
    return {"time": int(time.time()), "machine": f"{model or platform.processor()} x {os.cpu_count()}", "commit": paths.commit()}
