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
    """Weight decay leaves vectors alone: norms, biases, scales (rank 1 without the stacked layer axis)."""

    def decayed(params):
        flat = jax.tree_util.tree_map_with_path(
            lambda path, p: p.ndim - any(getattr(k, "key", "") in ("layers", "encoderblock") for k in path) > 1, params
        )
        return flat

    tx = optax.chain(
        optax.clip_by_global_norm(train.clip),
        optax.adamw(schedule(train), b1=0.9, b2=train.b2, weight_decay=train.weight_decay, mask=decayed),
    )
    if not (train.lora_rank or train.freeze):
        return tx
    which = lambda params: jax.tree.map(lambda t: "train" if t else "keep", lora.trainable(params, train.freeze))
    return optax.multi_transform({"train": tx, "keep": optax.set_to_zero()}, which)  # what is kept costs no optimizer state
