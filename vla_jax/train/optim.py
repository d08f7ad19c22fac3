"""The optimizer of a run: AdamW, linear warm-up then cosine, clipping by the global norm."""

from __future__ import annotations

import jax
import optax

from vla_jax.config import Train
from vla_jax.models import lora


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
        optax.adamw(schedule(train), b1=0.9, b2=train.b2, weight_decay=train.weight_decay, mask=decayed),
    )
    which = lambda params: jax.tree.map(lambda t: "train" if t else "keep", lora.trainable(params, train))
    return optax.multi_transform({"train": tx, "keep": optax.set_to_zero()}, which)  # what is kept costs no optimizer state
