"""Generating action tokens: one pass over the prefix, then one token at a time from cached keys and values."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from vla_jax.models import vla
from vla_jax.models.presets import VLAConfig
from vla_jax.types import Batch


def generate(cfg: VLAConfig, params: dict, batch: Batch, *, steps: int, lengths, budget, first: int, last: int, eos: int):
    """Greedy decoding within the action language. One sample per row, its prefix at the row's start, then padding.

    A token is allowed when it is an action id (first <= id < last) that does not exceed what is left of the row's
    `budget` of coefficients, or, once the budget is used up exactly, `eos`. So every sequence that ends is well formed.

    lengths: i32[last - first], coefficients each action id stands for; budget: i32[b], coefficients of each row's chunk.
    Returns ids i32[b steps], filled with `eos` after a row's end, and finished bool[b].
    """
    b, n = batch.tokens.shape
    lengths, prefix = jnp.asarray(lengths), (batch.segment > 0).sum(axis=1)
    hidden, cache = vla.prefill(cfg, params, batch)
    cache = jax.tree.map(lambda c: jnp.pad(c, [(0, 0), (0, 0), (0, steps), (0, 0), (0, 0)]), cache)
    action_rows = vla.embedding(params)[first:last]

    def choose(h, left):
        h = h.astype(jnp.float32)
        allowed = lengths[None] <= left[:, None]
        token = jnp.argmax(jnp.where(allowed, h @ action_rows.T, -jnp.inf), axis=-1) + first
        # `eos` is the only continuation of a full chunk, and never one of an unfinished chunk
        return jnp.where(left == 0, eos, token).astype(jnp.int32)

    def body(carry):
        t, token, left, out, cache = carry
        slots = jnp.arange(n + steps)
        visible = (slots[None] < prefix[:, None]) | ((slots[None] >= n) & (slots[None] <= n + t))
        h, cache = vla.decode_step(cfg, params, token, prefix + t, visible, cache, n + t)
        left = left - jnp.where(token == eos, 0, lengths[jnp.clip(token - first, 0, last - first - 1)])
        token = choose(h, left)
        return t + 1, token, left, out.at[:, t + 1].set(token, mode="drop"), cache

    last_hidden = jnp.take_along_axis(hidden, (prefix - 1)[:, None, None], axis=1)[:, 0]
    token = choose(last_hidden, budget)
    out = jnp.full((b, steps), eos, jnp.int32).at[:, 0].set(token)
    carry = (jnp.int32(0), token, budget, out, cache)
    _, token, left, out, _ = jax.lax.while_loop(lambda c: (c[0] < steps) & jnp.any(c[1] != eos), body, carry)
    return out, token == eos
