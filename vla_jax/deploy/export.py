"""A checkpoint -> a folder that acts on its own: weights, robots' cards and statistics, tokenizers, checksums. No code in it.

params.safetensors     parameters by path (EMA where one was kept)
policy.json            model, data and token settings, cards, statistics, the run's step
action_tokenizer.json  text.model
SHA256SUMS             of all files, in the format of the sha256sum program
"""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from vla_jax import __version__, tree
from vla_jax.types import UserError

FORMAT = "vla_jax.policy.1"


def export(workdir: str | Path, out: str | Path, *, step: int | None = None) -> Path:
    """Writes the folder `out`, which must not hold anything yet. Raises: UserError when there is nothing to export."""
    from vla_jax.models import lora
    from vla_jax.train import workdir as workdirs
    from vla_jax.train.checkpoint import Checkpointer, Damaged  # here, so that a robot's program loads no Orbax

    workdir, out = workdirs.place(workdir), Path(out).expanduser()
    workdirs.is_run(workdir)
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty. Give a new folder.")
    checkpoints = Checkpointer(workdir)
    try:
        step = checkpoints.latest() if step is None else step
        if step is None:
            raise UserError(f"{workdir}/checkpoints holds no finished checkpoint yet.")
        meta = checkpoints.meta(step)
        params = lora.merge(checkpoints.params(step), meta.config["train"].get("lora_alpha", 0.0))
    except Damaged as e:
        raise UserError(f"{e}. Export another step: RUN@STEP, with one of {checkpoints.steps()}.") from e
    finally:
        checkpoints.close()
    out.mkdir(parents=True, exist_ok=True)
    save_file({k: np.ascontiguousarray(v) for k, v in tree.flatten(params).items()}, out / "params.safetensors")
    (out / "action_tokenizer.json").write_text(json.dumps(meta.action_tokenizer))
    (out / "text.model").write_bytes(base64.b64decode(meta.text_model))
    body = {
        "format": FORMAT,
        "vla_jax": __version__,
        "step": step,
        "config": meta.config,
        "vocab": meta.vocab,
        "state_dim": meta.state_dim,
        "cards": meta.cards,
        "stats": meta.stats,
    }
    (out / "policy.json").write_text(json.dumps(body, indent=1))
    files = sorted(p for p in out.iterdir() if p.name != "SHA256SUMS")
    (out / "SHA256SUMS").write_text("".join(f"{_sha256(p)}  {p.name}\n" for p in files))
    return out


def read(folder: str | Path) -> tuple[dict, dict, Path]:
    """-> (policy.json, nested parameters, the folder), after checking every checksum.

    Raises: UserError when a file is missing, damaged or of another format.
    """
    folder = Path(folder).expanduser()
    sums = folder / "SHA256SUMS"
    if not sums.is_file():
        raise UserError(f"{folder} is no exported policy: it has no SHA256SUMS. Make one with `vla-jax export RUN OUT`.")
    for line in sums.read_text().splitlines():
        digest, _, name = line.partition("  ")
        file = folder / name
        if file.resolve().parent != folder.resolve() or not file.is_file():
            raise UserError(f"{folder}: {name!r} is listed in SHA256SUMS but is not a file of this folder")
        if _sha256(file) != digest:
            raise UserError(f"{file} is damaged: its SHA-256 differs from SHA256SUMS. Copy the folder again.")
    try:
        body = json.loads((folder / "policy.json").read_text())
        params = tree.unflatten(load_file(folder / "params.safetensors"))
    except (OSError, ValueError, RecursionError, SafetensorError) as e:
        raise UserError(f"{folder} is no exported policy: {e}") from e
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise UserError(f"{folder} has format {body.get('format') if isinstance(body, dict) else body!r}, this version reads {FORMAT!r}")
    return body, params, folder


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
