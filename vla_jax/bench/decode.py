"""Decoding of action tokens against the bound of memory: each token has to read the decoder's weights and the cache once."""

from __future__ import annotations

from collections.abc import Iterator

from vla_jax.bench.run import seconds
from vla_jax.types import UserError

_VOCAB, _SHORT = 1024, 8  # action ids; the shorter of the two lengths whose difference is timed


def run(*, repeats: int, preset: str, dtype: str, rows: tuple[int, ...], prompt: int, tokens: int) -> Iterator[dict]:
    """For each number of rows: time of one more token, of the first pass, and the ratio of the first to its bound.

    A token's time is the difference of decoding `tokens` and 8 ids, so that neither the prompt nor the call has a part in it. The bound:
    bytes of the decoder's layers, of the action rows of the embedding and of the keys and values that a token sees, over the best of two plain
    readers of memory in this run (a sum, and a copy, whose reads and writes both count). Random weights. Raises: UserError.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from vla_jax import tree
    from vla_jax.models import decode, incremental, presets, vla
    from vla_jax.types import Batch

    if tokens < 4 * _SHORT:
        raise UserError(f"--tokens {tokens} leaves too little to be timed; give {4 * _SHORT} or more")
    if prompt <= 256:
        raise UserError(f"--prompt {prompt} has no room for the 256 tokens of an image; give more")
    patch = presets.parts(preset)[0].patch
    cfg = presets.resolve(preset, vocab=4096, image_size=16 * patch, state_dim=0, dtype=dtype, remat="none")
    params = jax.jit(lambda k: vla.cast(cfg, vla.init(cfg, k)))(jax.random.key(0))
    language = decode.Language(
        np.arange(2048, 2048 + _VOCAB, dtype=np.int32), np.zeros((1, _VOCAB), np.int32), np.ones((1, _VOCAB), np.int32), (), (1,)
    )
    flat, size, c = tree.flatten(params), jnp.dtype(dtype).itemsize, cfg.language
    weights = sum(x.nbytes for p, x in flat.items() if p.startswith("llm/layers")) + _VOCAB * c.width * size
    generate = jax.jit(
        lambda p, layers, batch, budget, steps: decode.generate(
            cfg, p, batch, steps=steps, language=language, budget=budget, layers=layers
        )[0],
        static_argnums=4,
    )
    layers = jax.jit(lambda p: incremental.prepare(cfg, p))(params)
    speed = _bandwidth(repeats)
    for b in rows:
        ids = np.full((b, prompt), 5, np.int32)
        ids[:, : cfg.tokens_per_image] = -1
        place = np.broadcast_to(np.arange(prompt, dtype=np.int32), (b, prompt))
        given = {"images": np.zeros((b, 1, cfg.image_size, cfg.image_size, 3), np.uint8), "tokens": ids, "position": place}
        given |= {"segment": np.ones_like(ids), "block": np.zeros_like(ids), "state": np.zeros((b, 1, 1), np.float32)}
        batch = jax.device_put(Batch(**given))
        cost = {n: seconds(repeats, generate, params, layers, batch, np.full((b, 1), n, np.int32), n) for n in (_SHORT, tokens)}
        step = (cost[tokens] - cost[_SHORT]) / (tokens - _SHORT)
        cache = b * (prompt + tokens) * c.depth * 2 * c.kv_heads * c.head_dim * size
        bound = (weights + cache) / speed
        yield {
            "preset": preset,
            "dtype": dtype,
            "device": jax.devices()[0].device_kind,
            "rows": b,
            "prompt": prompt,
            "ms_per_token": round(step * 1e3, 3),
            "bound_ms": round(bound * 1e3, 3),
            "ratio": round(bound / step, 3),
            "tokens_per_s": round(b / step, 1),
            "first_pass_ms": round((cost[_SHORT] - _SHORT * step) * 1e3, 1),
            "gigabytes_per_token": round((weights + cache) / 1e9, 3),
            "ceiling_gb_s": round(speed / 1e9, 1),
        }


def _bandwidth(repeats: int) -> float:
    """Bytes a second of this device's memory."""
    import jax
    import jax.numpy as jnp

    count = (1 << 30) if jax.default_backend() != "cpu" else 1 << 27
    x = jnp.ones(count, jnp.float32)
    total, copy = jax.jit(jnp.sum), jax.jit(lambda x: x + 1)
    return max(x.nbytes / seconds(repeats, total, x), 2 * x.nbytes / seconds(repeats, copy, x))
