"""Where a run's numbers go: a progress bar, one JSON line per log step, TensorBoard, and W&B if asked for. Only the first process writes."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from vla_jax import distributed
from vla_jax.config import Config
from vla_jax.console import say
from vla_jax.train import workdir as workdirs
from vla_jax.types import UserError

FILE = "metrics.jsonl"


class Writer:
    """log(step, values): nested dicts become `a/b` keys. Use as a context manager."""

    def __init__(self, workdir: epath.Path, config: Config, *, first: int, quiet: bool = False):
        """Raises: UserError when train.wandb is set and W&B is not installed."""
        self.active = distributed.is_main()
        self._board = self._bar = self._wandb = None
        self._lines, self._full = [], False  # not written yet
        if self.active:
            from tqdm import tqdm

            self._mirror, here = workdirs.Mirror(workdir, (FILE, "wandb_run")), workdirs.local(workdir)
            self._wandb = _wandb(here, workdir.name, config)
            self._path = here / FILE
            self._board = _Board(here / "tensorboard")
            # in a log file one line every ten seconds is enough
            every = 0.2 if sys.stderr.isatty() else 10
            self._bar = tqdm(total=config.train.steps, initial=first, unit="step", disable=quiet, dynamic_ncols=True, mininterval=every)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *exc) -> None:
        if self.active:
            with contextlib.suppress(OSError):
                self._bar.close()
            with self._disk():
                _append(self._path, self._lines)
                self._board.close()
            if self._wandb:
                self._wandb.finish(exit_code=int(exc[0] is not None))
            self._mirror.copy()
            if exc[0] is None:
                self._mirror.clear()

    def copy(self) -> None:
        """To the workdir, where that is no folder of this machine."""
        if self.active:
            self._mirror.copy()

    def progress(self, step: int) -> None:
        if self.active:
            with contextlib.suppress(OSError):  # of the log: see console.say
                self._bar.update(step - self._bar.n)

    def log(self, step: int, values: dict, *, show: str = "") -> None:
        """`show` is the text beside the progress bar."""
        if not self.active:
            return
        flat = flatten(values)
        self._lines.append(json.dumps({"step": step, "time": round(time.time(), 3), **flat}) + "\n")
        numbers = {key: value for key, value in flat.items() if isinstance(value, (int, float))}
        with self._disk():
            _append(self._path, self._lines)
            self._board.write(step, numbers)
        if self._wandb:
            self._wandb.log(numbers, step=step)
        if show:
            with contextlib.suppress(OSError):
                self._bar.set_postfix_str(show)

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        """A full disk costs no run: it is said once, and lines wait for it, the newest thousand."""
        try:
            yield
            self._full = False
        except OSError as e:
            if not self._full:
                say(f"{self._path} cannot be written ({e.strerror}). The run goes on; its lines wait for room.")
            self._full = True
            del self._lines[:-1000]


class _Board:
    """TensorBoard's files, written here and now: tensorboardX's own writer does it in a thread that a full disk ends, and then whoever
    logs waits for it forever. After a failure a new file is begun, since a reader stops where a record is cut off."""

    def __init__(self, folder: Path):
        self._folder, self._file, self._files = folder, None, 0

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """Raises: OSError."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        try:
            if self._file is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._files += 1
                self._file = EventsWriter(str(self._folder / f"events{self._files}"))
            values = [Summary.Value(tag=key, simple_value=value) for key, value in numbers.items()]
            self._file.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
            self._file.flush()
        except OSError:
            self._file = None
            raise

    def close(self) -> None:
        if self._file:
            self._file.close()


def _append(path: Path, lines: list[str]) -> None:
    """Takes from `lines` what is in the file, whole: what was cut off by a full disk or a killed process stays a line alone."""
    while lines:
        with open(path, "a+b", buffering=0) as file:
            size = file.seek(0, 2)
            file.seek(max(size - 1, 0))
            start = b"" if file.read(1) in (b"", b"\n") else b"\n"
            data = start + lines[0].encode()
            if file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        lines.pop(0)


def _wandb(folder: Path, name: str, config: Config):
    """The run of Weights & Biases that belongs to this folder, for every start of it; None if none is asked for."""
    if not config.train.wandb:
        return None
    try:
        import wandb
    except ImportError as e:
        raise UserError("train.wandb is set and wandb is not installed: pip install wandb, or leave train.wandb empty") from e
    kept = folder / "wandb_run"
    known = kept.read_text().strip() if kept.is_file() else wandb.util.generate_id()
    kept.write_text(known)
    settings = {"project": config.train.wandb, "name": name, "config": dataclasses.asdict(config), "dir": str(folder)}
    return wandb.init(id=known, resume="allow", **settings)


def flatten(values: dict, prefix: str = "") -> dict:
    out = {}
    for key, value in values.items():
        if isinstance(value, dict):
            out.update(flatten(value, f"{prefix}{key}/"))
        else:
            out[prefix + key] = value
    return out


def began(workdir: os.PathLike) -> float | None:
    """When the first line of a run was written, in seconds since 1970; None if there is none."""
    return next((line["time"] for line in read(workdir) if "time" in line), None)


def read(workdir: os.PathLike) -> list[dict]:
    """The JSON lines of a run, in order; what a killed process left half-written is passed over."""
    path = epath.Path(workdir) / FILE
    return [line for line in parse(path.read_bytes().decode(errors="replace")) if "step" in line] if path.is_file() else []


def parse(text: str) -> list[dict]:
    """The lines of a text that are whole JSON objects."""
    out = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            out.append(json.loads(line))
    return [found for found in out if isinstance(found, dict)]
