"""Folders that are handed on: written whole or not at all, with the SHA-256 of every file, and read without leaving them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from vla_jax.types import UserError

SUMS = "SHA256SUMS"  # in the format of the sha256sum program


@contextlib.contextmanager
def written(out: Path) -> Iterator[Path]:
    """A new folder beside `out`, which takes its name when the block ends well and is removed when it does not.

    Raises: UserError when `out` holds something already, or the place cannot be written.
    """
    free(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    except OSError as e:
        raise UserError(f"{out} cannot be written: {e.strerror}. Give another folder.") from e
    try:
        yield partial
        mask = _umask()
        for p in (partial, *partial.rglob("*")):  # mkdtemp's folders and safetensors' files are the owner's alone
            p.chmod((0o777 if p.is_dir() else 0o666) & ~mask)
        partial.rename(out)
    except OSError as e:
        raise UserError(
            f"{out} could not be written ({e.strerror or e}). Nothing is left of it; make room there, or give another place."
        ) from e
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def local(folder: str | Path) -> Path:
    """A folder of this machine, with `~` resolved. Raises: UserError for a URL, of which Path would make a folder called "gs:"."""
    if "://" in str(folder):
        raise UserError(
            f"{folder} is a URL; this is read and written on a disk. Give a folder, and copy it (gcloud storage cp -r, gsutil, aws s3)."
        )
    return Path(folder).expanduser()


def free(out: Path) -> None:
    """Raises: UserError when there is something at `out` that is no empty folder."""
    try:
        if out.is_file() or (out.exists() and any(out.iterdir())):
            raise UserError(f"{out} is {'a file' if out.is_file() else 'not empty'}. Give a new folder.")
    except OSError as e:
        raise UserError(f"{out} cannot be looked at: {e.strerror}. Give another folder.") from e


def _umask() -> int:
    now = os.umask(0)
    os.umask(now)
    return now


def inside(folder: Path, name: str) -> Path:
    """The file `name` of a folder. Raises: UserError when it is none, or lies outside once links are followed."""
    try:
        file = folder / name
        if file.resolve().is_relative_to(folder.resolve()) and file.is_file():
            return file
    except (OSError, ValueError):  # a name that no file can have
        pass
    raise UserError(f"{folder}: {name!r} is not a file of this folder")


def seal(folder: Path) -> None:
    """Writes the checksums of all that is in it."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != SUMS)
    (folder / SUMS).write_text("".join(f"{sha256(p)}  {p.relative_to(folder).as_posix()}\n" for p in files))


def verify(folder: Path, what: str, *, but: tuple[str, ...] = ()) -> list[str]:
    """The names of its files, after checking their checksums, of all but those that end as `but` says. what: it is, for messages.

    Raises: UserError when a file is missing, damaged, or outside.
    """
    if folder.is_file():
        raise UserError(f"{folder} is a file, not the folder of {what}. Archives are not read: unpack it first.")
    if not (folder / SUMS).is_file():
        raise UserError(f"{folder} is no {what}: it has no {SUMS}. Make one with `vla-jax export RUN OUT`.")
    names = []
    try:
        lines = (folder / SUMS).read_text().splitlines()
    except (OSError, ValueError) as e:
        raise UserError(f"{folder / SUMS} cannot be read: {e}") from e
    for line in lines:
        digest, _, name = line.partition("  ")
        file = inside(folder, name)
        if not (but and name.endswith(but)) and sha256(file) != digest:
            raise UserError(f"{file} is damaged: its SHA-256 differs from {SUMS}. Copy the folder again.")
        names.append(name)
    return names


def sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
