"""Where things that are not code are found: configs/, data/ and launch/ of the checkout or of the installed wheel; and which code this is."""

from __future__ import annotations

import functools
import os
import subprocess
from pathlib import Path

from vla_jax import __version__
from vla_jax.types import UserError

_PACKAGE = Path(__file__).resolve().parent
# epath, through which Orbax and we reach gs://, would load TensorFlow wherever that is installed: it decides on its first path.
os.environ.setdefault("EPATH_USE_TF", "0")


def assets(kind: str) -> Path:
    """Folder `configs`, `data` or `launch`: the packaged one, else the one beside pyproject.toml.

    Raises: UserError naming both places when neither exists.
    """
    packaged, checkout = _PACKAGE / "_assets" / kind, _PACKAGE.parent / kind
    if packaged.is_dir():
        return packaged
    if checkout.is_dir() and (_PACKAGE.parent / "pyproject.toml").is_file():
        return checkout
    raise UserError(f"folder {kind}/ is neither at {packaged} nor at {checkout}. Reinstall vla-jax.")


def find(kind: str, name: str) -> Path:
    """A file given by path, or by its path below an asset folder (`configs/debug.py`, `cards/bridge_dataset.yaml`).

    Raises: UserError naming every place that was tried.
    """
    inner = name.removeprefix(kind + "/")
    tried = [Path(name), assets(kind) / inner]
    for path in tried:
        if path.is_file():
            return path
    folder = (assets(kind) / inner).parent
    have = sorted(p.name for p in folder.glob("*") if p.is_file()) if folder.is_dir() else []
    places = " nor ".join(dict.fromkeys(str(p) for p in tried))
    raise UserError(f"no file {places}." + (f" There are: {', '.join(have)}." if have else ""))


def place(name: str | os.PathLike, what: str):
    """A folder, or gs://bucket/path, as an absolute etils.epath.Path, whose methods are pathlib's. what: it is, for messages. Raises: UserError for a
    URL of another store than gs://, or without gcsfs."""
    from etils import epath

    text = os.fspath(name)
    if "://" not in text:
        return epath.Path(text).expanduser().resolve()
    if not text.startswith("gs://"):
        raise UserError(f"{what} {text}: it is kept in a folder or at gs://bucket/path; for another store, mount it and name the folder.")
    try:
        import gcsfs  # noqa: F401, what epath calls
        from fsspec.config import conf
    except ImportError as e:
        raise UserError(f"{what} {text} needs gcsfs: pip install 'vla-jax[gcs]', or mount the bucket and name the folder.") from e
    conf.setdefault("gcs", {})["use_listings_cache"] = False  # what another host has written since a folder was listed would not be there
    return epath.Path(text.rstrip("/"))


def cache_dir() -> Path:
    """Where indexes are kept unless `data.index_dir` says otherwise: $VLA_CACHE, else ~/.cache/vla_jax."""
    return Path(os.environ.get("VLA_CACHE") or Path.home() / ".cache" / "vla_jax")


@functools.cache
def commit() -> str:
    """Which code this is: the commit of the checkout that it lies in, with "+" where files were changed since; else the version. A wheel
    that is installed below somebody else's repository is not of that repository's commit."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(_PACKAGE), *words], capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != _PACKAGE.parent:
            return __version__
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):  # no git, or no repository
        return __version__
