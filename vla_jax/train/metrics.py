"""Where a run's numbers go: a progress bar, one JSON line per log step, TensorBoard, and W&B if asked for. Only the first process writes."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path

from vla_jax import distributed
from vla_jax.config import Config
from vla_jax.types import UserError

FILE = "metrics.jsonl"


class Writer:
    """log(step, values): nested dicts become `a/b` keys. Use as a context manager."""

    def __init__(self, workdir: Path, config: Config, *, first: int, quiet: bool = False):
        """Raises: UserError when train.wandb is set and W&B is not installed."""
        self.active = distributed.is_main()
        self._file = self._board = self._bar = self._wandb = None
        if self.active:
            from tensorboardX import SummaryWriter
            from tqdm import tqdm

            workdir.mkdir(parents=True, exist_ok=True)
            self._wandb = _wandb(workdir, config)
            self._file = open(workdir / FILE, "a")
            if not _ends_whole(workdir / FILE):  # a process that was killed while it wrote: its half line stays alone
                self._file.write("\n")
            self._board = SummaryWriter(str(workdir / "tensorboard"))
            # in a log file one line every ten seconds is enough
            every = 0.2 if sys.stderr.isatty() else 10
            self._bar = tqdm(total=config.train.steps, initial=first, unit="step", disable=quiet, dynamic_ncols=True, mininterval=every)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *exc) -> None:
        if self.active:
            self._bar.close()
            self._board.close()
            self._file.close()
            if self._wandb:
                self._wandb.finish(exit_code=int(exc[0] is not None))

    def progress(self, step: int) -> None:
        if self.active:
            self._bar.update(step - self._bar.n)

    def log(self, step: int, values: dict, *, show: str = "") -> None:
        """`show` is the text beside the progress bar."""
        if not self.active:
            return
        flat = flatten(values)
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **flat}) + "\n")
        self._file.flush()
        numbers = {key: value for key, value in flat.items() if isinstance(value, (int, float))}
        for key, value in numbers.items():
            self._board.add_scalar(key, value, step)
        if self._wandb:
            self._wandb.log(numbers, step=step)
        if show:
            self._bar.set_postfix_str(show)


def _wandb(workdir: Path, config: Config):
    """The run of Weights & Biases that belongs to this workdir, for every start of it; None if none is asked for."""
    if not config.train.wandb:
        return None
    try:
        import wandb
    except ImportError as e:
        raise UserError("train.wandb is set and wandb is not installed: pip install wandb, or leave train.wandb empty") from e
    kept = workdir / "wandb_run"
    name = kept.read_text().strip() if kept.is_file() else wandb.util.generate_id()
    kept.write_text(name)
    settings = {"project": config.train.wandb, "name": workdir.name, "config": dataclasses.asdict(config), "dir": str(workdir)}
    return wandb.init(id=name, resume="allow", **settings)


def flatten(values: dict, prefix: str = "") -> dict:
    out = {}
    for key, value in values.items():
        if isinstance(value, dict):
            out.update(flatten(value, f"{prefix}{key}/"))
        else:
            out[prefix + key] = value
    return out


def began(workdir: Path) -> float | None:
    """When the first line of a run was written, in seconds since 1970; None if there is none."""
    return next((line["time"] for line in read(workdir) if "time" in line), None)


def read(workdir: Path) -> list[dict]:
    """The JSON lines of a run, in order; what a killed process left half-written is passed over."""
    out = []
    path = workdir / FILE
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict) and "step" in found:
            out.append(found)
    return out


def _ends_whole(path: Path) -> bool:
    """Whether a file ends with a line's end, or holds nothing."""
    with open(path, "rb") as f:
        size = f.seek(0, 2)
        f.seek(max(size - 1, 0))
        return f.read(1) in (b"", b"\n")
