"""A run's model with weights at which every term matters, and its logits for one sample: what exports are compared with; and where the
programs are that read exports."""

import dataclasses
import os
from pathlib import Path

import jax
import numpy as np

from vla_jax import tree
from vla_jax.models import vla
from vla_jax.types import IMAGE, Batch


def other_python(name: str) -> str:
    """The Python that has NAME with the versions it wants: VLA_NAME_PYTHON, or the one of launch/oracles.sh; "" where there is none."""
    made = Path(__file__).parents[1] / ".oracles" / name
    return os.environ.get(f"VLA_{name.upper()}_PYTHON") or (str(made / "bin/python") if (made / "complete").exists() else "")


def lively(t, seed=0, **changes):
    """Norms that are not the identity, attention that is not flat."""
    rng = np.random.default_rng(seed)
    t = dataclasses.replace(t, **changes)
    shapes = jax.eval_shape(lambda: vla.init(t.cfg, jax.random.key(0)))

    def drawn(path, s):
        wide = 0.3 if s.ndim < 3 and "kernel" not in path and "input_embedding" not in path else s.shape[-2] ** -0.5
        w = rng.normal(size=s.shape) * (0.5 if "input_embedding" in path else wide)
        return (w + ("LayerNorm" in path or "encoder_norm" in path) * path.endswith("scale")).astype(np.float32)

    return dataclasses.replace(t, params={path: drawn(path, s) for path, s in tree.flatten(shapes).items()})


def logits(t, images, prefix, postfix):
    """f32[len(prefix) + len(postfix), vocab] after the images u8[m h w 3]; prefix sees itself, postfix is causal."""
    ids = np.concatenate([np.full(len(images) * t.cfg.tokens_per_image, IMAGE), prefix, postfix]).astype(np.int32)[None]
    n, p = ids.shape[1], ids.shape[1] - len(postfix)
    block = np.maximum(np.arange(n) - p + 1, 0)[None]
    one = np.ones_like(ids)
    batch = Batch(
        images=images[None],
        tokens=ids,
        segment=one,
        position=np.arange(n)[None],
        block=block,
        state=np.zeros((1, 1, max(1, t.cfg.state_dim)), np.float32),
    )
    cfg = dataclasses.replace(t.cfg, dtype="float32")
    out = jax.jit(lambda p, b: vla.logits(cfg, p, vla.apply(cfg, p, b)))(tree.unflatten(t.params), batch)
    return np.asarray(out)[0, len(images) * t.cfg.tokens_per_image :]
