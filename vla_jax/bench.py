"""Measurements, each as a ratio against a ceiling taken in the same run; one JSON-able dict per call."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from pathlib import Path
from statistics import median

import numpy as np

from vla_jax import __version__
from vla_jax.config import Config


def run(what: str, config: Config, *, repeats: int, where: str = "config") -> dict:
    """what: data | step. Raises: UserError as training would."""
    measured = {"data": _data, "step": _step}[what](config, repeats, where)
    return {"bench": what, "config": where, **measured, "repeats": repeats, "time": int(time.time()), **_machine()}


def _machine() -> dict:
    here = Path(__file__).parent
    asked = subprocess.run(["git", "-C", str(here), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    model = (
        next((x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")), "")
        if Path("/proc/cpuinfo").is_file()
        else ""
    )
    return {"machine": f"{model or platform.processor()} x {os.cpu_count()}", "commit": asked.stdout.strip() or __version__}


def _data(config: Config, repeats: int, where: str) -> dict:
    """Frames a second of the stream, against a bare loop that only reads, decodes and resizes the same frames."""
    from vla_jax.data import sample, source
    from vla_jax.data.stream import Stream
    from vla_jax.models import presets

    src = source.open_source(config, tokens_per_image=presets.tokens_per_image(config.model.preset, config.data.image_size))
    reader, batches = sample.ShardReader(), 20
    bare, ours, used = [], [], []
    for _ in range(repeats):
        with Stream(src) as stream:
            next(stream)
            cpu, wall = time.process_time(), time.perf_counter()
            got = [next(stream)[0] for _ in range(batches)]
            ours.append((time.perf_counter() - wall, time.process_time() - cpu, sum(int((b.dataset >= 0).sum()) for b in got)))
            used.append(np.mean([(b.segment > 0).mean() for b in got]))
        dataset, _, place = src.sampler.draw(np.arange(ours[-1][2]))
        cpu, wall = time.process_time(), time.perf_counter()
        for d, i in zip(dataset, place):
            sample.make(
                src.indexes[d],
                int(src.frames[d][i]),
                steps=src.steps(d),
                dataset=int(d),
                sample_id=0,
                size=config.data.image_size,
                wanted=config.data.views,
                reader=reader,
            )
        bare.append((time.perf_counter() - wall, time.process_time() - cpu, len(dataset)))
    reader.close()
    rate = lambda rows, i: median(n / row[i] for *row, n in rows)
    return {
        "samples_per_s": round(rate(ours, 0), 1),
        "samples_per_cpu_s": round(rate(ours, 1), 1),
        "ceiling_per_cpu_s": round(rate(bare, 1), 1),
        "ratio_per_cpu": round(rate(ours, 1) / rate(bare, 1), 3),
        "slots_used": round(float(median(used)), 3),
    }


def _step(config: Config, repeats: int, where: str) -> dict:
    """Model FLOP/s of the training step (matrix products of real tokens, no recompute) against this machine's own matrix
    product of 2048 x 2048."""
    import jax
    import jax.numpy as jnp

    from vla_jax import tree
    from vla_jax.data import feed
    from vla_jax.data.stream import Stream
    from vla_jax.train import loop, optim, state, step

    ready = loop.prepare(config, Path("."), where=where) if config.tokens.action_path else loop.prepare(config, _scratch(), where=where)
    tx, names = optim.make(config.train), ready.source.names
    _, place = state.shardings(ready.cfg, tx, ready.mesh, with_ema=config.train.ema > 0)
    current = state.create(ready.cfg, tx, ready.mesh, seed=0, with_ema=config.train.ema > 0)
    train_step = step.make_train_step(config, ready.cfg, tx, ready.mesh, place, datasets=len(names))
    with Stream(ready.source) as stream:
        batch = next(stream)[0]
    flat = tree.flatten(current.params)
    decoder = sum(v.size for k, v in flat.items() if k.startswith("llm/layers"))
    vision = sum(v.size for k, v in flat.items() if k.startswith("img/Transformer"))
    tokens, targets = int((batch.segment > 0).sum()), int((batch.loss_weight > 0).sum())
    flops = 6 * (decoder * tokens + vision * int((batch.tokens == -1).sum()) + flat["llm/embedder/input_embedding"].size * targets)
    device = feed.to_device(batch, ready.mesh)
    square = jnp.ones((2048, 2048), config.model.dtype)
    multiply = jax.jit(lambda a: a @ a)
    times, ceiling = [], []
    with jax.set_mesh(ready.mesh):
        for _ in range(repeats + 1):
            before = time.perf_counter()
            current, measured = train_step(current, device)
            jax.block_until_ready((current.params, measured))
            times.append(time.perf_counter() - before)
            before = time.perf_counter()
            multiply(square).block_until_ready()
            ceiling.append(2 * 2048**3 / (time.perf_counter() - before))
    rate = flops / median(times[1:])
    return {
        "step_ms": round(median(times[1:]) * 1e3, 1),
        "samples_per_s": round(int((batch.dataset >= 0).sum()) / median(times[1:]), 1),
        "model_gflops": round(rate / 1e9, 1),
        "ceiling_gflops": round(median(ceiling[1:]) / 1e9, 1),
        "ratio": round(rate / median(ceiling[1:]), 3),
        "first_step_s": round(times[0], 1),
        "devices": jax.device_count(),
    }


def _scratch() -> Path:
    import tempfile

    return Path(tempfile.mkdtemp(prefix="vla-jax-bench-"))
