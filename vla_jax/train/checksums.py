"""A number for every array of a state, the same however the array is divided, and another one when a byte of it is."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def flatten(tree) -> dict:
    """{path: leaf}, the same for a state and for what Orbax says it saved, where fields of tuples are keys of dicts."""
    name = lambda key: str(next(getattr(key, of) for of in ("key", "name", "idx") if hasattr(key, of)))
    return {"/".join(map(name, path)): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


@jax.jit
def _sums(leaves: list) -> list:
    return [_sum(x) for x in leaves]


def _sum(x) -> jax.Array:
    """u32: the bits of each element, mixed with its place, summed modulo 2^32.

    For one place the mixing (MurmurHash3's finaliser) is one to one, so any change of one element changes the sum; of several it does but
    once in about 2^32 times, whichever bits they are. Sums come in any order, so no array has to be gathered.
    """
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    x = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    x = x ^ (place * jnp.uint32(0x9E3779B1) + jnp.uint32(0x7F4A7C15))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return jnp.sum(x, dtype=jnp.uint32)


def of(tree) -> dict[str, int]:
    """{path: checksum} of all arrays (elements of at most four bytes), on whatever devices they are; the same on all processes."""
    flat = flatten(tree)
    return dict(zip(flat, (int(np.asarray(x)) for x in jax.device_get(_sums(list(flat.values()))))))
