"""Where a run goes on: the newest step that is whole, if it is this run's."""

from __future__ import annotations

import base64
import dataclasses
import json

from etils import epath

from vla_jax import config as configs
from vla_jax import distributed
from vla_jax.console import say
from vla_jax.data import prior
from vla_jax.tokens import files
from vla_jax.train import workdir as workdirs
from vla_jax.train.checkpoint import Checkpointer, Damaged, Meta
from vla_jax.types import TrainState, UserError, may_pass


def newest(checkpoints: Checkpointer, config: configs.Config, source, abstract: TrainState, where: TrainState, *, set_aside: bool = True):
    """(step, Meta, state) of the newest whole step; None when nothing was saved yet. Steps that are damaged are named, and set aside
    so that they can be written again. source: the opened data.source.Source. Every process calls it. Raises: UserError when the run is
    another one (check_same_run), or when no step is whole."""
    damaged: list[int] = []
    for step in reversed(checkpoints.agreed()):
        try:
            meta = checkpoints.meta(step)
            check_same_run(meta, config, checkpoints.path, source)
            found = step, meta, checkpoints.restore(step, abstract, where)
        except Damaged as e:
            if distributed.is_main():
                say(f"{e}; looking for the one before it")
            damaged.append(step)
            continue
        if damaged and set_aside:
            checkpoints.set_aside(damaged)
        return found
    if damaged:
        raise UserError(
            f"none of the checkpoints in {checkpoints.path} is whole ({', '.join(map(str, damaged))}; the reasons are above). Put a good copy there, or "
            "use another --workdir to start from the beginning."
        )
    return None


def remember(config: configs.Config, workdir: epath.Path) -> None:
    """Notes whose run this folder is, before its first checkpoint. Raises: UserError when it is that of another config, or cannot be written."""
    file = workdir / "config.json"
    try:
        old = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        old = None  # not there, or half-written by a process that was killed
    if isinstance(old, dict):
        before = configs.from_dict(old, where=str(file))
        check_config(before, config, workdir)
        if before.train.steps != config.train.steps and distributed.is_main():
            say(
                f"train.steps was {before.train.steps} and is {config.train.steps}: the learning rate falls over all steps, so from here on it is another."
            )
    elif distributed.is_main():
        try:
            file.write_text(json.dumps(dataclasses.asdict(config), indent=1))
        except Exception as e:  # of a store, many kinds
            kind = may_pass if workdirs.is_remote(file) else UserError
            raise kind(f"{file} cannot be written: {type(e).__name__}: {' '.join(str(e).split())[:300]}") from e
    _same_beginning(config.model.init, workdir)


def _same_beginning(init: str, workdir: epath.Path) -> None:
    """Notes what model.init holds, wherever it lies. Raises: UserError when the run has begun with something else. A run that has begun needs the
    folder no more: one that is gone is not asked about."""
    note, now = workdir / "init.sha256", prior.fingerprint(init) if init else ""
    if any(folder.name.isdigit() for folder in (workdir / "checkpoints").glob("*")):
        if now and now != (note.read_text().strip() if note.exists() else ""):
            raise UserError(
                f"the run in {workdir} did not begin with what model.init {init} holds. Use another --workdir, or leave model.init as it was."
            )
    elif now and distributed.is_main():
        note.write_text(now + "\n")


def check_config(old: configs.Config, config: configs.Config, where: epath.Path) -> None:
    """Raises: UserError when a run of the one config cannot go on with the other."""
    if old.digest() != config.digest():
        a, b = configs.flatten(dataclasses.asdict(old)), configs.flatten(dataclasses.asdict(config))
        changed = [f"{k}: {a[k]!r} -> {b[k]!r}" for k in a if a[k] != b[k]]
        raise UserError(f"{where} holds a run with another config ({'; '.join(changed[:6])}). Use another --workdir, or the same config.")


def check_same_run(meta: Meta, config: configs.Config, where: epath.Path, source) -> None:
    """source: the opened data.source.Source. Raises: UserError when the folder holds a run with another config, other
    tokenizers or another mixture."""
    fingerprint, layout = source.fingerprint(), source.layout
    old = configs.from_dict(json.loads(json.dumps(meta.config)), where=str(where))
    check_config(old, config, where)
    for name, same in (
        (
            "action tokenizer",
            (meta.action_tokenizer["digest"], meta.behind) == (files.to_json(layout.action)["digest"], layout.behind),
        ),
        ("text tokenizer", base64.b64decode(meta.text_model) == layout.text.model),
    ):
        if not same:
            raise UserError(
                f"{where} was trained with another {name} than the one found now. Put back the file it had (action_tokenizer.json in the workdir, tokens.action_path or tokens.text_model), or use another --workdir."
            )
    if (
        meta.mixture != fingerprint
        and config.train.allow_new_mixture
        and layout.state == "continuous"
        and meta.state_dim != source.shape[2]
    ):
        raise UserError(
            f"{where} was trained on states of {meta.state_dim} numbers (its mixture's largest) and the new mixture has {source.shape[2]}. "
            "Use another --workdir, or a mixture of the same size."
        )
    if meta.mixture != fingerprint and not config.train.allow_new_mixture:
        raise UserError(
            f"the data changed since {where} was written (mixture {meta.mixture} -> {fingerprint}). Set --config.train.allow_new_mixture=true to go on with the new data from its start."
        )
