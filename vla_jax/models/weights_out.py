"""Our parameters as others name and lay them out: the inverse of weight_files, and safetensors in shards."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from vla_jax.models.presets import VLAConfig
from vla_jax.models.weight_files import POSITION, hf_map

GB = 10**9


def hf_tensors(cfg: VLAConfig, weights: dict[str, np.ndarray], names: dict[str, str]) -> Iterator[tuple[str, np.ndarray]]:
    """(name, tensor) of every tensor that HF has for PaliGemma, a layer at a time. weights: by our paths.
    names: what stands there for `vision.`, `language.` and `projector.` (weight_files.canonical)."""
    for path, (tensors, _) in hf_map(cfg).items():
        stacked = "{}" in tensors[0]
        for i in range(len(weights[path]) if stacked else 1):
            parts = _undone(path, weights[path][i] if stacked else weights[path])
            for tensor, part in zip(tensors, parts, strict=True):
                room, _, rest = tensor.format(i).partition(".")
                yield names[room] + rest, np.ascontiguousarray(part)


def _undone(path: str, w: np.ndarray) -> tuple[np.ndarray, ...]:
    """A leaf, or a layer of it, as the tensors that weight_files.hf_map makes it from."""
    end = path.rpartition("encoderblock/")[2].removeprefix("llm/layers/")
    if path == "img/embedding/kernel":
        return (w.transpose(3, 2, 0, 1),)
    if path == POSITION:
        return (w[0],)
    if re.search(r"/(query|key|value)/kernel$", end):
        return (w.reshape(w.shape[0], -1).T,)
    if end.endswith("/out/kernel") or end == "attn/attn_vec_einsum/w":
        return (w.reshape(-1, w.shape[-1]).T,)
    if re.search(r"/(query|key|value)/bias$", end):
        return (w.reshape(-1),)
    if end == "attn/q_einsum/w":
        return (_rows(w),)
    if end == "attn/kv_einsum/w":
        return _rows(w[0]), _rows(w[1])
    if end == "mlp/gating_einsum":
        return w[0].T, w[1].T
    return (w.T,) if end.endswith("kernel") or end == "mlp/linear" else (w,)


def _rows(w: np.ndarray) -> np.ndarray:
    """[heads width head_dim] -> [heads * head_dim, width]."""
    return w.swapaxes(1, 2).reshape(-1, w.shape[1])


def openpi_name(path: str) -> str:
    """Where openpi keeps a leaf: the action expert beside the decoder, with _1 behind a module's name, its projections at the root."""
    if not path.startswith("expert/"):
        return f"PaliGemma/{path}"
    inner = path.removeprefix("expert/")
    named = re.sub(r"^(.*?)(mlp|\w+_einsum|\w+_norm)/(?:plain/)?(.*)$", r"PaliGemma/llm/\1\2_1/\3", inner)
    return named


def save_shards(
    tensors: Iterable[tuple[str, np.ndarray]], folder: Path, stem: str, *, shard_bytes: int, about: dict[str, str]
) -> list[str]:
    """Writes `stem.safetensors`, or where they are more than shard_bytes `stem-00001-of-0000n.safetensors` and HF's index of them
    (a tensor that is larger by itself has a file of its own). about: kept in each file. Returns the names of the files of weights."""
    from safetensors.numpy import save_file

    shards: list[list[str]] = []
    held: dict[str, np.ndarray] = {}
    total = size = 0

    def put() -> None:
        nonlocal held, size
        save_file(held, folder / f"{stem}-{len(shards)}.partial", metadata=about)
        shards.append(list(held))
        held, size = {}, 0

    for name, tensor in tensors:
        if held and size + tensor.nbytes > shard_bytes:
            put()
        held[name] = np.ascontiguousarray(tensor)
        size, total = size + tensor.nbytes, total + tensor.nbytes
    put()
    n = len(shards)
    files = [f"{stem}.safetensors"] if n == 1 else [f"{stem}-{i + 1:05}-of-{n:05}.safetensors" for i in range(n)]
    for i, file in enumerate(files):
        (folder / f"{stem}-{i}.partial").rename(folder / file)
    if n > 1:
        where = {name: file for names, file in zip(shards, files) for name in names}
        body = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(body, indent=1))
    return files
