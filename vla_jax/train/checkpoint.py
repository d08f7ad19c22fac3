"""Checkpoints: everything a run needs to go on, and everything a policy needs to act, in one Orbax step."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep_policy

from vla_jax import distributed
from vla_jax.config import Train
from vla_jax.console import say
from vla_jax.train import checksums
from vla_jax.train import workdir as workdirs
from vla_jax.types import TrainState, UserError, may_pass

_SOON = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "ABORTED", "UNAUTHENTICATED", "PERMISSION_DENIED")  # TensorStore's
_SOON_ERRNO = (errno.ESTALE, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENETUNREACH, errno.EHOSTUNREACH)


_CONTENTS = (ValueError, LookupError, TypeError, AttributeError, FileNotFoundError, NotADirectoryError, EOFError)


class Damaged(Exception):
    """A step whose bytes are not those that were written; says which, and how that was seen."""


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
    commit: str = ""  # of the code that trained it, as of its last start
    behind: int = 0  # ids of earlier action tokenizers before those of action_tokenizer
    earlier: list[dict] = dataclasses.field(default_factory=list)  # what robots of before speak: data.prior.Prior.earlier
    sums: dict[str, int] = dataclasses.field(default_factory=dict)  # checksums of the state's arrays, by path; set by save
    loss: float | None = None  # held out, where it is known; set by save


class Checkpointer:
    """Saves and restores the steps of one run below `workdir/checkpoints`, a folder or a URL. Saving is asynchronous.

    A step that cannot be written (a full disk, a store that does not answer) costs that step and not the run: it is said, and what is
    left of it is removed. What was saved before stays until a later step is complete.
    """

    def __init__(self, workdir: str | os.PathLike, train: Train | None = None):
        """train: its `keep`, `keep_every` and `keep_best` say which steps stay; None: for reading only."""
        self.path = workdirs.place(workdir) / "checkpoints"
        self._writing, self._losses = None, {}
        logging.getLogger("absl").addFilter(_not_orbax)
        self._options = ocp.CheckpointManagerOptions(
            preservation_policy=self._kept(train) if train else None,
            # a process that cannot write its part leaves the others waiting for it, so long at most
            async_options=ocp.AsyncOptions(timeout_secs=max(1, round(train.save_timeout_s))) if train else None,
            read_only=train is None,
            create=train is not None,
            cleanup_tmp_directories=train is not None,  # of a process that was killed while it saved
        )
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(self.path, options=self._options, item_names=("state", "meta"))

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *exc) -> None:
        if exc[0] is None:
            self.close()
        else:  # perhaps on this process alone: nothing that the others would have to join
            self._manager.close()

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def agreed(self, wait_s: float = 60.0) -> list[int]:
        """The steps that any process sees. Every process calls it, and returns once it sees them all: a network's folder may be listed late.
        Raises: UserError on all of them when one does not."""
        steps, until = sorted(set().union(*distributed.gather_json(self.steps()))), time.monotonic() + wait_s
        with distributed.together("looking for checkpoints"):
            while missing := set(steps) - set(self.steps()):
                if time.monotonic() > until:
                    raise may_pass(
                        f"another process sees the steps {sorted(missing)} in {self.path}, and this one has not for {wait_s:.0f} s"
                    )
                time.sleep(0.5)
                self._manager.reload()
        return steps

    def save(self, step: int, state: TrainState, meta: Meta, loss: float | None = None) -> None:
        """loss: held out, at this step, where it is known. Every process calls it. Waits for the step before."""
        self.wait()
        if step in self._manager.all_steps():
            return
        tree = _tree(state)
        told, self._losses[step] = _sealed(dataclasses.replace(meta, sums=checksums.of(tree), loss=loss)), loss
        args = ocp.args.Composite(state=ocp.args.StandardSave(tree), meta=ocp.args.JsonSave(told))
        self._writing = step
        self._try(lambda: self._manager.save(step, args=args, force=True))

    def wait(self) -> None:
        """Returns when the step that is being written is complete, or has been given up on all processes."""
        if self._writing is not None:
            self._try(self._manager.wait_until_finished)
            self._writing = None

    def _try(self, write: Callable[[], Any]) -> None:
        """What goes wrong with a step on one process gives it up on all."""
        problem = None
        try:
            write()
        except Exception as e:  # Orbax and TensorStore raise many kinds
            problem = e
        if any(distributed.gather_json(problem is not None)):
            self._give_up(problem or OSError("another process could not write its part"))

    def _give_up(self, problem: Exception) -> None:
        step, self._writing = self._writing, None
        with contextlib.suppress(Exception):  # what it still writes of this step would come back after it is removed
            self._manager.wait_until_finished()
        here, first = self.path / str(step), next(iter(str(problem).splitlines()), "")
        finished = distributed.broadcast_json(_finished(here) if distributed.is_main() else None)
        if finished:
            say(  # what failed came after it: Orbax removes old steps in the same breath
                f"checkpoint {here} is written; an older one could not be removed ({type(problem).__name__}: {first[-300:]}): remove it by hand."
            )
            self._replace()
            return
        if distributed.is_main():
            with contextlib.suppress(Exception):
                for left in (*self.path.glob(f"{step}.orbax-checkpoint-tmp*"), *([here] if finished is False else [])):  # it may be whole
                    left.rmtree(missing_ok=True)
        distributed.barrier(f"gave up step {step}")
        self._replace()
        say(
            f"checkpoint {self.path}/{step} could not be written ({type(problem).__name__}: {first[-300:]}). The run goes on; "
            f"it can be resumed from: {self.steps() or 'its start only'}. Make room there."
        )

    def _replace(self) -> None:
        """A new manager: of a step whose parts failed each, the old one would raise the second part's error for the next step."""
        with contextlib.suppress(Exception):
            self._manager.close()
        self._manager = self._open()

    def meta(self, step: int) -> Meta:
        """Raises: UserError when the step is not there, Damaged (on all processes) when it is not what was written."""
        if step not in self._manager.all_steps():
            raise UserError(f"no checkpoint of step {step} in {self.path}; there are: {self.steps() or 'none'}")
        return self._whole(step, lambda: self._read(step))

    def _read(self, step: int) -> Meta:
        told = json.loads((self.path / str(step) / "meta" / "metadata").read_text())
        if told.pop("sha256", "none") != _sha256(told):
            raise ValueError("meta has another checksum, or none")
        return Meta(**told)

    def restore(self, step: int, abstract: TrainState, where: TrainState) -> TrainState:
        """The state of a step, each shard read to the device that holds it, on any mesh, in the dtypes of `abstract`. Every process
        calls it. Raises: UserError when shapes differ; Damaged, on all processes, when an array is not what was written."""
        folder, wanted, sums = self.path / str(step) / "state", _tree(abstract), self.meta(step).sums
        reader = ocp.StandardCheckpointHandler()  # the manager's way ends at a barrier, which a process that failed never reaches
        about = self._whole(step, lambda: checksums.flatten(reader.metadata(folder).tree))
        saved = {path: (tuple(x.shape), np.dtype(x.dtype)) for path, x in about.items()}
        shapes = {path: tuple(x.shape) for path, x in checksums.flatten(wanted).items()}
        if differ := sorted(p for p in saved.keys() | shapes.keys() if p not in saved or saved[p][0] != shapes.get(p)):
            has, needs = saved.get(differ[0], ("nothing",))[0], shapes.get(differ[0], "nothing")
            raise UserError(
                f"the checkpoint {self.path}/{step} belongs to another model: {differ[0]} is {has} there and {needs} here"
                f"{f', and {len(differ) - 1} more' if differ[1:] else ''}. Use another --workdir."
            )
        dtypes = iter([saved[path][1] for path in shapes])
        target = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, next(dtypes), sharding=s), wanted, _tree(where))
        tree = self._whole(step, lambda: reader.restore(folder, args=ocp.args.StandardRestore(target)))
        self._verify(step, tree, sums)
        cast = jax.jit(lambda t: jax.tree.map(lambda x, a: x.astype(a.dtype), t, wanted), out_shardings=_tree(where), donate_argnums=0)
        return TrainState(**cast(tree))

    def _whole(self, step: int, read: Callable[[], Any]) -> Any:
        """What `read` returns, on every process. What goes wrong on one is raised on all, so that none waits for it: Damaged; or a UserError that passes
        where storage did not answer, or memory did not suffice, also when asked again: that says nothing about the step."""
        for pause_s in (1, 5, None):
            problem, soon, found = None, False, None
            try:
                found = read()
            except Exception as e:  # a damaged file makes Orbax and TensorStore raise many kinds
                problem, soon = (
                    f"{type(e).__name__}: {next(iter(str(e).splitlines()), '')[:200]}",
                    _passes(e, remote=workdirs.is_remote(self.path)),
                )
            told = [t for t in distributed.gather_json([problem, soon]) if t[0]]
            if not told:
                return found
            if damage := next((why for why, passes in told if not passes), None):
                raise Damaged(f"checkpoint {self.path}/{step} is damaged, or was not written by vla_jax ({damage})")
            if pause_s is None:
                raise may_pass(f"checkpoint {self.path}/{step} cannot be read now ({told[0][0]}). Start again: the run goes on from it.")
            time.sleep(pause_s)

    def _verify(self, step: int, tree: dict, sums: dict[str, int]) -> None:
        if bad := [path for path, n in checksums.of(tree).items() if n != sums.get(path)]:
            raise Damaged(
                f"checkpoint {self.path}/{step} is damaged: {len(bad)} of {len(sums)} arrays are not what was saved, {bad[0]} among them"
            )

    def weights(self, step: int, ema: bool | None = None) -> str:
        """Which parameters `params` takes: ema where they were kept, or params; ema: which are wanted. Raises: UserError, Damaged."""
        kept = any(path.startswith("ema/") for path in self.meta(step).sums)
        if ema and not kept:
            raise UserError(f"{self.path}/{step} has no running mean of its weights (train.ema was 0). Leave --ema out.")
        return "ema" if (kept if ema is None else ema) else "params"

    def params(self, step: int, *, ema: bool | None = None) -> dict:
        """All parameters, of those that `weights` says, as host arrays; nothing else is read. Raises: UserError, Damaged."""
        which, sums = self.weights(step, ema), self.meta(step).sums
        folder, reader = self.path / str(step) / "state", ocp.Checkpointer(ocp.PyTreeCheckpointHandler())

        def read() -> dict:
            stored = reader.metadata(folder).item_metadata.tree[which]
            every = lambda x: {which: jax.tree.map(lambda _: x, stored)}
            how = {"restore_args": every(ocp.RestoreArgs(restore_type=np.ndarray)), "partial_restore": True}
            return reader.restore(folder, args=ocp.args.PyTreeRestore(item=every(0), **how))

        tree = self._whole(step, read)
        self._verify(step, tree, {path: n for path, n in sums.items() if path.startswith(f"{which}/")})
        return tree[which]

    def set_aside(self, steps: list[int]) -> None:
        """Moves steps to `damaged/` in the workdir, so that the run can write them again. Every process calls it."""
        if distributed.is_main():
            for step in steps:
                workdirs.move(self.path / str(step), self.path.parent / "damaged" / str(step))
        distributed.barrier("set aside")
        self._manager.reload()

    def _kept(self, train: Train) -> keep_policy.PreservationPolicy:
        policies = [keep_policy.LatestN(train.keep)]
        if train.keep_every:
            policies.append(keep_policy.EveryNSteps(train.keep_every))
        if train.keep_best:
            policies.append(_Best(train.keep_best, self._loss))
        return keep_policy.AnyPreservationPolicy(policies)

    def _loss(self, step: int) -> float | None:
        """Held out, at a step of this start or of one before it."""
        if step not in self._losses:
            self._losses[step] = None
            with contextlib.suppress(Exception):  # one that is damaged has none
                self._losses[step] = self._read(step).loss
        return self._losses[step]

    def close(self) -> None:
        self.wait()
        self._manager.close()


@dataclasses.dataclass
class _Best:
    """A preservation policy of Orbax: the n steps with the lowest loss. Orbax's own forgets at a restart what it was not told to write down."""

    n: int
    loss: Callable[[int], float | None]

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        losses = {c.step: loss for c in checkpoints if (loss := self.loss(c.step)) is not None and math.isfinite(loss)}
        best = sorted(losses, key=lambda step: (losses[step], step))[: self.n]
        return [c.step in best for c in checkpoints]


def _not_orbax(record: logging.LogRecord) -> bool:
    """Orbax says in hundreds of lines what is said here in one."""
    return "orbax" not in record.pathname


def host_arrays(workdir: str | os.PathLike, step: int) -> dict[str, np.ndarray]:
    """Everything that a step holds, by path, as it is stored and without a look at checksums."""
    folder, reader = workdirs.place(workdir) / "checkpoints" / str(step) / "state", ocp.PyTreeCheckpointHandler()
    how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), reader.metadata(folder).tree)
    return checksums.flatten(reader.restore(folder, args=ocp.args.PyTreeRestore(restore_args=how)))


def _finished(step: epath.Path) -> bool | None:
    """None: the store does not say."""
    try:
        return step.exists() and ocp.utils.is_checkpoint_finalized(step)
    except Exception:  # of a store, many kinds
        return None


def _passes(problem: Exception, *, remote: bool) -> bool:
    """Whether it may be gone when asked again, and says nothing about what was written. Of a store's errors only those that contents give do:
    what cannot be read as what it should be, and what is not there; a network has too many kinds of its own to be listed."""
    text, number = str(problem), getattr(problem, "errno", None)
    kinds = (ConnectionError, TimeoutError, MemoryError, PermissionError)
    if isinstance(problem, kinds) or number in _SOON_ERRNO or any(word in text for word in _SOON):
        return True
    return remote and not isinstance(problem, _CONTENTS)


def _tree(state: TrainState) -> dict:
    return {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}


def _sealed(meta: Meta) -> dict:
    told = json.loads(json.dumps(dataclasses.asdict(meta)))
    return told | {"sha256": _sha256(told)}


def _sha256(told: dict) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
