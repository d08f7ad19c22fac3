"""One training step and one evaluation step, as pure functions compiled for a mesh."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax

from vla_jax.config import Config
from vla_jax.models import lora, vla
from vla_jax.models.presets import VLAConfig
from vla_jax.sharding import batch_sharding
from vla_jax.train import losses, optim
from vla_jax.types import Batch, TrainState


def loss_fn(params, config: Config, cfg: VLAConfig, batch: Batch, key, *, datasets: int):
    """-> (loss, sums by dataset; see losses). Of the tokens: mean over samples of the mean nll of their targets; of the flow: mean over
    samples of the mean square error of their velocities; `train.objective` says which, or both in one pass. key: of noise and times."""
    t, loss, sums = config.train, 0.0, {}
    # no gradient is made of what is not trained
    params = jax.tree.map(lambda p, on: p if on else jax.lax.stop_gradient(p), params, lora.trainable(params, t))
    if t.objective == "tokens":
        hidden = vla.apply(cfg, params, batch)
    else:
        wide = lambda x: losses.widened(x, cfg.expert.action_dim)  # noise is the expert's, whatever a robot has
        noisy, time, target = losses.draw_flow(key, wide(batch.actions))
        hidden, velocity = vla.flow(cfg, params, batch, noisy, time, insulated=t.objective == "both" and t.insulate)
        flow, real = losses.flow_loss(velocity, target, wide(batch.action_mask))
        loss += t.flow_weight * (flow * real).sum() / jnp.maximum(real.sum(), 1)
        sums |= losses.flow_per_dataset(flow, real, batch.dataset, datasets)
    if t.objective != "flow":
        limits = {"targets": config.pack.targets, "logit_cap": cfg.language.logit_cap}
        found = losses.token_loss(hidden, vla.embedding(params), batch.target, batch.loss_weight, **limits)
        loss += (found["nll"] * found["weight"]).sum() / jnp.maximum(found["weight"].sum(), 1e-6)
        sums |= losses.per_dataset(found, batch.segment, batch.dataset, datasets)
    return loss, sums


def make_train_step(config: Config, cfg: VLAConfig, tx: optax.GradientTransformation, mesh, where: TrainState, *, datasets: int):
    """-> jitted (state, batch) -> (state, metrics); the old state's memory is reused. Metrics are device scalars and
    per-dataset sums."""
    rate = optim.schedule(config.train)

    def step(state: TrainState, batch: Batch):
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        (loss, sums), grads = grad_fn(state.params, config, cfg, batch, key, datasets=datasets)
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
        return loss_fn(params, config, cfg, batch, jax.random.key(0), datasets=datasets)[1]  # the same noise each time

    return jax.jit(step, in_shardings=(where, batch_sharding(mesh)))
