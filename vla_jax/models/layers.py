"""Building blocks shared by encoder and decoder. Each weight states shape, initialiser and logical axes once, here or at its use."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vla_jax.sharding import constrain

_UNROLL = 4  # stacks no deeper than this are unrolled: a quarter off the step time on CPU, at no cost in compile time


def weight(init, *axes):
    """An initialiser that carries the logical axes of what it makes."""
    return nn.with_logical_partitioning(init, axes)


def used(w, x, *axes):
    """A weight as a product with x takes it: in x's dtype, so that this is what is gathered. Its gradient lies as the weight does, which
    the compiler hears here and nowhere else: so it sums and divides it in one go, layer by layer."""
    return constrain(w.astype(x.dtype), axes)


def fan_in(in_axis=-2, out_axis=-1, gain: float = 1.0):
    """Variance gain / fan-in."""
    return nn.initializers.variance_scaling(gain, "fan_in", "truncated_normal", in_axis=in_axis, out_axis=out_axis)


def kept(values, when: str):
    """Marks what attention takes (`in`) and gives (`out`), for `remat_policy`."""
    return jax.tree.map(lambda x: checkpoint_name(x, f"attention_{when}"), values)


def remat_policy(name: str):
    """What a layer's forward pass leaves for its backward pass; all else is computed again. full: the layer's input alone; attention:
    its queries, keys, values and what attention made of them, too; dots: the results of all matrix products; offload: as full, and
    the inputs wait in the host's memory (TPU, GPU)."""
    policies = jax.checkpoint_policies
    return {
        "full": lambda: None,
        "attention": lambda: policies.save_only_these_names("attention_in", "attention_out"),
        "dots": lambda: policies.dots_with_no_batch_dims_saveable,
        "offload": lambda: policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[], names_which_can_be_offloaded=["layer_in"], offload_src="device", offload_dst="pinned_host"
        ),
    }[name]()


def layer_input(x):
    """[b n d] as a layer takes it: rows over the devices, whole otherwise. Said in every layer: left to itself, the compiler may
    divide the width as the weights are, and then sums activations over all devices (docs/log.md)."""
    return checkpoint_name(constrain(x, ("batch", None, None)), "layer_in")


def stack(block: type[nn.Module], depth: int, remat: str, *, in_axes, out_axes=0):
    """`depth` copies of a block whose weights are stacked on axis 0 (logical axis "layers"), run by lax.scan."""
    if remat != "none":
        block = nn.remat(block, policy=remat_policy(remat), prevent_cse=False)
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=depth,
        unroll=depth if depth <= _UNROLL else 1,
        in_axes=in_axes,
        out_axes=out_axes,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


def rms(x, scale):
    """x / rms(x) * (1 + scale), computed in float32 (Gemma)."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + 1e-6)
    return (x32 * (1 + scale)).astype(x.dtype)


class RMSNorm(nn.Module):
    """See `rms`."""

    @nn.compact
    def __call__(self, x):
        return rms(x, self.param("scale", weight(nn.initializers.zeros, "norm"), (x.shape[-1],)))


class LayerNorm(nn.Module):
    """Layer normalisation in float32, eps 1e-6 (SigLIP)."""

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", weight(nn.initializers.ones, "norm"), (x.shape[-1],))
        bias = self.param("bias", weight(nn.initializers.zeros, "norm"), (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        x32 = x32 - x32.mean(-1, keepdims=True)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + 1e-6)
        return (x32 * scale + bias).astype(x.dtype)


class Einsum(nn.Module):
    """A named weight `w` applied by an einsum."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, equation: str, x):
        w = self.param("w", weight(self.init, *self.axes), self.shape)
        return jnp.einsum(equation, x, used(w, x, *self.axes))


def rope(x, position):
    """Rotary embedding, split halves, base 1e4: x [b n heads head_dim], position i32[b n] (Su et al., 2021)."""
    half = x.shape[-1] // 2
    frequency = 1e4 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = position[..., None, None].astype(jnp.float32) * frequency
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def cap(x, most: float):
    """most * tanh(x / most): keeps numbers within +-most (Gemma 2); 0: no cap."""
    return most * jnp.tanh(x / most) if most else x
