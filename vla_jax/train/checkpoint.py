"""Checkpoints: everything a run needs to go on, and everything a policy needs to act, in one Orbax step."""

from __future__ import annotations

import base64
import dataclasses
import json
import logging
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from vla_jax import config as configs
from vla_jax.tokens import files
from vla_jax.types import TrainState, UserError


@dataclasses.dataclass(frozen=True)
class Meta:
    """What lies beside the arrays, all JSON: config, cards (raw), statistics, tokenizers, stream state, model digest."""

    config: dict
    digest: str
    mixture: str
    cards: list[dict]
    stats: list[dict]
    action_tokenizer: dict
    text_model: str  # base64
    vocab: int
    state_dim: int
    stream: list[list[int]]
    productive_s: float = 0.0  # seconds that went into its steps, those of earlier starts included
    started: float = 0.0  # when the run began, in seconds since 1970


class Checkpointer:
    """Saves and restores the steps of one run below `workdir/checkpoints`. Saving is asynchronous; close() waits."""

    def __init__(self, workdir: str | Path, *, keep: int = 2, read_only: bool = False):
        self.path = Path(workdir).expanduser().resolve() / "checkpoints"
        quiet = logging.getLogger("absl")  # Orbax warns at length that a read-only manager does not write
        level = quiet.level
        if read_only:
            quiet.setLevel(logging.ERROR)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, read_only=read_only, create=not read_only)
        self._manager = ocp.CheckpointManager(self.path, options=options, item_names=("state", "meta"))
        quiet.setLevel(level)

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: TrainState, meta: Meta) -> None:
        if step in self._manager.all_steps():
            return
        args = ocp.args.Composite(state=ocp.args.StandardSave(_tree(state)), meta=ocp.args.JsonSave(dataclasses.asdict(meta)))
        self._manager.save(step, args=args, force=True)

    def meta(self, step: int) -> Meta:
        """Raises: UserError when the step is not there or was written by something else."""
        if step not in self._manager.all_steps():
            raise UserError(f"no checkpoint of step {step} in {self.path}; there are: {self.steps() or 'none'}")
        try:
            return Meta(**self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"])
        except (TypeError, KeyError, FileNotFoundError, ValueError) as e:
            raise UserError(f"{self.path}/{step} is no checkpoint of vla_jax ({type(e).__name__}: {e})") from e

    def restore(self, step: int, abstract: TrainState, where: TrainState) -> TrainState:
        """The state of a step, each shard read to the device that holds it. Raises: UserError when shapes differ."""
        target = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), _tree(abstract), _tree(where))
        try:
            tree = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target)))["state"]
        except (ValueError, KeyError) as e:
            raise UserError(
                f"the checkpoint {self.path}/{step} belongs to another model: {str(e).splitlines()[0]}. Use another --workdir."
            ) from e
        return TrainState(**tree)

    def params(self, step: int) -> dict:
        """All parameters (EMA where one is kept) as host arrays: for export."""
        tree = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore()))["state"]
        return jax.tree.map(np.asarray, tree.get("ema") or tree["params"])

    def close(self) -> None:
        self._manager.wait_until_finished()
        self._manager.close()


def _tree(state: TrainState) -> dict:
    return {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}


def check_same_run(meta: Meta, config: configs.Config, where: Path, source) -> None:
    """source: the opened data.source.Source. Raises: UserError when the folder holds a run with another config, other
    tokenizers or another mixture."""
    fingerprint, layout = source.fingerprint(), source.layout
    old = configs.from_dict(json.loads(json.dumps(meta.config)), where=str(where))
    if old.digest() != config.digest():
        a, b = configs.flatten(dataclasses.asdict(old)), configs.flatten(dataclasses.asdict(config))
        changed = [f"{k}: {a[k]!r} -> {b[k]!r}" for k in a if a[k] != b[k]]
        raise UserError(f"{where} holds a run with another config ({'; '.join(changed[:6])}). Use another --workdir, or the same config.")
    for name, same in (
        ("action tokenizer", meta.action_tokenizer["digest"] == files.to_json(layout.action)["digest"]),
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
