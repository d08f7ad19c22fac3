"""Attention's kernels on this device, each beside plain XLA on the same inputs, against the device's own matrix product."""

from __future__ import annotations

from collections.abc import Iterator

# name, rows, length, heads, key/value heads, head_dim, whether masked: the decoder and the encoder of preset 3b, longer rows, preset 300m
SHAPES = (
    ("decoder 3b", 8, 1024, 8, 1, 256, True),
    ("decoder 3b", 4, 2048, 8, 1, 256, True),
    ("decoder 300m", 16, 1024, 8, 1, 128, True),
    ("encoder 3b", 24, 256, 16, 16, 72, False),
)


def run(*, repeats: int) -> Iterator[dict]:
    """Forward and backward in bfloat16, packed rows of four samples. ratio: of the two products forward and four backward, over the full square, to
    the device's own product; what a kernel computes again or skips is not counted. Kernels that this platform lacks are left out."""
    import functools

    import jax
    import jax.numpy as jnp
    import numpy as np

    from vla_jax.bench.run import product_rate, seconds
    from vla_jax.models import attention, vla

    ceiling = product_rate(jnp.bfloat16, repeats)
    for name, b, n, heads, kv, hd, masked in SHAPES:
        keys = jax.random.split(jax.random.key(1), 4)
        q, g = (jax.random.normal(k, (b, n, heads, hd), jnp.bfloat16) for k in keys[:2])
        k, v = (jax.random.normal(key, (b, n, kv, hd), jnp.bfloat16) for key in keys[2:])
        segment = np.repeat(np.arange(1, 5), n // 4)[None].repeat(b, 0)
        block = np.maximum(np.arange(n // 4) - n // 8, 0)[None].repeat(b * 4, 0).reshape(b, n)  # half a sample is its prompt
        mask = jax.jit(vla.mask)(segment, block) if masked else None
        names = ["xla", *(x for x in ("cudnn", "splash") if not attention.why_not(x, attention.platform(), hd, q.dtype, 0.0))]
        times = {}
        for kernel in names:
            one = functools.partial(attention.attention, mask=mask, kernel=kernel)
            step = jax.jit(lambda q, k, v, g, one=one: jax.vjp(one, q, k, v)[1](g))
            times[kernel] = seconds(repeats, step, q * hd**-0.5, k, v, g)
            flops = 2 * 6 * b * heads * n * n * hd
            yield {
                "shape": name,
                "rows": b,
                "length": n,
                "heads": [heads, kv, hd],
                "kernel": kernel,
                "ms": round(times[kernel] * 1e3, 3),
                "speedup": round(times["xla"] / times[kernel], 2),
                "ratio": round(flops / times[kernel] / ceiling, 3),
                "ceiling_tflops": round(ceiling / 1e12, 2),
                "device": jax.devices()[0].device_kind,
            }
