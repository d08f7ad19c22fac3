"""Generating action tokens: one pass over the prefix, then one token at a time from cached keys and values."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from vla_jax.models import vla
from vla_jax.models.layers import cap
from vla_jax.models.presets import VLAConfig
from vla_jax.tokens.sequence import Layout
from vla_jax.types import Batch


@dataclasses.dataclass(frozen=True)
class Language:
    """What a layout lets a model say after the prompt: `opening`, action ids as the grammar has them, `closing`.

    ids: i32[v], id of each action token; after, count: i32[s v], see tokens.grammar.Grammar.
    """

    ids: np.ndarray
    after: np.ndarray
    count: np.ndarray
    opening: tuple[int, ...]
    closing: tuple[int, ...]

    @classmethod
    def of(cls, layout: Layout) -> Language:
        return cls(layout.ids, layout.grammar.after, layout.grammar.count, layout.opening, layout.closing)

    def longest(self, numbers: int) -> int:
        """The most ids of an answer with this many numbers."""
        return len(self.opening) + numbers * len(self.after) + len(self.closing)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """temperature 0: always the likeliest token. top_k: only among so many of the likeliest that are allowed (0: all)."""

    temperature: float = 0.0
    top_k: int = 0


GREEDY = Sampling()


def _pick(scores, sampling: Sampling, key):
    """i32[b] of scores f32[b v], which are -inf where a token is not allowed."""
    if not sampling.temperature:
        return jnp.argmax(scores, axis=-1)
    if sampling.top_k:
        least = jax.lax.top_k(scores, min(sampling.top_k, scores.shape[-1]))[0][:, -1:]
        scores = jnp.where(scores >= least, scores, -jnp.inf)
    return jax.random.categorical(key, scores / sampling.temperature, axis=-1)


def generate(cfg: VLAConfig, params: dict, batch: Batch, *, steps: int, language: Language, budget, sampling: Sampling = GREEDY, key=None):
    """Decoding within the action language. One sample per row, its prefix at the row's start, then padding. Only the rows of the
    embedding that belong to action tokens are scored, never the whole vocabulary.

    First come the ids of `opening`, then action ids that the grammar allows with what is left of the row's `budget`, then, once it is
    used up exactly, those of `closing`, whose last one fills the row from there on. So every sequence that ends is well formed.

    budget: i32[b], numbers of each row's chunk; key: of the draws, where sampling's temperature is above 0.
    Returns ids i32[b steps] and finished bool[b].
    """
    b, n = batch.tokens.shape
    after, count, ids = jnp.asarray(language.after), jnp.asarray(language.count), jnp.asarray(language.ids)
    need = jnp.where(after >= 0, count + (after > 0), jnp.iinfo(jnp.int32).max)
    opening, closing = jnp.asarray(language.opening, jnp.int32), jnp.asarray(language.closing, jnp.int32)
    prefix = (batch.segment > 0).sum(axis=1)
    hidden, cache = vla.prefill(cfg, params, batch)
    cache = jax.tree.map(lambda c: jnp.pad(c, [(0, 0), (0, 0), (0, steps), (0, 0), (0, 0)]), cache)
    rows, begin = vla.embedding(params)[ids], len(opening)

    def choose(t, h, state, left, closed):
        """The token at place t, and where that leads: (token, state, left, closed), each i32[b]."""
        allowed = need[state] <= left[:, None]
        scores = cap(h.astype(jnp.float32) @ rows.T, cfg.language.logit_cap)
        action = _pick(jnp.where(allowed, scores, -jnp.inf), sampling, None if key is None else jax.random.fold_in(key, t))
        full = (left == 0) & (state == 0)
        token = jnp.where(full, closing[jnp.minimum(closed, len(closing) - 1)], ids[action])
        acts = ~full & (t >= begin)
        if begin:
            token = jnp.where(t < begin, opening[jnp.minimum(t, begin - 1)], token)
        left = left - jnp.where(acts, count[state, action], 0)
        state = jnp.where(acts, after[state, action], state)
        return token.astype(jnp.int32), state, left, closed + (full & (t >= begin))

    def body(carry):
        t, token, walk, out, cache = carry
        slots = jnp.arange(n + steps)
        visible = (slots[None] < prefix[:, None]) | ((slots[None] >= n) & (slots[None] <= n + t))
        h, cache = vla.decode_step(cfg, params, token, prefix + t, visible, cache, n + t)
        token, *walk = choose(t + 1, h, *walk)
        return t + 1, token, tuple(walk), out.at[:, t + 1].set(token, mode="drop"), cache

    last_hidden = jnp.take_along_axis(hidden, (prefix - 1)[:, None, None], axis=1)[:, 0]
    nothing = jnp.zeros(b, jnp.int32)
    token, *walk = choose(jnp.int32(0), last_hidden, nothing, jnp.asarray(budget), nothing)
    out = jnp.full((b, steps), closing[-1], jnp.int32).at[:, 0].set(token)
    going = lambda carry: (carry[0] < steps - 1) & jnp.any(carry[2][2] < len(closing))
    _, _, (_, _, closed), out, _ = jax.lax.while_loop(going, body, (jnp.int32(0), token, tuple(walk), out, cache))
    return out, closed >= len(closing)


def integrate(cfg: VLAConfig, params: dict, batch: Batch, key, *, shape: tuple[int, int], steps: int):
    """Chunks f32[b k a] by the action expert: from noise (time 1) to actions (time 0) in `steps` steps of Euler's method. The prompt is
    read once; each step sees its keys and values. One sample per row; shape: (k, a)."""
    _, kv = vla.prefill(cfg, params, batch)
    noise = jax.random.normal(key, (len(batch.tokens), 1, *shape), jnp.float32)

    def step(i, x):
        time = jnp.full(x.shape[:2], 1 - i / steps, jnp.float32)
        return x - vla.velocity(cfg, params, kv, batch, x, time) / steps

    return jax.lax.fori_loop(0, steps, step, noise)[:, 0]
