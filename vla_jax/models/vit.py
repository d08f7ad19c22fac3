"""SigLIP-style image encoder, with the parameter names of big_vision's PaliGemma (`img/...`)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from vla_jax.models.attention import attention
from vla_jax.models.layers import LayerNorm, fan_in, kept, layer_input, stack, used, weight
from vla_jax.models.presets import VLAConfig
from vla_jax.sharding import constrain


class _Dense(nn.Module):
    """kernel [*inputs *outputs] and bias [*outputs]; `axes` names the kernel's axes, inputs first."""

    features: tuple[int, ...]
    axes: tuple[str | None, ...]
    contract: int = 1

    @nn.compact
    def __call__(self, x):
        inputs = x.shape[-self.contract :]
        in_axis, out_axis = tuple(range(len(inputs))), tuple(range(len(inputs), len(inputs) + len(self.features)))
        kernel = self.param("kernel", weight(fan_in(in_axis, out_axis), *self.axes), (*inputs, *self.features))
        bias = self.param("bias", weight(nn.initializers.zeros, *self.axes[self.contract :]), self.features)
        return jnp.tensordot(x, used(kernel, x, *self.axes), self.contract) + bias.astype(x.dtype)


class _Attention(nn.Module):
    cfg: VLAConfig

    @nn.compact
    def __call__(self, x):
        v = self.cfg.vision
        head_dim = v.width // v.heads
        project = lambda name: _Dense((v.heads, head_dim), ("embed", "heads", None), name=name)
        q, k, val = kept((project("query")(x), project("key")(x), project("value")(x)), "in")
        y = kept(attention(q * head_dim**-0.5, k, val, None, kernel=self.cfg.attention), "out")
        return _Dense((v.width,), ("heads", None, "embed"), contract=2, name="out")(y)


class _Mlp(nn.Module):
    cfg: VLAConfig

    @nn.compact
    def __call__(self, x):
        v = self.cfg.vision
        y = _Dense((v.mlp,), ("embed", "mlp"), name="Dense_0")(x.reshape(-1, v.width))
        return _Dense((v.width,), ("mlp", "embed"), name="Dense_1")(jax.nn.gelu(y, approximate=True)).reshape(x.shape)


class _Block(nn.Module):
    cfg: VLAConfig

    @nn.compact
    def __call__(self, x):
        x = layer_input(x)
        x = x + _Attention(self.cfg, name="MultiHeadDotProductAttention_0")(LayerNorm(name="LayerNorm_0")(x))
        return x + _Mlp(self.cfg, name="MlpBlock_0")(LayerNorm(name="LayerNorm_1")(x)), None


class _Transformer(nn.Module):
    cfg: VLAConfig

    @nn.compact
    def __call__(self, x):
        x, _ = stack(_Block, self.cfg.vision.depth, self.cfg.remat, in_axes=())(self.cfg, name="encoderblock")(x)
        return LayerNorm(name="encoder_norm")(x)


class _Patches(nn.Module):
    """A convolution with stride = kernel, written as one matrix product over cut-out patches."""

    cfg: VLAConfig

    @nn.compact
    def __call__(self, x):
        v = self.cfg.vision
        p, side = v.patch, self.cfg.image_size // v.patch
        # three times the usual spread: what fills a small part of a patch is then not drowned by its position (docs/log.md)
        kernel = self.param("kernel", weight(fan_in((0, 1, 2), 3, 9.0), None, None, None, "embed"), (p, p, 3, v.width))
        bias = self.param("bias", weight(nn.initializers.zeros, "embed"), (v.width,))
        x = x.reshape(len(x), side, p, side, p, 3).swapaxes(2, 3).reshape(len(x), side * side, p * p * 3)
        return x @ used(kernel, x, None, None, None, "embed").reshape(-1, v.width) + bias.astype(x.dtype)


def _sincos(key, shape, dtype=jnp.float32):
    """Initial positions, learned from there: sines and cosines of row and column (Vaswani et al., 2017, in two
    dimensions as in MoCo v3). A model then knows where a patch lies from its first step, instead of learning that."""
    _, tokens, width = shape
    side, quarter = round(tokens**0.5), -(-width // 4)
    frequency = 1e4 ** -jnp.linspace(0, 1, quarter)
    row, column = jnp.divmod(jnp.arange(tokens), side)
    angles = jnp.concatenate([row[:, None] * frequency, column[:, None] * frequency], axis=1)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)[None, :, :width].astype(dtype)


class ImageEncoder(nn.Module):
    """u8[i h w 3] -> [i tokens d], in the decoder's width, unscaled."""

    cfg: VLAConfig

    @nn.compact
    def __call__(self, images):
        cfg = self.cfg
        images = constrain(images, ("batch", None, None, None))
        x = images.astype(jnp.dtype(cfg.dtype)) / 127.5 - 1
        x = _Patches(cfg, name="embedding")(x)
        position = self.param("pos_embedding", weight(_sincos, None, None, "embed"), (1, x.shape[1], cfg.vision.width))
        x = _Transformer(cfg, name="Transformer")(x + position.astype(x.dtype))
        return constrain(_Dense((cfg.language.width,), ("embed", None), name="head")(x), ("batch", None, None))
