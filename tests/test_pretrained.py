"""Files of other projects, written as those write them, read back bit for bit; and what is said of files that do not fit."""

import json

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vla_jax import cli, sharding, tree
from vla_jax.models import presets, pretrained, vla, weight_files
from vla_jax.models.presets import Language, Vision
from vla_jax.train import loop
from vla_jax.types import UserError

PRESET = (Vision(40, 2, 2, 72, 16), Language(48, 3, 4, 1, 16, 80))


@pytest.fixture(scope="module", autouse=True)
def preset():
    with pytest.MonkeyPatch.context() as m:
        m.setitem(presets.PRESETS, "small", PRESET)
        yield


def small(vocab=384, image_size=32, state_dim=0):
    return presets.resolve("small", vocab=vocab, image_size=image_size, state_dim=state_dim, dtype="float32", remat="none")


@pytest.fixture(scope="module")
def weights():
    """{path: f32 array}, random, also where an initialiser makes zeros."""
    rng, shapes = np.random.default_rng(0), tree.flatten(jax.eval_shape(lambda: vla.init(small(), jax.random.key(0))))
    return {path: rng.normal(size=s.shape).astype(np.float32) for path, s in shapes.items()}


def load(source, kind, cfg=None, **options):
    cfg = cfg or small()
    mesh = sharding.make_mesh(2, 2, 2)
    return tree.flatten(pretrained.load(source, kind, cfg, vla.shardings(cfg, mesh), **options))


def same(loaded, weights, but=()):
    assert loaded.keys() == weights.keys()
    for path, want in weights.items():
        if path not in but:
            np.testing.assert_array_equal(np.asarray(loaded[path]), want, err_msg=path)


@pytest.mark.parametrize("prefix", ["params/", ""])
def test_big_vision(weights, tmp_path, prefix):
    np.savez(tmp_path / "w.npz", **{prefix + path: w for path, w in weights.items()}, **{"opt/count": np.zeros(1)})
    same(load(tmp_path / "w.npz", "big_vision"), weights)


def test_big_vision_in_bfloat16(weights, tmp_path):
    half = {path: w.astype(ml_dtypes.bfloat16) for path, w in weights.items()}
    np.savez(tmp_path / "w.npz", **half)
    same(load(tmp_path / "w.npz", "big_vision"), {path: w.astype(np.float32) for path, w in half.items()})
    np.savez(tmp_path / "o.npz", **{"img/x": np.array([{}], object)})
    with pytest.raises(UserError, match="img/x holds object; only floating-point weights are read"):
        load(tmp_path / "o.npz", "big_vision")


@pytest.mark.parametrize("value", [True, False])
def test_openpi(weights, tmp_path, value):
    """As openpi saves pi0-FAST: below params/PaliGemma, each leaf in a box `value` or not; the folder params itself will do."""
    boxed = tree.unflatten({path + ("/value" if value else ""): w for path, w in weights.items()})
    with ocp.PyTreeCheckpointer() as writer:
        writer.save(tmp_path / "step" / "params", {"params": {"PaliGemma": boxed}})
        writer.save(tmp_path / "more" / "params", {"params": {"PaliGemma": boxed, "head_of_mine": {"w": np.zeros(3)}}})
    same(load(tmp_path / "step", "openpi"), weights)
    same(load(tmp_path / "step" / "params", "openpi"), weights)
    with pytest.raises(UserError, match=r"superfluous: head_of_mine/w \(3,\)"):
        load(tmp_path / "more", "openpi")
    (tmp_path / "step" / "params" / "_METADATA").unlink()
    with pytest.raises(UserError, match="no Orbax checkpoint, or a damaged one"):
        load(tmp_path / "step", "openpi")


def as_hf(weights, cfg):
    """The tensors by transformers' present names, by inverting each leaf's map on a grid of places."""
    out = {}
    for path, (names, make) in weight_files.hf_map(cfg).items():
        stacked = "{}" in names[0]
        for i in range(weights[path].shape[0] if stacked else 1):
            want = weights[path][i] if stacked else weights[path]
            shapes = hf_shapes(path, names, want, cfg)
            numbers, at = [], 0
            for shape in shapes:
                numbers.append(np.arange(at, at + np.prod(shape)).reshape(shape))
                at += int(np.prod(shape))
            flat = np.empty(at, np.float32)
            flat[make(*numbers).reshape(-1)] = want.reshape(-1)
            for name, n in zip(names, numbers):
                out[name.format(i)] = flat[n]
    return out


def hf_shapes(path, names, want, cfg):
    v, c = cfg.vision, cfg.language
    one = {
        "q_proj": (c.heads * c.head_dim, c.width),
        "k_proj": (c.kv_heads * c.head_dim, c.width),
        "v_proj": (c.kv_heads * c.head_dim, c.width),
        "o_proj": (c.width, c.heads * c.head_dim),
        "gate_proj": (c.mlp, c.width),
        "up_proj": (c.mlp, c.width),
        "down_proj": (c.width, c.mlp),
        "fc1": (v.mlp, v.width),
        "fc2": (v.width, v.mlp),
        "patch_embedding": (v.width, 3, v.patch, v.patch),
        "position_embedding": want.shape[1:],
    }
    if path.startswith("img/"):
        one |= dict.fromkeys(("q_proj", "k_proj", "v_proj", "out_proj"), (v.width, v.width))
    found = []
    for name in names:
        key, kind = name.split(".")[-2:]
        found.append(one[key] if kind == "weight" and key in one else (c.width, v.width) if name == "projector.weight" else (want.size,))
        if path == "llm/embedder/input_embedding":
            found[-1] = want.shape
    return found


STYLES = {
    "transformers 5": {
        "vision": "vision_tower.vision_model.",
        "language": "language_model.model.",
        "projector": "multi_modal_projector.linear.",
    },
    "transformers 4.52": {
        "vision": "model.vision_tower.vision_model.",
        "language": "model.language_model.",
        "projector": "model.multi_modal_projector.linear.",
    },
    "no vision_model": {
        "vision": "model.vision_tower.",
        "language": "model.language_model.",
        "projector": "model.multi_modal_projector.linear.",
    },
    "LeRobot": {
        k: f"model.paligemma_with_expert.paligemma.model.{v}"
        for k, v in {
            "vision": "vision_tower.vision_model.",
            "language": "language_model.",
            "projector": "multi_modal_projector.linear.",
        }.items()
    },
}


def named(tensors, style):
    return {STYLES[style][(part := name.split(".")[0])] + name.removeprefix(part + "."): w for name, w in tensors.items()}


@pytest.mark.parametrize("style", STYLES)
def test_hf_names_of_all_ages(weights, tmp_path, style):
    from safetensors.numpy import save_file

    tensors = named(as_hf(weights, small()), style)
    tensors["lm_head.weight"] = weights["llm/embedder/input_embedding"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(8, np.float32)
    half = sorted(tensors)[::2]
    save_file({n: tensors[n] for n in half}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({n: tensors[n] for n in tensors if n not in half}, tmp_path / "model-00002-of-00002.safetensors")
    places = {n: f"model-0000{1 if n in half else 2}-of-00002.safetensors" for n in tensors}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    same(load(tmp_path, "hf"), weights)
    for odd in ("{", "[]", '{"weight_map": 3}'):
        (tmp_path / "model.safetensors.index.json").write_text(odd)
        with pytest.raises(UserError, match="no index of safetensors"):
            load(tmp_path, "hf")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="lacks model-00002-of-00002.safetensors"):
        load(tmp_path, "hf")


def test_hf_files_that_do_not_fit_are_told_tensor_by_tensor(weights, tmp_path):
    """One of many layers missing, of another shape, or too much; quantised; not tied; not finite."""
    from safetensors.numpy import save_file

    good = named(as_hf(weights, small()), "transformers 4.52")
    at = "model.language_model.layers.1.input_layernorm.weight"
    query = "model.language_model.layers.1.self_attn.q_proj.weight"
    assert at in good and query in good

    def said(change):
        save_file(
            good | change if isinstance(change, dict) else {n: w for n, w in good.items() if n != change}, tmp_path / "model.safetensors"
        )
        with pytest.raises(UserError) as e:
            load(tmp_path, "hf")
        return str(e.value)

    text = said(query)
    assert "missing tensor: language.layers.1.self_attn.q_proj.weight" in text and "superfluous" not in text
    assert f"{at}: expected (48,), as in layer 0, found (1,)" in said({at: np.ones(1, np.float32)})
    assert f"{query}: expected" in said({query: good[query][:-1]})
    assert "superfluous tensor: model.language_model.layers.9.mlp.up_proj.weight (3,)" in said(
        {"model.language_model.layers.9.mlp.up_proj.weight": np.zeros(3, np.float32)}
    )
    assert f"{at} holds I8" in said({at: np.ones(48, np.int8)})
    assert "lm_head.weight differs from" in said({"lm_head.weight": weights["llm/embedder/input_embedding"] + 1})
    assert "llm/layers/pre_attention_norm/scale cannot be taken" in said({at: np.full(48, np.nan, np.float32)})
    embed = next(n for n in good if n.endswith("embed_tokens.weight"))
    save_file({"lm_head.weight" if n == embed else n: w for n, w in good.items()}, tmp_path / "model.safetensors")
    same(load(tmp_path, "hf"), weights)  # a tied table that was kept under its other name


def test_siglip_as_big_vision_publishes_it_beside_gemma_of_another_format(weights, tmp_path, capsys):
    """Layers apart, a pooling head and a text side of its own."""
    from safetensors.numpy import save_file

    apart = {}
    for path, w in weights.items():
        if path.startswith("img/Transformer/encoderblock/"):
            apart |= {path.replace("encoderblock/", f"encoderblock_{i}/"): layer for i, layer in enumerate(w)}
        elif path.startswith("img/") and not path.startswith("img/head/"):
            apart[path] = w
    apart |= {"img/MAPHead_0/probe": np.zeros((1, 1, 40)), "txt/head/kernel": np.zeros((2, 2)), "t": np.zeros(1)}
    np.savez(tmp_path / "siglip.npz", **{f"params/{p}": w for p, w in apart.items()})
    tensors = named(as_hf(weights, small()), "transformers 5")
    (tmp_path / "gemma").mkdir()
    save_file({n: w for n, w in tensors.items() if "language_model" in n}, tmp_path / "gemma" / "model.safetensors")
    command = [
        "import",
        str(tmp_path / "siglip.npz"),
        "--format=big_vision",
        "--preset=small",
        "--image-size=32",
        f"--out={tmp_path / 'out'}",
    ]
    assert cli.main(command) == 2 and "holds no embedding of tokens: give a decoder's weights, too, with --more" in capsys.readouterr().err
    assert cli.main([*command, f"--more={tmp_path / 'gemma'}", "--more-format=hf"]) == 0
    got = load(tmp_path / "out", "native")
    assert all(np.array_equal(got[p], w) for p, w in weights.items() if not p.startswith("img/head/"))
    with pytest.raises(UserError, match="both hold llm/embedder"):
        load(tmp_path / "gemma", "hf", more=tmp_path / "gemma")
    del apart["img/Transformer/encoderblock_1/LayerNorm_0/scale"]
    np.savez(tmp_path / "siglip.npz", **apart)
    with pytest.raises(UserError, match="missing: img/Transformer/encoderblock_1/LayerNorm_0/scale"):
        load(tmp_path / "siglip.npz", "big_vision", more=tmp_path / "gemma", more_kind="hf")


def test_damaged_and_quantised_npz(weights, tmp_path):
    np.savez(tmp_path / "w.npz", **weights)
    raw = bytearray((tmp_path / "w.npz").read_bytes())
    at = raw.find(weights["llm/layers/mlp/linear"].tobytes()[:64])
    raw[at + 100] ^= 1
    (tmp_path / "w.npz").write_bytes(raw)
    with pytest.raises(UserError, match="llm/layers/mlp/linear cannot be taken from .*CRC"):
        load(tmp_path / "w.npz", "big_vision")
    np.savez(tmp_path / "q.npz", **(weights | {"img/head/bias": np.zeros(48, np.int8)}))
    with pytest.raises(UserError, match="holds int8; only floating-point weights are read"):
        load(tmp_path / "q.npz", "big_vision")
    with pytest.raises(UserError, match="is a folder; weights of big_vision are one .npz file"):
        load(tmp_path, "big_vision")


def test_siglip_and_gemma_from_two_folders_that_transformers_wrote(tmp_path):
    """Text side, pooling head and logit scale of SigLIP are of no use; the projection between the two is new."""
    torch, hf = pytest.importorskip("torch"), pytest.importorskip("transformers")
    v, c = PRESET
    seen = dict(
        hidden_size=v.width,
        intermediate_size=v.mlp,
        num_hidden_layers=v.depth,
        num_attention_heads=v.heads,
        patch_size=v.patch,
        image_size=32,
    )
    said = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
    torch.manual_seed(0)
    siglip = hf.SiglipModel(hf.SiglipConfig(vision_config=seen, text_config=said))
    told = dict(hidden_size=c.width, intermediate_size=c.mlp, num_hidden_layers=c.depth, num_attention_heads=c.heads, head_dim=c.head_dim)
    gemma = hf.GemmaForCausalLM(hf.GemmaConfig(**told, num_key_value_heads=1, vocab_size=300))
    siglip.save_pretrained(tmp_path / "siglip")
    gemma.to(torch.bfloat16).save_pretrained(tmp_path / "gemma", max_shard_size="40KB")
    got = load(tmp_path / "siglip", "hf", more=tmp_path / "gemma", text_vocab=300)
    to = lambda t: t.detach().float().numpy()
    np.testing.assert_array_equal(
        got["img/embedding/kernel"], to(siglip.vision_model.embeddings.patch_embedding.weight).transpose(2, 3, 1, 0)
    )
    np.testing.assert_array_equal(got["llm/layers/mlp/linear"][1], to(gemma.model.layers[1].mlp.down_proj.weight).T)
    table = np.asarray(got["llm/embedder/input_embedding"])
    np.testing.assert_array_equal(table[:300], to(gemma.model.embed_tokens.weight))
    assert np.abs(np.asarray(got["img/head/kernel"])).std() > 0 and (np.asarray(got["img/head/bias"]) == 0).all()
    with pytest.raises(UserError, match=r"missing: llm/embedder/input_embedding"):
        load(tmp_path / "siglip", "hf")


def test_rows_behind_the_text_are_new_and_alike(weights, tmp_path):
    """HF pads its embedding; the rows that this model's action tokens take are drawn like the others, and the same on each run."""
    np.savez(tmp_path / "w.npz", **weights)
    cfg = small(vocab=600)
    got = load(tmp_path / "w.npz", "big_vision", cfg, text_vocab=300)
    table, known = np.asarray(got["llm/embedder/input_embedding"]), weights["llm/embedder/input_embedding"][:300]
    assert table.shape == (640, 48) and np.array_equal(table[:300], known)
    new = table[300:]
    assert np.abs(new.mean(0) - known.mean(0)).max() < 0.3 and 0.8 < new.std() / known.std() < 1.2
    again = load(tmp_path / "w.npz", "big_vision", cfg, text_vocab=300)["llm/embedder/input_embedding"]
    assert np.array_equal(table, np.asarray(again))
    drawn = []
    with pytest.MonkeyPatch.context() as m:  # once, though each of eight devices asks for its part
        extended = pretrained._extended
        m.setattr(pretrained, "_extended", lambda *a: (drawn.append(1), extended(*a))[1])
        load(tmp_path / "w.npz", "big_vision", cfg, text_vocab=300)
    assert drawn == [1]
    with pytest.raises(UserError, match=r"input_embedding: expected \(640, 48\), found \(384, 48\)"):
        load(tmp_path / "w.npz", "big_vision", cfg, text_vocab=500)  # more text than the file has


def test_positions_of_another_resolution(weights, tmp_path):
    """Against scipy's zoom, which big_vision uses: bilinear with the corners kept."""
    ndimage = pytest.importorskip("scipy.ndimage")
    np.savez(tmp_path / "w.npz", **weights)
    for size in (16, 48, 80):
        got = np.asarray(load(tmp_path / "w.npz", "big_vision", small(image_size=size))["img/pos_embedding"])
        side = size // 16
        grid = weights["img/pos_embedding"].reshape(2, 2, 40)
        if side == 1:
            want = grid.mean((0, 1), keepdims=True)
        else:
            want = ndimage.zoom(grid, (side / 2, side / 2, 1), order=1)
        np.testing.assert_allclose(got, want.reshape(1, side * side, 40), atol=1e-6)


def test_files_that_do_not_fit(weights, tmp_path):
    """Everything that differs at once, expected against found."""
    odd = dict(weights)
    odd.pop("llm/final_norm/scale")
    odd["llm/extra/w"] = np.zeros(3)
    odd["img/head/bias"] = np.zeros(7)
    np.savez(tmp_path / "w.npz", **odd)
    with pytest.raises(UserError) as e:
        load(tmp_path / "w.npz", "big_vision")
    for said in (
        "3 leaves differ",
        "missing: llm/final_norm/scale (48,)",
        "superfluous: llm/extra/w (3,)",
        "img/head/bias: expected (48,), found (7,)",
    ):
        assert said in str(e.value)
    (tmp_path / "no.npz").write_bytes(b"PK\x03\x04 nothing")
    (tmp_path / "bad.safetensors").write_bytes(b"\xff" * 40)
    (tmp_path / "empty" / "params").mkdir(parents=True)
    for place, kind, match in (
        ("gone", "hf", "does not exist"),
        ("no.npz", "big_vision", "no .npz file"),
        ("bad.safetensors", "hf", "no safetensors file"),
        ("empty", "hf", "holds no safetensors"),
        ("empty", "openpi", "no Orbax checkpoint"),
        ("empty", "flax", "unknown; there are: hf, big_vision, openpi"),
    ):
        with pytest.raises(UserError, match=match):
            load(tmp_path / place, kind)


@pytest.mark.parametrize("stacked", [True, False])
def test_each_layer_is_read_once_and_no_device_holds_more_than_its_share(stacked):
    """However a leaf is divided, over its layers too, and over devices that hold the same part."""
    whole = np.random.default_rng(0).normal(size=(4, 8, 6)).astype(np.float32)
    read = []
    leaf = weight_files.Leaf(whole.shape, stacked, lambda i: (read.append(i), whole[i] if stacked else whole)[1])
    mesh = sharding.make_mesh(2, 2, 2)
    for spec in (P(None, "fsdp", "tensor"), P("data", ("fsdp", "tensor")), P(), P("tensor")):
        read.clear()
        got = leaf.placed(NamedSharding(mesh, spec))
        assert sorted(read) == ([0, 1, 2, 3] if stacked else [0])
        assert np.array_equal(got, whole) and got.sharding.spec == spec
        assert {x.data.size for x in got.addressable_shards} == {
            whole.size // np.prod([2 for axis in "data fsdp tensor".split() if axis in str(spec)], dtype=int)
        }


@pytest.mark.parametrize("kind", ["hf", "openpi"])
def test_import_command_of_other_formats(weights, tmp_path, kind, capsys):
    from safetensors.numpy import save_file

    if kind == "hf":
        (tmp_path / "src").mkdir()
        save_file(named(as_hf(weights, small()), "transformers 5"), tmp_path / "src" / "model.safetensors")
    else:
        with ocp.PyTreeCheckpointer() as writer:
            writer.save(tmp_path / "src" / "params", {"params": {"PaliGemma": tree.unflatten(weights)}})
    said = ["import", str(tmp_path / "src"), f"--format={kind}", "--preset=small", "--image-size=32", f"--out={tmp_path / 'out'}"]
    assert cli.main(said) == 0, capsys.readouterr().err
    same(load(tmp_path / "out", "native"), weights)


def test_import_command_and_a_run_that_begins_with_it(weights, tmp_path, tiny, capsys):
    """PRESET's weights through the command; a run takes them, with rows for its action tokens, and a resumed one does not need them."""
    np.savez(tmp_path / "w.npz", **weights)
    here = ["import", str(tmp_path / "w.npz"), "--format=big_vision", "--preset=small", "--image-size=48", f"--out={tmp_path / 'pre'}"]
    assert cli.main(here) == 0 and "384 rows of the embedding" in capsys.readouterr().out
    assert cli.main(here) == 2 and "exists" in capsys.readouterr().err
    settings = ["model.preset=small", f"model.init={tmp_path / 'pre'}", "train.steps=1", "train.warmup=0", "train.lr=0"]
    config = tiny(*settings)
    with pytest.raises(UserError, match="input_embedding: expected"):  # the text model has 1,024 pieces, the file 384
        loop.train(loop.prepare(config, tmp_path / "run"), quiet=True)
    path = "llm/embedder/input_embedding"
    np.savez(tmp_path / "w.npz", **(weights | {path: np.random.default_rng(1).normal(size=(1024, 48)).astype(np.float32)}))
    (tmp_path / "pre").rename(tmp_path / "old")
    assert cli.main(here) == 0
    trained = tree.flatten(loop.train(loop.prepare(config, tmp_path / "run"), quiet=True).params)  # with a learning rate of 0
    np.testing.assert_array_equal(np.asarray(trained["llm/layers/mlp/linear"]), weights["llm/layers/mlp/linear"])
    assert trained[path].shape[0] == 1152 and "state/kernel" in trained
    (tmp_path / "pre").rename(tmp_path / "moved")
    loop.train(loop.prepare(tiny(*settings[:2], "train.steps=2", *settings[3:]), tmp_path / "run"), quiet=True)
