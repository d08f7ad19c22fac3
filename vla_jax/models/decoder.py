"""Gemma-style decoder, with the parameter names of big_vision's PaliGemma (`llm/...`)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from vla_jax.models.attention import attention
from vla_jax.models.layers import Einsum, RMSNorm, fan_in, kept, layer_input, rope, stack, used, weight
from vla_jax.models.presets import VLAConfig
from vla_jax.sharding import constrain, divides


class Attention(nn.Module):
    cfg: VLAConfig

    @nn.compact
    def __call__(self, x, position, mask, before=None):
        """before: keys and values (k, v), each [b s kv hd], that stand in front of x's own."""
        c = self.cfg.language
        # twice the usual spread: attention that starts less uniform finds the named object sooner (docs/log.md)
        q = Einsum((c.heads, c.width, c.head_dim), ("heads", "embed", None), fan_in(1, (0, 2), 4.0), name="q_einsum")("btd,hde->bthe", x)
        kv = Einsum((2, c.kv_heads, c.width, c.head_dim), (None, None, "embed", None), fan_in(2, (1, 3)), name="kv_einsum")(
            "btd,ckde->cbtke", x
        )
        q, k, v = kept((rope(q, position) * c.head_dim**-0.5, rope(kv[0], position), kv[1]), "in")
        if before is not None:
            k, v = (jnp.concatenate([old.astype(new.dtype), new], axis=1) for old, new in zip(before, (k, v)))
        y = kept(attention(q, k, v, mask, most=c.attn_cap, kernel=self.cfg.attention), "out")
        out = Einsum((c.heads, c.head_dim, c.width), ("heads", None, "embed"), fan_in((0, 1), 2), name="attn_vec_einsum")(
            "bthe,hed->btd", y
        )
        return out, (k, v)


class Mlp(nn.Module):
    cfg: VLAConfig

    @nn.compact
    def __call__(self, x):
        c = self.cfg.language
        gating = self.param("gating_einsum", weight(fan_in(1, 2), None, "embed", "mlp"), (2, c.width, c.mlp))
        linear = self.param("linear", weight(fan_in(0, 1), "mlp", "embed"), (c.mlp, c.width))
        rows = x.reshape(-1, c.width)  # plain matrix products: on CPU three times faster forward and backward
        gate, up = (rows @ w for w in used(gating, x, None, "embed", "mlp"))
        return ((jax.nn.gelu(gate, approximate=True) * up) @ used(linear, x, "mlp", "embed")).reshape(x.shape)


class _Block(nn.Module):
    cfg: VLAConfig
    keep_kv: bool = False

    @nn.compact
    def __call__(self, x, position, mask):
        x = layer_input(x)
        y, kv = Attention(self.cfg, name="attn")(RMSNorm(name="pre_attention_norm")(x), position, mask)
        after = self.cfg.language.post_norms
        x = x + (RMSNorm(name="post_attention_norm")(y) if after else y)
        y = Mlp(self.cfg, name="mlp")(RMSNorm(name="pre_ffw_norm")(x))
        x = x + (RMSNorm(name="post_ffw_norm")(y) if after else y)
        return x, kv if self.keep_kv else None


class Embedder(nn.Module):
    """Token embedding, shared with the output: kept apart from the decoder so that the loss can use it in chunks."""

    cfg: VLAConfig

    @nn.compact
    def __call__(self, tokens):
        c = self.cfg
        init = nn.initializers.normal(c.language.width**-0.5)
        table = self.param("input_embedding", weight(init, "vocab", "embed"), (c.vocab, c.language.width))
        # Every device looks its part of the width up, for the rows of all: these parts are exchanged, and never the table. From the
        # table in float32, in which the gradients of a token that stands in thousands of places are then added.
        rows = "replica" if divides("embed", table.shape[1]) else "batch"
        x = constrain(table, ("vocab", "embed"))[constrain(tokens, (rows, None))].astype(jnp.dtype(c.dtype))
        x = constrain(constrain(x, (rows, None, "embed")), ("batch", None, None))
        return x * jnp.asarray(c.language.width**0.5, c.dtype)


class Decoder(nn.Module):
    """[b n d] embeddings -> [b n d] hidden states after the final norm, and keys and values per layer if `keep_kv`.

    position i32[b n], mask bool[b n n]; keys and values: (k, v) each [layers b n kv hd].
    """

    cfg: VLAConfig
    keep_kv: bool = False

    def setup(self):
        self.embedder = Embedder(self.cfg)
        layers = stack(_Block, self.cfg.language.depth, self.cfg.remat, in_axes=(nn.broadcast, nn.broadcast))
        self.layers = layers(self.cfg, self.keep_kv)
        self.final_norm = RMSNorm()

    def embed(self, tokens):
        return self.embedder(tokens)

    def __call__(self, x, position, mask):
        x, kv = self.layers(x, position, mask)
        return self.final_norm(x), kv
