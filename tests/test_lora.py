"""Adapters and frozen weights: only what is meant is trained, merging is exact, and they lie sharded."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from vla_jax import config, sharding, tree
from vla_jax.deploy import export
from vla_jax.models import lora, presets, pretrained, vla
from vla_jax.models.presets import Lora
from vla_jax.train import evaluate, loop, optim, state
from vla_jax.types import UserError

ON = ("llm/layers/attn/.*", "llm/layers/mlp/.*")


@pytest.fixture(scope="module")
def small():
    from test_pretrained import PRESET

    with pytest.MonkeyPatch.context() as m:
        m.setitem(presets.PRESETS, "small", PRESET)
        made = presets.resolve("small", vocab=128, image_size=32, state_dim=2, dtype="float32", remat="none")
    return dataclasses.replace(made, lora=Lora(3, 6.0, ON))


def test_merging_adds_the_product_and_nothing_else(small):
    made = jax.jit(vla.init, static_argnums=0)
    plain, params = made(dataclasses.replace(small, lora=None), jax.random.key(0)), made(small, jax.random.key(0))
    flat = tree.flatten(params)
    assert {p for p in flat if p.startswith("lora/")} == {f"lora/{p}/{f}" for p in lora.adapted(plain, ON) for f in "ab"}
    for path, w in tree.flatten(vla.merged(small, params)).items():  # b is zero at first
        np.testing.assert_array_equal(np.asarray(w), np.asarray(tree.flatten(plain)[path]))
    rng = np.random.default_rng(0)
    flat = {p: rng.normal(size=w.shape).astype(np.float32) if p.startswith("lora/") else np.asarray(w) for p, w in flat.items()}
    merged = tree.flatten(vla.merged(small, tree.unflatten(flat)))
    assert "lora" not in {p.split("/")[0] for p in merged}
    for path, w in merged.items():
        want = flat[path].astype(np.float64)
        if path in lora.adapted(plain, ON):
            want = want + 2.0 * np.einsum("...ir,...ro->...io", flat[f"lora/{path}/a"].astype(np.float64), flat[f"lora/{path}/b"])
        np.testing.assert_allclose(np.asarray(w), want, atol=1e-4)


def test_a_run_trains_adapters_alone_and_exports_them_merged(tiny, tmp_path):
    """Weights stay bit for bit, adapters move (and the state's projection, as lora_also says), the optimizer keeps nothing for the rest,
    factors lie as their weights do; resumed it is the same run; what is evaluated is what is exported."""
    c = tiny("train.lora_rank=2", "train.lora_alpha=64", "train.lr=1e-2", "train.steps=3", "train.warmup=0", "train.save_every=2")
    run = loop.prepare(c, tmp_path / "run")
    tx = optim.make(c.train)
    before = tree.flatten(jax.tree.map(np.asarray, state.create(run.cfg, tx, run.mesh, seed=c.train.seed, with_ema=False).params))
    after = loop.train(run, quiet=True)
    kept = {p: np.asarray(w) for p, w in tree.flatten(after.params).items()}
    assert {p for p, w in kept.items() if not np.array_equal(w, before[p])} == {p for p in kept if p.startswith(("lora/", "state/"))}
    numbers = sum(x.size for x in jax.tree.leaves(after.opt_state))
    adapters = sum(w.size for p, w in kept.items() if p.startswith(("lora/", "state/")))
    assert numbers < 2 * adapters + 10
    spec = lambda p: tuple(tree.flatten(after.params)[p].sharding.spec)
    assert "fsdp" in spec("lora/llm/layers/attn/q_einsum/w/a") and "fsdp" in spec("llm/layers/attn/q_einsum/w")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "3")
    again = tree.flatten(loop.train(loop.prepare(c, tmp_path / "run"), quiet=True).params)
    assert all(np.array_equal(np.asarray(again[p]), w) for p, w in kept.items())
    _, exported, _ = export.read(export.export(tmp_path / "run", tmp_path / "out"))
    for path, w in tree.flatten(vla.merged(run.cfg, after.params)).items():
        np.testing.assert_allclose(tree.flatten(exported)[path], np.asarray(w), atol=1e-6)
    assert "lora" not in exported
    plain = dataclasses.replace(run.cfg, lora=None)
    want = evaluate.action_errors(plain, run.source.held_out(), exported, frames=2)
    base = evaluate.action_errors(
        plain, run.source.held_out(), tree.unflatten({p: w for p, w in kept.items() if p[:5] != "lora/"}), frames=2
    )
    found = evaluate.run(c, tmp_path / "run", frames=2)
    mae = lambda errors: np.array([x for name in run.source.names for x in errors[name]["mae"].values()])
    np.testing.assert_allclose(mae(found), mae(want), atol=1e-5)
    assert np.abs(mae(base) - mae(want)).max() > 1e-3  # without the adapters it would be another policy


def test_adapters_on_weights_of_others(small, tmp_path):
    """What adapters are for: imported weights stay as they are, and adapters are new."""
    plain = dataclasses.replace(small, lora=None, state_dim=0)
    rng = np.random.default_rng(0)
    weights = {
        p: rng.normal(size=s.shape).astype(np.float32)
        for p, s in tree.flatten(jax.eval_shape(lambda: vla.init(plain, jax.random.key(0)))).items()
    }
    np.savez(tmp_path / "w.npz", **weights)
    mesh = sharding.make_mesh(2, 2, 2)
    loaded = pretrained.load(tmp_path / "w.npz", "big_vision", small, vla.shardings(small, mesh))
    for path, w in tree.flatten(vla.merged(small, loaded)).items():
        if not path.startswith("state/"):
            np.testing.assert_array_equal(np.asarray(w), weights[path])
    new = tree.flatten(loaded["lora"])
    assert new and all(np.asarray(w).any() == path.endswith("/a") for path, w in new.items())


def test_freezing_by_pattern(tiny, tmp_path):
    run = loop.prepare(
        dataclasses.replace(c := tiny("train.steps=1", "train.warmup=0"), train=dataclasses.replace(c.train, freeze=("img/.*",))), tmp_path
    )
    before = tree.flatten(
        jax.tree.map(np.asarray, state.create(run.cfg, optim.make(run.config.train), run.mesh, seed=0, with_ema=False).params)
    )
    after = tree.flatten(loop.train(run, quiet=True).params)
    for path, w in after.items():
        assert np.array_equal(np.asarray(w), before[path]) == path.startswith("img/"), path


def test_patterns_that_do_nothing_are_refused(tiny, tmp_path, small):
    shapes = jax.eval_shape(lambda: vla.init(dataclasses.replace(small, lora=None), jax.random.key(0)))
    for patterns, match in ((("llm/no/.*",), "matches none"), (("(",), "no regular expression"), ((".*",), "no matrix")):
        with pytest.raises(UserError, match=match):
            lora.adapted(shapes, patterns)
        with pytest.raises(UserError, match="matches none|no regular expression|nothing that the loss"):
            lora.trainable(shapes, config.Train(freeze=patterns))
    with pytest.raises(UserError, match="lora_on is empty"):
        lora.adapted(shapes, ())


NOTHING = "nothing that the loss of the {} reaches is trained"


@pytest.mark.parametrize(
    "train, loss",
    [
        ({"freeze": (".*",)}, "tokens"),
        ({"objective": "both", "freeze": ("expert/.*",)}, "flow"),
        ({"objective": "both", "freeze": ("(llm|img|state)/.*",)}, "tokens"),
        ({"objective": "flow", "freeze": (".*",)}, "flow"),
        ({"lora_rank": 2, "lora_on": ("expert/layers/attn/.*",), "lora_also": ()}, "tokens"),
        ({"objective": "both", "lora_rank": 2, "lora_also": ()}, "flow"),
        ({"objective": "both", "freeze": ("expert/.*",), "insulate": False}, ""),
        ({"objective": "both", "lora_rank": 2}, ""),
    ],
)
def test_a_loss_that_would_train_nothing_is_refused(tiny, tmp_path, train, loss):
    c = tiny("model.expert=tiny", "model.expert_dims=8")
    c = dataclasses.replace(c, train=dataclasses.replace(c.train, **train))
    if not loss:
        loop.prepare(c, tmp_path)
        return
    with pytest.raises(UserError, match=NOTHING.format(loss)):
        loop.prepare(c, tmp_path)


def test_what_the_objective_has_no_part_for_is_left_alone(tiny, tmp_path, small):
    """An expert that only stands by is not shrunk by weight decay; biases and scales never are, whatever their shape."""
    shapes = jax.eval_shape(
        lambda: vla.init(
            presets.resolve("tiny", vocab=128, image_size=32, state_dim=2, dtype="float32", remat="none", expert="tiny"), jax.random.key(0)
        )
    )
    ones = jax.tree.map(lambda s: jax.numpy.ones(s.shape), shapes)
    tx = optim.make(config.Train(weight_decay=0.5, warmup=0, lr=0.1))
    updates, _ = jax.jit(tx.update)(jax.tree.map(jax.numpy.zeros_like, ones), tx.init(ones), ones)
    moved = {p for p, u in tree.flatten(updates).items() if np.asarray(u).any()}
    assert moved == {p for p in tree.flatten(shapes) if not p.startswith("expert/") and not p.endswith(("/bias", "/scale"))}


def test_adapters_beside_rows_that_nobody_trains_are_refused(tiny, tmp_path):
    (tmp_path / "weights" / "params").mkdir(parents=True)  # of others: they have no robots
    c = tiny("train.lora_rank=2", f"model.init={tmp_path / 'weights'}")
    with pytest.raises(UserError, match=r"rows of the embedding for 32 action tokens are not in model.init.*lora_also"):
        loop.prepare(c, tmp_path)
    also = dataclasses.replace(c.train, lora_also=("llm/embedder/.*",))
    loop.prepare(dataclasses.replace(c, train=also), tmp_path)
