"""Where a run is kept: a folder, or gs://bucket/path through the same calls.

An object store has no appending and no renaming of folders. What grows line by line (metrics, TensorBoard's files, a trace) is therefore
written to a folder of this machine and copied whole at every checkpoint; the rest is written where it belongs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
from pathlib import Path

from etils import epath

from vla_jax import distributed, paths
from vla_jax.config import Config
from vla_jax.console import say
from vla_jax.types import UserError, may_pass


def place(name: str | os.PathLike) -> epath.Path:
    """A workdir as an absolute path whose methods are pathlib's. Raises: UserError for a URL of another store than gs://, or without gcsfs."""
    return paths.place(name, "workdir")


def open_(name: str | os.PathLike) -> epath.Path:
    """`place`, for a run that is to be written: its folder is made, or its store asked. Raises: UserError when that fails; one that
    passes where a store does not answer."""
    found = place(name)
    try:
        if not is_remote(found):
            found.mkdir(parents=True, exist_ok=True)
        else:
            (found / "config.json").exists()  # no mkdir, which would make a misspelt bucket
    except Exception as e:  # of credentials and connections, many kinds
        if is_remote(found):
            kind = UserError if isinstance(e, FileNotFoundError | PermissionError) or "403" in str(e) else may_pass
            raise kind(f"workdir {found} cannot be reached: {type(e).__name__}: {' '.join(str(e).split())[:300]}") from e
        if not isinstance(e, OSError):
            raise
        raise UserError(f"workdir {found} cannot be made: {e.strerror}. Name a folder that may be written.") from e
    return found


def check_shared(found: epath.Path, wait_s: float = 60.0) -> None:
    """Every process calls it. Raises: UserError on all of them when one does not see what process 0 writes there."""
    blind = distributed.blind(found, wait_s)
    if blind:
        raise UserError(
            f"{found} is not the same place on all hosts: what process 0 wrote there was not seen by process {blind[0]} within {wait_s:.0f} s. "
            "Name shared storage."
        )


def with_index(config: Config, found: epath.Path) -> Config:
    """Of a run in a bucket the indexes are kept in the folder index/ beside it, unless data.index_dir says otherwise: the hosts share no disk, and the
    machines of the next start have none of this one's."""
    if not is_remote(found) or config.data.index_dir:
        return config
    return dataclasses.replace(config, data=dataclasses.replace(config.data, index_dir=f"{os.fspath(found.parent)}/index"))


def is_run(found: epath.Path) -> None:
    """Raises: UserError when no training run was kept there."""
    if not (found / "checkpoints").is_dir():
        raise UserError(f"{found} holds no run: there is no folder checkpoints/ in it. Give the --workdir of a training run.")


def is_remote(found: os.PathLike) -> bool:
    return "://" in os.fspath(found)


def local(found: epath.Path) -> Path:
    """The folder of this machine for what grows: the workdir itself where it is one."""
    if not is_remote(found):
        return Path(found)
    return paths.cache_dir() / "runs" / hashlib.sha256(os.fspath(found).encode()).hexdigest()[:16]


def move(folder: epath.Path, to: epath.Path) -> None:
    """A folder and all that is in it; `to` is replaced."""
    to.parent.mkdir(parents=True, exist_ok=True)
    to.rmtree(missing_ok=True)
    if not is_remote(folder):
        folder.rename(to)
        return
    for file in _files(folder):
        file.copy(to / str(file)[len(str(folder)) + 1 :])
    folder.rmtree()


def _files(folder: epath.Path) -> list[epath.Path]:
    return [file for found in folder.iterdir() for file in (_files(found) if found.is_dir() else [found])]


class Mirror:
    """Keeps a remote workdir's copy of its `local` folder. For a workdir that is a folder there is nothing to do."""

    def __init__(self, found: epath.Path, names: tuple[str, ...]):
        """names: of files that go on from where an earlier start, perhaps on another machine, has left them."""
        self._from, self._to, self._known, self._failed = local(found), found, {}, False
        self._from.mkdir(parents=True, exist_ok=True)
        for name in names if is_remote(found) else ():
            there, here = found / name, self._from / name
            # a start that ended before its last lines were copied has more of them here
            if there.exists() and (not here.is_file() or here.stat().st_size < there.stat().length):
                here.write_bytes(there.read_bytes())

    def copy(self) -> None:
        """Everything that has changed. A store that does not answer costs no run: it is said once, and tried again the next time."""
        if not is_remote(self._to):
            return
        try:
            for file in sorted(f for f in self._from.rglob("*") if f.is_file()):
                now = (stat := file.stat()).st_size, stat.st_mtime_ns
                if self._known.get(file) != now:
                    (self._to / str(file.relative_to(self._from))).write_bytes(file.read_bytes())
                    self._known[file] = now
            self._failed = False
        except Exception as e:  # of the network, many kinds
            if not self._failed:
                say(
                    f"{self._from} could not be copied to {self._to} ({type(e).__name__}: {str(e)[:200]}). The run goes on; it is tried again."
                )
            self._failed = True

    def clear(self) -> None:
        """Of a run that is done: what has been copied is not kept twice."""
        if is_remote(self._to) and not self._failed:
            shutil.rmtree(self._from, ignore_errors=True)
