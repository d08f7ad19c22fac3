"""The model against `transformers` on CPU torch: the same weights, through the files that it writes, give the same logits and gradients."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vla_jax import config, sharding, tree
from vla_jax.models import presets, pretrained, vla, weight_files
from vla_jax.models.presets import Language, Vision
from vla_jax.models.vit import ImageEncoder
from vla_jax.train import losses, step
from vla_jax.types import IMAGE, Batch

torch = pytest.importorskip("torch", reason="the extra `parity` is not installed")
transformers = pytest.importorskip("transformers", reason="the extra `parity` is not installed")

VOCAB, SIZE, PER_IMAGE = 300, 32, 4
KINDS = {
    "gemma": Language(48, 3, 4, 1, 16, 80),
    "gemma_groups": Language(48, 2, 4, 2, 24, 80),
    "gemma2": Language(48, 3, 4, 2, 16, 80, post_norms=True, attn_cap=5.0, logit_cap=3.0),
}
VISION = Vision(40, 2, 2, 72, 16)


def config_of(kind, dtype="float32"):
    return presets.VLAConfig(VISION, KINDS[kind], 384, SIZE, 0, dtype, "none")  # the vocabulary rounded up, as presets.resolve has it


def hf_model(kind):
    """Random weights of a size at which every term matters: norms that are not the identity, attention that is not flat."""
    c, v = KINDS[kind], VISION
    text = {
        "model_type": "gemma2" if c.post_norms else "gemma",
        "hidden_size": c.width,
        "intermediate_size": c.mlp,
        "num_hidden_layers": c.depth,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "vocab_size": VOCAB,
        "query_pre_attn_scalar": c.head_dim,
        "attn_logit_softcapping": c.attn_cap,
        "final_logit_softcapping": c.logit_cap,
    }
    if not c.post_norms:
        text = {k: x for k, x in text.items() if "softcapping" not in k and k != "query_pre_attn_scalar"}
    vision = {"model_type": "siglip_vision_model", "hidden_size": v.width, "intermediate_size": v.mlp, "num_hidden_layers": v.depth}
    vision |= {
        "num_attention_heads": v.heads,
        "patch_size": v.patch,
        "image_size": SIZE,
        "projection_dim": c.width,
        "vision_use_head": False,
    }
    made = transformers.PaliGemmaConfig(vision_config=vision, text_config=text, projection_dim=c.width, image_token_id=VOCAB - 1)
    made._attn_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.PaliGemmaForConditionalGeneration(made).float().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(0, 0.3 if "norm" in name or "bias" in name else p.shape[-1] ** -0.5 if p.ndim == 2 else 0.1)
            if "layer_norm" in name and name.endswith("weight") or "post_layernorm.weight" in name:
                p.add_(1)
    return model


@pytest.fixture(scope="module", params=list(KINDS))
def pair(request, tmp_path_factory):
    """(kind, transformers' model, our parameters as loaded from the folder that it wrote)."""
    model, folder = hf_model(request.param), tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return request.param, model, load(folder, "hf", config_of(request.param))


def load(folder, kind, cfg, **options):
    where = vla.shardings(cfg, sharding.make_mesh(2, 2, 2))
    return pretrained.load(folder, kind, cfg, where, **({"text_vocab": VOCAB} | options))


def samples(rng):
    """(images, prefix ids, suffix ids) with none, one and two images."""
    ids = lambda n: rng.integers(3, VOCAB - 2, n)
    return [(rng.integers(0, 256, (m, SIZE, SIZE, 3), np.uint8), ids(p), ids(s)) for m, p, s in ((1, 5, 6), (2, 3, 9), (0, 8, 2))]


def ours(batch_of, length):
    """Each list of samples in one row, packed."""
    rows = len(batch_of)
    most = max(sum(len(s[0]) for s in row) for row in batch_of)
    out = {k: np.zeros((rows, length), np.int32) for k in ("tokens", "segment", "position", "block")}
    images = np.zeros((rows, most, SIZE, SIZE, 3), np.uint8)
    for r, row in enumerate(batch_of):
        at = slot = 0
        for g, (pictures, prefix, suffix) in enumerate(row):
            tokens = np.concatenate([np.full(len(pictures) * PER_IMAGE, IMAGE), prefix, suffix])
            span = slice(at, at + len(tokens))
            out["tokens"][r, span], out["segment"][r, span], out["position"][r, span] = tokens, g + 1, np.arange(len(tokens))
            out["block"][r, span] = np.maximum(np.arange(len(tokens)) - (len(tokens) - len(suffix)) + 1, 0)
            images[r, slot : slot + len(pictures)] = pictures
            at, slot = at + len(tokens), slot + len(pictures)
    return Batch(**out, images=images, state=np.zeros((rows, 1, 1), np.float32))


def theirs(sample, pad=0):
    """Inputs of one sample, with `pad` slots behind it."""
    pictures, prefix, suffix = sample
    ids = np.concatenate([np.full(len(pictures) * PER_IMAGE, VOCAB - 1), prefix, suffix, np.zeros(pad, int)])
    n = len(ids) - pad
    pixels = torch.tensor(pictures.astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2)
    kind = torch.tensor([[0] * (n - len(suffix)) + [1] * (len(suffix) + pad)])
    mask = torch.tensor([[1] * n + [0] * pad])
    seen = {"pixel_values": pixels} if len(pictures) else {}
    return {"input_ids": torch.tensor(ids)[None], "token_type_ids": kind, "attention_mask": mask} | seen


def logits(cfg, params, batch):
    made = jax.jit(lambda p, b: vla.logits(cfg, p, vla.apply(cfg, p, b)))
    return np.asarray(made(params, batch), np.float32)[..., :VOCAB]


def test_logits_equal_packed_and_padded(pair):
    """max |dlogit| < 1e-5 in float32, of logits that spread over several units: alone, padded, and packed into one row of ours."""
    kind, model, params = pair
    cfg, made = config_of(kind), samples(np.random.default_rng(1))
    with torch.no_grad():
        want = [model(**theirs(s)).logits[0].numpy() for s in made]
        padded = model(**theirs(made[0], pad=4)).logits[0].numpy()
    assert np.abs(padded[: len(want[0])] - want[0]).max() < 1e-5
    assert min(w.std() for w in want) > 0.3
    alone = logits(cfg, params, ours([[s] for s in made], 40))
    packed = logits(cfg, params, ours([made], 64))[0]
    at = 0
    for i, w in enumerate(want):
        assert np.abs(alone[i, : len(w)] - w).max() < 1e-5
        assert np.abs(packed[at : at + len(w)] - w).max() < 1e-5
        at += len(w)


def test_bfloat16_is_as_near_as_torchs(pair):
    """Ours in bfloat16 is about as far from the float32 logits as torch's own bfloat16 is."""
    kind, model, params = pair
    made = samples(np.random.default_rng(2))[:2]
    half = hf_model(kind).to(torch.bfloat16)
    ids = [theirs(s) for s in made]
    with torch.no_grad():
        exact = [model(**i).logits[0].numpy() for i in ids]
        rough = [half(**{k: x.bfloat16() if x.is_floating_point() else x for k, x in i.items()}).logits[0].float().numpy() for i in ids]
    mine = logits(config_of(kind, "bfloat16"), params, ours([[s] for s in made], 40))
    for i, (e, r) in enumerate(zip(exact, rough)):
        off = lambda x, e=e: np.sqrt(np.mean((x - e) ** 2))
        assert 0 < off(mine[i, : len(e)]) < 1.5 * off(r)


def test_gradients_of_a_step_equal_torchs(pair, monkeypatch):
    """Of the training step's own loss, for every leaf, through the very map that loaded the weights: three samples packed in one row, each
    with the mean cross-entropy over its suffix, logits made in chunks of four positions."""
    kind, model, params = pair
    cfg, made = dataclasses.replace(config_of(kind), vocab=VOCAB), samples(np.random.default_rng(3))
    model.zero_grad()
    for sample in made:
        inputs = theirs(sample)
        n, suffix = inputs["input_ids"].shape[1], len(sample[2])
        out = model(**inputs).logits[0, n - suffix - 1 : n - 1]
        (torch.nn.functional.cross_entropy(out, inputs["input_ids"][0, n - suffix :]) / len(made)).backward()
    grads = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    batch, at = ours([made], 64), 0
    target, weight = np.zeros((1, 64), np.int32), np.zeros((1, 64), np.float32)
    for pictures, prefix, suffix in made:
        end = at + len(pictures) * PER_IMAGE + len(prefix) + len(suffix)
        target[0, end - len(suffix) - 1 : end - 1], weight[0, end - len(suffix) - 1 : end - 1] = suffix, 1 / len(suffix)
        at = end
    batch = dataclasses.replace(batch, target=target, loss_weight=weight, dataset=np.zeros((1, 3), np.int32))
    monkeypatch.setattr(losses, "LOGITS", 4 * VOCAB)
    settings = config.Config(pack=config.Pack(targets=sum(len(s[2]) for s in made)))
    table = vla.embedding(params)[:VOCAB]  # rows behind the file's are no part of torch's softmax
    params = params | {"llm": params["llm"] | {"embedder": {"input_embedding": table}}}
    loss = lambda p: step.loss_fn(p, settings, cfg, batch, jax.random.key(0), datasets=1)[0]
    mine = tree.flatten(jax.jit(jax.grad(loss))(params))
    canonical = {weight_files.canonical(name): g for name, g in grads.items()}
    for path, (names, make) in weight_files.hf_map(cfg).items():
        depth = mine[path].shape[0] if "{}" in names[0] else 1
        want = np.stack([make(*(canonical[n.format(i)] for n in names)) for i in range(depth)])
        want = want if "{}" in names[0] else want[0]
        assert np.abs(np.asarray(mine[path]) - want).max() < 1e-5 * max(1.0, np.abs(want).max()), path
        assert np.abs(want).max() > 0 or path.endswith("key/bias"), path  # a key's bias shifts all scores alike


def test_siglip_and_gemma_each_from_its_own_checkpoint(tmp_path):
    """The encoder before its projection (which neither has, and which is drawn), and the decoder on plain causal text."""
    v, c, cfg = VISION, KINDS["gemma"], config_of("gemma")
    torch.manual_seed(1)
    siglip = transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(
            hidden_size=v.width,
            intermediate_size=v.mlp,
            num_hidden_layers=v.depth,
            num_attention_heads=v.heads,
            patch_size=16,
            image_size=SIZE,
        )
    )
    gemma = transformers.GemmaForCausalLM(
        transformers.GemmaConfig(
            hidden_size=c.width,
            intermediate_size=c.mlp,
            num_hidden_layers=c.depth,
            num_attention_heads=c.heads,
            num_key_value_heads=c.kv_heads,
            head_dim=c.head_dim,
            vocab_size=VOCAB,
            attn_implementation="eager",
        )
    )
    for model, place in ((siglip, "siglip"), (gemma, "gemma")):
        with torch.no_grad():
            for p in model.parameters():
                p.normal_(0, p.shape[-1] ** -0.5 if p.ndim == 2 else 0.3)
        model.eval().save_pretrained(tmp_path / place)
    params = load(tmp_path / "siglip", "hf", cfg, more=tmp_path / "gemma")
    images = np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3), np.uint8)
    with torch.no_grad():
        want = siglip(torch.tensor(images.astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2)).last_hidden_state.numpy()
        ids = np.random.default_rng(1).integers(1, VOCAB, (1, 12))
        scores = gemma(torch.tensor(ids)).logits.numpy()
    head = jax.tree.map(np.asarray, params["img"]["head"])
    got = jax.jit(lambda p, x: ImageEncoder(cfg).apply({"params": p}, x))(params["img"], images)
    projected = want @ head["kernel"] + head["bias"]
    assert np.abs(np.asarray(got) - projected).max() < 1e-5 * np.abs(projected).max() and want.std() > 0.1
    batch = ours([[(np.zeros((1, SIZE, SIZE, 3), np.uint8)[:0], ids[0, :1], ids[0, 1:])]], 12)
    batch = dataclasses.replace(batch, images=np.zeros((1, 1, SIZE, SIZE, 3), np.uint8))
    assert np.abs(logits(cfg, params, batch) - scores).max() < 1e-5 and scores.std() > 0.3


def test_leaves_lie_sharded(pair):
    kind, _, params = pair
    flat = tree.flatten(params)
    whole = [p for p, x in flat.items() if x.size > 4000 and x.sharding.is_fully_replicated]
    assert not whole and all(isinstance(x.sharding, NamedSharding) for x in flat.values())
    assert any(x.sharding.spec != PartitionSpec() for x in flat.values())
