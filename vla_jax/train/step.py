"""One training step and one evaluation step, as pure functions compiled for a mesh."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax

from vla_jax.config import Config
from vla_jax.models import vla
from vla_jax.models.presets import VLAConfig
from vla_jax.sharding import batch_sharding
from vla_jax.train import losses, optim
from vla_jax.types import Batch, TrainState


def loss_fn(params, cfg: VLAConfig, batch: Batch, *, targets: int, datasets: int):
    """-> (mean over samples of the mean nll of their targets, sums by dataset; see losses.per_dataset)."""
    hidden = vla.apply(cfg, params, batch)
    limits = {"targets": targets, "logit_cap": cfg.language.logit_cap}
    loss = losses.token_loss(hidden, vla.embedding(params), batch.target, batch.loss_weight, **limits)
    total = (loss["nll"] * loss["weight"]).sum() / jnp.maximum(loss["weight"].sum(), 1e-6)
    return total, losses.per_dataset(loss, batch.segment, batch.dataset, datasets)


def make_train_step(config: Config, cfg: VLAConfig, tx: optax.GradientTransformation, mesh, where: TrainState, *, datasets: int):
    """-> jitted (state, batch) -> (state, metrics); the old state's memory is reused. Metrics are device scalars and
    per-dataset sums."""
    rate = optim.schedule(config.train)

    def step(state: TrainState, batch: Batch):
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, sums), grads = grad_fn(state.params, cfg, batch, targets=config.pack.targets, datasets=datasets)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None:
            ema = jax.tree.map(lambda e, p: e + (1 - config.train.ema) * (p - e), ema, params)
        metrics = {
            "loss": loss,
            "grad_norm": optax.global_norm(grads),
            "param_norm": optax.global_norm(params),
            "lr": rate(state.step),
            "tokens": (batch.segment > 0).sum(),
            "samples": (batch.dataset >= 0).sum(),
            "datasets": sums,
        }
        new = dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state, ema=ema)
        return new, metrics

    data = batch_sharding(mesh)
    return jax.jit(step, in_shardings=(where, data), out_shardings=(where, None), donate_argnums=0)


def make_eval_step(config: Config, cfg: VLAConfig, mesh, where, *, datasets: int):
    """-> jitted (params, batch) -> sums by dataset. `where`: the parameters' shardings."""

    def step(params, batch: Batch):
        return loss_fn(params, cfg, batch, targets=config.pack.targets, datasets=datasets)[1]

    return jax.jit(step, in_shardings=(where, batch_sharding(mesh)))
