"""`vla-jax eval --export`: an exported policy on recorded episodes, with the statistics, tokenizers and views that it carries."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax

from vla_jax import sharding
from vla_jax.config import Config
from vla_jax.data import cards, source
from vla_jax.data.source import Source
from vla_jax.deploy import export, policy
from vla_jax.deploy.trained import Robot
from vla_jax.models import vla
from vla_jax.train import evaluate, step
from vla_jax.types import UserError


def run(config: Config, folder: str | Path, *, frames: int, where: str = "config") -> dict[str, dict]:
    """What evaluate.run says of a run, of an export. `config` says which data, how much of it at once and on which mesh (data.root, index_dir,
    mixture, holdout, threads; pack.rows, pack.group; mesh; train.eval_batches); everything else is the export's. Held-out episodes are those of data.holdout; with 0 all of them.

    Raises: UserError when a dataset is not among the export's robots, or its card means something else there.
    """
    body, params, folder = export.read(folder)
    trained, cfg, found, layouts = policy.parts(body, params, folder)
    data = {
        key: getattr(config.data, key)
        for key in ("root", "index_dir", "mixture", "holdout", "max_skipped", "threads", "read_ahead", "prefetch")
    }
    mesh_of = dataclasses.replace(trained, data=dataclasses.replace(trained.data, **data), mesh=config.mesh)
    pack = dataclasses.replace(trained.pack, rows=config.pack.rows, group=config.pack.group)
    own = dataclasses.replace(mesh_of, pack=pack, train=dataclasses.replace(trained.train, eval_batches=config.train.eval_batches))
    mesh = sharding.make_mesh(own.mesh.data, own.mesh.fsdp, own.mesh.tensor, where=where)
    sharding.check_batch(own.pack.rows, mesh, where=where)
    mix, indexes = source.open_indexes(own)
    for ix in indexes:
        _check(ix.card, found, folder)
    layout, *others = {id(x): x for x in (layouts[ix.card.name] for ix in indexes)}.values()
    if others:
        groups = [[name for name, x in layouts.items() if x is one] for one in (layout, *others)]
        raise UserError(f"the robots of {folder} speak several action tokenizers ({groups}): evaluate each group with a mixture of its own")
    opened = Source.make(
        own,
        indexes,
        [found[ix.card.name].stats for ix in indexes],
        layout,
        weights=[1.0] * len(indexes),
        held_out=own.data.holdout > 0,
        seed=0,
    )
    opened.check_fit()
    names, place = opened.names, vla.shardings(cfg, mesh)
    eval_step = step.make_eval_step(own, cfg, mesh, place, datasets=len(names))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, place)
        out = evaluate.token_metrics(own, opened, eval_step, placed, mesh, batches=own.train.eval_batches)
    for name, errors in evaluate.robot_errors(own, cfg, opened, placed, frames=frames, mesh=mesh, detail=True).items():
        out.setdefault(name, {}).update(errors)
    return {"step": body["step"], **out}


def _check(card: cards.DatasetCard, found: dict[str, Robot], folder: Path) -> None:
    if card.name not in found:
        raise UserError(f"{folder} was not trained on {card.name}; its robots are: {', '.join(found)}")
    theirs = found[card.name].card
    for what in ("state", "action", "views"):
        if getattr(card, what) != getattr(theirs, what):
            raise UserError(
                f"card {card.name} has another {what} than in {folder}: {getattr(card, what)} here, {getattr(theirs, what)} there"
            )
