"""One training step and one evaluation step, as pure functions compiled for a mesh."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from vla_jax import tree
from vla_jax.config import Config, Train
from vla_jax.models import lora, vla
from vla_jax.models.presets import VLAConfig
from vla_jax.sharding import BATCH, batch_sharding
from vla_jax.train import losses, optim
from vla_jax.types import IMAGE, Batch, TrainState

SETTLED = 50  # steps whose gradients' norms must have been seen before any can stand out
_MEMORY = 0.98  # decay of the running mean of the norm


def loss_fn(params, config: Config, cfg: VLAConfig, batch: Batch, key, *, datasets: int):
    """-> (loss, sums by dataset; see losses). Of the tokens: mean over samples of the mean nll of their targets; of the flow: mean over
    samples of the mean square error of their velocities; `train.objective` says which, or both in one pass. key: of noise and times."""
    return _loss(params, config, cfg, batch, _draw(config, cfg, batch, key), _whole(batch), datasets)


def _draw(config: Config, cfg: VLAConfig, batch: Batch, key):
    """Noise and times of a whole batch (losses.draw_flow), so that its parts do not draw other ones than it would."""
    if config.train.objective == "tokens":
        return None
    return losses.draw_flow(key, losses.widened(batch.actions, cfg.expert.action_dim))  # noise is the expert's, whatever a robot has


def _whole(batch: Batch) -> dict:
    """What the sums of a batch are divided by: taken from all of it, so that the losses of its parts add up to its own."""
    total = lambda x, least: jnp.maximum(x.sum(), least)
    out = {} if batch.loss_weight is None else {"weight": total(batch.loss_weight, 1e-6)}
    return out if batch.action_mask is None else out | {"samples": total(batch.action_mask.any(axis=(-1, -2)), 1)}


def _loss(params, config: Config, cfg: VLAConfig, batch: Batch, drawn, whole: dict, datasets: int):
    t, loss, sums = config.train, 0.0, {}
    # no gradient is made of what is not trained
    params = jax.tree.map(lambda p, on: p if on else jax.lax.stop_gradient(p), params, lora.trainable(params, t))
    if t.objective == "tokens":
        hidden = vla.apply(cfg, params, batch)
    else:
        noisy, time, target = drawn
        hidden, velocity = vla.flow(cfg, params, batch, noisy, time, insulated=t.objective == "both" and t.insulate)
        flow, real = losses.flow_loss(velocity, target, losses.widened(batch.action_mask, cfg.expert.action_dim))
        loss += t.flow_weight * (flow * real).sum() / whole["samples"]
        sums |= losses.flow_per_dataset(flow, real, batch.dataset, datasets)
    if t.objective != "flow":
        limits = {"targets": config.pack.targets, "logit_cap": cfg.language.logit_cap}
        found = losses.token_loss(hidden, vla.embedding(params), batch.target, batch.loss_weight, **limits)
        each = found["nll"] + t.z_loss * jnp.square(found["log_z"]) if t.z_loss else found["nll"]
        loss += (each * found["weight"]).sum() / whole["weight"]
        sums |= losses.per_dataset(found, batch.segment, batch.dataset, datasets)
    return loss, sums


def _gradients(params, config: Config, cfg: VLAConfig, batch: Batch, key, mesh, where, datasets: int):
    """((loss, sums), gradients) of a batch, in `train.accumulate` parts one after another; each device takes its part of its own rows."""
    grad_fn, parts = jax.value_and_grad(_loss, has_aux=True), config.train.accumulate
    drawn, whole = _draw(config, cfg, batch, key), _whole(batch)

    def of(part, drawn):
        found, grads = grad_fn(params, config, cfg, part, drawn, whole, datasets)
        return found, jax.lax.with_sharding_constraint(grads, where)  # summed over the devices where they will be used, and nowhere else

    if parts == 1:
        return of(batch, drawn)
    rows = NamedSharding(mesh, PartitionSpec(None, BATCH))
    split = lambda x: jax.lax.with_sharding_constraint(x.reshape(len(x) // parts, parts, *x.shape[1:]).swapaxes(0, 1), rows)
    split_batch = jax.tree.map(split, (batch, drawn))
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(of, *jax.tree.map(lambda x: x[0], split_batch)))
    nothing = nothing[0], jax.lax.with_sharding_constraint(nothing[1], where)
    return jax.lax.scan(lambda total, part: (jax.tree.map(jnp.add, total, of(*part)), None), nothing, split_batch)[0]


def _ordinary(tally: dict, step, loss, norm, train: Train):
    """Whether a step is to be taken: loss and gradient are finite, and its norm is no spike. After max_skips in a row none is any more, so
    that the loop, which looks at log steps only, cannot miss them."""
    ok = jnp.isfinite(loss) & jnp.isfinite(norm) & (tally["in_a_row"] < train.max_skips)
    if train.spike:
        seen = (step - tally["skipped"]).astype(jnp.float32)
        ok &= (seen < SETTLED) | (norm <= train.spike * tally["norm"] / (1 - _MEMORY**seen))
    return ok


def _counted(tally: dict, ok, norm, work: dict) -> dict:
    """The tally after a step."""

    def plus(pair, n):
        rest = pair[1] + jnp.where(ok, n, 0)
        return jnp.stack([pair[0] + (rest >> 20), rest & ((1 << 20) - 1)])

    return {
        "skipped": tally["skipped"] + ~ok,
        "in_a_row": jnp.where(ok, 0, tally["in_a_row"] + 1),
        "norm": jnp.where(ok, _MEMORY * tally["norm"] + (1 - _MEMORY) * norm, tally["norm"]),
        "samples": plus(tally["samples"], work["samples"]),
        "tokens": plus(tally["tokens"], work["tokens"]),
    }


def work(batch: Batch) -> dict:
    """What a batch holds: real samples, tokens, images' tokens, pairs of tokens of the same sample (f32; the others i32), and targets."""
    count = (batch.segment[:, :, None] == 1 + jnp.arange(batch.dataset.shape[1])).sum(axis=1)
    return {
        "samples": (batch.dataset >= 0).sum(),
        "tokens": (batch.segment > 0).sum(),
        "patches": (batch.tokens == IMAGE).sum(),
        "pairs": jnp.square(count.astype(jnp.float32)).sum(),  # more than 2**31 on a pod
        "targets": (batch.loss_weight > 0).sum(),
    }


def _norms(values) -> dict:
    """Norm of each of optim.GROUPS that a tree of parameters has."""
    flat = tree.flatten(values)
    groups = {name: [x for path, x in flat.items() if optim.group(path) == name] for name in optim.GROUPS}
    return {name: optax.global_norm(leaves) for name, leaves in groups.items() if leaves}


def make_train_step(config: Config, cfg: VLAConfig, tx: optax.GradientTransformation, mesh, where: TrainState, *, datasets: int):
    """-> jitted (state, batch) -> (state, metrics); the old state's memory is reused. Metrics are device scalars and per-dataset sums.

    A step whose loss or gradient is not finite, or whose gradient's norm is a spike (train.spike), changes nothing but the count of steps
    and the tally.
    """
    rate = optim.schedule(config.train)

    def step(state: TrainState, batch: Batch):
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        (loss, sums), grads = _gradients(state.params, config, cfg, batch, key, mesh, where.params, datasets)
        norm, held = optax.global_norm(grads), work(batch)
        ok = _ordinary(state.tally, state.step, loss, norm, config.train)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None:
            ema = jax.tree.map(lambda e, p: e + (1 - config.train.ema) * (p - e), ema, params)
        old = state.params, state.opt_state, state.ema
        params, opt_state, ema = jax.tree.map(lambda new, old: jnp.where(ok, new, old), (params, opt_state, ema), old)
        tally = _counted(state.tally, ok, norm, held)
        metrics = {
            "loss": loss,
            "grad_norm": norm,
            "norm": {"grad": _norms(grads), "update": _norms(updates), "param": _norms(params)},
            "lr": rate(state.step - state.tally["skipped"]),  # the schedule counts the steps that were taken
            "work": held,
            "tally": tally,
            "datasets": sums,
        }
        new = dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state, ema=ema, tally=tally)
        return new, metrics

    data = batch_sharding(mesh)
    return jax.jit(step, in_shardings=(where, data), out_shardings=(where, None), donate_argnums=0)


def make_eval_step(config: Config, cfg: VLAConfig, mesh, where, *, datasets: int):
    """-> jitted (params, batch) -> sums by dataset. `where`: the parameters' shardings."""

    def step(params, batch: Batch):
        return loss_fn(params, config, cfg, batch, jax.random.key(0), datasets=datasets)[1]  # the same noise each time

    return jax.jit(step, in_shardings=(where, batch_sharding(mesh)))
