"""An index at gs://bucket/path: hosts that share no disk give it to one another there, and keep a copy each."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

from vla_jax import paths

_LAST = "meta.json"  # with it an index is whole


@dataclasses.dataclass(frozen=True)
class Shelf:
    """copy: the index's folder here; there: its place in the bucket; parts of it lie beside, until they are merged."""

    copy: Path
    there: Any  # etils.epath.Path

    @classmethod
    def of(cls, index_dir: str, copy: Path) -> Shelf | None:
        """None where data.index_dir is a folder. Raises: UserError for another store than gs://."""
        return cls(copy, paths.place(index_dir, "data.index_dir") / copy.name) if "://" in index_dir else None

    def fetch(self) -> None:
        """The index, unless it is here already, or not there yet."""
        if (self.copy / _LAST).is_file() or not (self.there / _LAST).exists():
            return
        partial = self.copy.with_name(f"{self.copy.name}.partial-{os.getpid()}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for file in self.there.iterdir():
            file.copy(partial / file.name)
        shutil.rmtree(self.copy, ignore_errors=True)
        try:
            partial.rename(self.copy)
        except OSError:  # another process of this host was first
            if not (self.copy / _LAST).is_file():
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def give(self) -> None:
        for file in sorted(self.copy.iterdir(), key=lambda p: p.name == _LAST):
            (self.there / file.name).write_bytes(file.read_bytes())
        if self._parts().exists():
            self._parts().rmtree()

    def parts(self) -> set[int]:
        """The shards that have a part there."""
        return {int(p.name.removesuffix(".npz")) for p in self._parts().iterdir()} if self._parts().exists() else set()

    def give_parts(self, folder: Path) -> None:
        known = self.parts()
        for file in folder.glob("*.npz"):
            if int(file.stem) not in known:
                (self._parts() / file.name).write_bytes(file.read_bytes())

    def fetch_parts(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for file in self._parts().iterdir() if self._parts().exists() else ():
            if not (folder / file.name).is_file():
                file.copy(folder / file.name)

    def _parts(self):
        return self.there.parent / f"{self.there.name}.parts"
