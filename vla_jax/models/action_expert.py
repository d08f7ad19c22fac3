"""The action expert: noisy actions in, their velocity out, by flow matching; it sees keys and values of the decoder's prompt.

Sources: Black et al., "pi0: A Vision-Language-Action Flow Model for General Robot Control", 2024, and pi0.5, 2025, as openpi has them.
The decoder never looks at the expert, so the expert is a stack of its own that takes what each layer of the decoder left behind.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from vla_jax.models.decoder import Attention, Mlp
from vla_jax.models.layers import RMSNorm, fan_in, layer_input, stack, used, weight
from vla_jax.models.presets import VLAConfig

_PERIODS = 4e-3, 4.0  # shortest and longest of the time embedding


class _Linear(nn.Module):
    """kernel [in out] and bias, by the names that openpi gives them."""

    features: int
    axes: tuple[str | None, str | None]
    init: nn.initializers.Initializer = fan_in(0, 1)

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", weight(self.init, *self.axes), (x.shape[-1], self.features))
        bias = self.param("bias", weight(nn.initializers.zeros, self.axes[1]), (self.features,))
        return x @ used(kernel, x, *self.axes) + bias.astype(x.dtype)


class _Norm(nn.Module):
    """RMS norm; with a condition [b n d] it is scaled and shifted by it, and says a gate for what it feeds (adaptive norm of pi0.5)."""

    @nn.compact
    def __call__(self, x, condition):
        if condition is None:
            return RMSNorm(name="plain")(x), 1
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + 1e-6)
        told = _Linear(3 * x.shape[-1], ("embed", None), nn.initializers.zeros, name="Dense_0")(condition.astype(x.dtype))
        scale, shift, gate = jnp.split(told, 3, axis=-1)
        return (x32 * (1 + scale) + shift).astype(x.dtype), gate


class _Block(nn.Module):
    cfg: VLAConfig  # with the expert's width and mlp as the decoder's

    @nn.compact
    def __call__(self, x, before, position, mask, condition):
        x = layer_input(x)
        y, gate = _Norm(name="pre_attention_norm")(x, condition)
        x = x + Attention(self.cfg, name="attn")(y, position, mask, before)[0] * gate
        y, gate = _Norm(name="pre_ffw_norm")(x, condition)
        return x + Mlp(self.cfg, name="mlp")(y) * gate, None


def time_embedding(time, width: int):
    """f32[..] in 0..1 -> f32[.. width]: sines, then cosines, of periods from 4e-3 to 4, evenly spaced in their logarithm."""
    shortest, longest = _PERIODS
    period = shortest * (longest / shortest) ** jnp.linspace(0.0, 1.0, width // 2, dtype=jnp.float32)
    angle = time[..., None] * (2 * jnp.pi / period)
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


class ActionExpert(nn.Module):
    """cfg.expert is not None."""

    cfg: VLAConfig

    @nn.compact
    def __call__(self, kv, seen, prefix, noisy, time, state, steps):
        """Velocities f32[b g k a] of g samples in each of b rows; a is action_dim, whatever the robots have. As in openpi, all but the
        layers computes in float32.

        kv: the decoder's keys and values (k, v), each [layers b n kv hd]; seen bool[b g n]: which of them a sample's expert may see (its
        own prompt); prefix i32[b g]: their number, after which its positions count on; noisy f32[b g k a]; time f32[b g], 1 = noise;
        state f32[b g s]; steps i32[b g]: of the robot's chunk, of k.
        """
        cfg, e = self.cfg, self.cfg.expert
        dtype = jnp.dtype(cfg.dtype)
        b, g, k, _ = noisy.shape
        dense = lambda name, axes=("embed", None), size=e.width: _Linear(size, axes, name=name)
        x = dense("action_in_proj", (None, "embed"))(noisy)
        told = time_embedding(time, e.width)
        condition, first = None, 0
        if e.ada:
            told = nn.swish(dense("time_mlp_out")(nn.swish(dense("time_mlp_in")(told))))
            condition = jnp.repeat(told, k, axis=1)  # [b g*k d]: of each token
        else:
            x = jnp.concatenate([x, jnp.broadcast_to(told[:, :, None], x.shape)], axis=-1)
            x = dense("action_time_mlp_out")(nn.swish(dense("action_time_mlp_in")(x)))
            x = jnp.concatenate([dense("state_proj", (None, "embed"))(state)[:, :, None], x], axis=2)
            first = 1
        t = first + k
        at = jnp.arange(t)
        real = at[None, None] < first + steps[..., None]  # [b g t]
        # a sample's tokens see its prompt; the state sees itself besides; actions see the state and each other, both ways
        own = (at[:, None] >= first) | (at[None, :] < first)
        own = own[None, None] & real[:, :, None, :]
        mask = jnp.zeros((b, g, t, g, t), bool).at[:, jnp.arange(g), :, jnp.arange(g)].set(own.swapaxes(0, 1)).reshape(b, g * t, g * t)
        mask = jnp.concatenate([jnp.repeat(seen, t, axis=1), mask], axis=-1)
        position = (prefix[..., None] + at).reshape(b, g * t)
        inner = dataclasses.replace(cfg, language=dataclasses.replace(cfg.language, width=e.width, mlp=e.mlp))
        layers = stack(_Block, cfg.language.depth, cfg.remat, in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast))
        x, _ = layers(inner, name="layers")(x.reshape(b, g * t, e.width).astype(dtype), kv, position, mask, condition)
        x, _ = _Norm(name="final_norm")(x, condition)
        x = x.reshape(b, g, t, e.width)[:, :, first:]
        return dense("action_out_proj", size=e.action_dim)(x.astype(jnp.float32))
