"""The training state: created where it will live, never whole on one device."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from vla_jax.models import vla
from vla_jax.models.presets import VLAConfig
from vla_jax.sharding import RULES
from vla_jax.types import TrainState

jax.tree_util.register_dataclass(TrainState, [f.name for f in dataclasses.fields(TrainState)], [])


def _init(cfg: VLAConfig, tx: optax.GradientTransformation, seed: int, with_ema: bool) -> TrainState:
    key = jax.random.key(seed)
    params = vla.init(cfg, jax.random.fold_in(key, 0))
    ema = jax.tree.map(jnp.copy, params) if with_ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), ema, jax.random.key_data(key))


def shardings(cfg: VLAConfig, tx: optax.GradientTransformation, mesh, *, with_ema: bool):
    """(abstract TrainState, its shardings). Whatever in the optimizer state mirrors the parameters is divided like them."""
    abstract = jax.eval_shape(lambda: _init(cfg, tx, 0, with_ema))
    axes = vla.logical_axes(cfg)
    specs = jax.tree.map(
        lambda p, a: NamedSharding(mesh, RULES.spec(a, p.shape, mesh)),
        abstract.params,
        axes,
        is_leaf=lambda x: isinstance(x, jax.ShapeDtypeStruct),
    )
    whole = NamedSharding(mesh, PartitionSpec())
    opt = optax.tree_map_params(tx, lambda _, s: s, abstract.opt_state, specs, transform_non_params=lambda _: whole)
    return abstract, TrainState(whole, specs, opt, specs if with_ema else None, whole)


def create(cfg: VLAConfig, tx: optax.GradientTransformation, mesh, *, seed: int, with_ema: bool) -> TrainState:
    """A fresh state, initialised sharded."""
    _, where = shardings(cfg, tx, mesh, with_ema=with_ema)
    with jax.set_mesh(mesh):
        return jax.jit(lambda: _init(cfg, tx, seed, with_ema), out_shardings=where)()
