"""Floating-point operations of a model, twice: what it needs, from its shapes, and what a program does, from its trace.

A multiplication with its addition counts as two. Only products are counted, which are all but a few per mille.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import numpy as np

from vla_jax.models.presets import Expert, Language, Vision, VLAConfig

RULE = (
    "matrix products of the model's forward pass, times three for training; no recomputation, no optimizer; attention over the pairs of "
    "tokens of one sample, logits at targets only"
)


def vision(v: Vision, width: int, patches: int, *, image_tokens: int) -> dict[str, float]:
    """Forward, for so many patches in images of image_tokens each: {patches, layers, attention, head}."""
    return {
        "patches": 2.0 * patches * 3 * v.patch**2 * v.width,
        "layers": 2.0 * patches * v.depth * (4 * v.width**2 + 2 * v.width * v.mlp),
        "attention": 4.0 * patches * image_tokens * v.width * v.depth,
        "head": 2.0 * patches * v.width * width,
    }


def language(c: Language, tokens: float, pairs: float) -> dict[str, float]:
    """Forward, for so many tokens, and pairs of a token with one that it may see: {layers, attention}."""
    layer = 2 * c.heads * c.head_dim * c.width + 2 * c.kv_heads * c.head_dim * c.width + 3 * c.width * c.mlp
    return {"layers": 2.0 * tokens * c.depth * layer, "attention": 4.0 * pairs * c.heads * c.head_dim * c.depth}


def expert(c: Language, e: Expert, tokens: float, pairs: float) -> dict[str, float]:
    """Forward, of the action expert's layers: {layers, attention}."""
    layer = 2 * c.heads * c.head_dim * e.width + 2 * c.kv_heads * c.head_dim * e.width + 3 * e.width * e.mlp
    return {"layers": 2.0 * tokens * c.depth * layer, "attention": 4.0 * pairs * c.heads * c.head_dim * c.depth}


def model(cfg: VLAConfig, work: Mapping[str, float]) -> float:
    """FLOP of a training step by RULE, all weights trained: of adapters or frozen weights it says more than is done. work: numbers of tokens, patches, pairs and targets, as train.step.work counts them, and of
    expert_tokens and expert_pairs where there is an expert."""
    seen = vision(cfg.vision, cfg.language.width, work["patches"], image_tokens=cfg.tokens_per_image)
    forward = sum(seen.values()) + sum(language(cfg.language, work["tokens"], work["pairs"]).values())
    forward += 2.0 * work["targets"] * cfg.language.width * cfg.vocab
    if cfg.expert:
        forward += sum(expert(cfg.language, cfg.expert, work.get("expert_tokens", 0), work.get("expert_pairs", 0)).values())
    return 3 * forward - seen["patches"]  # pixels need no gradient


def slots(cfg: VLAConfig, rows: int, *, length: int, images: int, targets: int, samples: int = 0, steps: int = 0) -> dict[str, float]:
    """The work of a batch of which every slot is filled: rows of `length` tokens that all see each other, `images` in each."""
    own = samples * (steps + 1)  # tokens of the expert in a row: a state and a chunk each
    return {
        "tokens": rows * length,
        "patches": rows * images * cfg.tokens_per_image,
        "pairs": rows * length**2,
        "targets": rows * targets,
        "expert_tokens": rows * own,
        "expert_pairs": rows * own * (length + own),
    }


def with_expert(work: Mapping[str, float], steps: int) -> dict[str, float]:
    """The work of a batch whose samples each have `steps` noisy actions and a state: beside the decoder's, the expert's."""
    own = steps + 1
    pairs = own * (work["tokens"] + work["samples"] * own)
    return dict(work) | {"expert_tokens": work["samples"] * own, "expert_pairs": pairs}


def traced(fn, *args) -> float:
    """FLOP of a function of arrays (or of jax.ShapeDtypeStruct) as it is programmed: matrix products and convolutions, those of loops as
    often as they run and those that are computed again; of what no result depends on, none. A kernel that is not JAX's own counts as nothing.
    """
    closed = jax.make_jaxpr(fn)(*args)
    return _count(_needed(closed.jaxpr))


def _needed(jaxpr):
    from jax.interpreters import partial_eval

    return partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]


def _count(jaxpr) -> float:
    return sum(_equation(e) for e in jaxpr.eqns)


def _inner(equation):
    """The programs inside of an equation."""
    for value in equation.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                yield item


def _equation(e) -> float:
    name, shape = e.primitive.name, lambda v: v.aval.shape
    if name == "dot_general":
        (contracted, _), _ = e.params["dimension_numbers"]
        return 2.0 * math.prod(shape(e.outvars[0])) * math.prod(shape(e.invars[0])[d] for d in contracted)
    if name == "conv_general_dilated":
        kernel, numbers = shape(e.invars[1]), e.params["dimension_numbers"]
        return 2.0 * math.prod(shape(e.outvars[0])) * math.prod(kernel) / kernel[numbers.rhs_spec[0]]
    if name == "pallas_call":
        return 0.0
    times = {
        "scan": e.params.get("length", 1),
        "shard_map": np.prod(list(dict(e.params["mesh"].shape).values())) if "mesh" in e.params else 1,
    }
    counts = [_count(j) for j in _inner(e)]
    return times.get(name, 1) * (max(counts, default=0.0) if name == "cond" else sum(counts))
