"""Recordings made by other processes: TensorFlow, which writes RLDS, stays out of the one that trains and acts."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from vla_jax.types import UserError

Recording = tuple[Path, str, int, tuple[str, ...]]  # (where, whose last part is the robot; robot; episodes; more options of record.py)


def make(wanted: Sequence[Recording], log: Path, *, at_once: int = 2) -> None:
    """Makes those that are not there yet; a folder gets its name when it is whole. Raises: UserError when one fails, naming the log."""
    todo = [r for r in wanted if not r[0].is_dir()]
    running: list[tuple[Path, Path, subprocess.Popen]] = []
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as out:
        while todo or running:
            while todo and len(running) < at_once:
                place, robot, episodes, more = todo.pop(0)
                place.parent.mkdir(parents=True, exist_ok=True)
                partial = place.with_name(f".{robot}.partial")
                shutil.rmtree(partial, ignore_errors=True)
                command = [sys.executable, "-m", "vla_jax.tabletop.record", str(partial)]
                command += ["--episodes", str(episodes), "--robots", robot, *more]
                running.append((partial, place, subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)))
            partial, place, process = running.pop(0)
            if process.wait():
                for *_, other in running:
                    other.kill()
                raise UserError(f"recording {place} failed; see {log}")
            (partial / place.name).rename(place)
            partial.rmdir()
