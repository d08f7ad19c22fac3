"""Generating action tokens: one pass over the prefix, then one token at a time from cached keys and values."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from vla_jax.models import incremental, vla
from vla_jax.models.layers import cap, rms
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
    """i32[..] of scores f32[.. v], which are -inf where a token is not allowed."""
    if not sampling.temperature:
        return jnp.argmax(scores, axis=-1)
    if sampling.top_k:
        least = jax.lax.top_k(scores, min(sampling.top_k, scores.shape[-1]))[0][..., -1:]
        scores = jnp.where(scores >= least, scores, -jnp.inf)
    return jax.random.categorical(key, scores / sampling.temperature, axis=-1)


def generate(
    cfg: VLAConfig,
    params: dict,
    batch: Batch,
    *,
    steps: int,
    language: Language,
    budget,
    sampling: Sampling = GREEDY,
    key=None,
    layers: list[dict] | None = None,
):
    """Decoding within the action language, for every sample of every row at once. Only the prompts of `batch` are looked at (what a
    sample says behind its prompt is neither seen nor needed), and only the rows of the embedding that belong to action tokens are
    scored, never the whole vocabulary.

    First come the ids of `opening`, then action ids that the grammar allows with what is left of the sample's `budget`, then, once it
    is used up exactly, those of `closing`, whose last one fills up from there on. So every sequence that ends is well formed.

    budget: i32[b g], numbers of each sample's chunk, 0 where there is none; key: of the draws, where sampling's temperature is above 0;
    layers: what `incremental.prepare` makes of the parameters, if it was made before.
    Returns ids i32[b g steps] and finished bool[b g].
    """
    params, cfg = vla.merged(cfg, params), dataclasses.replace(cfg, lora=None)
    budget, layers = jnp.asarray(budget), layers or incremental.prepare(cfg, params)
    (b, n), g = batch.tokens.shape, budget.shape[1]
    after, count, ids = jnp.asarray(language.after), jnp.asarray(language.count), jnp.asarray(language.ids)
    need = jnp.where(after >= 0, count + (after > 0), jnp.iinfo(jnp.int32).max)
    opening, closing = jnp.asarray(language.opening, jnp.int32), jnp.asarray(language.closing, jnp.int32)
    seen, prefix = vla.prompts(batch.segment, batch.block, g)
    hidden, cache = vla.prefill(cfg, params, batch)
    cache = incremental.open_cache(cache, steps * g)
    rows, begin = vla.embedding(params)[ids].astype(hidden.dtype), len(opening)

    def choose(t, h, state, left, closed):
        """The token at place t, and where that leads: (token, state, left, closed), each i32[b g]."""
        allowed = need[state] <= left[..., None]
        scores = cap(jnp.einsum("bgd,vd->bgv", h, rows, preferred_element_type=jnp.float32), cfg.language.logit_cap)
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
        x = vla.embedding(params)[token].astype(hidden.dtype) * jnp.asarray(cfg.language.width**0.5, hidden.dtype)
        x, cache = incremental.step(cfg, layers, x, prefix + t, incremental.visible(seen, steps, t), cache, n + t * g)
        token, *walk = choose(t + 1, rms(x, params["llm"]["final_norm"]["scale"]), *walk)
        return t + 1, token, tuple(walk), out.at[..., t + 1].set(token, mode="drop"), cache

    last = n - 1 - jnp.argmax(seen[..., ::-1], axis=-1)
    nothing = jnp.zeros((b, g), jnp.int32)
    token, *walk = choose(jnp.int32(0), jnp.take_along_axis(hidden, last[..., None], axis=1), nothing, budget, nothing)
    out = jnp.full((b, g, steps), closing[-1], jnp.int32).at[..., 0].set(token)
    going = lambda carry: (carry[0] < steps - 1) & jnp.any(carry[2][2] < len(closing))
    _, _, (_, _, closed), out, _ = jax.lax.while_loop(going, body, (jnp.int32(0), token, tuple(walk), out, cache))
    return out, closed >= len(closing)


def integrate(cfg: VLAConfig, params: dict, batch: Batch, key, *, chunk: int, dims, steps: int):
    """Chunks f32[b g k a] by the action expert, k = chunk and a its action_dim: from noise (time 1) to actions (time 0) in `steps` steps of
    Euler's method. The prompts are read once; each step sees their keys and values.

    dims: i32[b g], how many numbers each robot has. Where it has none the way to zero is known and not asked for. A number's noise
    depends on its row, sample, step and place alone, not on what else is in the batch.
    """
    params, cfg = vla.merged(cfg, params), dataclasses.replace(cfg, lora=None)
    dims, most = jnp.asarray(dims), cfg.expert.action_dim
    _, kv = vla.prefill(cfg, params, batch)
    draw = lambda *place: jax.random.normal(functools.reduce(jax.random.fold_in, place, key), (most,), jnp.float32)
    for axes in ((None, None, 0), (None, 0, None), (0, None, None)):
        draw = jax.vmap(draw, axes)
    noise = draw(*map(jnp.arange, (*dims.shape, chunk)))  # [b g k a]
    real = jnp.arange(most) < dims[..., None, None]

    def step(i, x):
        now = 1 - i / steps
        x = jnp.where(real, x, now * noise)
        return x - vla.velocity(cfg, params, kv, batch, x, jnp.full(dims.shape, now, jnp.float32)) / steps

    return jnp.where(real, jax.lax.fori_loop(0, steps, step, noise), 0)
