"""The optimizer of a run: AdamW, Adafactor or Muon, clipped by the global norm, with a learning rate for each part of the model."""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

from vla_jax import tree
from vla_jax.config import Train
from vla_jax.models import lora

GROUPS = ("vision", "language", "expert")

# Matrices of the layers for Muon: which axes, from the end, a row of inputs is multiplied with, and which ones it becomes
_MATRICES = (
    (r".*/q_einsum/w", (-2,), (-3, -1)),
    (r".*/kv_einsum/w", (-2,), (-3, -1)),
    (r".*/attn_vec_einsum/w", (-3, -2), (-1,)),
    (r".*/(query|key|value)/kernel", (-3,), (-2, -1)),
    (r".*/out/kernel", (-3, -2), (-1,)),
    (r".*/(gating_einsum|linear|MlpBlock_0/Dense_[01]/kernel)", (-2,), (-1,)),
)


def group(path: str) -> str:
    """Which of GROUPS a parameter belongs to; the projection of the robot's state goes with the expert, an adapter with its weight."""
    path = path.removeprefix(f"{lora.NAME}/")
    return {"img/": "vision", "llm/": "language"}.get(path[:4], "expert")


def schedule(train: Train) -> optax.Schedule:
    """Learning rate of a step: 0 -> lr over `warmup`, then a cosine to lr * lr_end at `steps`."""
    warmup = min(train.warmup, max(train.steps - 1, 0))
    return optax.warmup_cosine_decay_schedule(0.0, train.lr, warmup, max(train.steps, warmup + 1), train.lr * train.lr_end)


def make(train: Train) -> optax.GradientTransformation:
    """Weight decay leaves vectors alone: norms' scales and biases, also those that are stacked by layer or split by head."""

    def decayed(params):
        return jax.tree_util.tree_map_with_path(lambda path, p: p.ndim > 1 and path[-1].key not in ("bias", "scale"), params)

    tx = optax.chain(
        optax.clip_by_global_norm(train.clip),
        {"adamw": _adam, "adafactor": _adafactor, "muon": _muon}[train.optimizer](train),
        optax.add_decayed_weights(train.weight_decay, decayed),
        optax.scale_by_learning_rate(schedule(train)),
        optax.stateless(lambda updates, _: _by_group(updates, train)),
    )
    which = lambda params: jax.tree.map(lambda t: "train" if t else "keep", lora.trainable(params, train))
    whole = optax.multi_transform({"train": tx, "keep": optax.set_to_zero()}, which)  # what is kept costs no optimizer state
    if train.lr_decay == 1:
        return whole
    return optax.chain(whole, optax.stateless(lambda updates, _: by_layer(updates, train.lr_decay)))


_TOWERS = (("img/", "img/Transformer/encoderblock/", ("img/embedding/", "img/pos_embedding")), ("llm/", "llm/layers/", ()))


def by_layer(updates: dict, decay: float) -> dict:
    """Updates times `decay` for each layer between theirs and the end of its tower (Bao et al., "BEiT", 2021): of L layers the i-th, from
    0, has decay^(L - i), the patches' embedding and positions decay^(L + 1), and what follows the last layer 1. Layers lie stacked on
    axis 0. The decoder's table is its output, too, and has 1; so have the expert and the state's projection. An adapter goes with its
    weight."""
    flat = tree.flatten(updates)

    def factor(path: str, u):
        path = path.removeprefix(f"{lora.NAME}/")
        for tower, layers, below in _TOWERS:
            if path.startswith(layers):
                return (decay ** jnp.arange(len(u), 0, -1, dtype=u.dtype)).reshape(-1, *[1] * (u.ndim - 1))
            if path.startswith(tower) and path.startswith(below):
                return decay ** (1 + next(len(x) for p, x in flat.items() if p.startswith(layers)))
        return 1.0

    return tree.unflatten({path: u * factor(path, u) for path, u in flat.items()})


def _adam(train: Train) -> optax.GradientTransformation:
    return optax.scale_by_adam(b1=train.b1, b2=train.b2, mu_dtype=jnp.dtype(train.moment_dtype))


def _adafactor(train: Train) -> optax.GradientTransformation:
    """Second moments as rows and columns (Shazeer and Stern, 2018), with a first moment and without a scale of the parameters (as in
    Zhai et al., "Scaling Vision Transformers", 2022): the learning rates of AdamW carry over."""
    first = optax.ema(train.b1, debias=False, accumulator_dtype=jnp.dtype(train.moment_dtype))
    return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), first)


def _muon(train: Train) -> optax.GradientTransformation:
    """The layers' matrices orthogonalised (Jordan et al., 2024), scaled so that AdamW's learning rate and decay carry over (Liu et al.,
    2025: 0.2 times the root of the larger side); embeddings, projections, norms and biases by AdamW."""

    def numbers(path, p) -> MuonDimensionNumbers | None:
        name = "/".join(k.key for k in path)
        if re.search(r"(^|/)(layers|encoderblock)/", name) and not name.startswith(lora.NAME):
            for pattern, inputs, outputs in _MATRICES:
                if re.fullmatch(pattern, name):
                    return MuonDimensionNumbers(tuple(p.ndim + i for i in inputs), tuple(p.ndim + o for o in outputs))
        return None

    def larger(path, p):
        sides = (math.prod(p.shape[axis] for axis in side) for side in numbers(path, p))
        return p * 0.2 * max(sides) ** 0.5

    every = jax.tree_util.tree_map_with_path
    orthogonal = optax.contrib.scale_by_muon(
        mu_dtype=jnp.dtype(train.moment_dtype), weight_dimension_numbers=lambda updates: every(numbers, updates)
    )
    kinds = {"muon": optax.chain(orthogonal, optax.stateless(lambda u, _: every(larger, u))), "adam": _adam(train)}
    return optax.multi_transform(kinds, lambda params: every(lambda path, p: "muon" if numbers(path, p) else "adam", params))


def _by_group(updates, train: Train):
    factors = {"vision": train.lr_vision, "language": train.lr_language, "expert": train.lr_expert}
    if set(factors.values()) == {1.0}:
        return updates
    return jax.tree_util.tree_map_with_path(lambda path, u: u * factors[group("/".join(k.key for k in path))], updates)
