"""Counts, packing and decoding of the model. Everything in float32, tiny sizes."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax import sharding, tree
from vla_jax.data import feed
from vla_jax.models import decode, incremental, presets, vla
from vla_jax.models.layers import LayerNorm, rms, rope
from vla_jax.tokens import grammar
from vla_jax.types import Batch, UserError

assert feed  # registers Batch as a pytree


@pytest.fixture(scope="module")
def cfg():
    return presets.resolve("tiny", vocab=300, image_size=32, state_dim=3, dtype="float32", remat="none")


@pytest.fixture(scope="module")
def params(cfg):
    return jax.jit(vla.init, static_argnums=0)(cfg, jax.random.key(0))


def test_3b_is_paligemma_by_name_shape_and_count():
    cfg = presets.resolve("3b", vocab=257152, image_size=224, state_dim=0, dtype="bfloat16", remat="full")
    leaves = tree.flatten(jax.eval_shape(lambda: vla.init(cfg, jax.random.key(0))))
    assert len(leaves) == 32 and sum(x.size for x in leaves.values()) == 2_923_335_408
    at, head = "img/Transformer/encoderblock/", (27, 16, 72)
    norm, hidden = {"scale": (27, 1152), "bias": (27, 1152)}, (27, 1152, 16, 72)
    expected = {
        "img/embedding/kernel": (14, 14, 3, 1152),
        "img/embedding/bias": (1152,),
        "img/pos_embedding": (1, 256, 1152),
        "img/head/kernel": (1152, 2048),
        "img/head/bias": (2048,),
        "img/Transformer/encoder_norm/scale": (1152,),
        "img/Transformer/encoder_norm/bias": (1152,),
        **{f"{at}LayerNorm_{n}/{k}": s for n in "01" for k, s in norm.items()},
        **{f"{at}MultiHeadDotProductAttention_0/{n}/kernel": hidden for n in ("query", "key", "value")},
        **{f"{at}MultiHeadDotProductAttention_0/{n}/bias": head for n in ("query", "key", "value")},
        f"{at}MultiHeadDotProductAttention_0/out/kernel": (27, 16, 72, 1152),
        f"{at}MultiHeadDotProductAttention_0/out/bias": (27, 1152),
        f"{at}MlpBlock_0/Dense_0/kernel": (27, 1152, 4304),
        f"{at}MlpBlock_0/Dense_0/bias": (27, 4304),
        f"{at}MlpBlock_0/Dense_1/kernel": (27, 4304, 1152),
        f"{at}MlpBlock_0/Dense_1/bias": (27, 1152),
        "llm/embedder/input_embedding": (257152, 2048),
        "llm/final_norm/scale": (2048,),
        "llm/layers/pre_attention_norm/scale": (18, 2048),
        "llm/layers/pre_ffw_norm/scale": (18, 2048),
        "llm/layers/attn/q_einsum/w": (18, 8, 2048, 256),
        "llm/layers/attn/kv_einsum/w": (18, 2, 1, 2048, 256),
        "llm/layers/attn/attn_vec_einsum/w": (18, 8, 256, 2048),
        "llm/layers/mlp/gating_einsum": (18, 2, 2048, 16384),
        "llm/layers/mlp/linear": (18, 16384, 2048),
    }
    assert {path: leaf.shape for path, leaf in leaves.items()} == expected
    assert all(leaf.dtype == np.float32 for leaf in leaves.values())


@pytest.mark.parametrize(
    "preset, millions", [("100m", 263), ("300m", 559), ("1b", 1188), ("3b", 2923), ("paligemma2_3b", 3032), ("paligemma2_10b", 9662)]
)
def test_sizes_are_those_of_the_documentation(preset, millions):
    """With 257,152 rows of vocabulary, as docs/model.md has them."""
    cfg = presets.resolve(preset, vocab=257152, image_size=224, state_dim=0, dtype="bfloat16", remat="full")
    shapes = jax.eval_shape(lambda: vla.init(cfg, jax.random.key(0)))
    assert (
        sum(x.size for x in jax.tree.leaves(shapes)) // 10**6 == millions
        or round(sum(x.size for x in jax.tree.leaves(shapes)) / 1e6) == millions
    )


def test_encoders_are_siglips():
    """So400m: 412,442,352 parameters without its pooling head and with 256 positions; the others by their published widths."""
    counted = {}
    for name in presets.VISIONS:
        v = presets.VISIONS[name]
        cfg = presets.resolve(f"{name}+gemma_2b", vocab=128, image_size=16 * v.patch, state_dim=0, dtype="bfloat16", remat="full")
        flat = tree.flatten(jax.eval_shape(lambda cfg=cfg: vla.init(cfg, jax.random.key(0))))
        counted[name] = sum(x.size for p, x in flat.items() if p.startswith("img/") and not p.startswith("img/head/"))
    assert counted["so400m_14"] == 412_442_352
    by_hand = lambda w, d, m, p: d * (4 * w * w + 4 * w + 2 * w * m + m + w + 4 * w) + 2 * w + 3 * p * p * w + w + 256 * w
    assert counted["b16"] == by_hand(768, 12, 3072, 16) and counted["l16"] == by_hand(1024, 24, 4096, 16)
    assert counted["so400m_16"] == by_hand(1152, 27, 4304, 16) and counted["g_opt_16"] == by_hand(1536, 40, 6144, 16)


@pytest.mark.parametrize(
    "language, published",
    [("gemma_2b", 2_506_172_416), ("gemma_7b", 8_537_680_896), ("gemma2_2b", 2_614_341_888), ("gemma2_9b", 9_241_705_984)],
)
def test_decoders_have_the_published_number_of_parameters(language, published):
    """With their vocabulary of 256,000; any encoder goes with any decoder."""
    cfg = presets.resolve(f"b16+{language}", vocab=256_000, image_size=224, state_dim=0, dtype="bfloat16", remat="full")
    leaves = tree.flatten(jax.eval_shape(lambda: vla.init(cfg, jax.random.key(0))))
    assert sum(x.size for p, x in leaves.items() if p.startswith("llm/")) == published
    assert leaves["img/head/kernel"].shape == (768, presets.LANGUAGES[language].width)


def test_every_leaf_has_logical_axes(cfg, params):
    axes, leaves = tree.flatten(vla.logical_axes(cfg)), tree.flatten(params)
    assert axes.keys() == leaves.keys()
    assert all(len(axes[k]) == leaves[k].ndim for k in leaves)


def row(cfg, rng, n, *, prefix):
    """One sample of n tokens in which the first `tokens_per_image` are an image and then a state."""
    per = cfg.tokens_per_image
    tokens = rng.integers(1, 290, n).astype(np.int32)
    tokens[:per], tokens[per] = -1, -2
    block = np.maximum(np.arange(n) - prefix + 1, 0).astype(np.int32)
    return tokens, block, rng.integers(0, 255, (32, 32, 3), np.uint8), rng.normal(size=3).astype(np.float32)


def batch_of(cfg, rows, n):
    """Rows of samples, packed one after another."""
    b, m = len(rows), max(len(r) for r in rows)
    out = {k: np.zeros((b, n), np.int32) for k in ("tokens", "segment", "position", "block")}
    images, state = np.zeros((b, m, 32, 32, 3), np.uint8), np.zeros((b, m, 3), np.float32)
    for i, samples in enumerate(rows):
        at = 0
        for g, (tokens, block, image, s) in enumerate(samples):
            span = slice(at, at + len(tokens))
            out["tokens"][i, span], out["block"][i, span], out["segment"][i, span] = tokens, block, g + 1
            out["position"][i, span] = np.arange(len(tokens))
            images[i, g], state[i, g] = image, s
            at += len(tokens)
    return Batch(**{**out, "images": images, "state": state})


def test_packed_rows_equal_the_same_samples_alone(cfg, params):
    rng = np.random.default_rng(0)
    samples = [row(cfg, rng, n, prefix=p) for n, p in ((12, 9), (15, 8), (10, 10))]
    packed = np.asarray(vla.apply(cfg, params, batch_of(cfg, [samples], 48)))[0]
    at = 0
    for sample in samples:
        alone = np.asarray(vla.apply(cfg, params, batch_of(cfg, [[sample]], 20)))[0]
        n = len(sample[0])
        np.testing.assert_allclose(packed[at : at + n], alone[:n], atol=2e-5)  # other summation order over masked slots
        at += n


def test_prefix_sees_itself_and_never_the_future(cfg, params):
    rng = np.random.default_rng(1)
    tokens, block, image, state = row(cfg, rng, 14, prefix=9)
    base = np.asarray(vla.apply(cfg, params, batch_of(cfg, [[(tokens, block, image, state)]], 14)))[0]
    late, early = tokens.copy(), tokens.copy()
    late[12] += 1
    early[8] += 1
    changed = np.abs(np.asarray(vla.apply(cfg, params, batch_of(cfg, [[(late, block, image, state)]], 14)))[0] - base).max(-1)
    assert (changed[:12] == 0).all() and (changed[12:] > 0).all()
    changed = np.abs(np.asarray(vla.apply(cfg, params, batch_of(cfg, [[(early, block, image, state)]], 14)))[0] - base).max(-1)
    assert (changed > 0).all()  # the whole prefix is bidirectional


def test_image_and_state_reach_the_output(cfg, params):
    rng = np.random.default_rng(2)
    tokens, block, image, state = row(cfg, rng, 12, prefix=9)
    run = lambda i, s: np.asarray(vla.apply(cfg, params, batch_of(cfg, [[(tokens, block, i, s)]], 12)))
    base = run(image, state)
    assert np.abs(run(255 - image, state) - base).max() > 1e-3 and np.abs(run(image, state + 1) - base).max() > 1e-3


def odd_language(rng):
    """Action ids in descending order, some of which end within a number, and words before and behind: all that a layout may ask for."""
    count = rng.integers(0, 3, (2, 80)).astype(np.int32)
    after = rng.choice(np.array([-1, 0, 1, 1, 1], np.int32), (2, 80))
    after[:, 0], count[:, 0] = 0, 1  # any budget can be used up
    count[(count == 0) & ((after == 0) | (np.arange(2)[:, None] == 1))] = 1  # and each id leads on
    return decode.Language(np.arange(280, 200, -1, dtype=np.int32), after, count, opening=(5, 9), closing=(7, 1))


def sharpened(params, language):
    """Sharp attention, so that a position that is off by one changes what is chosen; ids that begin a number without ending it are the
    likeliest, so that they are chosen wherever they are allowed, and only there."""
    params = jax.tree_util.tree_map_with_path(lambda path, p: p * 12 if "q_einsum" in jax.tree_util.keystr(path) else p, params)
    table = params["llm"]["embedder"]["input_embedding"]
    params["llm"]["embedder"]["input_embedding"] = table.at[language.ids[(language.after[0] == 1)]].multiply(4.0)
    return params


def teacher_forced(cfg, params, language, sample, made, budget):
    """Checks that each generated token is the argmax, among what the grammar allows, of a full forward pass over what precedes it.
    Returns how often that was within a number."""
    tokens, block, image, robot = sample
    walk, table, apply = grammar.Grammar(language.after, language.count), np.asarray(vla.embedding(params)), jitted(cfg)
    assert made[:2].tolist() == [5, 9]
    left, at, inside = budget, 0, 0
    for t, token in enumerate(made[2:], 2):
        if left == 0 and at == 0:
            assert made[t : t + 2].tolist() == [7, 1] and (made[t + 1 :] == 1).all()
            break
        seen = np.concatenate([tokens, made[:t]]).astype(np.int32)
        blocks = np.concatenate([block, np.arange(1, t + 1)]).astype(np.int32)
        h = np.asarray(apply(params, batch_of(cfg, [[(seen, blocks, image, robot)]], 64)))[0, len(seen) - 1]
        scores = np.where(walk.allowed(at, left), h @ table[language.ids].T, -np.inf)
        chosen = int(280 - token)
        assert chosen == scores.argmax() or scores.max() - scores[chosen] < 1e-4
        at, left = int(language.after[at, chosen]), left - int(language.count[at, chosen])
        inside += at
    assert (left, at) == (0, 0)
    return inside


@functools.lru_cache
def jitted(cfg):
    return jax.jit(functools.partial(vla.apply, cfg))


@pytest.mark.parametrize("kind", ["gemma", "gemma 2"])
@pytest.mark.parametrize("dtype, most", [("float32", 2e-5), ("bfloat16", 0.1)])
def test_a_step_of_decoding_is_a_full_pass(kind, dtype, most):
    """Hidden states, not only what is chosen from them: of tokens fed one by one behind prompts of different lengths, packed, against one
    pass over all. In bfloat16 within a few roundings of numbers of size one."""
    rules = presets.LANGUAGES["gemma2_2b"] if kind == "gemma 2" else None
    more = {"post_norms": True, "attn_cap": 4.0, "logit_cap": 3.0} if rules else {}
    language = presets.Language(32, 2, 4, 2 if rules else 1, 16, 64, **more)
    cfg = presets.VLAConfig(presets.PRESETS["tiny"][0], language, 384, 32, 3, dtype, "none")
    params = jax.jit(vla.init, static_argnums=0)(cfg, jax.random.key(0))
    rng = np.random.default_rng(8)
    prompts, n, steps = [row(cfg, rng, n, prefix=n) for n in (9, 14, 11)], 48, 5
    batch = batch_of(cfg, [prompts[:2], prompts[2:]], n)
    spoken = rng.integers(1, 380, (2, 2, steps)).astype(np.int32)
    seen, prefix = vla.prompts(batch.segment, batch.block, 2)
    cache = incremental.open_cache(jax.jit(functools.partial(vla.prefill, cfg))(params, batch)[1], steps * 2)
    layers = incremental.prepare(cfg, params)
    step = jax.jit(functools.partial(incremental.step, cfg))
    got = []
    for t in range(steps):
        x = (vla.embedding(params)[spoken[..., t]] * 32**0.5).astype(dtype)
        x, cache = step(layers, x, prefix + t, incremental.visible(seen, steps, t), cache, n + t * 2)
        got.append(np.asarray(layers_norm(params, x), np.float32))
    for r, g, sample in ((0, 0, prompts[0]), (0, 1, prompts[1]), (1, 0, prompts[2])):
        tokens, block, image, robot = sample
        whole = np.concatenate([tokens, spoken[r, g]]), np.concatenate([block, 1 + np.arange(steps, dtype=np.int32)]), image, robot
        want = np.asarray(jitted(cfg)(params, batch_of(cfg, [[whole]], n)), np.float32)[0, len(tokens) : len(tokens) + steps]
        np.testing.assert_allclose(np.stack([x[r, g] for x in got]), want, atol=most)


def layers_norm(params, x):
    return rms(x, params["llm"]["final_norm"]["scale"])


def test_rope_at_far_positions():
    """Against numpy in float64: at position 4,000 an angle in bfloat16 would be off by radians."""
    x = np.random.default_rng(0).normal(size=(1, 3, 2, 16)).astype(np.float32)
    position = np.array([[0, 700, 4000]], np.int32)
    angle = position[0][:, None, None] / 1e4 ** (np.arange(8) / 8)
    a, b = x[..., :8].astype(np.float64), x[..., 8:].astype(np.float64)
    want = np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)
    np.testing.assert_allclose(rope(jnp.asarray(x), position), want, atol=2e-3)  # float32 knows 4,000 radians to 2.4e-4
    np.testing.assert_allclose(rope(jnp.asarray(x, jnp.bfloat16), position).astype(np.float32), want, atol=3e-2)


def test_norms_of_tiny_numbers():
    """Where eps counts: variances of 1e-6."""
    x = (np.random.default_rng(0).normal(size=(4, 64)) * 1e-3).astype(np.float32)
    y = x.astype(np.float64)
    norm = LayerNorm()
    got = norm.apply(nn.unbox(norm.init(jax.random.key(0), x)), x)
    np.testing.assert_allclose(got, (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(rms(x, np.ones(64)), 2 * y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-6), rtol=1e-4)


def test_rematerialisation_changes_work_and_not_results(monkeypatch):
    """Products in the backward pass: with `dots` only those whose results are not kept are made again, with `full` all. Stacks of more than
    four layers are scanned."""
    deep = presets.Language(32, 6, 2, 1, 16, 64)
    results, products = {}, {}
    for remat in presets.REMAT:
        cfg = presets.VLAConfig(presets.PRESETS["tiny"][0], deep, 384, 32, 3, "float32", remat)
        params = jax.jit(vla.init, static_argnums=0)(cfg, jax.random.key(0))
        batch = batch_of(cfg, [[row(cfg, np.random.default_rng(9), 14, prefix=9)]], 16)
        loss = jax.value_and_grad(lambda p, cfg=cfg, batch=batch: jnp.square(vla.apply(cfg, p, batch)).mean())
        results[remat] = jax.tree.leaves(jax.jit(loss)(params))
        text = str(jax.make_jaxpr(loss)(params))
        products[remat] = text.count("dot_general")
        assert "length=6" in text and "unroll=1\n" in text  # a scan over the decoder's layers, one at a time
    assert products["none"] < products["dots"] < products["full"], products
    for other in ("dots", "full"):
        for a, b in zip(results["none"], results[other]):
            np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("how", ["padded", "packed", "packed with answers"])
def test_cached_greedy_decoding_equals_teacher_forcing(cfg, params, how):
    """Prompts of different lengths, a row each or several in a row, also such that hold an answer already, which must not be seen."""
    rng = np.random.default_rng(3)
    language = odd_language(rng)
    params = sharpened(params, language)
    samples = [row(cfg, rng, n, prefix=n) for n in (9, 13, 11, 10, 17)]
    budgets = [10, 7, 4, 9, 1]
    if how == "padded":
        batch, place = batch_of(cfg, [[s] for s in samples], 20), [(i, 0) for i in range(5)]
    else:
        given = samples
        if how == "packed with answers":
            answer = [rng.integers(200, 280, n).astype(np.int32) for n in (3, 0, 6, 1, 2)]
            given = [(np.concatenate([t, a]), np.concatenate([b, 1 + np.arange(len(a))]), i, s) for (t, b, i, s), a in zip(samples, answer)]
        batch, place = batch_of(cfg, [given[:3], given[3:]], 48), [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    budget = np.zeros((len(batch.tokens), 1 if how == "padded" else 3), np.int32)  # the second packed row holds no third sample
    for (r, g), n in zip(place, budgets):
        budget[r, g] = n
    run = jax.jit(functools.partial(decode.generate, cfg, steps=language.longest(10), language=language))
    ids, ended = run(params, batch, budget=budget)
    assert np.asarray(ended).all()
    checked = [teacher_forced(cfg, params, language, s, np.asarray(ids[at]), n) for s, at, n in zip(samples, place, budgets)]
    assert sum(checked)  # a number was left unfinished at some token


def test_gemma_2_and_groups_decode_alike(params):
    """Caps, norms behind and two key/value heads, in the decoder's own layout of weights."""
    language = presets.Language(32, 2, 4, 2, 16, 64, post_norms=True, attn_cap=4.0, logit_cap=3.0)
    cfg = presets.VLAConfig(presets.PRESETS["tiny"][0], language, 384, 32, 3, "float32", "none")
    params = jax.jit(vla.init, static_argnums=0)(cfg, jax.random.key(1))
    rng = np.random.default_rng(5)
    spoken = odd_language(rng)
    params = sharpened(params, spoken)
    samples = [row(cfg, rng, n, prefix=n) for n in (12, 9)]
    run = jax.jit(functools.partial(decode.generate, cfg, steps=spoken.longest(8), language=spoken))
    ids, ended = run(params, batch_of(cfg, [samples], 32), budget=np.array([[8, 6]], np.int32))
    assert np.asarray(ended).all()
    for g, (s, n) in enumerate(zip(samples, (8, 6))):
        teacher_forced(cfg, params, spoken, s, np.asarray(ids[0, g]), n)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 1, 8), (8, 1, 1)])
def test_sharded_decoding_says_the_same(cfg, params, sizes):
    """Weights, rows and heads over eight devices: the same ids, and no device holds a whole matrix where the mesh divides it."""
    rng = np.random.default_rng(6)
    language = odd_language(rng)
    params = sharpened(params, language)
    samples = [row(cfg, rng, n, prefix=n) for n in (9, 13, 11, 10, 17, 12, 9, 15)]
    batch, budget = batch_of(cfg, [[s] for s in samples], 20), np.arange(2, 10, dtype=np.int32)[:, None]
    run = jax.jit(functools.partial(decode.generate, cfg, steps=language.longest(9), language=language))
    want, _ = run(params, batch, budget=budget)
    mesh = sharding.make_mesh(*sizes)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, vla.shardings(cfg, mesh))
        layers = jax.jit(functools.partial(incremental.prepare, cfg))(placed)
        got, ended = run(placed, jax.device_put(batch, sharding.batch_sharding(mesh)), budget=budget, layers=layers)
    assert np.asarray(ended).all() and np.array_equal(got, want)
    divided = sizes[1] * sizes[2] > 1
    assert all(layers[0][name].sharding.is_fully_replicated != divided for name in ("up", "gate", "down"))


def test_cast_parameters_give_the_very_same(params, cfg):
    """In bfloat16: what a forward pass makes of float32 parameters and of those cast beforehand, bit for bit."""
    half = dataclasses.replace(cfg, dtype="bfloat16")
    cast = vla.cast(half, params)
    assert sum(x.nbytes for x in jax.tree.leaves(cast)) < 0.6 * sum(x.nbytes for x in jax.tree.leaves(params))
    batch = batch_of(cfg, [[row(cfg, np.random.default_rng(7), 14, prefix=9)]], 20)
    want, got = (np.asarray(jitted(half)(p, batch), np.float32) for p in (params, cast))
    assert np.array_equal(want, got) and np.abs(want).max() > 0.1


def test_sampling_follows_temperature_and_top_k():
    """Frequencies of 4,000 draws against the softmax of the allowed scores, within five standard errors (at most 0.04)."""
    scores = np.array([1.0, -np.inf, 0.5, 3.0, 2.0, -np.inf], np.float32)
    rows = jnp.asarray(np.tile(scores, (4000, 1)))
    for sampling, kept in ((decode.Sampling(1.0), [0, 2, 3, 4]), (decode.Sampling(2.0), [0, 2, 3, 4]), (decode.Sampling(0.7, 2), [3, 4])):
        drawn = np.bincount(np.asarray(decode._pick(rows, sampling, jax.random.key(0))), minlength=6) / 4000
        want = np.exp(scores[kept].astype(np.float64) / sampling.temperature)
        np.testing.assert_allclose(drawn[kept], want / want.sum(), atol=0.04)
        assert drawn.sum() == pytest.approx(drawn[kept].sum())
    for sampling in (decode.GREEDY, decode.Sampling(1.0, 1), decode.Sampling(1e-3)):
        assert (np.asarray(decode._pick(rows, sampling, jax.random.key(1))) == 3).all()


def test_sampled_answers_stay_in_the_language(cfg, params):
    """Other draws with another key, the same with the same one, and each a complete sequence of its row's budget."""
    rng = np.random.default_rng(4)
    count = rng.integers(1, 4, (1, 40)).astype(np.int32)
    count[0, 0] = 1
    language = decode.Language(np.arange(200, 240, dtype=np.int32), np.zeros((1, 40), np.int32), count, opening=(), closing=(1,))
    walk, budget = grammar.Grammar(language.after, count), np.array([9, 5], np.int32)
    batch = batch_of(cfg, [[row(cfg, rng, n, prefix=n)] for n in (9, 12)], 16)
    run = jax.jit(functools.partial(decode.generate, cfg, steps=10, language=language, sampling=decode.Sampling(5.0)))
    made = [np.asarray(run(params, batch, budget=budget[:, None], key=jax.random.key(k))[0])[:, 0] for k in (0, 0, 1)]
    assert np.array_equal(made[0], made[1]) and not np.array_equal(made[0], made[2])
    capped = dataclasses.replace(cfg, language=dataclasses.replace(cfg.language, logit_cap=0.1))
    flat = functools.partial(decode.generate, capped, steps=10, language=language, sampling=decode.Sampling(1.0))
    many = batch_of(cfg, [[row(cfg, rng, 9, prefix=9)]] * 400, 16)
    first = np.asarray(jax.jit(flat)(params, many, budget=np.full((400, 1), 9), key=jax.random.key(2))[0])[:, 0]
    assert len(np.unique(first[:, 0])) > 30  # scores within 0.1 of each other: nearly all of 40 are drawn
    assert 0 < (first[:, 0] == first[:, 1]).mean() < 0.2  # and each place draws anew
    for ids in (made[0], made[2]):
        for i in range(2):
            end = int(np.argmax(ids[i] == 1))
            assert walk.accepts(ids[i, :end] - 200, int(budget[i])) and (ids[i, end:] == 1).all()


@pytest.mark.parametrize("most", [0.0, 3.0])
def test_chunked_loss_equals_plain_log_softmax(most):
    from vla_jax.train import losses

    rng = np.random.default_rng(4)
    hidden, table = rng.normal(size=(2, 20, 8)).astype(np.float32), rng.normal(size=(50, 8)).astype(np.float32)
    target, weight = rng.integers(0, 50, (2, 20)).astype(np.int32), np.zeros((2, 20), np.float32)
    weight[0, [3, 4, 9]], weight[1, [0, 19]] = [0.5, 0.25, 0.25], 0.5
    found = losses.token_loss(jnp.asarray(hidden), jnp.asarray(table), target, weight, targets=7, logit_cap=most)
    scores = hidden @ table.T
    log_p = jax.nn.log_softmax(most * np.tanh(scores / most) if most else scores)
    plain = -np.take_along_axis(np.asarray(log_p), target[..., None], -1)[..., 0] * weight
    np.testing.assert_allclose((found["nll"] * found["weight"]).sum(), plain.sum(), rtol=1e-5)
    by = losses.per_dataset(found, np.tile(np.repeat([1, 2], 10), (2, 1)), np.array([[0, 1], [2, 0]]), 3)
    np.testing.assert_allclose(by["targets"], [4, 0, 1])
    np.testing.assert_allclose(by["loss_sum"], [plain[0].sum() + plain[1, 10:].sum(), 0, plain[1, :10].sum()], rtol=1e-5)


def test_image_size_must_fit_the_patch():
    with pytest.raises(UserError, match="image_size 50 is not a multiple of the patch size 8 of preset debug. Nearest: 48"):
        presets.tokens_per_image("debug", 50)
    with pytest.raises(UserError, match=r"'b16\+gemma_3b'; there are: tiny.*so400m_14.*\+gemma_2b"):
        presets.parts("b16+gemma_3b")
