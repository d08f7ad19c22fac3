"""Weights that others have trained, leaf by leaf onto the mesh; see weight_files for the formats.

A leaf is read once, and goes to the devices that hold a part of it: no device holds the whole model, and no host more than a leaf and its
devices' share.
"""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np

from vla_jax import tree
from vla_jax.models import weight_files
from vla_jax.models.presets import Expert, VLAConfig
from vla_jax.models.weight_files import POSITION, TABLE, Leaf
from vla_jax.types import UserError


def load(
    source: str | Path,
    kind: str,
    cfg: VLAConfig,
    where: dict,
    *,
    text_vocab: int = 0,
    seed: int = 0,
    more: str | Path = "",
    more_kind: str = "",
) -> dict:
    """Parameters, f32, as a nested dict of arrays laid out as `where` (a tree of shardings, as state.shardings has it) says.

    source: a file or folder of `kind` (weight_files.FORMATS); more: a second one, of more_kind or the same, so that SigLIP and Gemma may come from two.
    text_vocab: rows of the embedding that are the file's (0: all that it has); those behind them, of action tokens, are drawn with the
    others' mean and spread. A robot with more numbers than any before gets new rows of what projects them (_NUMBERS). Positions of another resolution are resized. What the file cannot have is drawn, too: the projected state, adapters, an
    expert that the file has nothing of and, with `more`, the projection of image tokens. A model without an expert leaves a file's aside.

    Raises: UserError listing every leaf that is missing, superfluous or of another shape, expected against found; for weights that are
    integers or not finite, and for files that cannot be read.
    """
    from vla_jax.models import vla

    found, wrong = weight_files.read(source, kind, cfg)
    if more:
        second, also = weight_files.read(more, more_kind or kind, cfg)
        if both := sorted(found.keys() & second.keys()):
            raise UserError(f"{source} and {more} both hold {', '.join(both[:4])}{' ..' if both[4:] else ''}: which is meant?")
        found, wrong = found | second, wrong + also
    if not cfg.expert:
        found = {p: leaf for p, leaf in found.items() if not p.startswith("expert/")}
    want = tree.flatten(jax.eval_shape(lambda: vla.init(cfg, jax.random.key(0))))
    expert = {p for p in want if p.startswith("expert/")}
    fresh = (
        {p for p in want if p.startswith(("state/", "lora/"))} - found.keys()
        | (set() if expert & found.keys() else expert)
        | ({p for p in want if p.startswith("img/head/")} - found.keys() if more else set())
    )
    text_vocab = text_vocab or (found[TABLE].shape[0] if TABLE in found else 0)
    fitted = {path: _fit(path, leaf, want[path].shape, text_vocab, seed) for path, leaf in found.items() if path in want}
    wrong += [f"missing: {p} {want[p].shape}" for p in want if p not in found and p not in fresh]
    wrong += [f"superfluous: {p} {leaf.shape}" for p, leaf in found.items() if p not in want]
    wrong += [f"{p}: expected {want[p].shape}, found {found[p].shape}" for p, leaf in fitted.items() if leaf.shape != want[p].shape]
    if wrong:
        raise UserError(f"{source} is no checkpoint of this model; {len(wrong)} leaves differ:\n  " + "\n  ".join(wrong[:40]))
    places, out = tree.flatten(where), {}
    drawn = jax.jit(lambda k: {p: tree.flatten(vla.init(cfg, k))[p] for p in fresh}, out_shardings={p: places[p] for p in fresh})
    out |= drawn(jax.random.key(seed)) if fresh else {}
    for path, leaf in fitted.items():
        try:
            out[path] = leaf.placed(places[path])
        except Exception as e:  # files of others: whatever is wrong with them is theirs
            raise UserError(f"{path} cannot be taken from {source}{f' and {more}' if more else ''}: {type(e).__name__}: {e}") from e
    return tree.unflatten({path: out[path] for path in want})


# The axis of a leaf that counts the numbers of a robot's state or action.
_NUMBERS = {
    "state/kernel": 0,
    "expert/state_proj/kernel": 0,
    "expert/action_in_proj/kernel": 0,
    "expert/action_out_proj/kernel": 1,
    "expert/action_out_proj/bias": 0,
}


def _fit(path: str, leaf: Leaf, shape: tuple[int, ...], text_vocab: int, seed: int) -> Leaf:
    """The leaf with more rows of the vocabulary, more numbers of a robot, or positions of another grid, if that is all that differs."""
    if (axis := _NUMBERS.get(path)) is not None and len(leaf.shape) == len(shape) and leaf.shape[axis] < shape[axis]:
        if leaf.shape == (*shape[:axis], leaf.shape[axis], *shape[axis + 1 :]):
            return Leaf(shape, False, lambda _: _widened(leaf.layer(0), shape, axis, seed))
    if path == TABLE and leaf.shape[1:] == shape[1:] and min(leaf.shape[0], shape[0]) >= text_vocab:
        return Leaf(shape, False, lambda _: _extended(leaf.layer(0), shape[0], text_vocab, seed))
    side = [round(s[1] ** 0.5) if len(s) == 3 else 0 for s in (leaf.shape, shape)]
    if path == POSITION and leaf.shape != shape and len(leaf.shape) == 3 and leaf.shape[2] == shape[2] and side[0] ** 2 == leaf.shape[1]:
        return Leaf(shape, False, lambda _: resized(leaf.layer(0), side[1]))
    return leaf


def _extended(table: np.ndarray, rows: int, text_vocab: int, seed: int) -> np.ndarray:
    """The first `text_vocab` rows, then new ones."""
    known = np.asarray(table[:text_vocab], np.float32)
    mean, spread = known.mean(axis=0), known.std(axis=0)
    new = np.random.default_rng(seed).normal(size=(rows - text_vocab, known.shape[1])).astype(np.float32)
    return np.concatenate([known, mean + spread * new])


def _widened(known: np.ndarray, shape: tuple[int, ...], axis: int, seed: int) -> np.ndarray:
    """What is known, then new rows (or columns) as an initialiser draws them: variance 1 / fan-in, biases zero."""
    more = (*shape[:axis], shape[axis] - known.shape[axis], *shape[axis + 1 :])
    new = np.random.default_rng(seed).normal(size=more) * shape[0] ** -0.5 if len(shape) > 1 else np.zeros(more)
    return np.concatenate([np.asarray(known, np.float32), new.astype(np.float32)], axis)


def resized(position: np.ndarray, side: int) -> np.ndarray:
    """Learned positions [1 n d] of a square grid -> [1 side*side d], bilinear, corners kept on corners (as big_vision's resample_posemb)."""
    _, n, width = position.shape
    old = round(n**0.5)
    grid = np.asarray(position, np.float32).reshape(old, old, width)
    at = np.linspace(0, old - 1, side) if side > 1 else np.array([(old - 1) / 2])
    low = np.clip(np.floor(at).astype(int), 0, max(old - 2, 0))
    share = (at - low).astype(np.float32)
    high = np.minimum(low + 1, old - 1)
    grid = grid[low] * (1 - share)[:, None, None] + grid[high] * share[:, None, None]
    grid = grid[:, low] * (1 - share)[None, :, None] + grid[:, high] * share[None, :, None]
    return grid.reshape(1, side * side, width)


def survey(source: str | Path, kind: str, cfg: VLAConfig) -> dict:
    """What can be told of a file before it is read: {"rows": of the embedding, 0 if it has none; "side": of its grid of positions, likewise;
    "expert": the action expert that its leaves' shapes describe, or None}. Raises: UserError."""
    shapes = {path: leaf.shape for path, leaf in weight_files.read(source, kind, cfg)[0].items()}
    side = round(shapes[POSITION][1] ** 0.5) if len(shapes.get(POSITION, ())) == 3 else 0
    expert, mlp = None, shapes.get("expert/layers/mlp/linear", ())
    if len(mlp) == 3:
        ada = any("Dense_0" in path or "time_mlp_in" in path for path in shapes if path.startswith("expert/"))
        dims = (shapes.get("expert/action_in_proj/kernel") or (32,))[0]
        expert = Expert(mlp[2], mlp[1], ada and "expert/state_proj/kernel" not in shapes, dims)
    return {"rows": shapes[TABLE][0] if TABLE in shapes else 0, "side": side, "expert": expert}


def save(params: dict, out: str | Path, about: dict) -> None:
    """The folder that `load` reads as `native`: every host writes its shards. about: kept beside them as import.json."""
    import orbax.checkpoint as ocp

    out = Path(out).expanduser().resolve()
    with ocp.StandardCheckpointer() as writer:
        writer.save(out / "params", params)
    if jax.process_index() == 0:
        (out / "import.json").write_text(json.dumps(about, indent=1) + "\n")
