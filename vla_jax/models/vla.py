"""The whole model as three functions of a frozen config: `init`, `apply`, `logical_axes`. Parameters are nested dicts."""

from __future__ import annotations

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from vla_jax import tree
from vla_jax.models import lora
from vla_jax.models.action_expert import ActionExpert
from vla_jax.models.decoder import Decoder
from vla_jax.models.layers import cap, fan_in, weight
from vla_jax.models.presets import VLAConfig
from vla_jax.models.vit import ImageEncoder
from vla_jax.sharding import RULES, constrain
from vla_jax.types import IMAGE, STATE


class _State(nn.Module):
    cfg: VLAConfig

    @nn.compact
    def __call__(self, state):
        width = self.cfg.language.width
        kernel = self.param("kernel", weight(fan_in(0, 1), None, "embed"), (self.cfg.state_dim, width))
        bias = self.param("bias", weight(nn.initializers.zeros, "embed"), (width,))
        return (state @ kernel + bias).astype(jnp.dtype(self.cfg.dtype))


class _VLA(nn.Module):
    cfg: VLAConfig
    keep_kv: bool = False

    def setup(self):
        self.img = ImageEncoder(self.cfg)
        self.llm = Decoder(self.cfg, self.keep_kv)
        if self.cfg.state_dim:
            self.state = _State(self.cfg)
        if self.cfg.expert:
            self.expert = ActionExpert(self.cfg)

    def embed(self, images, tokens, segment, state):
        """Puts image tokens and states where their placeholders stand: the i-th IMAGE of a row is the i-th image token."""
        b, m = images.shape[:2]
        x = self.llm.embed(jnp.maximum(tokens, 0))
        encoded = self.img(images.reshape(b * m, *images.shape[2:]))
        encoded = constrain(encoded.reshape(b, -1, encoded.shape[-1]), ("batch", None, None))
        is_image = tokens == IMAGE
        which = jnp.clip(jnp.cumsum(is_image, axis=1) - 1, 0, encoded.shape[1] - 1)
        x = jnp.where(is_image[..., None], jnp.take_along_axis(encoded, which[..., None], axis=1), x)
        if self.cfg.state_dim:
            owner = jnp.maximum(segment - 1, 0)[..., None]
            x = jnp.where((tokens == STATE)[..., None], jnp.take_along_axis(self.state(state), owner, axis=1), x)
        return constrain(x, ("batch", None, None))

    def hidden(self, images, tokens, segment, position, block, state):
        x = self.embed(images, tokens, segment, state)
        return self.llm(x, position, mask(segment, block))[0]

    def prefill(self, images, tokens, segment, position, block, state):
        """Hidden states, and keys and values of every layer: (k, v) each [layers b n kv hd]."""
        x = self.embed(images, tokens, segment, state)
        return self.llm(x, position, mask(segment, block))

    def flow(self, images, tokens, segment, position, block, state, noisy, time, chunk, insulated):
        """(hidden states, velocities f32[b g k a]) in one pass. insulated: no gradient of the velocities reaches the decoder."""
        x = self.embed(images, tokens, segment, state)
        x, kv = self.llm(x, position, mask(segment, block))
        if insulated:
            kv = jax.lax.stop_gradient(kv)
        return x, self.velocity(kv, *prompts(segment, block, noisy.shape[1]), noisy, time, state, chunk)

    def velocity(self, kv, seen, prefix, noisy, time, state, chunk):
        """See ActionExpert; states of fewer dims than its own are filled up with zeros."""
        fill = [(0, 0), (0, 0), (0, max(0, self.cfg.expert.action_dim - state.shape[-1]))]
        return self.expert(kv, seen, prefix, noisy, time, jnp.pad(state[..., : self.cfg.expert.action_dim], fill), chunk)


def mask(segment, block):
    """bool[b n n]: a token sees the tokens of its own segment whose block is not above its own."""
    same = (segment[:, :, None] == segment[:, None, :]) & (segment > 0)[:, None, :]
    return same & (block[:, None, :] <= block[:, :, None])


def prompts(segment, block, samples: int):
    """(bool[b g n]: the tokens of each sample's prompt, i32[b g]: how many they are)."""
    seen = (segment[:, None, :] == jnp.arange(1, samples + 1)[None, :, None]) & (block == 0)[:, None, :]
    return seen, seen.sum(axis=-1)


def _made(cfg: VLAConfig, key):
    """Parameters with their logical axes, from the smallest inputs that touch every one of them."""
    one = jnp.zeros((1, 2), jnp.int32)
    inputs = jnp.zeros((1, 1, cfg.image_size, cfg.image_size, 3), jnp.uint8), one, one, one, one, jnp.zeros((1, 1, max(cfg.state_dim, 1)))
    if not cfg.expert:
        return _VLA(cfg).init(key, *inputs, method=_VLA.hidden)["params"]
    state, noisy = jnp.zeros((1, 1, cfg.expert.action_dim)), jnp.zeros((1, 1, 1, cfg.expert.action_dim))
    inputs = *inputs[:-1], inputs[-1] if cfg.state_dim else state
    return _VLA(cfg, keep_kv=True).init(key, *inputs, noisy, jnp.zeros((1, 1)), jnp.ones((1, 1), jnp.int32), False, method=_VLA.flow)[
        "params"
    ]


def init(cfg: VLAConfig, key) -> dict:
    """Parameters, f32, as a nested dict. Pure: jit it with output shardings to create them where they belong."""
    params = nn.unbox(_made(cfg, key))
    return lora.init(params, jax.random.fold_in(key, 1), rank=cfg.lora.rank, patterns=cfg.lora.on) if cfg.lora else params


def logical_axes(cfg: VLAConfig) -> dict:
    """The tree of `init` with a tuple of logical axis names (or None) for each leaf."""
    boxed = jax.eval_shape(lambda k: _made(cfg, k), jax.random.key(0))
    axes = jax.tree.map(lambda x: tuple(x.names), boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    return lora.axes(axes, patterns=cfg.lora.on, shapes=nn.unbox(boxed)) if cfg.lora else axes


def shardings(cfg: VLAConfig, mesh) -> dict:
    """The tree of `init` with the place of each leaf on a mesh, by the rules of sharding.py."""
    shapes = jax.eval_shape(lambda: init(cfg, jax.random.key(0)))
    place = lambda shape, axes: NamedSharding(mesh, RULES.spec(axes, shape.shape, mesh))
    return jax.tree.map(place, shapes, logical_axes(cfg), is_leaf=lambda x: isinstance(x, jax.ShapeDtypeStruct))


def merged(cfg: VLAConfig, params: dict) -> dict:
    """The parameters without adapters, which are added to the weights that they adapt."""
    return lora.merge(params, cfg.lora.alpha) if cfg.lora else params


def apply(cfg: VLAConfig, params: dict, batch):
    """types.Batch -> hidden states [b n d] after the final norm. Logits are `hidden @ embedding(params).T`."""
    args = (batch.images, batch.tokens, batch.segment, batch.position, batch.block, batch.state)
    return _VLA(cfg).apply({"params": merged(cfg, params)}, *args, method=_VLA.hidden)


def encode(cfg: VLAConfig, params: dict, images):
    """The image encoder alone: u8[i h w 3] -> [i tokens d]."""
    return _VLA(cfg).apply({"params": merged(cfg, params)}, images, method=lambda model, x: model.img(x))


def decode(cfg: VLAConfig, params: dict, x, segment, position, block):
    """The decoder alone: embedded tokens [b n d] -> hidden states as `apply`."""
    run = lambda model, *args: model.llm(*args)[0]
    return _VLA(cfg).apply({"params": merged(cfg, params)}, x, position, mask(segment, block), method=run)


def embedding(params: dict):
    """The tied input and output embedding, f32[vocab d]."""
    return params["llm"]["embedder"]["input_embedding"]


def logits(cfg: VLAConfig, params: dict, hidden):
    """f32[.. vocab] of hidden states [.. d]. Of few positions only: a training step never makes them whole (train.losses)."""
    scores = jnp.einsum("...d,vd->...v", hidden, embedding(params).astype(hidden.dtype), preferred_element_type=jnp.float32)
    return cap(scores, cfg.language.logit_cap)


def flow(cfg: VLAConfig, params: dict, batch, noisy, time, *, insulated: bool):
    """types.Batch, noisy actions f32[b g k a] and their time f32[b g] (1 = noise) -> (hidden as `apply`, velocities f32[b g k a]).

    a is cfg.expert.action_dim for every robot: numbers that it does not have are zero as actions, and noise as noise (openpi).
    """
    args = (batch.images, batch.tokens, batch.segment, batch.position, batch.block, batch.state, noisy, time, batch.chunk)
    return _VLA(cfg, keep_kv=True).apply({"params": merged(cfg, params)}, *args, insulated, method=_VLA.flow)


def velocity(cfg: VLAConfig, params: dict, kv, batch, noisy, time):
    """The same for keys and values that `prefill` made: what a step of integration needs."""
    seen, prefix = prompts(batch.segment, batch.block, noisy.shape[1])
    return _VLA(cfg).apply({"params": merged(cfg, params)}, kv, seen, prefix, noisy, time, batch.state, batch.chunk, method=_VLA.velocity)


def prefill(cfg: VLAConfig, params: dict, batch):
    """Like `apply`, with keys and values of every layer: (k, v) each [layers b n kv hd]."""
    args = (batch.images, batch.tokens, batch.segment, batch.position, batch.block, batch.state)
    return _VLA(cfg, keep_kv=True).apply({"params": merged(cfg, params)}, *args, method=_VLA.prefill)


def cast(cfg: VLAConfig, params: dict) -> dict:
    """The parameters as a forward pass uses them: matrices in the compute dtype, norms and what projects
    states, actions and times in float32. The same
    results, from half the memory where that dtype has half the bits."""
    flat = tree.flatten(params)
    kept = lambda path: "norm" in path.lower() or re.match(r"state/|expert/(?!layers/)", path)
    return tree.unflatten({p: w if kept(p) else w.astype(jnp.dtype(cfg.dtype)) for p, w in flat.items()})
