"""Where things that are not code are found: configs/, data/ and launch/ of the checkout or of the installed wheel."""

from __future__ import annotations

import os
from pathlib import Path

from vla_jax.types import UserError

_PACKAGE = Path(__file__).resolve().parent


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


def cache_dir() -> Path:
    """Where indexes are kept unless `data.index_dir` says otherwise: $VLA_CACHE, else ~/.cache/vla_jax."""
    return Path(os.environ.get("VLA_CACHE") or Path.home() / ".cache" / "vla_jax")
