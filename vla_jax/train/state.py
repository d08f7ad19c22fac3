"""The training state: created where it will live, never whole on one device."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from vla_jax import tree
from vla_jax.config import Config
from vla_jax.models import presets, pretrained, vla
from vla_jax.models.presets import Lora, VLAConfig
from vla_jax.sharding import make_mesh
from vla_jax.types import TrainState, UserError

jax.tree_util.register_dataclass(TrainState, [f.name for f in dataclasses.fields(TrainState)], [])


def model_config(config: Config, *, vocab: int, state_dim: int) -> VLAConfig:
    """The model of a config, for so many token ids and a mixture whose largest state has state_dim numbers. Raises: UserError."""
    model, train = config.model, config.train
    cfg = presets.resolve(
        model.preset,
        vocab=max(vocab, model.vocab),
        image_size=config.data.image_size,
        state_dim=state_dim if config.tokens.state == "continuous" else 0,
        dtype=model.dtype,
        remat=model.remat,
        expert=model.expert,
        expert_dims=model.expert_dims,
        attention=model.attention,
    )
    if train.lora_rank:
        cfg = dataclasses.replace(cfg, lora=Lora(train.lora_rank, train.lora_alpha, train.lora_on))
    return cfg


def _init(cfg: VLAConfig, tx: optax.GradientTransformation, seed: int, with_ema: bool, params=None) -> TrainState:
    key = jax.random.key(seed)
    params = vla.init(cfg, jax.random.fold_in(key, 0)) if params is None else params
    ema = jax.tree.map(jnp.copy, params) if with_ema else None
    zero, pair = jnp.zeros((), jnp.int32), jnp.zeros(2, jnp.int32)
    tally = {"skipped": zero, "in_a_row": zero, "norm": jnp.zeros(()), "samples": pair, "tokens": pair}
    return TrainState(zero, params, tx.init(params), ema, jax.random.key_data(key), tally)


def shardings(cfg: VLAConfig, tx: optax.GradientTransformation, mesh, *, with_ema: bool):
    """(abstract TrainState, its shardings). Whatever in the optimizer state mirrors the parameters is divided like them."""
    abstract = jax.eval_shape(lambda: _init(cfg, tx, 0, with_ema))
    specs = vla.shardings(cfg, mesh)
    whole = NamedSharding(mesh, PartitionSpec())
    shapes, places = tree.flatten(abstract.params), tree.flatten(specs)

    def of_optimizer(path, leaf):
        """By the end of its path, which names the parameter that it belongs to; a step count belongs to none."""
        name = "/".join(k.key for k in path if isinstance(k, jax.tree_util.DictKey) and isinstance(k.key, str))
        name = next((name[i:] for i in [0, *(i + 1 for i, c in enumerate(name) if c == "/")] if name[i:] in places), "")
        return places[name] if name and leaf.shape == shapes[name].shape else whole

    opt = jax.tree_util.tree_map_with_path(of_optimizer, abstract.opt_state)
    tally = jax.tree.map(lambda _: whole, abstract.tally)
    return abstract, TrainState(whole, specs, opt, specs if with_ema else None, whole, tally)


def started_again(state: TrainState) -> TrainState:
    """A restored state whose skipped steps are forgiven: train.max_skips counts from here."""
    row = state.tally["in_a_row"]
    return dataclasses.replace(state, tally=state.tally | {"in_a_row": jax.jit(jnp.zeros_like, out_shardings=row.sharding)(row)})


def convert(source: str, kind: str, out: str, *, preset: str, image_size: int, vocab: int = 0, more: str = "", more_kind: str = "") -> dict:
    """Weights of others -> a folder for `model.init`, through the devices' memory, sharded over all of them; with the action expert
    that the file has. Returns what it writes about them. Raises: UserError."""
    mesh = make_mesh(1, -1, 1)
    cfg = presets.resolve(preset, vocab=128, image_size=image_size, state_dim=0, dtype="float32", remat="none")
    found = [pretrained.survey(place, of, cfg) for place, of in ((source, kind), (more, more_kind or kind)) if place]
    vocab = vocab or max(f["rows"] for f in found)
    if not vocab:
        raise UserError(f"{source} holds no embedding of tokens: give a decoder's weights, too, with --more")
    cfg = dataclasses.replace(cfg, vocab=-(-vocab // 128) * 128, expert=next((f["expert"] for f in found if f["expert"]), None))
    with jax.set_mesh(mesh):
        where = vla.shardings(cfg, mesh)
        params = pretrained.load(source, kind, cfg, where, text_vocab=vocab, more=more, more_kind=more_kind)
    about = {"format": "vla_jax.import.1", "source": str(source), "more": str(more), "kind": kind, "preset": preset}
    about |= {"image_size": image_size, "text_vocab": vocab, "parameters": sum(x.size for x in jax.tree.leaves(params))}
    side, was = image_size // cfg.vision.patch, max(f["side"] for f in found)
    if side != was:
        about["positions"] = f"resized from {was} x {was} to {side} x {side}"
    if cfg.expert:
        name = next((n for n, size in presets.EXPERTS.items() if size == (cfg.expert.width, cfg.expert.mlp)), "")
        about["expert"] = dataclasses.asdict(cfg.expert) | {"preset": f"{name}{':ada' * cfg.expert.ada}" if name else ""}
    pretrained.save(params, out, about)
    return about


def create(
    cfg: VLAConfig, tx: optax.GradientTransformation, mesh, *, seed: int, with_ema: bool, init: str = "", known_rows: int = 0
) -> TrainState:
    """A fresh state, initialised sharded; init: a folder that `convert` or `vla-jax export` wrote, whose parameters it begins with.
    known_rows: of the embedding, which alone are taken from there. Raises: UserError when they are not this model's."""
    _, where = shardings(cfg, tx, mesh, with_ema=with_ema)
    with jax.set_mesh(mesh):
        if not init:
            return jax.jit(lambda: _init(cfg, tx, seed, with_ema), out_shardings=where)()
        params = pretrained.load(init, "native", cfg, where.params, text_vocab=known_rows, seed=seed)
        return jax.jit(lambda p: _init(cfg, tx, seed, with_ema, p), out_shardings=where, donate_argnums=0)(params)
