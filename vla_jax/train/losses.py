"""Cross-entropy on the positions that have a target, in chunks: never logits of a whole sequence over the vocabulary.

The vocabulary is divided over the devices that share one copy of the weights: each makes the logits of its part for the targets of all of
them. What travels are the hidden states of the targets, megabytes, and not the table of embeddings and its gradient, gigabytes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from vla_jax.models.layers import cap
from vla_jax.sharding import RULES, constrain, divides

LOGITS = 1 << 28  # that exist at one time on a device: 1 GiB in float32


def _chunk(rows: int, targets: int, vocab: int, axes: tuple[str, str]) -> int:
    """Positions of each row whose logits exist at one time: as even parts of `targets` as LOGITS allows. axes: of rows and vocabulary."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        rows, vocab = NamedSharding(mesh, RULES.spec(axes, (rows, vocab), mesh)).shard_shape((rows, vocab))
    most = max(LOGITS // (rows * vocab), 1)
    return -(-targets // -(-targets // most))


def token_loss(hidden, table, target, weight, *, targets: int, logit_cap: float = 0.0) -> dict:
    """hidden [b n d], table f32[v d], target i32[b n], weight f32[b n] -> per-position arrays over the targets.

    targets: positions with weight > 0 in a row, at most (the packer's limit). Returns {"nll", "correct", "log_z", "weight",
    "position"}, each [b targets]; slots without a target have weight 0. Log-softmax in float32, of logits capped as the model's are;
    log_z is the logarithm of its normaliser.
    """
    weight, position = (constrain(x, ("batch", None)) for x in jax.lax.top_k(weight, targets))
    picked = jnp.take_along_axis(hidden, position[..., None], axis=1), jnp.take_along_axis(target, position, axis=1)
    # where the vocabulary does not divide, each device makes all logits of its own rows
    rows, words = ("replica", "logits") if divides("logits", len(table)) else ("batch", "vocab")
    # first as the rows lie, which is where the gradient returns to
    h, labels = (constrain(constrain(x, ("batch", None, None)[: x.ndim]), (rows, None, None)[: x.ndim]) for x in picked)
    table = constrain(table.astype(h.dtype), (words, None))
    size = _chunk(len(h), targets, len(table), (rows, words))
    pad = -targets % size
    split = lambda x: jnp.pad(x, [(0, 0), (0, pad), *[(0, 0)] * (x.ndim - 2)]).reshape(len(x), -1, size, *x.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint  # logits are made again in the backward pass instead of being kept
    def chunk(args):
        h, labels = args
        logits = jnp.einsum("btd,vd->btv", h, table, preferred_element_type=jnp.float32)
        logits = constrain(cap(logits, logit_cap), (rows, None, words))
        log_z = jax.nn.logsumexp(logits, axis=-1)
        # masked reductions, since a look-up or an argmax would gather the divided vocabulary
        word = jnp.arange(len(table))
        at = jnp.sum(jnp.where(word == labels[..., None], logits, 0), axis=-1)
        best = jnp.min(jnp.where(logits == jnp.max(logits, axis=-1, keepdims=True), word, len(table)), axis=-1)
        return log_z - at, best == labels, log_z

    found = jax.lax.map(chunk, (split(h), split(labels)))
    nll, correct, log_z = (x.swapaxes(0, 1).reshape(len(h), -1)[:, :targets] for x in found)
    return {"nll": nll, "correct": correct, "log_z": log_z, "weight": weight, "position": position}


def widened(x, dims: int):
    """x [.. a] with zeros (or False) behind, up to [.. dims]."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, dims - x.shape[-1])])


def draw_flow(key, actions):
    """Noise and time of a step: (noisy f32[b g k a], time f32[b g], target f32[b g k a]). The path runs straight from the actions
    (time 0) to noise (time 1) and its velocity is the target; times near 1 come more often: beta(1.5, 1) (pi0)."""
    for_noise, for_time = jax.random.split(key)
    noise = jax.random.normal(for_noise, actions.shape, jnp.float32)
    time = jax.random.beta(for_time, 1.5, 1.0, actions.shape[:2]) * 0.999 + 0.001
    at = time[..., None, None]
    return at * noise + (1 - at) * actions, time, noise - actions


def flow_loss(velocity, target, mask) -> tuple:
    """Mean square over the real numbers of each sample: (f32[b g], bool[b g]: samples that have any). Dimensions and steps that a robot does
    not have, and those past its episode's end, have no part in it."""
    error = jnp.where(mask, jnp.square(velocity - target), 0)
    count = mask.sum(axis=(-1, -2))
    return error.sum(axis=(-1, -2)) / jnp.maximum(count, 1), count > 0


def flow_per_dataset(loss, real, dataset, count: int) -> dict:
    """Sums by dataset, f32[count] each, of what `flow_loss` returns."""
    onehot = jax.nn.one_hot(jnp.where(real, dataset, -1), count)
    total = lambda x: jnp.einsum("bg,bgc->c", x, onehot)
    return {"flow_sum": total(loss), "flow_samples": total(real.astype(jnp.float32))}


def per_dataset(loss: dict, segment, dataset, count: int) -> dict:
    """Sums by dataset, f32[count] each: weighted nll, weight, unweighted nll, correct predictions and targets."""
    owner = jnp.take_along_axis(segment, loss["position"], axis=1) - 1
    of = jnp.take_along_axis(dataset, jnp.maximum(owner, 0), axis=1)
    real = (loss["weight"] > 0).astype(jnp.float32)
    onehot = jax.nn.one_hot(jnp.where(real > 0, of, -1), count)
    total = lambda x: jnp.einsum("bt,btc->c", x, onehot)
    return {
        "loss_sum": total(loss["nll"] * loss["weight"]),
        "weight": total(loss["weight"]),
        "nll_sum": total(loss["nll"] * real),
        "correct": total(loss["correct"] * real),
        "targets": total(real),
    }
