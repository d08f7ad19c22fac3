"""Weights that others have trained, leaf by leaf onto the mesh: HF safetensors, big_vision's `.npz`, openpi's Orbax folders.

Our parameter tree is big_vision's PaliGemma (`img/...`, `llm/...`, layers stacked on axis 0), so its files load by name. Of HF's files
each leaf states from which tensors it comes, and how. A leaf is read where a device asks for a part of it: no device and no
host holds the whole model.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from vla_jax import tree
from vla_jax.models.presets import Expert, VLAConfig
from vla_jax.types import UserError

FORMATS = ("hf", "big_vision", "openpi", "native")
_OURS = re.compile(r"(img|llm|expert)/.*")
_TABLE, _POSITION = "llm/embedder/input_embedding", "img/pos_embedding"


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
        return jax.make_array_from_callback(self.shape, where, lambda index: parts[key(index)])


# What is before a tensor's own name varies with the version of the library and with what wrapped the model.
_NAMES = (
    (re.compile(r".*?(?:vision_tower\.)?vision_model\.(.*)"), r"vision.\1"),
    (re.compile(r".*?vision_tower\.(.*)"), r"vision.\1"),
    (re.compile(r".*?multi_modal_projector\.linear\.(.*)"), r"projector.\1"),
    (re.compile(r"((?:embeddings|encoder|post_layernorm|head)\..*)"), r"vision.\1"),  # SigLIP's encoder alone, by transformers 5
    (re.compile(r"(?:.*\.)?((?:embed_tokens|norm|layers\.\d+)\..*)"), r"language.\1"),
)
# Of no use here: a tied copy of the embedding, SigLIP's text side and its pooling head.
_IGNORED = re.compile(r"(.*\.)?lm_head\.weight|text_model\..*|logit_(scale|bias)|vision\.head\..*|vision\.embeddings\.position_ids")


def _canonical(name: str) -> str:
    if re.match(r"text_model\.", name):
        return name
    for pattern, to in _NAMES:
        if pattern.fullmatch(name):
            return pattern.sub(to, name)
    return name


def _hf_map(cfg: VLAConfig) -> dict[str, tuple[tuple[str, ...], Callable]]:
    """Our leaf -> (tensors, {} standing for the layer; how they become the leaf, or one layer of it)."""
    v, c = cfg.vision, cfg.language
    same, flip = lambda w: w, lambda w: w.T
    head = v.width // v.heads
    out: dict[str, tuple[tuple[str, ...], Callable]] = {
        "img/embedding/kernel": (("vision.embeddings.patch_embedding.weight",), lambda w: w.transpose(2, 3, 1, 0)),
        "img/embedding/bias": (("vision.embeddings.patch_embedding.bias",), same),
        _POSITION: (("vision.embeddings.position_embedding.weight",), lambda w: w[None]),
        "img/Transformer/encoder_norm/scale": (("vision.post_layernorm.weight",), same),
        "img/Transformer/encoder_norm/bias": (("vision.post_layernorm.bias",), same),
        "img/head/kernel": (("projector.weight",), flip),
        "img/head/bias": (("projector.bias",), same),
        _TABLE: (("language.embed_tokens.weight",), same),
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


def _hf(folder: Path, cfg: VLAConfig) -> dict[str, Leaf]:
    """The leaves of a folder (or file) of safetensors; those of a model's half if it holds only SigLIP or only Gemma."""
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
    where, shapes = {}, {}
    for file in files:
        try:
            opened = safe_open(file, "np")
        except (SafetensorError, OSError) as e:
            raise UserError(f"{file} is no safetensors file: {e}") from e
        for name in opened.keys():
            if _IGNORED.fullmatch(_canonical(name)) or _IGNORED.fullmatch(name):
                continue
            if _canonical(name) in where:
                raise UserError(f"{folder}: {name} and {where[_canonical(name)][1]} are the same tensor of the model")
            where[_canonical(name)] = opened, name
            shapes[_canonical(name)] = tuple(opened.get_slice(name).get_shape())
    read = lambda name: where[name][0].get_tensor(where[name][1])
    out, used = {}, set()
    for path, (names, make) in _hf_map(cfg).items():
        stacked = "{}" in names[0]
        depth = cfg.vision.depth if path.startswith("img/") else cfg.language.depth
        wanted = [n.format(i) for i in range(depth if stacked else 1) for n in names]
        if not all(n in where for n in wanted):
            continue  # said with all others that are missing, by the caller
        used.update(wanted)
        first = [np.broadcast_to(np.float32(0), shapes[n.format(0)]) for n in names]
        try:
            shape = make(*first).shape
        except ValueError:
            shape = tuple(first[0].shape)  # so unlike the model's that it cannot be laid out; compared and named below
        layer = lambda i, names=names, make=make: make(*(read(n.format(i)) for n in names))
        out[path] = Leaf((depth, *shape) if stacked else shape, stacked, layer)
    if extra := sorted(set(where) - used):
        raise UserError(
            f"{folder} holds {len(extra)} tensors that the model does not have: {', '.join(extra[:6])}{' ..' if len(extra) > 6 else ''}"
        )
    return out


def _big_vision(file: Path) -> dict[str, Leaf]:
    """The leaves of an `.npz` whose names begin with `params/` (or with nothing). bfloat16 comes back from such files as two raw bytes."""
    try:
        opened = np.load(file)
        names = {m: n for n in opened.files if _OURS.fullmatch(m := n.removeprefix("params/"))}
        shapes = {m: _header(opened, n) for m, n in names.items()}
    except (OSError, ValueError, AttributeError, KeyError, zipfile.BadZipFile) as e:
        raise UserError(f"{file} is no .npz file of arrays: {e}") from e

    @functools.lru_cache(maxsize=1)  # every device asks for its part of the same leaf
    def read(name: str) -> np.ndarray:
        array = opened[names[name]]
        return array.view(ml_dtypes.bfloat16) if array.dtype == "V2" else array

    return {n: Leaf(shape, False, lambda _, n=n: read(n)) for n, shape in shapes.items()}


def _header(opened, name: str) -> tuple[int, ...]:
    """The shape of an array in an .npz, whose numbers stay where they are. Raises: ValueError for arrays of objects."""
    with opened.zip.open(f"{name}.npy") as f:
        version = np.lib.format.read_magic(f)
        shape, _, dtype = (np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0)(f)
    if dtype.kind not in "fiu" and dtype != "V2":
        raise ValueError(f"{name} holds {dtype}, not numbers")
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


def _orbax(folder: Path, *inside: str) -> dict[str, Leaf]:
    """The leaves of a PyTree checkpoint, below the keys `inside`; a last key `value`, as newer libraries write it, is left out."""
    import orbax.checkpoint as ocp

    reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    try:
        stored = tree.flatten(reader.metadata(folder).item_metadata.tree)
    except Exception as e:  # Orbax raises whatever its parts do
        raise UserError(f"{folder} is no Orbax checkpoint: {str(e).splitlines()[0]}") from e
    start = "".join(f"{key}/" for key in inside)
    names = {n.removeprefix(start).removesuffix("/value"): n for n in stored if n.startswith(start)}
    names = {_of_openpi(n) if inside else n: m for n, m in names.items()}

    @functools.lru_cache(maxsize=1)
    def read(name: str) -> np.ndarray:
        item, args = tree.unflatten({name: 0}), tree.unflatten({name: ocp.RestoreArgs(restore_type=np.ndarray)})
        return tree.flatten(reader.restore(folder, args=ocp.args.PyTreeRestore(item=item, restore_args=args, partial_restore=True)))[name]

    return {n: Leaf(tuple(stored[m].shape), False, lambda _, m=m: read(m)) for n, m in names.items() if _OURS.fullmatch(n)}


def _open(place: str | Path, kind: str, cfg: VLAConfig) -> dict[str, Leaf]:
    path = Path(place).expanduser().resolve()
    if kind not in FORMATS:
        raise UserError(f"format {kind!r} is unknown; there are: {', '.join(FORMATS)}")
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if kind == "hf":
        return _hf(path, cfg)
    if kind == "big_vision":
        return _big_vision(path)
    return _orbax(path / "params", *(("params",) if kind == "openpi" else ()))


def load(source: str | Path, kind: str, cfg: VLAConfig, where: dict, *, text_vocab: int = 0, seed: int = 0, more: str | Path = "") -> dict:
    """Parameters, f32, as a nested dict of arrays laid out as `where` (a tree of shardings, as state.shardings has it) says.

    source: a file or folder of `kind` (FORMATS); more: a second one of the same kind, so that SigLIP and Gemma may come from two.
    text_vocab: rows of the embedding that are the file's (0: all that it has); those behind them, of action tokens, are drawn with the
    others' mean and spread. Positions of another resolution are resized. What the file cannot have is drawn, too: the projected state, adapters, an
    expert that the file has nothing of and, with `more`, the projection of image tokens.

    Raises: UserError listing every leaf that is missing, superfluous or of another shape, expected against found.
    """
    from vla_jax.models import vla

    found: dict[str, Leaf] = {}
    for place in (source, *([more] if more else [])):
        found |= _open(place, kind, cfg)
    want = tree.flatten(jax.eval_shape(lambda: vla.init(cfg, jax.random.key(0))))
    expert = {p for p in want if p.startswith("expert/")}
    fresh = (
        {p for p in want if p.startswith(("state/", "lora/"))}
        | (set() if expert & found.keys() else expert)
        | ({p for p in want if p.startswith("img/head/")} - found.keys() if more else set())
    )
    text_vocab = text_vocab or (found[_TABLE].shape[0] if _TABLE in found else 0)
    fitted = {path: _fit(path, leaf, want[path].shape, text_vocab, seed) for path, leaf in found.items() if path in want}
    wrong = [f"missing: {p} {want[p].shape}" for p in want if p not in found and p not in fresh]
    wrong += [f"superfluous: {p} {leaf.shape}" for p, leaf in found.items() if p not in want]
    wrong += [f"{p}: expected {want[p].shape}, found {found[p].shape}" for p, leaf in fitted.items() if leaf.shape != want[p].shape]
    if wrong:
        raise UserError(f"{source} is no checkpoint of this model; {len(wrong)} leaves differ:\n  " + "\n  ".join(wrong[:40]))
    places, out = tree.flatten(where), {}
    drawn = jax.jit(lambda k: {p: tree.flatten(vla.init(cfg, k))[p] for p in fresh}, out_shardings={p: places[p] for p in fresh})
    out |= drawn(jax.random.key(seed)) if fresh else {}
    for path, leaf in fitted.items():
        out[path] = leaf.placed(places[path])
    return tree.unflatten({path: out[path] for path in want})


def _fit(path: str, leaf: Leaf, shape: tuple[int, ...], text_vocab: int, seed: int) -> Leaf:
    """The leaf with more rows of the vocabulary, or positions of another grid, if that is all that differs."""
    if path == _TABLE and leaf.shape[1:] == shape[1:] and leaf.shape[0] >= text_vocab:
        # once for all devices that ask for their part
        return Leaf(shape, False, functools.lru_cache(maxsize=1)(lambda _: _extended(leaf.layer(0), shape[0], text_vocab, seed)))
    side = [round(s[1] ** 0.5) if len(s) == 3 else 0 for s in (leaf.shape, shape)]
    if path == _POSITION and leaf.shape != shape and len(leaf.shape) == 3 and leaf.shape[2] == shape[2] and side[0] ** 2 == leaf.shape[1]:
        return Leaf(shape, False, lambda _: resized(leaf.layer(0), side[1]))
    return leaf


def _extended(table: np.ndarray, rows: int, text_vocab: int, seed: int) -> np.ndarray:
    """The first `text_vocab` rows, then new ones."""
    known = np.asarray(table[:text_vocab], np.float32)
    mean, spread = known.mean(axis=0), known.std(axis=0)
    new = np.random.default_rng(seed).normal(size=(rows - text_vocab, known.shape[1])).astype(np.float32)
    return np.concatenate([known, mean + spread * new])


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


def survey(source: str | Path, kind: str, cfg: VLAConfig) -> tuple[int, Expert | None]:
    """(rows of the embedding that a file holds, 0 if it has none; its action expert, by the shapes of its leaves). Raises: UserError."""
    shapes = {path: leaf.shape for path, leaf in _open(source, kind, cfg).items()}
    expert, into, mlp = None, shapes.get("expert/action_in_proj/kernel", ()), shapes.get("expert/layers/mlp/linear", ())
    if len(into) == 2 and len(mlp) == 3:
        expert = Expert(into[1], mlp[1], "expert/time_mlp_in/kernel" in shapes, into[0])
    return shapes[_TABLE][0] if _TABLE in shapes else 0, expert


def save(params: dict, out: str | Path, about: dict) -> None:
    """The folder that `load` reads as `native`: every host writes its shards. about: kept beside them as import.json."""
    import orbax.checkpoint as ocp

    out = Path(out).expanduser().resolve()
    with ocp.StandardCheckpointer() as writer:
        writer.save(out / "params", params)
    if jax.process_index() == 0:
        (out / "import.json").write_text(json.dumps(about, indent=1) + "\n")
