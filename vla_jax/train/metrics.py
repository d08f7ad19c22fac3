"""Where a run's numbers go: a progress bar, one JSON line per log step, and TensorBoard. Only the first process writes."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from vla_jax import distributed


class Writer:
    """log(step, values): nested dicts become `a/b` keys. Use as a context manager."""

    def __init__(self, workdir: Path, *, first: int, last: int, quiet: bool = False):
        self.active = distributed.is_main()
        self._file = self._board = self._bar = None
        if self.active:
            from tensorboardX import SummaryWriter
            from tqdm import tqdm

            workdir.mkdir(parents=True, exist_ok=True)
            self._file = open(workdir / "metrics.jsonl", "a")
            self._board = SummaryWriter(str(workdir / "tensorboard"))
            # in a log file one line every ten seconds is enough
            self._bar = tqdm(
                total=last, initial=first, unit="step", disable=quiet, dynamic_ncols=True, mininterval=0.2 if sys.stderr.isatty() else 10
            )

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *exc) -> None:
        if self.active:
            self._bar.close()
            self._board.close()
            self._file.close()

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
        for key, value in flat.items():
            if isinstance(value, (int, float)):
                self._board.add_scalar(key, value, step)
        if show:
            self._bar.set_postfix_str(show)


def flatten(values: dict, prefix: str = "") -> dict:
    out = {}
    for key, value in values.items():
        if isinstance(value, dict):
            out.update(flatten(value, f"{prefix}{key}/"))
        else:
            out[prefix + key] = value
    return out


def read(workdir: Path) -> list[dict]:
    """The JSON lines of a run, in order; a half-written last line is passed over."""
    out = []
    path = workdir / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            out.append(json.loads(line))
        except ValueError:
            continue
    return out
