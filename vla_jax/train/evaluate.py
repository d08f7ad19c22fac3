"""Offline evaluation on held-out episodes: token loss and accuracy, and action error in robot units, per dataset."""

from __future__ import annotations

import dataclasses
import json
import re

import jax
import numpy as np

from vla_jax import distributed
from vla_jax.config import Config
from vla_jax.data import feed
from vla_jax.data.source import Source
from vla_jax.data.stream import Stream
from vla_jax.models import vla
from vla_jax.models.act import Actor, Request
from vla_jax.models.presets import VLAConfig
from vla_jax.train import chunk_errors, optim, state, step
from vla_jax.train import workdir as workdirs
from vla_jax.train.chunk_errors import Chunks
from vla_jax.types import UserError


def run(config: Config, workdir, *, frames: int, where: str = "config") -> dict[str, dict]:
    """Everything about the newest checkpoint of a run: {dataset: {nll, accuracy, targets, mae, baseline, valid, and what chunk_errors.detail
    gives: frames, dims, horizon, instructions}}; of the action expert the same with flow_ before it."""
    from vla_jax.train import checkpoint, loop, resume  # loop imports this module

    workdirs.is_run(workdirs.place(workdir))  # first: opening a run makes its folder
    ready = loop.prepare(config, workdir, where=where)
    tx, names = optim.make(config.train), ready.source.names
    abstract, place = state.shardings(ready.cfg, tx, ready.mesh, with_ema=config.train.ema > 0)
    saved = checkpoint.Checkpointer(ready.workdir)
    try:
        found = resume.newest(saved, config, ready.source, abstract, place, set_aside=False)
    finally:
        saved.close()
    if found is None:
        raise UserError(f"{ready.workdir}/checkpoints holds no finished checkpoint yet.")
    latest, _, current = found
    params, held_out = current.ema or current.params, ready.source.held_out()
    eval_step = step.make_eval_step(config, ready.cfg, ready.mesh, place.params, datasets=len(names))
    with jax.set_mesh(ready.mesh):
        out = token_metrics(config, held_out, eval_step, params, ready.mesh, batches=config.train.eval_batches)
    for name, found in robot_errors(config, ready.cfg, held_out, params, frames=frames, mesh=ready.mesh, detail=True).items():
        out.setdefault(name, {}).update(found)
    return {"step": latest, **out}


def show(found: dict) -> str:
    """What `run` found, as JSON with a line a list and a line an instruction."""
    text = json.dumps(found, indent=1)
    return re.sub(r"[\[{][^\[\]{}]*[\]}]", lambda m: re.sub(r"\n\s*", " ", m.group()), text)


def robot_errors(config: Config, cfg: VLAConfig, source: Source, params, *, frames: int, mesh, detail: bool = False) -> dict[str, dict]:
    """{dataset: mae, baseline, valid of the tokens, and flow_mae of the expert}, as the objective has them; see `action_errors`. detail: see
    `run`."""
    plain, params, out = dataclasses.replace(cfg, lora=None), vla.merged(cfg, params), {}
    for head in ("tokens", "flow") if config.train.objective == "both" else (config.train.objective,):
        for name, chunks in open_loop(plain, source, params, frames=frames, head=head, mesh=mesh).items():
            own, naive = (chunk_errors.by_unit(of(chunks), chunks.dims) for of in (chunk_errors.mae, chunk_errors.baseline))
            more = chunk_errors.detail(chunks) if detail else {}
            found = {"mae": own, "valid": float(chunks.valid.mean()), **more}
            if head == "flow":  # all that the expert gives is well formed
                found = {f"flow_{key}": x for key, x in found.items() if key != "valid"}
            out.setdefault(name, {}).update(found, baseline=naive)
    return out


class Evaluation:
    """What a run measures of itself on held-out episodes while it trains."""

    def __init__(self, source: Source, cfg: VLAConfig, mesh, where):
        self._config, self._cfg, self._mesh = source.config, cfg, mesh
        self._held_out = source.held_out() if source.config.data.holdout > 0 else None
        self._step = step.make_eval_step(source.config, cfg, mesh, where, datasets=len(source.names))

    def due(self, now: int) -> bool:
        t = self._config.train
        return self._held_out is not None and (now == t.steps or (t.eval_every > 0 and now % t.eval_every == 0))

    def __call__(self, params) -> dict[str, dict]:
        """{dataset: nll, accuracy, targets or flow, and with train.eval_frames `mae`, `baseline` and `valid` as `action_errors` says}."""
        t = self._config.train
        found = token_metrics(self._config, self._held_out, self._step, params, self._mesh, batches=t.eval_batches)
        if t.eval_frames:
            for name, errors in robot_errors(
                self._config, self._cfg, self._held_out, params, frames=t.eval_frames, mesh=self._mesh
            ).items():
                found.setdefault(name, {}).update(errors)
        return found


def token_metrics(config: Config, source: Source, eval_step, params, mesh, *, batches: int) -> dict[str, dict[str, float]]:
    """Over the same first `batches` held-out batches each time: {dataset: {nll, accuracy, targets}}; nll in nats a token;
    truncated: share of samples whose text was cut, where any was."""
    total = None
    with Stream(source, process=distributed.process_index(), processes=distributed.process_count()) as stream:
        for _, (batch, _) in zip(range(batches), stream):
            sums = jax.tree.map(np.asarray, eval_step(params, feed.to_device(batch, mesh)))
            total = sums if total is None else jax.tree.map(np.add, total, sums)
        drawn, cut = dict(stream.drawn), dict(stream.truncated)
    found = summarise(total, source.names)
    for name, n in cut.items():
        found.setdefault(name, {})["truncated"] = n / drawn[name]  # of this host's samples
    return found


def summarise(sums: dict, names: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """The sums of train.losses -> {dataset: {nll, accuracy, targets, flow}}, of datasets that occurred, and as the objective has them."""
    out: dict = {}
    none = np.zeros(len(names))
    for i, name in enumerate(names):
        if count := float(sums.get("flow_samples", none)[i]):
            out[name] = {"flow": float(sums["flow_sum"][i]) / count}
        if count := float(sums.get("targets", none)[i]):
            out[name] = out.get(name, {}) | {
                "nll": float(sums["nll_sum"][i]) / count,
                "accuracy": float(sums["correct"][i]) / count,
                "targets": int(count),
            }
    return out


def loss(found: dict[str, dict]) -> float | None:
    """What `token_metrics` found -> that by which the best checkpoints are chosen: nll and flow loss, the mean over datasets."""
    each = [of.get("nll", 0.0) for of in found.values()], [of.get("flow", 0.0) for of in found.values()]
    return float(np.mean(np.add(*each))) if found else None


def action_unigram_entropy(source: Source, *, chunks: int = 4096) -> dict[str, float]:
    """Entropy (nats a token) of the training targets' unigram distribution, per dataset: what a model that ignores its
    input can reach at best."""
    out = {}
    for d, name in enumerate(source.names):
        picked = source.chunks(d, source.frames[d].spread(chunks))[0]
        ids = np.concatenate([[*tokens, -1] for tokens in source.layout.action.encode_batch(picked)])
        p = np.unique(ids, return_counts=True)[1] / len(ids)
        out[name] = float(-(p * np.log(p)).sum())
    return out


def action_errors(
    cfg: VLAConfig, source: Source, params, *, frames: int = 64, batch: int = 32, head: str = "tokens", mesh=None
) -> dict[str, dict]:
    """Mean absolute error of generated chunks on evenly spaced frames of `source` (held out), in robot units.

    {dataset: {"mae": {unit: error}, "baseline": {unit: error of always giving the mean training action}, "valid": share
    of well-formed chunks, "first": (recorded, predicted) first actions of all frames, f32[frames a] each}}. Steps past an
    episode's end do not count.
    """
    return {
        name: {
            "mae": chunk_errors.by_unit(chunk_errors.mae(chunks), chunks.dims),
            "baseline": chunk_errors.by_unit(chunk_errors.baseline(chunks), chunks.dims),
            "valid": float(chunks.valid.mean()),
            "first": (chunks.recorded[:, 0], chunks.predicted[:, 0]),
        }
        for name, chunks in open_loop(cfg, source, params, frames=frames, batch=batch, head=head, mesh=mesh).items()
    }


def open_loop(
    cfg: VLAConfig, source: Source, params, *, frames: int = 64, batch: int = 32, head: str = "tokens", mesh=None
) -> dict[str, Chunks]:
    """{dataset: generated chunks beside the recorded ones, on evenly spaced frames of `source`, in robot units}."""
    actor = Actor(cfg, source.layout, params, head=head, mesh=mesh)
    out = {}
    for d, index in enumerate(source.indexes):
        picked, samples, predicted, valid = source.frames[d].spread(frames), [], [], []
        for at in range(0, len(picked), batch):
            some = [source.sample(d, int(f)) for f in picked[at : at + batch]]
            for s, (chunk, ok) in zip(some, actor([request(source, d, s) for s in some])):
                samples.append(dataclasses.replace(s, images={}))
                predicted.append(chunk_errors.as_given(source.normalizers[d]["action"].denormalize(chunk), index.card.action.dims))
                valid.append(ok)
        out[index.card.name] = Chunks(
            dims=index.card.action.dims,
            recorded=np.stack([s.actions for s in samples]),
            predicted=np.stack(predicted),
            mask=np.stack([s.action_mask for s in samples]),
            valid=np.array(valid),
            prompts=tuple(s.prompt for s in samples),
            mean=source.statistics[d]["action"].mean,
        )
    return out


def request(source: Source, dataset: int, s) -> Request:
    """A sample's observation, as the actor takes it."""
    state = source.normalize_state(dataset, s.state)
    return Request(list(s.images.values()), state, source.prompt(dataset, s.prompt, state), len(s.actions), s.actions.shape[1])
