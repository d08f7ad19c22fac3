"""Action tokenizers as files: one small JSON each, with the format's version and a digest."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from vla_jax.tokens import actions, bins, published
from vla_jax.tokens.published import ODD
from vla_jax.types import ActionTokenizer, UserError

_READERS = {actions.FORMAT: actions.from_json, bins.FORMAT: bins.from_json, published.FORMAT: published.from_json}


def to_json(tokenizer: ActionTokenizer) -> dict:
    body = tokenizer.to_json()
    return {**body, "digest": _digest(body)}


def from_json(values: dict, *, where: str = "action tokenizer") -> ActionTokenizer:
    """Raises: UserError when format, digest or content are not right."""
    name = values.get("format") if isinstance(values, dict) else values
    if not isinstance(name, str) or name not in _READERS:
        raise UserError(f"{where} has format {str(name)[:80]!r}, expected one of: {', '.join(_READERS)}")
    try:
        body = {k: v for k, v in values.items() if k != "digest"}
        if values.get("digest") != _digest(body):
            raise UserError(f"{where} is damaged: its digest does not match its content. Fit it again with `vla-jax tokens fit`.")
        return _READERS[name](body, where)
    except ODD as e:
        raise UserError(f"{where} is no tokenizer: {type(e).__name__}: {str(e)[:200]}") from e


def kind(tokenizer: ActionTokenizer) -> str:
    """What `tokens.action` calls it: fast, bins or quantile."""
    if not isinstance(tokenizer, bins.BinTokenizer):
        return "fast"
    widths = np.diff(tokenizer.edges)
    return "bins" if np.ptp(widths) < 1e-6 * widths.max() else "quantile"


def load(path: str | Path) -> ActionTokenizer:
    """A file that `save` wrote, or the folder of a published FAST tokenizer. Raises: UserError."""
    path = Path(path) if isinstance(path, str) else path  # others may be of a store
    if path.is_dir():
        return published.load(path)
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"action tokenizer {path} cannot be read: {e}") from e
    return from_json(values, where=str(path))


def save(tokenizer: ActionTokenizer, path: str | Path) -> None:
    """Appears when whole: another host may be reading."""
    path, text = Path(path) if isinstance(path, str) else path, json.dumps(to_json(tokenizer))
    if "://" in str(path):  # objects always do
        path.write_text(text)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)


def _digest(body: dict) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]
