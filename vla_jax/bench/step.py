"""The training step against this machine's own matrix product."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median

from vla_jax.config import Config


def run(config: Config, repeats: int, where: str) -> dict:
    """Model FLOP/s of the training step (matrix products of real tokens, no recompute) against this machine's own matrix
    product."""
    import jax

    from vla_jax import tree
    from vla_jax.bench.run import product_rate
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
    times, ceiling = [], []
    with jax.set_mesh(ready.mesh):
        for _ in range(repeats + 1):
            before = time.perf_counter()
            current, measured = train_step(current, device)
            jax.block_until_ready((current.params, measured))
            times.append(time.perf_counter() - before)
            ceiling.append(product_rate(config.model.dtype, 1))
    rate = flops / median(times[1:])
    model, pack = config.model, config.pack
    return {
        "preset": model.preset,
        "dtype": model.dtype,
        "remat": model.remat,
        "attention": model.attention,
        "rows": [pack.rows, pack.length],
        "step_ms": round(median(times[1:]) * 1e3, 1),
        "samples_per_s": round(int((batch.dataset >= 0).sum()) / median(times[1:]), 1),
        "model_gflops": round(rate / 1e9, 1),
        "ceiling_gflops": round(median(ceiling[1:]) / 1e9, 1),
        "ratio": round(rate / median(ceiling[1:]), 3),
        "first_step_s": round(times[0], 1),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }


def _scratch() -> Path:
    import tempfile

    return Path(tempfile.mkdtemp(prefix="vla-jax-bench-"))
