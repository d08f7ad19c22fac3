"""The decoder token by token: the same arithmetic as decoder.py, with weights and cache laid out so that each is read once and never copied.

A scan over stacked layers, or a slice of a weight inside the loop of decoding, is a copy of it for every token.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from vla_jax.models.layers import cap, rms, rope
from vla_jax.models.presets import VLAConfig
from vla_jax.sharding import constrain


def prepare(cfg: VLAConfig, params: dict) -> list[dict]:
    """Of each layer, plain matrices in the compute dtype, q [d heads*hd], k and v [d kv*hd], out [heads*hd d], gate and up [d mlp],
    down [mlp d], and its norms' scales in float32. params: without adapters."""
    c, layers = cfg.language, params["llm"]["layers"]
    flat = lambda w: w.swapaxes(0, 1).reshape(c.width, -1)

    def layer(i):
        attn, (gate, up) = layers["attn"], layers["mlp"]["gating_einsum"][i]
        k, v = attn["kv_einsum"]["w"][i]
        out = {"q": flat(attn["q_einsum"]["w"][i]), "k": flat(k), "v": flat(v), "gate": gate, "up": up}
        out |= {"out": attn["attn_vec_einsum"]["w"][i].reshape(-1, c.width), "down": layers["mlp"]["linear"][i]}
        norms = {name: p["scale"][i] for name, p in layers.items() if name.endswith("_norm")}
        return {name: w.astype(jnp.dtype(cfg.dtype)) for name, w in out.items()} | norms

    return [layer(i) for i in range(c.depth)]


def open_cache(cache, slots: int) -> list[tuple]:
    """Keys and values of a prompt, (k, v) each [layers b n kv hd] -> of each layer (k, v), each [b kv n+slots hd], divided over the
    mesh as rows and heads are."""
    fill = lambda x: jnp.pad(x.swapaxes(1, 2), [(0, 0), (0, 0), (0, slots), (0, 0)])
    place = lambda x: constrain(fill(x), ("batch", "heads", None, None))
    return [(place(k), place(v)) for k, v in zip(*cache)]


def visible(seen, steps: int, t):
    """bool[b g n + steps*g]: what the token of each sample at place t sees: its prompt (seen bool[b g n]), and of the slots behind the row, g
    a step, its own up to and with t."""
    b, g, _ = seen.shape
    slot = jnp.arange(steps * g)
    own = (slot % g == jnp.arange(g)[:, None]) & (slot // g <= t)
    return jnp.concatenate([seen, jnp.broadcast_to(own, (b, *own.shape))], axis=-1)


def step(cfg: VLAConfig, layers: list[dict], x, position, visible, cache: list[tuple], slot):
    """Embedded tokens x [b g d] at position i32[b g], which see the slots visible bool[b g s], themselves included; their keys and values
    are written from `slot` on. -> (x before the final norm, cache)."""
    c, b, g = cfg.language, *x.shape[:2]
    group, written = c.heads // c.kv_heads, []
    heads = lambda y, n: y.reshape(b, g, n, c.head_dim)
    after = lambda w, name, y: rms(y, w[name]) if c.post_norms else y
    seen = visible[:, None, None]  # [b 1 1 g s]: of every head and every query that shares it
    for w, (k, v) in zip(layers, cache):
        y = rms(x, w["pre_attention_norm"])
        q = rope(heads(y @ w["q"], c.heads), position) * c.head_dim**-0.5
        new = rope(heads(y @ w["k"], c.kv_heads), position), heads(y @ w["v"], c.kv_heads)
        k, v = (jax.lax.dynamic_update_slice_in_dim(old, n.swapaxes(1, 2).astype(old.dtype), slot, axis=2) for old, n in zip((k, v), new))
        written.append((k, v))
        q = q.reshape(b, g, c.kv_heads, group, c.head_dim).transpose(0, 2, 3, 1, 4)
        scores = cap(jnp.einsum("bkqgh,bksh->bkqgs", q, k, preferred_element_type=jnp.float32), c.attn_cap)
        probs = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(jnp.float32).min), axis=-1).astype(v.dtype)
        y = jnp.einsum("bkqgs,bksh->bkqgh", probs, v).transpose(0, 3, 1, 2, 4).reshape(b, g, -1)
        x = x + after(w, "post_attention_norm", y @ w["out"])
        y = rms(x, w["pre_ffw_norm"])
        y = jax.nn.gelu(y @ w["gate"], approximate=True) * (y @ w["up"])
        x = x + after(w, "post_ffw_norm", y @ w["down"])
    return x, written
