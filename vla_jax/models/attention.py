"""Attention behind one function: plain XLA everywhere, cuDNN's flash attention on GPU, splash attention on TPU."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from vla_jax.models.layers import cap
from vla_jax.models.presets import VLAConfig
from vla_jax.sharding import RULES
from vla_jax.types import UserError

_SHORT = 128  # fewer queries, as in a step of decoding, are always XLA's: there is no matrix of scores worth avoiding
_WORTH = 512 * 512  # scores per head and row from which on `auto` takes splash: a choice, no TPU was there to measure
_NARROW = 128  # heads up to which `auto` takes cuDNN: wider ones are slower than XLA's on an H200 (docs/log.md)
_TILES = (512, 384, 256, 128)  # of splash: a multiple of the 128 lanes


def attention(q, k, v, mask, *, most: float = 0.0, kernel: str = "auto"):
    """q [b t heads hd] (already scaled), k and v [b s kv hd], mask bool[b t s] or None -> [b t heads hd].

    Heads share keys and values in equal groups. Softmax in float32, of scores capped at `most`; a query without anything to see gets
    some mean of v, which stays in padding and is never read. kernel: one of presets.ATTENTION; a named one is used for 128 queries and more.

    Raises: UserError where the named kernel cannot be used, with the reason.
    """
    where = platform()
    name = choose(kernel, where, q.shape, k.shape, q.dtype, most)
    if name == "xla":
        return _xla(q, k, v, mask, most)
    _refuse(name, where, q.shape[-1], q.dtype, most)
    return _sharded(functools.partial(_cudnn if name == "cudnn" else _splash, most=most), q, k, v, mask)


def check(cfg: VLAConfig) -> None:
    """For the devices of the mesh that is set. Raises: UserError where the kernel that a config names cannot be used."""
    vision, language = cfg.vision, cfg.language
    for head_dim, most in ((language.head_dim, language.attn_cap), (vision.width // vision.heads, 0.0)):
        if cfg.attention not in ("auto", "xla"):
            _refuse(cfg.attention, platform(), head_dim, cfg.dtype, most)


def _refuse(kernel: str, where: str, head_dim: int, dtype, most: float) -> None:
    if why := why_not(kernel, where, head_dim, dtype, most):
        raise UserError(f"model.attention is {kernel!r}, which cannot be used here: {why}. Set --config.model.attention=auto.")


def platform() -> str:
    """Of the devices that a function is being compiled for: those of the mesh that is set, which may be described only."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = device.platform if device else jax.default_backend()
    return "gpu" if name in ("cuda", "rocm") else name


def choose(kernel: str, where: str, q: tuple[int, ...], k: tuple[int, ...], dtype, most: float) -> str:
    """The kernel to use for queries and keys of these shapes on this platform."""
    if kernel == "xla" or q[1] < _SHORT:
        return "xla"
    if kernel != "auto":
        return kernel
    best = {"gpu": "cudnn", "tpu": "splash"}.get(where, "xla")
    worth = q[-1] <= _NARROW if best == "cudnn" else q[1] * k[1] >= _WORTH
    return best if worth and not why_not(best, where, q[-1], dtype, most) else "xla"


def why_not(kernel: str, where: str, head_dim: int, dtype, most: float) -> str:
    """Why a kernel cannot be used; empty if it can."""
    if kernel == "splash" and where != "tpu":
        return f"splash attention is a TPU's, and this is {where}"
    if kernel == "cudnn":
        if where != "gpu":
            return f"cuDNN needs an NVIDIA GPU, and this is {where}"
        if most:
            return f"cuDNN cannot cap scores, and this model caps them at {most:g}"
        if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
            return f"cuDNN computes in bfloat16 or float16, and model.dtype is {jnp.dtype(dtype)}"
        if head_dim % 8 or head_dim > 256:
            return f"cuDNN takes heads of up to 256 in multiples of 8, and these have {head_dim}"
    return ""


def _xla(q, k, v, mask, most: float):
    b, t, heads, hd = q.shape
    kv = k.shape[2]
    # batch and key/value head lead, the group's heads join the query positions: one plain batched matrix product
    q = q.reshape(b, t, kv, heads // kv, hd).transpose(0, 2, 3, 1, 4).reshape(b, kv, -1, hd)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    scores = jnp.einsum("bkqh,bksh->bkqs", q, k, preferred_element_type=jnp.float32)
    scores = cap(scores, most)
    if mask is not None:
        grouped = scores.reshape(b, kv, heads // kv, t, -1)
        scores = jnp.where(mask[:, None, None], grouped, jnp.finfo(jnp.float32).min).reshape(scores.shape)
    probs = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("bkqs,bksh->bkqh", probs, v)
    return out.reshape(b, kv, heads // kv, t, hd).transpose(0, 3, 1, 2, 4).reshape(b, t, heads, hd)


def _sharded(kernel, q, k, v, mask):
    """The kernel on each device's own rows and heads: the compiler cannot divide it by itself."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return kernel(q, k, v, mask)
    axes = ("batch", None, "heads", None)
    if k.shape[2] > 1 and RULES.spec(axes, q.shape, mesh)[2] != RULES.spec(axes, k.shape, mesh)[2]:
        k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))  # a device's heads are no whole groups
    of_q, of_k = RULES.spec(axes, q.shape, mesh), RULES.spec(axes, k.shape, mesh)
    of_mask = None if mask is None else PartitionSpec(of_q[0])
    return jax.shard_map(kernel, mesh=mesh, in_specs=(of_q, of_k, of_k, of_mask), out_specs=of_q, check_vma=False)(q, k, v, mask)


def _padded(x, *multiples):
    """Zeros behind each axis that has a multiple, up to it."""
    return jnp.pad(x, [(0, -n % m if m else 0) for n, m in zip(x.shape, multiples, strict=True)])


def _cudnn(q, k, v, mask, *, most: float):
    assert not most
    t = q.shape[1]
    if mask is not None:  # with a mask its backward pass takes even lengths only
        q, k, v, mask = _padded(q, 0, 2, 0, 0), _padded(k, 0, 2, 0, 0), _padded(v, 0, 2, 0, 0), _padded(mask, 0, 2, 2)[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=1.0, implementation="cudnn")[:, :t]


def _splash(q, k, v, mask, *, most: float, interpret: bool = False):
    """Tiles of the mask that are empty (another sample's, the future) are skipped. Row by row, as a TPU's core would anyway."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    (_, t, heads, hd), s = q.shape, k.shape[1]
    if mask is None and (t % 128 or s % 128):
        mask = jnp.ones((len(q), t, s), bool)
    if mask is not None:
        mask = _padded(mask, 0, 128, 128)
        mask = mask.at[:, :, 0].max(~mask.any(axis=-1))  # a row of tiles that are all skipped would be 0 / 0
    q, k, v = (_padded(x, 0, 128, 0, 128) for x in (q, k, v))
    tile = lambda n: next(size for size in _TILES if n % size == 0)
    of_q, of_k = tile(q.shape[1]), tile(k.shape[1])
    sizes = splash.BlockSizes(
        block_q=of_q,
        block_kv=of_k,
        block_kv_compute=of_k,
        block_q_dkv=of_q,
        block_kv_dkv=of_k,
        block_kv_dkv_compute=of_k,
        block_q_dq=of_q,
        block_kv_dq=of_k,
    )

    def row(q, k, v, mask):
        seen = splash.MultiHeadMask([splash.FullMask((q.shape[1], k.shape[1]))] * heads) if mask is None else mask[None]
        made = splash.make_splash_mha(
            seen, block_sizes=sizes, head_shards=1, q_seq_shards=1, attn_logits_soft_cap=most or None, interpret=interpret
        )
        if mask is not None:  # JAX makes an array of this flag, and then asks for its truth
            made.fwd_mask_info = made.fwd_mask_info._replace(is_dynamic_mask=True)
        return made(q, k, v)

    heads_first = lambda x: x.swapaxes(1, 2)
    out = jax.vmap(row, in_axes=(0, 0, 0, None if mask is None else 0))(heads_first(q), heads_first(k), heads_first(v), mask)
    return heads_first(out)[:, :t, :, :hd]
