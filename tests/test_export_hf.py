"""The folder for `transformers`, loaded by it: the same logits, tokenizer and pictures; and our names for its tensors, both ways."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from lively import lively, logits
from safetensors.numpy import load_file

from vla_jax import cli, sharding, tree
from vla_jax.deploy import export, hf, trained
from vla_jax.models import presets, pretrained, vla, weight_files, weights_out
from vla_jax.models.presets import Language, Vision
from vla_jax.types import UserError

SIZES = {
    "gemma": (Vision(40, 3, 2, 72, 16), Language(48, 2, 4, 1, 16, 80)),
    "gemma_groups": (Vision(40, 2, 2, 72, 16), Language(48, 3, 4, 2, 24, 80)),
    "gemma2": (Vision(40, 2, 2, 72, 16), Language(48, 2, 4, 2, 16, 80, post_norms=True, attn_cap=5.0, logit_cap=3.0)),
}


@pytest.fixture(scope="module", params=SIZES)
def sized(request, openpi_run):
    """The run as if it had been of another size."""
    t, (vision, language) = trained.read(openpi_run), SIZES[request.param]
    return lively(t, cfg=dataclasses.replace(t.cfg, vision=vision, language=language))


def write(t, out, monkeypatch, **how):
    monkeypatch.setattr(trained, "read", lambda *a, **k: t)
    return export.export("run", out, kind="hf", **how)


def test_every_leaf_comes_back_through_the_map(sized):
    """What is written and read in two directions is what it was, and no number is in two tensors."""
    names = {k: f"{k}." for k in hf.NAMES}
    tensors = dict(weights_out.hf_tensors(sized.cfg, sized.params, names))
    assert sum(x.size for x in tensors.values()) == sum(w.size for w in sized.params.values())
    for path, (parts, make) in weight_files.hf_map(sized.cfg).items():
        stacked = "{}" in parts[0]
        layers = [make(*(tensors[p.format(i)] for p in parts)) for i in range(len(sized.params[path]) if stacked else 1)]
        np.testing.assert_array_equal(np.stack(layers) if stacked else layers[0], sized.params[path], err_msg=path)


def test_logits_of_transformers_are_ours(sized, tmp_path, monkeypatch):
    """max |dlogit| below 1e-5 of the largest logit in float32, which has 6e-8; nothing missing, nothing left over; and back by `import`."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    out = write(sized, tmp_path / "out", monkeypatch, shard_bytes=200_000)
    assert len(list(out.glob("model-*.safetensors"))) > 2
    auto = transformers.PaliGemmaForConditionalGeneration
    model, info = auto.from_pretrained(out, output_loading_info=True, attn_implementation="eager")
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 48, 48, 3), np.uint8)
    prefix, postfix = rng.integers(3, 8000, 7), rng.integers(3, 8000, 5)
    ids = np.concatenate([np.full(2 * sized.cfg.tokens_per_image, sized.cfg.vocab), prefix, postfix])
    kind = torch.tensor([[0] * (len(ids) - 5) + [1] * 5])
    pixels = torch.tensor(images.astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2)
    inputs = {"input_ids": torch.tensor(ids)[None], "token_type_ids": kind, "attention_mask": torch.ones_like(kind), "pixel_values": pixels}
    with torch.no_grad():
        want = model.eval()(**inputs).logits[0, -12:].numpy()
    ours = logits(sized, images, prefix, postfix)
    assert want.shape == ours.shape and ours.std() > 0.3
    assert np.abs(want - ours).max() < 1e-5 * np.abs(want).max()
    where = vla.shardings(sized.cfg, sharding.make_mesh(2, 2, 2))
    again = tree.flatten(pretrained.load(out, "hf", sized.cfg, where))
    assert all(np.array_equal(np.asarray(again[p]), w) for p, w in sized.params.items())


def test_bfloat16(sized, tmp_path, monkeypatch):
    out = write(sized, tmp_path / "out", monkeypatch, dtype="bf16")
    file, config = load_file(out / "model.safetensors"), json.loads((out / "config.json").read_text())
    assert {x.dtype.name for x in file.values()} == {"bfloat16"} and config["dtype"] == "bfloat16"


@pytest.mark.parametrize("layout", ["openpi", "native"])
def test_tokenizer(openpi_run, tmp_path, monkeypatch, layout):
    """The same ids on prompts and odd text, BOS in front; ids behind the text have names, and the image its own."""
    transformers = pytest.importorskip("transformers")
    t = trained.read(openpi_run)
    if layout == "native":
        tokens = dataclasses.replace(t.config.tokens, layout="native", state="none")
        made = trained.Layout.of(tokens, t.layout.text, t.layout.action, t.cfg.tokens_per_image)
        vocab = -(-made.vocab_size // 128) * 128
        t = lively(t, layout=made, cfg=dataclasses.replace(t.cfg, vocab=vocab))
    out = write(t, tmp_path / "out", monkeypatch)
    theirs, text = transformers.AutoTokenizer.from_pretrained(out), t.layout.text
    odd = ["  two  spaces ", "ünïcode ☃ 手", "\n", "a\tb", "<loc0001> <seg001>", "Action: ", "|", "", "State: -1 0 255;\n"]
    for said in [*odd, *(f"Task: push {w}, State: {i} 3;\n" for i, w in enumerate("red_block green-cup mug a 1.5 kg".split()))]:
        assert theirs.encode(said, add_special_tokens=False) == text.encode(said), said
        assert theirs.encode(said) == [text.bos, *text.encode(said)]
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (text.bos, text.eos, text.pad)
    assert theirs.convert_tokens_to_ids("<image>") == t.cfg.vocab
    if layout == "native":
        assert theirs.convert_ids_to_tokens([int(t.layout.ids[0]), int(t.layout.ids[63])]) == ["<action 0>", "<action 63>"]


def test_what_paligemma_has_no_place_for(openpi_run, tmp_path, monkeypatch):
    t = trained.read(openpi_run)
    expert = dataclasses.replace(t, cfg=dataclasses.replace(t.cfg, expert=presets.Expert(24, 48, False)))
    with pytest.raises(UserError, match="has an action expert .* which PaliGemma has no place for. Use --format native or openpi"):
        write(expert, tmp_path / "out", monkeypatch)
    with pytest.raises(UserError, match="as a projected token .* which PaliGemma has no place for"):
        write(dataclasses.replace(t, cfg=dataclasses.replace(t.cfg, state_dim=3)), tmp_path / "out", monkeypatch)
    assert not list(tmp_path.iterdir())


def test_the_command(openpi_run, tmp_path, capsys):
    assert cli.main(["export", f"{openpi_run}@2", str(tmp_path / "out"), "--format=hf", "--no-ema"]) == 0
    told = (tmp_path / "out" / "README.md").read_text()
    assert "as trained, f32" in told and "transformers.PaliGemmaForConditionalGeneration" in told
    plain = trained.read(openpi_run, ema=False)
    table = load_file(tmp_path / "out" / "model.safetensors")["language_model.model.embed_tokens.weight"]
    assert np.array_equal(table, plain.params[weight_files.TABLE])
    assert not np.array_equal(table, trained.read(openpi_run).params[weight_files.TABLE])
    assert jax.tree.map(np.shape, plain.params) == jax.tree.map(np.shape, trained.read(openpi_run).params)
