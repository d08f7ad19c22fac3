"""Files of weights as others write them: HF safetensors, big_vision's `.npz`, openpi's Orbax folders, and our own.

Our parameter tree is big_vision's PaliGemma (`img/...`, `llm/...`, layers stacked on axis 0), so its files are read by name. Of HF's files
each leaf states from which tensors it comes, and how.
"""

from __future__ import annotations

import dataclasses
import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from vla_jax import folders, tree
from vla_jax.models.presets import VLAConfig
from vla_jax.types import UserError

FORMATS = ("hf", "big_vision", "openpi", "native")
_OURS = re.compile(r"(img|llm|expert)/.*")
TABLE, POSITION = "llm/embedder/input_embedding", "img/pos_embedding"
EXPORTED = "policy.json"  # what tells a folder of `vla-jax export` from one of `vla-jax import`


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A parameter as a file holds it. shape: after all transposition; layer(i) reads layer i of a leaf that stacks layers,
    layer(0) a leaf that does not."""

    shape: tuple[int, ...]
    stacked: bool
    layer: Callable[[int], np.ndarray]

    def placed(self, where: jax.sharding.Sharding) -> jax.Array:
        """f32, divided so. Each layer is read once, however many devices want a part of it; the host holds what its devices will."""
        parts: dict[tuple, np.ndarray] = {}
        key = lambda index: tuple((s.start, s.stop) for s in index)
        indexes = {key(i): i for i in where.addressable_devices_indices_map(self.shape).values()}
        if not self.stacked:
            whole = self.layer(0)
            parts = {k: np.asarray(whole[i], np.float32) for k, i in indexes.items()}
            del whole
        else:
            ranges = {k: range(*i[0].indices(self.shape[0])) for k, i in indexes.items()}
            size = lambda i: [len(range(*s.indices(n))) for s, n in zip(i, self.shape)]
            parts = {k: np.empty(size(i), np.float32) for k, i in indexes.items()}
            for n in sorted({n for r in ranges.values() for n in r}):
                layer = self.layer(n)
                for k, index in indexes.items():
                    if n in ranges[k]:
                        parts[k][n - ranges[k].start] = layer[index[1:]]
        if not all(np.isfinite(x).all() for x in parts.values()):
            raise ValueError("it holds numbers that are not finite")
        return jax.make_array_from_callback(self.shape, where, lambda index: parts[key(index)])


Found = tuple[dict[str, Leaf], list[str]]  # the leaves of a file, and what is wrong with it, a line each


# What is before a tensor's own name varies with the version of the library and with what wrapped the model.
_NAMES = (
    (re.compile(r".*?(?:vision_tower\.)?vision_model\.(.*)"), r"vision.\1"),
    (re.compile(r".*?vision_tower\.(.*)"), r"vision.\1"),
    (re.compile(r".*?multi_modal_projector\.linear\.(.*)"), r"projector.\1"),
    (re.compile(r"((?:embeddings|encoder|post_layernorm|head)\..*)"), r"vision.\1"),  # SigLIP's encoder alone, by transformers 5
    (re.compile(r"(?:.*\.)?((?:embed_tokens|norm|layers\.\d+)\..*)"), r"language.\1"),
)
# Of no use here: SigLIP's text side and its pooling head, and what can be computed.
_IGNORED = re.compile(r"text_model\..*|logit_(scale|bias)|vision\.head\..*|vision\.embeddings\.position_ids|.*\.rotary_emb\.inv_freq")
_HEAD, _EMBED = re.compile(r"(.*\.)?lm_head\.weight"), "language.embed_tokens.weight"


def canonical(name: str) -> str:
    if re.match(r"text_model\.", name):
        return name
    for pattern, to in _NAMES:
        if pattern.fullmatch(name):
            return pattern.sub(to, name)
    return name


def hf_map(cfg: VLAConfig) -> dict[str, tuple[tuple[str, ...], Callable]]:
    """Our leaf -> (tensors, {} standing for the layer; how they become the leaf, or one layer of it)."""
    v, c = cfg.vision, cfg.language
    same, flip = lambda w: w, lambda w: w.T
    head = v.width // v.heads
    out: dict[str, tuple[tuple[str, ...], Callable]] = {
        "img/embedding/kernel": (("vision.embeddings.patch_embedding.weight",), lambda w: w.transpose(2, 3, 1, 0)),
        "img/embedding/bias": (("vision.embeddings.patch_embedding.bias",), same),
        POSITION: (("vision.embeddings.position_embedding.weight",), lambda w: w[None]),
        "img/Transformer/encoder_norm/scale": (("vision.post_layernorm.weight",), same),
        "img/Transformer/encoder_norm/bias": (("vision.post_layernorm.bias",), same),
        "img/head/kernel": (("projector.weight",), flip),
        "img/head/bias": (("projector.bias",), same),
        TABLE: (("language.embed_tokens.weight",), same),
        "llm/final_norm/scale": (("language.norm.weight",), same),
    }
    ours, theirs = "img/Transformer/encoderblock/", "vision.encoder.layers.{}."
    for a, b in (("LayerNorm_0", "layer_norm1"), ("LayerNorm_1", "layer_norm2")):
        out[f"{ours}{a}/scale"] = ((f"{theirs}{b}.weight",), same)
        out[f"{ours}{a}/bias"] = ((f"{theirs}{b}.bias",), same)
    for a, b in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        at = f"{ours}MultiHeadDotProductAttention_0/{a}"
        out[f"{at}/kernel"] = ((f"{theirs}self_attn.{b}.weight",), lambda w: w.T.reshape(v.width, v.heads, head))
        out[f"{at}/bias"] = ((f"{theirs}self_attn.{b}.bias",), lambda w: w.reshape(v.heads, head))
    at = f"{ours}MultiHeadDotProductAttention_0/out"
    out[f"{at}/kernel"] = ((f"{theirs}self_attn.out_proj.weight",), lambda w: w.T.reshape(v.heads, head, v.width))
    out[f"{at}/bias"] = ((f"{theirs}self_attn.out_proj.bias",), same)
    for a, b in (("Dense_0", "fc1"), ("Dense_1", "fc2")):
        out[f"{ours}MlpBlock_0/{a}/kernel"] = ((f"{theirs}mlp.{b}.weight",), flip)
        out[f"{ours}MlpBlock_0/{a}/bias"] = ((f"{theirs}mlp.{b}.bias",), same)
    ours, theirs = "llm/layers/", "language.layers.{}."
    norms = {"pre_attention_norm": "input_layernorm", "pre_ffw_norm": "post_attention_layernorm"}
    if c.post_norms:  # Gemma 2
        norms = {"pre_attention_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm"}
        norms |= {"pre_ffw_norm": "pre_feedforward_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
    for a, b in norms.items():
        out[f"{ours}{a}/scale"] = ((f"{theirs}{b}.weight",), same)
    heads = lambda w: w.reshape(-1, c.head_dim, c.width).swapaxes(1, 2)
    attention = f"{theirs}self_attn."
    out[f"{ours}attn/q_einsum/w"] = ((f"{attention}q_proj.weight",), heads)
    out[f"{ours}attn/kv_einsum/w"] = (
        (f"{attention}k_proj.weight", f"{attention}v_proj.weight"),
        lambda k, v: np.stack([heads(k), heads(v)]),
    )
    out[f"{ours}attn/attn_vec_einsum/w"] = ((f"{attention}o_proj.weight",), lambda w: w.T.reshape(c.heads, c.head_dim, c.width))
    out[f"{ours}mlp/gating_einsum"] = ((f"{theirs}mlp.gate_proj.weight", f"{theirs}mlp.up_proj.weight"), lambda g, u: np.stack([g.T, u.T]))
    out[f"{ours}mlp/linear"] = ((f"{theirs}mlp.down_proj.weight",), flip)
    return out


def _hf(folder: Path, cfg: VLAConfig) -> Found:
    """A folder (or file) of safetensors; the leaves of a model's half if it holds only SigLIP or only Gemma."""
    from safetensors import SafetensorError, safe_open

    index, files = folder / "model.safetensors.index.json", [folder]
    if folder.is_dir():
        files = sorted(folder.glob("*.safetensors"))
        if index.is_file():
            try:
                named = {Path(f).name for f in json.loads(index.read_text())["weight_map"].values()}  # no path leaves the folder
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
                raise UserError(f"{index} is no index of safetensors: {type(e).__name__}: {e}") from e
            files = [folder / f for f in sorted(named)]
    missing = [f for f in files if not f.is_file()]
    if missing or not files:
        raise UserError(f"{folder} holds no safetensors" if not files else f"{folder} lacks {', '.join(f.name for f in missing)}")
    where, shapes, wrong, head = {}, {}, [], None
    for file in files:
        try:
            opened = safe_open(file, "np")
        except (SafetensorError, OSError) as e:
            raise UserError(f"{file} is no safetensors file: {e}") from e
        for name in opened.keys():
            if _HEAD.fullmatch(name):
                head = opened, name
                continue
            if _IGNORED.fullmatch(canonical(name)) or _IGNORED.fullmatch(name):
                continue
            if canonical(name) in where:
                raise UserError(f"{folder}: {name} and {where[canonical(name)][1]} are the same tensor of the model")
            where[canonical(name)] = opened, name
            part = opened.get_slice(name)
            shapes[canonical(name)] = tuple(part.get_shape())
            if part.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                wrong.append(f"{name} holds {part.get_dtype()}; quantised weights are not read")
    read = lambda name: where[name][0].get_tensor(where[name][1])
    if head and _EMBED not in where:  # tied, and kept under this name
        where[_EMBED], shapes[_EMBED] = head, tuple(head[0].get_slice(head[1]).get_shape())
        head = None
    out, used = {}, set()
    for path, (names, make) in hf_map(cfg).items():
        stacked = "{}" in names[0]
        depth = (cfg.vision.depth if path.startswith("img/") else cfg.language.depth) if stacked else 1
        wanted = [n.format(i) for i in range(depth) for n in names]
        here = [n for n in wanted if n in where]
        used.update(here)
        if len(here) < len(wanted):  # of a leaf that is missing altogether the caller speaks
            wrong += [f"missing tensor: {n}" for n in wanted if here and n not in where]
            continue
        first = [shapes[n.format(0)] for n in names]
        wrong += [
            f"{where[n.format(i)][1]}: expected {want}, as in layer 0, found {shapes[n.format(i)]}"
            for i in range(depth)
            for n, want in zip(names, first)
            if shapes[n.format(i)] != want
        ]
        try:
            shape = make(*(np.broadcast_to(np.float32(0), x) for x in first)).shape
        except ValueError:
            shape = first[0]  # so unlike the model's that it cannot be laid out; compared and named below
        layer = lambda i, names=names, make=make: make(*(read(n.format(i)) for n in names))
        out[path] = Leaf((depth, *shape) if stacked else shape, stacked, layer)
    if head and TABLE in out:

        def same(_) -> np.ndarray:  # when the table is read, and not before: the two are the largest of a file
            table = read(_EMBED)
            if not np.array_equal(head[0].get_tensor(head[1]), table):
                raise ValueError(f"{head[1]} differs from {where[_EMBED][1]}, and this model has one table for both")
            return table

        out[TABLE] = dataclasses.replace(out[TABLE], layer=same)
    return out, wrong + [f"superfluous tensor: {where[n][1]} {shapes[n]}" for n in sorted(set(where) - used)]


def _big_vision(file: Path, cfg: VLAConfig) -> Found:
    """An `.npz` whose names begin with `params/` (or with nothing); SigLIP's own have their layers apart. bfloat16 comes back from such
    files as two raw bytes."""
    if file.is_dir():
        raise UserError(f"{file} is a folder; weights of big_vision are one .npz file")
    try:
        opened = np.load(file)
        names = {m: n for n in opened.files if _OURS.fullmatch(m := n.removeprefix("params/")) and not m.startswith("img/MAPHead_0/")}
        shapes = {m: _header(opened, n) for m, n in names.items()}
    except (OSError, ValueError, AttributeError, KeyError, zipfile.BadZipFile) as e:
        raise UserError(f"{file} is no .npz file of arrays: {e}") from e

    def read(name: str) -> np.ndarray:
        array = opened[names[name]]
        return array.view(ml_dtypes.bfloat16) if array.dtype == "V2" else array

    out, wrong = {n: Leaf(shape, False, lambda _, n=n: read(n)) for n, shape in shapes.items()}, []
    apart = {m[2] for n in shapes if (m := re.fullmatch(r"(img/Transformer/encoderblock_\d+)/(.*)", n))}
    for rest in apart:
        layers = [f"img/Transformer/encoderblock_{i}/{rest}" for i in range(cfg.vision.depth)]
        wrong += [f"missing: {n}" for n in layers if n not in out]
        found = [out.pop(n).shape for n in layers if n in out]
        wrong += [f"{layers[i]}: expected {found[0]}, as in layer 0, found {s}" for i, s in enumerate(found) if s != found[0]]
        if found:
            whole = (cfg.vision.depth, *found[0])
            out[f"img/Transformer/encoderblock/{rest}"] = Leaf(whole, True, lambda i, layers=layers: read(layers[i]))
    return out, wrong


def _header(opened, name: str) -> tuple[int, ...]:
    """The shape of an array in an .npz, whose numbers stay where they are. Raises: ValueError for arrays of objects."""
    with opened.zip.open(f"{name}.npy") as f:
        version = np.lib.format.read_magic(f)
        shape, _, dtype = (np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0)(f)
    if dtype.kind != "f" and dtype != "V2":
        raise ValueError(f"{name} holds {dtype}; only floating-point weights are read")
    return shape


# openpi keeps the expert's leaves beside the decoder's, with _1 behind the module's name, and its projections at the root
_EXPERT = (
    (re.compile(r"PaliGemma/((?:img|llm)/.*)"), r"\1"),
    (re.compile(r"llm/(.*?)(\w+)_1/scale"), r"expert/\1\2/plain/scale"),
    (re.compile(r"llm/(.*?)(\w+)_1/(.*)"), r"expert/\1\2/\3"),
    (re.compile(r"((?:action|state|time|action_time)_\w+/(?:kernel|bias))"), r"expert/\1"),
)


def _of_openpi(name: str) -> str:
    for pattern, to in _EXPERT:
        name = pattern.sub(to, name) if pattern.fullmatch(name) else name
    return name


def _orbax(folder: Path, *inside: str) -> Found:
    """A PyTree checkpoint, below the keys `inside`; a last key `value`, as newer libraries write it, is left out."""
    import orbax.checkpoint as ocp

    reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    try:
        stored = tree.flatten(reader.metadata(folder).item_metadata.tree)
    except Exception as e:  # Orbax raises whatever its parts do, also an AttributeError of nothing
        raise UserError(f"{folder} is no Orbax checkpoint, or a damaged one: {str(e).splitlines()[0]}") from e
    start = "".join(f"{key}/" for key in inside)
    names = {n.removeprefix(start).removesuffix("/value"): n for n in stored if n.startswith(start)}
    names = {_of_openpi(n) if inside else n: m for n, m in names.items()}

    def read(name: str) -> np.ndarray:
        item, args = tree.unflatten({name: 0}), tree.unflatten({name: ocp.RestoreArgs(restore_type=np.ndarray)})
        return tree.flatten(reader.restore(folder, args=ocp.args.PyTreeRestore(item=item, restore_args=args, partial_restore=True)))[name]

    wrong = [f"{m} holds {stored[m].dtype}; quantised weights are not read" for m in names.values() if not _floating(stored[m].dtype)]
    return {n: Leaf(tuple(stored[m].shape), False, lambda _, m=m: read(m)) for n, m in names.items()}, wrong


def _exported(folder: Path) -> Found:
    """A folder of `vla-jax export`, one file of safetensors or several, after checking every checksum."""
    names = folders.verify(folder, "exported policy")
    tensors = exported_tensors(folder, names)
    wrong = [f"{n} holds {t.get_dtype()}" for n, t in tensors.items() if t.get_dtype() not in ("F32", "BF16")]
    return {n: Leaf(tuple(t.get_shape()), False, lambda _, t=t: t[...]) for n, t in tensors.items()}, wrong


def exported_tensors(folder: Path, names: list[str]) -> dict:
    """{path: a slice of safetensors} of an export whose files are `names`. Raises: UserError."""
    from safetensors import SafetensorError, safe_open

    out: dict = {}
    for name in sorted(n for n in names if n.endswith(".safetensors")):
        try:
            opened = safe_open(folders.inside(folder, name), "np")
            out |= {key: opened.get_slice(key) for key in opened.keys()}
        except (SafetensorError, OSError) as e:
            raise UserError(f"{folder / name} is no safetensors file: {e}") from e
    return out


def _floating(dtype) -> bool:
    return np.dtype(dtype).kind == "f" or dtype == ml_dtypes.bfloat16


def read(place: str | Path, kind: str, cfg: VLAConfig) -> Found:
    """kind: one of FORMATS. Raises: UserError for a file that is none of its kind."""
    path = Path(place).expanduser().resolve()
    if kind not in FORMATS:
        raise UserError(f"format {kind!r} is unknown; there are: {', '.join(FORMATS)}")
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if kind == "hf":
        return _hf(path, cfg)
    if kind == "big_vision":
        return _big_vision(path, cfg)
    if kind == "native" and (path / EXPORTED).is_file():
        return _exported(path)
    inside = path / "params" if (path / "params").is_dir() else path  # the folder of params itself will do
    return _orbax(inside, *(("params",) if kind == "openpi" else ()))
