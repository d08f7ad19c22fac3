"""A whole run on one page, in the order of time."""

from __future__ import annotations

import base64
import dataclasses
import json
import time
from collections import Counter
from pathlib import Path

import jax
import numpy as np

from vla_jax import distributed, sharding
from vla_jax.config import Config
from vla_jax.data import feed, stats
from vla_jax.data.source import Source, open_source
from vla_jax.data.stream import Stream, initial_state
from vla_jax.models import attention, lora, presets, vla
from vla_jax.models.presets import Lora, VLAConfig
from vla_jax.tokens import files
from vla_jax.train import checkpoint, evaluate, metrics, optim, state, step
from vla_jax.train.checkpoint import Checkpointer, Meta
from vla_jax.types import TrainState, UserError


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run is made of, before its first step."""

    config: Config
    workdir: Path
    mesh: jax.sharding.Mesh
    source: Source
    cfg: VLAConfig


def prepare(config: Config, workdir: str | Path, *, where: str = "config") -> Run:
    """Opens everything and checks that it fits together. Raises: UserError, before a parameter is created."""
    workdir = Path(workdir).expanduser()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"workdir {workdir} cannot be made: {e.strerror}. Name a folder that may be written.") from e
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, where=where)
    sharding.check_batch(config.pack.rows, mesh, where=where)
    patches = presets.tokens_per_image(config.model.preset, config.data.image_size)
    started = any(folder.name.isdigit() for folder in (workdir / "checkpoints").glob("*"))
    source = open_source(config, tokens_per_image=patches, tokenizer_path=workdir / "action_tokenizer.json", refit=not started)
    cfg = presets.resolve(
        config.model.preset,
        vocab=source.layout.vocab_size,
        image_size=config.data.image_size,
        state_dim=source.shape[2] if source.layout.state == "continuous" else 0,
        dtype=config.model.dtype,
        remat=config.model.remat,
        expert=config.model.expert,
        expert_dims=config.model.expert_dims,
        attention=config.model.attention,
    )
    if config.train.lora_rank:
        cfg = dataclasses.replace(cfg, lora=Lora(config.train.lora_rank, config.train.lora_alpha, config.train.lora_on))
    trained = lora.trainable(jax.eval_shape(lambda: vla.init(cfg, jax.random.key(0))), config.train)  # patterns are checked
    drawn = source.layout.vocab_size - source.layout.text.vocab_size
    if config.model.init and config.train.objective != "flow" and drawn and not vla.embedding(trained):
        raise UserError(
            f"the rows of the embedding for {drawn} action tokens are not in model.init, and would stay random: add 'llm/embedder/.*' to "
            "train.lora_also (with train.freeze: take it out), or use tokens.layout=openpi, whose ids are the text model's."
        )
    with jax.set_mesh(mesh):
        attention.check(cfg)
    if cfg.expert and max(source.shape[1:]) > cfg.expert.action_dim:
        raise UserError(
            f"the mixture has actions of {source.shape[1]} and states of {source.shape[2]} numbers, more than model.expert_dims "
            f"{cfg.expert.action_dim}. Raise --config.model.expert_dims."
        )
    distributed.agree("config", f"{config.digest()} {config.model.attention} {config.model.remat}")  # one program on all
    distributed.agree("data", source.fingerprint())
    return Run(config, workdir, mesh, source, cfg)


def train(run: Run, *, quiet: bool = False) -> TrainState:
    """Trains from the newest checkpoint in the workdir, or from the start, to `train.steps`; returns the final state."""
    config, t, names = run.config, run.config.train, run.source.names
    tx = optim.make(t)
    with_ema = t.ema > 0
    abstract, where = state.shardings(run.cfg, tx, run.mesh, with_ema=with_ema)
    checkpoints = Checkpointer(run.workdir, keep=t.keep)
    first, flow = checkpoints.latest() or 0, initial_state(config)
    if first:
        meta = checkpoints.meta(first)
        checkpoint.check_same_run(meta, config, checkpoints.path, run.source)
        current = checkpoints.restore(first, abstract, where)
        flow = np.array(meta.stream, np.int64) if meta.mixture == run.source.fingerprint() else flow
    else:
        current = state.create(
            run.cfg, tx, run.mesh, seed=t.seed, with_ema=with_ema, init=config.model.init, text_vocab=run.source.layout.text.vocab_size
        )
    if first >= t.steps:
        if distributed.is_main() and not quiet:
            print(f"already done: {run.workdir} is at step {first} of {t.steps}")
        checkpoints.close()
        return current

    train_step = step.make_train_step(config, run.cfg, tx, run.mesh, where, datasets=len(names))
    eval_step = step.make_eval_step(config, run.cfg, run.mesh, where.params, datasets=len(names))
    held_out = run.source.held_out() if config.data.holdout > 0 else None
    on_cpu = jax.default_backend() == "cpu"
    share = len(flow) // distributed.process_count()
    mine = flow[distributed.process_index() * share :][:share]
    stream = Stream(run.source, process=distributed.process_index(), processes=distributed.process_count(), state=mine)
    ahead = feed.Feed(stream, run.mesh)
    with jax.set_mesh(run.mesh), stream, ahead, metrics.Writer(run.workdir, first=first, last=t.steps, quiet=quiet) as writer:
        writer.log(first, {"data": _used(run.source)})
        since, waited, at = time.perf_counter(), 0.0, first
        for now in range(first + 1, t.steps + 1):
            before = time.perf_counter()
            batch, after = next(ahead)
            waited += time.perf_counter() - before
            current, measured = train_step(current, batch)
            if on_cpu:  # virtual devices share a few threads: queued steps could take those that a collective waits for
                jax.block_until_ready(measured)
            writer.progress(now)
            if now % t.log_every == 0 or now == t.steps:
                values = _readable(measured, names)
                elapsed, steps = time.perf_counter() - since, now - at
                values |= {
                    "step_s": elapsed / steps,
                    "data_wait_share": waited / elapsed,
                    "slots_used": values["tokens"] / (config.pack.rows * config.pack.length),
                }
                values |= {"skipped": _total({f"{d}/{why}": n for (d, why), n in dict(stream.skipped).items()})}
                values |= {"truncated": _total(dict(stream.truncated))}
                cut = sum(values["truncated"].values())
                writer.log(now, {"train": values}, show=f"loss {values['loss']:.3f}" + (f", {cut} prompts cut" if cut else ""))
                since, waited, at = time.perf_counter(), 0.0, now
            if held_out and (now == t.steps or (t.eval_every and now % t.eval_every == 0)):
                found = evaluate.token_metrics(config, held_out, eval_step, current.params, run.mesh, batches=t.eval_batches)
                writer.log(now, {"eval": found})
            if now % t.save_every == 0 or now == t.steps:  # before the next batch is taken
                checkpoints.save(now, current, _meta(run, feed.gather_states(after)))
    checkpoints.close()
    return current


def _used(source: Source) -> dict:
    """What the indexes hold of each dataset, and what they left out and why (episodes by cause)."""
    kept = lambda ix: {"episodes": ix.episodes, "frames": ix.frames, "skipped": ix.skipped, "filtered": ix.filtered}
    return {ix.card.name: kept(ix) for ix in source.indexes}


def _total(mine: dict[str, int]) -> dict[str, int]:
    """What this process has counted since the run was started or resumed, summed over all hosts: samples passed over by
    `dataset/cause`, samples whose text was cut by dataset."""
    total: Counter = Counter()
    for counts in distributed.gather_json(mine):
        total.update(counts)
    return dict(sorted(total.items()))


def _readable(measured: dict, names: tuple[str, ...]) -> dict:
    """Device scalars -> floats, and the sums by dataset -> means by name."""
    host = jax.tree.map(np.asarray, measured)
    sums = host.pop("datasets")
    return {**{k: float(v) for k, v in host.items()}, "dataset": evaluate.summarise(sums, names)}


def _meta(run: Run, flow: np.ndarray) -> Meta:
    source = run.source
    return Meta(
        config=json.loads(json.dumps(dataclasses.asdict(run.config))),
        digest=run.config.digest(),
        mixture=source.fingerprint(),
        cards=[json.loads(json.dumps(dataclasses.asdict(ix.card))) for ix in source.indexes],
        stats=[stats.to_json(s) for s in source.statistics],
        action_tokenizer=files.to_json(source.layout.action),
        text_model=base64.b64encode(source.layout.text.model).decode(),
        vocab=source.layout.vocab_size,
        state_dim=run.cfg.state_dim,
        stream=flow.tolist(),
    )
