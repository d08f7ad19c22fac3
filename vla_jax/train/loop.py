"""A whole run on one page, in the order of time."""

from __future__ import annotations

import base64
import collections
import contextlib
import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
from etils import epath

from vla_jax import distributed, paths, sharding
from vla_jax.config import Config, Train
from vla_jax.console import say
from vla_jax.data import feed, prior, stats
from vla_jax.data.source import Source, open_source
from vla_jax.data.stream import Stream, initial_state
from vla_jax.models import attention, flops, lora, presets, vla
from vla_jax.models.presets import VLAConfig
from vla_jax.tokens import files
from vla_jax.train import evaluate, metrics, optim, resume, state, step
from vla_jax.train import workdir as workdirs
from vla_jax.train.checkpoint import Checkpointer, Meta
from vla_jax.train.evaluate import Evaluation
from vla_jax.train.interruption import Interruption, Watch
from vla_jax.train.meter import Meter, Profile, age, memory, utilisation
from vla_jax.types import Interrupted, TrainState, UserError


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run is made of, before its first step."""

    config: Config
    workdir: epath.Path
    mesh: jax.sharding.Mesh
    source: Source
    cfg: VLAConfig


def prepare(config: Config, workdir: str | Path, *, where: str = "config") -> Run:
    """Opens everything and checks that it fits together. Raises: UserError, before a parameter is created."""
    distributed.agree_versions()
    with distributed.together("opening the workdir"):
        workdir = workdirs.open_(workdir)
    workdirs.check_shared(workdir)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, where=where)
    sharding.check_batch(config.pack.rows, mesh, parts=config.train.accumulate, where=where)
    patches = presets.tokens_per_image(config.model.preset, config.data.image_size)
    started = any(distributed.gather_json(any(folder.name.isdigit() for folder in (workdir / "checkpoints").glob("*"))))
    begun = workdir / "init"  # what a policy in model.init brought along; a run that has started needs that folder no more
    first = prior.load(begun if started else config.model.init) if started or config.model.init else None
    if first:
        first.check(config)
    kept = workdir / "action_tokenizer.json"
    source = open_source(
        workdirs.with_index(config, workdir), tokens_per_image=patches, tokenizer_path=kept, refit=not started, prior=first
    )
    cfg = state.model_config(config, vocab=source.layout.vocab_size, state_dim=source.shape[2])
    trained = lora.trainable(jax.eval_shape(lambda: vla.init(cfg, jax.random.key(0))), config.train)  # patterns are checked
    drawn = max(0, source.layout.vocab_size - source.known_rows)
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
    all_of = dataclasses.asdict(config)
    for key in ("root", "index_dir", "threads", "read_ahead", "prefetch"):  # each host's own affair
        all_of["data"].pop(key)
    distributed.agree("config", json.dumps(all_of, sort_keys=True))  # one program, and its pauses at the same steps
    distributed.agree("data", source.fingerprint())
    if first and not started:
        with distributed.together("keeping what model.init brings"):
            if distributed.is_main():
                first.keep(begun)
                say(_begins(source, drawn))
    return Run(config, workdir, mesh, source, cfg)


def _begins(source: Source, drawn: int) -> str:
    """What a run takes from the policy that it begins with, what is new, and which robots it keeps or loses."""
    first, c = source.prior, source.config
    known = [] if c.data.refit_stats else [n for n in source.names if n in first.robots]
    own = [n for n in source.names if n not in known]
    keep, lost = first.carried(c, source.names, source.layout.action)
    parts = [f"begins with {c.model.init}, step {first.step}"]
    parts += [f"statistics of {', '.join(known)} are kept"] if known else []
    parts += [f"those of {', '.join(own)} are of this data"] if own else []
    parts.append(f"{drawn} action tokens have new rows of the embedding" if drawn else "the action tokens are its own")
    if first.state_dim and source.shape[2] > first.state_dim:
        parts.append(f"numbers {first.state_dim}..{source.shape[2] - 1} of the state have new rows of its projection")
    names = [card["name"] for card, _ in keep]
    parts += [f"{', '.join(names)} can still be driven as before"] if keep else []
    parts += [f"{', '.join(g['robots'])} by the action tokens of before" for g in first.spoken(names, source.layout.action)]
    parts += [f"{name} will not be in the export: {why}" for name, why in lost.items()]
    return "; ".join(parts)


def train(run: Run, *, quiet: bool = False, profile: tuple[int, int] | None = None) -> TrainState:
    """Trains from the newest checkpoint in the workdir, or from the start, to `train.steps`; returns the final state.

    profile: (first, last) step of which a trace is written to workdir/profile. Raises: Interrupted, with everything saved, after SIGTERM or
    SIGINT to any process; UserError, besides what the parts raise, when train.max_skips steps in a row had to be skipped.
    """
    t = run.config.train
    if profile and profile[0] > t.steps:
        raise UserError(f"--profile={profile[0]}:{profile[1]}: the run has {t.steps} steps (train.steps)")
    began = age()
    with Watch(t.hang_s) as watch:  # from before the first thing that needs all processes
        return _train(run, watch, began, quiet=quiet, profile=profile)


def _train(run: Run, watch: Watch, began: float, *, quiet: bool, profile: tuple[int, int] | None) -> TrainState:
    config, t, names = run.config, run.config.train, run.source.names
    watch.beat(0, "looking for a checkpoint, and restoring it or creating the state")
    with distributed.together("opening the workdir"):
        resume.remember(config, run.workdir)
    tx, with_ema, main = optim.make(t), t.ema > 0, distributed.is_main()
    abstract, where = state.shardings(run.cfg, tx, run.mesh, with_ema=with_ema)
    checkpoints = Checkpointer(run.workdir, t)
    first, flow, clock = 0, initial_state(config), (0.0, 0.0)
    if found := resume.newest(checkpoints, config, run.source, abstract, where):
        first, meta, restored = found
        current, clock = state.started_again(restored), (meta.productive_s, meta.started)
        flow = np.array(meta.stream, np.int64) if meta.mixture == run.source.fingerprint() else flow
    else:
        current = state.create(
            run.cfg,
            tx,
            run.mesh,
            seed=t.seed,
            with_ema=with_ema,
            init=config.model.init,
            known_rows=min(run.source.known_rows, run.cfg.vocab),
        )
    if first >= t.steps:
        if main and not quiet:
            print(f"already done: {run.workdir} is at step {first} of {t.steps}")
        checkpoints.close()
        return current

    started = {"init_s": began, "restore_s" if first else "create_s": age() - began}
    train_step = step.make_train_step(config, run.cfg, tx, run.mesh, where, datasets=len(names))
    evaluation = Evaluation(run.source, run.cfg, run.mesh, where.params)
    share = len(flow) // distributed.process_count()
    mine = flow[distributed.process_index() * share :][:share]
    stream = Stream(run.source, process=distributed.process_index(), processes=distributed.process_count(), state=mine)
    ahead, meter, queued = feed.Feed(stream, run.mesh), Meter(run.workdir, *clock), collections.deque()
    lag = 0 if jax.default_backend() == "cpu" else 1  # virtual devices share a few threads: a collective may need those of a queued step
    with (
        jax.set_mesh(run.mesh),
        Interruption() as interruption,
        checkpoints,  # inside it: its end waits for the last step to be whole
        stream,
        ahead,
        Profile(workdirs.local(run.workdir) / "profile", profile if main else None) as trace,
        metrics.Writer(run.workdir, config, first=first, quiet=quiet) as writer,
    ):
        writer.log(first, {"data": _used(run.source)})
        for now in range(first + 1, t.steps + 1):
            watch.beat(now, "waiting for its batch, or for the step before it")
            trace.before(now)
            with jax.transfer_guard("disallow"):  # nothing crosses between host and devices: the batch is there already
                if not ahead.ready():  # what the devices still work through is no waiting for data
                    jax.block_until_ready(list(queued))
                with meter.waiting("data"):
                    batch, after = next(ahead)
                with meter.waiting("compile") if now == first + 1 else contextlib.nullcontext():
                    current, measured = train_step(current, batch)
                queued.append(measured["loss"])
                if len(queued) > lag:  # the devices always have their next step, and never a queue of batches
                    jax.block_until_ready(queued.popleft())
            trace.after(now, measured)
            meter.steps += 1
            writer.progress(now)
            if now == first + 1:
                writer.log(now, {"start": started | meter.first()})
            if now % t.log_every == 0 or now == t.steps:
                values = _readable(measured, names)
                values |= meter.window()
                values |= _held(run, values.pop("work"), values["step_s"]) | _counted(run, stream, after) | {"memory": memory()}
                writer.log(now, {"train": values}, show=_line(values))
                _halt(values, now, t, checkpoints)
            measures = {}
            if evaluation.due(now):
                watch.beat(now, "evaluating")
                with meter.waiting("eval"):
                    measures = evaluation(current.ema or current.params)
                writer.log(now, {"eval": measures})
            ends = interruption.reached(now) and now < t.steps
            if ends or now % t.save_every == 0 or now == t.steps:  # before the next batch is taken
                watch.beat(now, "saving a checkpoint")
                with meter.waiting("checkpoint"):
                    checkpoints.save(now, current, _meta(run, feed.gather_states(after), meter), evaluate.loss(measures))
                    writer.copy()
            if ends or now == t.steps:
                checkpoints.wait()
            if ends:
                raise Interrupted(now, t.steps, checkpoints.latest() or 0)
        if checkpoints.latest() != t.steps:  # once more, and then it is no finished run
            checkpoints.save(t.steps, current, _meta(run, feed.gather_states(after), meter), evaluate.loss(measures))
            checkpoints.wait()
        if checkpoints.latest() != t.steps:
            raise OSError(
                f"the last checkpoint could not be written: {run.workdir} holds steps {checkpoints.steps()}, and the run was at {t.steps}. "
                "Make room there and start again: it goes on from the newest."
            )
    return current


def _used(source: Source) -> dict:
    """What the indexes hold of each dataset, and what they left out and why (episodes by cause)."""
    kept = lambda ix: {"episodes": ix.episodes, "frames": ix.frames, "skipped": ix.skipped, "filtered": ix.filtered}
    return {ix.card.name: kept(ix) for ix in source.indexes}


def _counted(run: Run, stream: Stream, after: np.ndarray) -> dict:
    """Over all hosts: epochs of each dataset so far; and since the run was started or resumed, samples passed over by
    `dataset/cause` and samples whose text was cut by dataset."""
    skipped = {f"{d}/{why}": n for (d, why), n in dict(stream.skipped).items()}
    drawn = int(after[:, 0].sum() - (after[:, 1:] >= 0).sum())
    told = distributed.gather_json({"skipped": skipped, "truncated": dict(stream.truncated), "drawn": drawn})
    total = lambda what: dict(sorted(sum((collections.Counter(x[what]) for x in told), collections.Counter()).items()))
    counts = run.source.sampler.counts(sum(x["drawn"] for x in told))
    epochs = {name: n / len(frames) for name, n, frames in zip(run.source.names, counts.tolist(), run.source.frames)}
    return {"epochs": epochs, "skipped": total("skipped"), "truncated": total("truncated")}


def _readable(measured: dict, names: tuple[str, ...]) -> dict:
    """Device scalars -> numbers, and the sums by dataset -> means by name."""
    host = jax.device_get(measured)
    sums, tally = host.pop("datasets"), host.pop("tally")
    seen = {name: int(tally[name][0]) * (1 << 20) + int(tally[name][1]) for name in ("samples", "tokens")}
    skips = {"skipped_steps": int(tally["skipped"]), "skipped_in_a_row": int(tally["in_a_row"])}
    return {**jax.tree.map(lambda x: x.item(), host), "seen": seen, **skips, "dataset": evaluate.summarise(sums, names)}


def _held(run: Run, work: dict, step_s: float) -> dict:
    """What the last batch held, and the rates at which such batches are learned from."""
    pack = run.config.pack
    done = flops.with_expert(work, run.source.shape[0]) if run.config.train.objective != "tokens" else work
    rates = {"samples_per_s": work["samples"] / step_s, "tokens_per_s": work["tokens"] / step_s}
    used = {"samples": work["samples"], "tokens": work["tokens"], "slots_used": work["tokens"] / (pack.rows * pack.length)}
    return used | rates | utilisation(run.cfg, done, step_s)


def _line(values: dict) -> str:
    """Beside the progress bar."""
    cut, skipped = sum(values["truncated"].values()), values["skipped_steps"]
    parts = [f"loss {values['loss']:.3f}", f"{values['samples_per_s']:.0f} samples/s"]
    parts += [f"MFU {values['mfu']:.0%}"] if "mfu" in values else []
    parts += [f"{skipped} steps skipped"] if skipped else []
    return ", ".join(parts + ([f"{cut} prompts cut"] if cut else []))


def _halt(values: dict, now: int, t: Train, checkpoints: Checkpointer) -> None:
    """Raises: UserError when the run cannot go on like this."""
    if values["skipped_in_a_row"] >= t.max_skips:
        checkpoints.close()
        raise UserError(
            f"stopped at step {now}: the last {values['skipped_in_a_row']} steps were skipped (train.max_skips={t.max_skips}), because loss "
            f"({values['loss']:g}) or gradient (norm {values['grad_norm']:g}) were not finite or a spike (train.spike={t.spike:g}). "
            f"The parameters are those of the last step that was taken; checkpoints: {checkpoints.steps() or 'none'}. Lower train.lr, raise train.warmup "
            "or train.spike, or look at the data of these steps, and start again: the run goes on from its newest checkpoint."
        )


def _meta(run: Run, flow: np.ndarray, meter: Meter) -> Meta:
    source = run.source
    cards = [json.loads(json.dumps(dataclasses.asdict(ix.card))) for ix in source.indexes]
    numbers = [stats.to_json(s) for s in source.statistics]
    carried = source.prior.carried(run.config, source.names, source.layout.action)[0] if source.prior else []
    for card, known in carried:
        cards, numbers = [*cards, card], [*numbers, known]
    return Meta(
        config=json.loads(json.dumps(dataclasses.asdict(run.config))),
        digest=run.config.digest(),
        mixture=source.fingerprint(),
        cards=cards,
        stats=numbers,
        action_tokenizer=files.to_json(source.layout.action),
        text_model=base64.b64encode(source.layout.text.model).decode(),
        vocab=source.layout.vocab_size,
        state_dim=run.cfg.state_dim,
        stream=flow.tolist(),
        productive_s=meter.so_far(),
        started=meter.started,
        commit=paths.commit(),
        behind=source.layout.behind,
        earlier=source.prior.spoken([card["name"] for card, _ in carried], source.layout.action) if source.prior else [],
    )
