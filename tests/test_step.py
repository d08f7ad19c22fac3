"""The training step's parts: accumulation, guards, optimizers, learning rates by group, what is recomputed, what is sent."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vla_jax import config, distributed, sharding, tree
from vla_jax.data import feed
from vla_jax.data.stream import Stream
from vla_jax.models import vla
from vla_jax.train import loop, losses, optim, state, step
from vla_jax.types import UserError


def made(run, *, datasets=3):
    """(state, compiled step) of a prepared run."""
    tx, ema = optim.make(run.config.train), run.config.train.ema > 0
    _, where = state.shardings(run.cfg, tx, run.mesh, with_ema=ema)
    current = state.create(run.cfg, tx, run.mesh, seed=0, with_ema=ema)
    return current, step.make_train_step(run.config, run.cfg, tx, run.mesh, where, datasets=datasets)


def batches(run, count):
    with Stream(run.source) as stream:
        return [next(stream)[0] for _ in range(count)]


def host(x):
    return jax.tree.map(np.asarray, x)


@pytest.mark.parametrize("objective", ["tokens", "both"])
def test_accumulation_equals_the_large_batch(tiny, tmp_path, objective):
    """Two steps in one, two and four parts: the same losses, gradients, sums by dataset and parameters; only the order of sums differs
    (float32: 2e-5 of a gradient's norm; a step of Adam can turn where a gradient is nearly zero, hence a tenth of lr)."""
    over = ["mesh.data=-1", "mesh.fsdp=1", "pack.rows=8", f"train.objective={objective}", "train.z_loss=1e-3", "train.lr=1e-3"]
    over += ["model.expert=tiny"] if objective == "both" else []
    found = {}
    devices = jax.devices()[:2]
    for parts in (1, 2, 4):
        run = loop.prepare(tiny(*over), tmp_path)
        run = dataclasses.replace(run, config=tiny(*over, f"train.accumulate={parts}"), mesh=sharding.make_mesh(2, 1, 1, devices=devices))
        current, train_step = made(run)
        seen = []
        with jax.set_mesh(run.mesh):
            for batch in batches(run, 2):
                current, m = train_step(current, feed.to_device(batch, run.mesh))
                seen.append(host({k: m[k] for k in ("loss", "grad_norm", "datasets")}))
        found[parts] = seen, host(current.params)
    (want, params), scale = found[1], 1e-4
    for parts in (2, 4):
        for w, g in zip(want, found[parts][0]):
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), w, g)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=scale), params, found[parts][1])


def test_parts_that_do_not_divide_are_refused(tiny, tmp_path):
    with pytest.raises(UserError, match="pack.rows 8 is not divisible by train.accumulate 3"):
        tiny("train.accumulate=3")
    with pytest.raises(UserError, match=r"not divisible by data\*fsdp\*train.accumulate = 4\*2\*2 = 16 .*Nearest: 16"):
        loop.prepare(tiny("train.accumulate=2"), tmp_path)


def test_z_loss_is_the_square_of_the_normaliser(tiny, tmp_path):
    run = loop.prepare(tiny(), tmp_path)
    (batch,) = batches(run, 1)
    params = vla.init(run.cfg, jax.random.key(0))
    loss = lambda z: float(step.loss_fn(params, tiny(f"train.z_loss={z}"), run.cfg, batch, jax.random.key(0), datasets=3)[0])
    hidden, table = vla.apply(run.cfg, params, batch), vla.embedding(params)
    logits = np.asarray(hidden @ table.T, np.float64)
    log_z = np.log(np.exp(logits).sum(-1))
    want = (np.square(log_z) * batch.loss_weight).sum() / batch.loss_weight.sum()
    assert want > 1
    np.testing.assert_allclose((loss(0.5) - loss(0.0)) / 0.5, want, rtol=1e-4)


@pytest.mark.parametrize("logits", [1 << 28, 2 * 512, 7])
def test_chunks_of_the_loss_change_nothing(monkeypatch, logits):
    """Against plain log-softmax, whatever the chunk, down to one position at a time."""
    rng = np.random.default_rng(0)
    hidden, table = rng.normal(size=(3, 20, 8)).astype(np.float32), rng.normal(size=(512, 8)).astype(np.float32)
    target, weight = rng.integers(0, 512, (3, 20)), (rng.random((3, 20)) < 0.4) * rng.random((3, 20)).astype(np.float32)
    monkeypatch.setattr(losses, "LOGITS", logits)
    found = host(jax.jit(lambda: losses.token_loss(hidden, table, target, weight, targets=14))())
    scores = hidden @ table.T
    want = optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(scores), jnp.asarray(target))
    at = found["position"]
    real = found["weight"] > 0
    assert real.sum() == (weight > 0).sum()
    take = lambda x: np.take_along_axis(np.asarray(x), at, 1)
    np.testing.assert_allclose(found["nll"][real], take(want)[real], rtol=1e-5)
    np.testing.assert_array_equal(found["correct"][real], take(scores.argmax(-1) == target)[real])
    target[:, ::2] = 0
    same = host(
        jax.jit(lambda: losses.token_loss(0 * hidden, table, target, weight, targets=14))()
    )  # all scores are equal: the first counts
    np.testing.assert_array_equal(same["correct"][same["weight"] > 0], take(target == 0)[same["weight"] > 0])
    assert 0 < same["correct"][same["weight"] > 0].mean() < 1


@pytest.mark.parametrize("remat", ["full", "attention", "dots", "offload"])
def test_what_is_computed_again_changes_nothing(tiny, tmp_path, remat):
    """Deep enough to be scanned. Gradients equal in float32 up to fusion."""
    run = loop.prepare(tiny("model.preset=demo", "model.remat=none"), tmp_path)
    vision, language = (dataclasses.replace(x, depth=6) for x in (run.cfg.vision, run.cfg.language))
    cfg = dataclasses.replace(run.cfg, vision=vision, language=language)
    (batch,) = batches(run, 1)
    params = jax.jit(vla.init, static_argnums=0)(cfg, jax.random.key(0))
    grad = lambda cfg: host(jax.jit(jax.grad(lambda p: step.loss_fn(p, run.config, cfg, batch, jax.random.key(0), datasets=3)[0]))(params))
    want, got = grad(cfg), grad(dataclasses.replace(cfg, remat=remat))
    for (path, w), g in zip(tree.flatten(want).items(), tree.flatten(got).values()):
        np.testing.assert_allclose(w, g, atol=1e-5 * max(1e-3, np.abs(w).max()), err_msg=path)


def poisoned(batch, value=np.nan):
    return dataclasses.replace(batch, loss_weight=np.where(batch.loss_weight > 0, value, 0).astype(np.float32))


def test_a_step_that_is_not_finite_is_skipped_and_counted(tiny, tmp_path):
    run = loop.prepare(tiny("train.ema=0.9", "train.warmup=1"), tmp_path)
    current, train_step = made(run)
    good = batches(run, 3)
    with jax.set_mesh(run.mesh):
        put = lambda b: feed.to_device(b, run.mesh)
        current, _ = train_step(current, put(good[0]))
        before = host(current)
        current, m = train_step(current, put(poisoned(good[1])))
        after = host(current)
        for field in ("params", "opt_state", "ema"):
            jax.tree.map(np.testing.assert_array_equal, getattr(before, field), getattr(after, field))
        assert not np.isfinite(m["grad_norm"]) and after.step == 2
        tally = after.tally
        assert (tally["skipped"], tally["in_a_row"]) == (1, 1)
        samples = lambda b: int((b.dataset >= 0).sum())
        assert tally["samples"].tolist() == [0, samples(good[0])]
        current, m = train_step(current, put(good[2]))
    tally = host(current).tally
    assert (tally["skipped"], tally["in_a_row"]) == (1, 0) and np.isfinite(m["loss"])
    assert tally["samples"].tolist() == [0, samples(good[0]) + samples(good[2])]
    # the schedule counts the steps that were taken, in the log and in the optimizer
    np.testing.assert_allclose(m["lr"], optim.schedule(run.config.train)(1), rtol=1e-6)
    assert any(not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(before.params), jax.tree.leaves(host(current.params))))


@pytest.mark.parametrize("loss, norm, taken", [(1.0, 1.0, True), (np.nan, 1.0, False), (1.0, np.inf, False), (1.0, np.nan, False)])
def test_either_that_is_not_finite_skips(loss, norm, taken):
    tally = {"in_a_row": jnp.int32(0), "skipped": jnp.int32(0), "norm": jnp.float32(1)}
    assert bool(step._ordinary(tally, jnp.int32(9), jnp.float32(loss), jnp.float32(norm), config.Train())) is taken


def test_a_spike_is_skipped_once_the_norms_have_settled(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(step, "SETTLED", 3)
    run = loop.prepare(tiny("train.spike=1.5", "train.warmup=1", "train.lr=1e-5"), tmp_path)
    current, train_step = made(run)
    (batch,) = batches(run, 1)
    loud = dataclasses.replace(batch, images=np.zeros_like(batch.images), target=np.where(batch.loss_weight > 0, 3, batch.target))
    skipped, norms = [], []
    with jax.set_mesh(run.mesh):
        quiet, loud = feed.to_device(batch, run.mesh), feed.to_device(loud, run.mesh)
        for b in (quiet, loud, quiet, quiet, quiet, loud, quiet):
            current, m = train_step(current, b)
            skipped.append(int(m["tally"]["skipped"]))
            norms.append(float(m["grad_norm"]))
    running = float(m["tally"]["norm"]) / (1 - 0.98 ** (7 - skipped[-1]))
    spikes = norms[5] > 1.5 * running
    assert skipped == [0, 0, 0, 0, 0, int(spikes), int(spikes)]
    if not spikes:  # the loud batch must be one, or this test says nothing
        pytest.fail(f"norms {norms} hold no spike")


def test_the_tally_carries_over_a_million():
    tally = {"skipped": jnp.int32(0), "in_a_row": jnp.int32(0), "norm": jnp.float32(0)} | {
        k: jnp.array([3, 1048570]) for k in ("samples", "tokens")
    }
    got = step._counted(tally, jnp.bool_(True), jnp.float32(1), {"samples": jnp.int32(10), "tokens": jnp.int32(5_000_000)})
    total = lambda pair: int(pair[0]) * (1 << 20) + int(pair[1])
    assert total(got["samples"]) == total([3, 1048570]) + 10 and int(got["samples"][1]) < 1 << 20
    assert total(got["tokens"]) == total([3, 1048570]) + 5_000_000


def test_a_streak_between_log_steps_is_not_missed(tiny, tmp_path, monkeypatch):
    """Three bad batches in a row, then a good one, looked at only every fourth step."""
    real, count = Stream.__next__, [0]

    def some(self):
        got = real(self)
        count[0] += 1
        return (poisoned(got[0]), got[1]) if count[0] % 4 else got

    monkeypatch.setattr(Stream, "__next__", some)
    run = loop.prepare(tiny("train.steps=12", "train.log_every=4", "train.max_skips=3", "data.holdout=0"), tmp_path / "w")
    with pytest.raises(UserError, match="stopped at step 4: the last 4 steps were skipped"):
        loop.train(run, quiet=True)


def test_too_many_skipped_steps_end_the_run(tiny, tmp_path, monkeypatch):
    """And say what, how often, and from where it can go on."""
    real = Stream.__next__
    monkeypatch.setattr(Stream, "__next__", lambda self: (lambda got: (poisoned(got[0]), got[1]))(real(self)))
    run = loop.prepare(tiny("train.steps=8", "train.log_every=4", "train.max_skips=3", "train.save_every=3"), tmp_path / "w")
    with pytest.raises(UserError, match=r"stopped at step 4: the last 4 steps were skipped \(train.max_skips=3\).*nan.*checkpoints: \[3\]"):
        loop.train(run, quiet=True)
    # mended data: it goes on from the checkpoint, whose parameters are sound and whose three skipped steps are forgiven
    monkeypatch.setattr(Stream, "__next__", real)
    final = loop.train(loop.prepare(run.config, tmp_path / "w"), quiet=True)
    assert int(final.step) == 8 and all(np.isfinite(x).all() for x in jax.tree.leaves(host(final.params)))
    assert int(final.tally["skipped"]) == 3


@pytest.mark.parametrize(
    "optimizer, dtype", [("adamw", "bfloat16"), ("adafactor", "float32"), ("adafactor", "bfloat16"), ("muon", "float32")]
)
def test_optimizers_learn_sharded(tiny, tmp_path, optimizer, dtype):
    """Each lowers the loss on one batch, with its moments divided like the parameters, and the same on one device as on eight."""
    over = (f"train.optimizer={optimizer}", f"train.moment_dtype={dtype}", "train.lr=3e-3", "train.warmup=1", "train.steps=40")
    curves = []
    for sizes, devices in (((1, 4, 2), jax.devices()), ((1, 1, 1), jax.devices()[:1])):
        run = loop.prepare(tiny(*over), tmp_path)
        run = dataclasses.replace(run, mesh=sharding.make_mesh(*sizes, devices=devices))
        current, train_step = made(run)
        (batch,) = batches(run, 1)
        with jax.set_mesh(run.mesh):
            given, seen = feed.to_device(batch, run.mesh), []
            for _ in range(12):
                current, m = train_step(current, given)
                seen.append(float(m["loss"]))
        assert seen[-1] < seen[0] - 0.5, seen
        curves.append(seen)
        first = {
            str(x.dtype)
            for path, x in jax.tree_util.tree_leaves_with_path(current.opt_state)
            if ".mu" in jax.tree_util.keystr(path) or ".ema" in jax.tree_util.keystr(path)
        }
        assert first == {dtype}
        if devices != jax.devices()[:1]:
            param = tree.flatten(current.params)["llm/layers/mlp/linear"]
            moments = [
                x
                for path, x in jax.tree_util.tree_leaves_with_path(current.opt_state)
                if jax.tree_util.keystr(path).endswith("['mlp']['linear']") and x.shape == param.shape
            ]
            assert moments and all(x.sharding == param.sharding for x in moments)
    np.testing.assert_allclose(curves[0][:6], curves[1][:6], rtol=2e-3)


def test_adafactor_keeps_rows_and_columns_only():
    c = config.Train(optimizer="adafactor", moment_dtype="bfloat16")
    params = {"llm": {"layers": {"mlp": {"linear": jnp.zeros((4, 512, 256))}}}, "img": {"x": {"bias": jnp.zeros((4, 512))}}}
    sizes = [x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(optim.make(c).init, params))]
    full = 4 * 512 * 256
    assert full * 2 < sum(sizes) < full * 2.2 + 4 * 512 * 8  # the first moment in two bytes, and little else


def test_muon_orthogonalises_each_layers_matrices(tiny, tmp_path):
    """The update of each matrix that Muon takes, reshaped to (inputs, outputs), has singular values within what five Newton-Schulz steps
    give (0.68 .. 1.13 of one; Jordan et al.), times 0.2 * root of the larger side; what it does not take is AdamW's."""
    run = loop.prepare(tiny(), tmp_path)
    params = vla.init(run.cfg, jax.random.key(0))
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params)
    make = lambda name: optim.make(config.Train(optimizer=name, weight_decay=0.0, warmup=0, lr=1.0, clip=1e9))
    got, adam = ({k: tree.flatten(host(make(k).update(grads, make(k).init(params), params)[0]))}[k] for k in ("muon", "adamw"))
    lang, vis = run.cfg.language, run.cfg.vision
    d, w, hd = lang.width, vis.width, lang.head_dim
    view = {
        "llm/layers/attn/q_einsum/w": lambda u: u[1].transpose(1, 0, 2).reshape(d, -1),
        "llm/layers/attn/kv_einsum/w": lambda u: u[1, 1].transpose(1, 0, 2).reshape(d, -1),
        "llm/layers/attn/attn_vec_einsum/w": lambda u: u[1].reshape(-1, d),
        "llm/layers/mlp/gating_einsum": lambda u: u[1, 0],
        "llm/layers/mlp/linear": lambda u: u[0],
        "img/Transformer/encoderblock/MultiHeadDotProductAttention_0/query/kernel": lambda u: u[1].reshape(w, -1),
        "img/Transformer/encoderblock/MultiHeadDotProductAttention_0/out/kernel": lambda u: u[1].reshape(-1, w),
        "img/Transformer/encoderblock/MlpBlock_0/Dense_1/kernel": lambda u: u[1],
    }
    assert hd
    for path, of in view.items():
        matrix = of(got[path])
        values = np.linalg.svd(matrix, compute_uv=False) / (0.2 * max(matrix.shape) ** 0.5)
        small, large = np.quantile(values, [0.1, 1.0])  # the least of a square matrix's may start too near zero
        assert 0.6 < small and large < 1.2, (path, values)
    for path in ("llm/embedder/input_embedding", "img/head/kernel", "img/pos_embedding", "llm/final_norm/scale"):
        np.testing.assert_allclose(got[path], adam[path], rtol=1e-4, atol=1e-6, err_msg=path)


def test_learning_rates_by_group():
    params = {
        "img": {"w": jnp.ones((2, 2))},
        "llm": {"w": jnp.ones((2, 2))},
        "expert": {"w": jnp.ones((2, 2))},
        "state": {"w": jnp.ones((2, 2))},
    }
    c = config.Train(lr=1.0, warmup=0, lr_vision=0.5, lr_language=0.25, lr_expert=2.0, weight_decay=0.1, objective="both")
    tx = optim.make(c)
    updates = tree.flatten(tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)[0])
    size = {path: -float(u[0, 0]) for path, u in updates.items()}
    np.testing.assert_allclose([size[f"{g}/w"] / size["llm/w"] for g in ("img", "expert", "state")], [2.0, 8.0, 8.0], rtol=1e-5)
    np.testing.assert_allclose(size["llm/w"], 0.25 * 1.1, rtol=1e-3)  # decay is scaled, too
    assert [optim.group(p) for p in ("lora/img/x/a", "lora/llm/y/b", "lora/expert/z/a", "state/bias")] == [
        "vision",
        "language",
        "expert",
        "expert",
    ]


def test_norms_by_group_add_up(tiny, tmp_path):
    run = loop.prepare(tiny("train.warmup=1", "model.expert=tiny", "train.objective=both"), tmp_path)
    current, train_step = made(run)
    (batch,) = batches(run, 1)
    with jax.set_mesh(run.mesh):
        _, m = train_step(current, feed.to_device(batch, run.mesh))
    norms = host(m["norm"])
    assert set(norms) == {"grad", "update", "param"} and set(norms["grad"]) == set(optim.GROUPS)
    np.testing.assert_allclose(np.sqrt(sum(x**2 for x in norms["grad"].values())), m["grad_norm"], rtol=1e-5)
    assert all(x > 0 for group in ("grad", "param") for x in norms[group].values())


def test_state_is_made_where_it_belongs(tiny, tmp_path):
    """No device ever holds the whole of it, not even while it is made: what the program that makes it needs on one is its eighth."""
    run = loop.prepare(tiny("model.preset=debug", "mesh.data=1", "mesh.fsdp=8", "model.vocab=16384"), tmp_path)
    tx = optim.make(run.config.train)
    abstract, where = state.shardings(run.cfg, tx, run.mesh, with_ema=True)
    with jax.set_mesh(run.mesh):
        program = jax.jit(lambda: state._init(run.cfg, tx, 0, True), out_shardings=where).lower().compile()
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract))
    m = program.memory_analysis()
    assert m.output_size_in_bytes < 0.14 * whole  # norms and biases are on all
    assert m.temp_size_in_bytes < 0.14 * whole


def divided_text(run, dump):
    """The step's program for the mesh, after it was divided: before this platform replaces bfloat16, which a CPU does not have."""
    current, train_step = made(run)
    (batch,) = batches(run, 1)
    with jax.set_mesh(run.mesh):
        lowered = train_step.lower(current, feed.to_device(batch, run.mesh))
    lowered.compile(compiler_options={"xla_dump_to": str(dump), "xla_dump_hlo_pass_re": "spmd.*|sharding.*"})
    return next(p for p in sorted(dump.glob("*after_spmd-partitioning*")) if "jit_step" in p.name).read_text()


def sent(text, kinds):
    """[(dtype, dims)] of what operations of these kinds give."""
    found = re.findall(rf"= (\(?[^=]*?) (?:{kinds})\(", text)
    return [(d, tuple(int(n) for n in s.split(",") if n)) for out in found for d, s in re.findall(r"(\w+)\[([\d,]*)\]", out)]


def test_weights_travel_in_bfloat16_and_activations_not_at_all(tiny, tmp_path):
    """On a mesh of eight: what is gathered and has the size of a weight is bfloat16, and so are the sums of gradients; and no device
    gathers or sums what belongs to the rows of all: 32 images, or 8 rows in the decoder's layers."""
    over = ("model.preset=debug", "model.dtype=bfloat16", "mesh.data=1", "mesh.fsdp=8", "model.remat=full", "pack.images=4")
    run = loop.prepare(tiny(*over), tmp_path)
    vision, language = (dataclasses.replace(x, depth=6) for x in (run.cfg.vision, run.cfg.language))  # scanned, as real ones are
    run = dataclasses.replace(run, cfg=dataclasses.replace(run.cfg, vision=vision, language=language))
    text = divided_text(run, tmp_path / "hlo")
    large = {(d, s) for d, s in sent(text, "all-gather") if np.prod(s) >= 96 * 96 and d.startswith(("f", "bf"))}
    assert len(large) >= 6 and {d for d, _ in large} == {"bf16"}, large
    summed = {(d, s) for d, s in sent(text, "all-reduce|reduce-scatter") if np.prod(s) >= 96 * 96}
    summed.discard(("f32", (8, 64, 128)))  # what the parts of the vocabulary say of the hidden states of targets
    assert {d for d, s in summed} == {"bf16"}, summed
    of_all = [(d, s) for d, s in sent(text, "all-reduce|all-gather|reduce-scatter") if s[:1] == (32,) and len(s) > 2 or s[:2] == (8, 96)]
    assert not [x for x in of_all if np.prod(x[1]) > 8 * 64 * 128], of_all


def test_parts_are_taken_from_each_devices_own_rows(tiny, tmp_path):
    """Accumulating in two parts sends no pictures: nothing of the batch's bytes is exchanged."""
    run = loop.prepare(tiny("pack.rows=16", "train.accumulate=2", "mesh.data=8", "mesh.fsdp=1"), tmp_path)
    moved = [s for d, s in sent(divided_text(run, tmp_path / "hlo"), "all-gather|all-to-all|collective-permute") if d == "u8"]
    assert not moved


def test_averaged_parameters_and_clipping(tiny, tmp_path):
    """EMA by its definition; a gradient of any size moves plain parameters no further than its clipped norm allows."""
    run = loop.prepare(tiny("train.ema=0.75", "train.warmup=0"), tmp_path)
    current, train_step = made(run)
    (batch,) = batches(run, 1)
    start = host(current.params)
    with jax.set_mesh(run.mesh):
        current, _ = train_step(current, feed.to_device(batch, run.mesh))
    want = jax.tree.map(lambda e, p: 0.75 * e + 0.25 * p, start, host(current.params))
    jax.tree.map(lambda w, g: np.testing.assert_allclose(w, g, atol=1e-6), want, host(current.ema))


def test_the_gradient_is_clipped_as_a_whole():
    """Two gradients after each other, of which Adam's moments remember the sizes: large ones as if they had been scaled to the norm of
    train.clip, small ones as they are."""
    params = {"llm": {"w": jnp.ones((4, 4)), "v": jnp.ones(3)}}
    rng = np.random.default_rng(0)
    grad = lambda norm: jax.tree.map(
        lambda x: (norm / 4.359 * rng.choice([-1.0, 1.0], x.shape)).astype(np.float32), params
    )  # of 19 numbers

    def updates(clip, grads):
        tx = optim.make(config.Train(clip=clip, warmup=0, lr=1.0, weight_decay=0.0))
        state = tx.init(params)
        for g in grads:
            out, state = tx.update(g, state, params)
        return out

    first, second = grad(100.0), grad(0.3)
    scaled = jax.tree.map(lambda g: g / 200, first)  # to a norm of 0.5
    same = lambda a, b: all(np.allclose(x, y, rtol=1e-3) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))
    assert same(updates(0.5, [first, second]), updates(1e9, [scaled, second]))
    assert not same(updates(0.5, [first, second]), updates(1e9, [first, second]))


def test_compiled_programs_are_kept_where_the_cache_is(monkeypatch, tmp_path):
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("VLA_CACHE", str(tmp_path))
    try:
        distributed.keep_compiled()  # the tests' own folder is named in the environment, and stays
        assert jax.config.jax_compilation_cache_dir == before
        monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
        distributed.keep_compiled()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "compiled")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_a_vocabulary_that_does_not_divide_costs_no_more(tiny, tmp_path):
    """Each device then makes the logits of its own rows: the work of one is an eighth of all, as where it divides."""
    run = loop.prepare(tiny("mesh.data=1", "mesh.fsdp=8"), tmp_path)
    hidden, target = jnp.zeros((8, 96, 32)), jnp.zeros((8, 96), jnp.int32)
    costs = []
    for vocab in (4096, 4100):
        grad = jax.grad(lambda h, t: losses.token_loss(h, t, target, target + 1.0, targets=64)["nll"].sum(), (0, 1))
        with jax.set_mesh(run.mesh):
            rows = jax.sharding.NamedSharding(run.mesh, jax.sharding.PartitionSpec(sharding.BATCH))
            lowered = jax.jit(grad, in_shardings=(rows, None)).lower(hidden, jnp.zeros((vocab, 32)))
        costs.append(lowered.compile().cost_analysis()["flops"])
    assert costs[1] < 1.3 * costs[0], costs


def test_gradients_of_a_frequent_token_do_not_drown(tiny, tmp_path):
    """One token in 4,096 places: in bfloat16 its row's gradient is the sum in float32 of what each place gives, to their own rounding."""
    from vla_jax.models import decoder

    cfg = dataclasses.replace(loop.prepare(tiny(), tmp_path).cfg, dtype="bfloat16")
    tokens = jnp.zeros((4, 1024), jnp.int32)
    each = jnp.asarray(np.random.default_rng(0).normal(0.2, 1, (4, 1024, cfg.language.width)), jnp.bfloat16)
    table = jnp.zeros((cfg.vocab, cfg.language.width))
    look = lambda t: decoder.Embedder(cfg).apply({"params": {"input_embedding": t}}, tokens)
    got = jax.grad(lambda t: (look(t).astype(jnp.float32) * each.astype(jnp.float32)).sum())(table)[0]
    want = each.astype(jnp.float32).sum((0, 1)) * cfg.language.width**0.5
    np.testing.assert_allclose(got, want, rtol=2e-2, atol=2.0)


def test_the_loop_reads_nothing_between_log_steps(tiny, tmp_path, monkeypatch):
    """Whoever reads a step's results makes the host wait for it. Each is replaced by something that notes when it is read; on other
    platforms than this one the loop's transfer guard refuses such reads, too."""
    reads, now = [], [0]
    real = step.make_train_step

    class Noted:
        def __init__(self, value):
            self.value, self.step = value, now[0]

        def is_ready(self):
            return True

        def block_until_ready(self):
            return self

        def __array__(self, *args, **kwargs):
            reads.append(self.step)
            return np.asarray(self.value)

    def watched(*args, **kwargs):
        compiled = real(*args, **kwargs)

        def one(s, b):
            now[0] += 1
            s, m = compiled(s, b)
            return s, jax.tree.map(Noted, m)

        return one

    monkeypatch.setattr(step, "make_train_step", watched)
    loop.train(loop.prepare(tiny("train.steps=7", "train.log_every=3", "train.save_every=2"), tmp_path), quiet=True)
    assert set(reads) == {3, 6, 7}


def test_the_guard_would_stop_a_hidden_transfer(tiny, tmp_path, monkeypatch):
    """A number from the host that slips into the step is refused by the loop itself."""
    real = step.make_train_step

    def leaky(*args, **kwargs):
        made = real(*args, **kwargs)
        return lambda s, b: made(dataclasses.replace(s, step=s.step + np.int32(0)), b)

    monkeypatch.setattr(step, "make_train_step", leaky)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        loop.train(loop.prepare(tiny("train.steps=1"), tmp_path), quiet=True)
