"""A checkpoint -> a folder to hand on: our own format, or that of openpi, LeRobot or `transformers` (a module each). No code in ours.

params.safetensors     parameters by path; above 5 GB in several files, with params.safetensors.index.json
policy.json            settings of model, data and tokens, and the run's step
robots/NAME.json       card, statistics and specification of a robot
action_tokenizer.json  text.model
README.md              what it was trained on, how far, under which licences
SHA256SUMS             of all files, in the format of the sha256sum program

All but the parameters is read with numpy alone (`about`). A run begins with such a folder by model.init.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path

from vla_jax import __version__, folders, tree
from vla_jax.types import UserError

FORMAT = "vla_jax.policy.2"
FORMATS = ("native", "openpi", "lerobot", "hf")
SHARD_BYTES = 5 * 10**9


def export(
    workdir: str | Path,
    out: str | Path,
    *,
    step: int | None = None,
    kind: str = "native",
    ema: bool | None = None,
    dtype: str = "f32",
    robot: str = "",
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Writes the folder `out`, which must not hold anything yet: whole, or nothing of it. kind: of FORMATS. ema: the running mean of the
    weights, or not; None: where one was kept. dtype: of trained.DTYPES. robot: name of a card, where a format is of one robot; in ours the export then has that one alone.

    Raises: UserError when there is nothing to export, or the format has no place for what the run has.
    """
    from vla_jax.deploy import card, hf, lerobot, openpi, trained

    targets = {"openpi": openpi, "lerobot": lerobot, "hf": hf}
    for name, value, allowed in (("format", kind, FORMATS), ("dtype", dtype, trained.DTYPES)):
        if value not in allowed:
            raise UserError(f"{name} is {value!r}; there are: {', '.join(allowed)}")
    out = folders.local(out).absolute()
    folders.free(out)
    t = trained.read(workdir, step=step, ema=ema)
    if robot:
        t.named(robot)  # whatever the format makes of it
    notes = targets[kind].check(t, robot=robot) if kind in targets else []
    with folders.written(out) as partial:
        write = targets[kind].write if kind in targets else _native
        write(t, partial, dtype=dtype, robot=robot, shard_bytes=shard_bytes, place=out)
        (partial / "README.md").write_text(card.text(t, kind, dtype, notes))
        folders.seal(partial)
    return out


def _native(t, folder: Path, *, dtype: str, robot: str, shard_bytes: int, place: Path) -> None:
    """robot: the only one that is kept; "": all."""
    from vla_jax.models.weights_out import save_shards

    save_shards(sorted(t.cast(dtype).items()), folder, "params", shard_bytes=shard_bytes, about={"format": FORMAT})
    (folder / "action_tokenizer.json").write_text(json.dumps(t.meta.action_tokenizer))
    (folder / "text.model").write_bytes(base64.b64decode(t.meta.text_model))
    (folder / "robots").mkdir()
    kept = [r for r in t.robots if robot in ("", r.card.name)]
    for raw, numbers, r in zip(t.meta.cards, t.meta.stats, t.robots):
        if r not in kept:
            continue
        told = {"card": raw, "stats": numbers, "spec": r.spec()}
        (folder / "robots" / f"{r.card.name}.json").write_text(json.dumps(told, indent=1))
    body = {
        "format": FORMAT,
        "vla_jax": __version__,
        "step": t.step,
        "weights": t.weights,
        "dtype": dtype,
        "config": t.meta.config,
        "vocab": t.cfg.vocab,
        "state_dim": t.meta.state_dim,
        "robots": [r.card.name for r in kept],
        "behind": t.meta.behind,
        "earlier": [g for g in t.meta.earlier if {r.card.name for r in kept} & set(g["robots"])],
    }
    (folder / "policy.json").write_text(json.dumps(body, indent=1))


def about(folder: str | Path, *, weights: bool = False) -> tuple[dict, dict[str, dict]]:
    """-> (policy.json, {robot: {card, stats, spec}}), after checking every checksum (weights: those of the parameters, too).
    Imports no jax. Raises: UserError when a file is missing, damaged or of another format."""
    folder = folders.local(folder)
    names = folders.verify(folder, "exported policy", but=() if weights else (".safetensors",))
    listed = lambda files: [f for f in files if f not in names]
    try:
        if absent := listed(("policy.json", "text.model", "action_tokenizer.json")):
            raise UserError(f"{folder} lacks {', '.join(absent)}, or its checksum")
        body = json.loads((folder / "policy.json").read_text())
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            found = body.get("format") if isinstance(body, dict) else body
            raise UserError(f"{folder} has format {str(found)[:80]!r}, this version reads {FORMAT!r}")
        files = [f"robots/{name}.json" for name in body["robots"]]
        if absent := listed(files):
            raise UserError(f"{folder} lacks {', '.join(absent)}, or its checksum")
        return body, {name: json.loads(folders.inside(folder, f).read_text()) for name, f in zip(body["robots"], files)}
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as e:
        raise UserError(f"{folder} is no exported policy: {type(e).__name__}: {str(e)[:200]}") from e


def read(folder: str | Path) -> tuple[dict, dict, Path]:
    """-> (policy.json with the robots' files under `robot`, nested parameters, the folder), after checking every checksum.

    Raises: UserError when a file is missing, damaged or of another format.
    """
    from vla_jax.models import weight_files

    folder = folders.local(folder)
    body, robots = about(folder, weights=True)
    names = [line.partition("  ")[2] for line in (folder / folders.SUMS).read_text().splitlines()]
    try:
        params = {path: part[...] for path, part in weight_files.exported_tensors(folder, names).items()}
    except Exception as e:  # whatever safetensors makes of an odd file
        raise e if isinstance(e, UserError) else UserError(f"{folder} is no exported policy: {type(e).__name__}: {str(e)[:200]}") from e
    return body | {"robot": robots}, tree.unflatten(params), folder
