"""Steps, meshes, resuming, and the real sample. Eight virtual devices."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from vla_jax import config, paths, tree
from vla_jax.data import feed, sample
from vla_jax.data.stream import Stream
from vla_jax.models import vla
from vla_jax.train import evaluate, loop, metrics, optim, state, step
from vla_jax.types import UserError


def losses(workdir):
    return {x["step"]: x["train/loss"] for x in metrics.read(workdir) if "train/loss" in x}


def test_two_and_two_steps_equal_four_bit_for_bit(tiny, tmp_path):
    over = ("train.save_every=2", "train.log_every=1", "train.ema=0.9")
    whole = loop.train(loop.prepare(tiny("train.steps=4", *over), tmp_path / "whole"), quiet=True)
    # the schedule depends on the run's length, so the first half is a run of four steps stopped at its checkpoint
    halves = tmp_path / "halves"
    run = loop.prepare(tiny("train.steps=4", *over), halves)
    stop_after(run, 2)
    part = loop.train(loop.prepare(tiny("train.steps=4", *over), halves), quiet=True)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(part), strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b))
    assert losses(tmp_path / "whole") == losses(halves)  # the data order too


def stop_after(run, steps):
    """Interrupts a run as a pre-emption would: the batch after `steps` never comes."""

    class Stop(Exception):
        pass

    real, count = Stream.__next__, [0]

    def limited(self):
        if not np.array_equal(self.source.frames[0], run.source.frames[0]):
            return real(self)
        count[0] += 1
        if count[0] > steps:
            raise Stop
        return real(self)

    Stream.__next__ = limited
    try:
        with pytest.raises(Stop):
            loop.train(run, quiet=True)
    finally:
        Stream.__next__ = real


def test_done_is_said_and_nothing_is_done_again(tiny, tmp_path, capsys):
    for _ in range(2):
        loop.train(loop.prepare(tiny("train.steps=2"), tmp_path / "w"), quiet=False)
    assert "already done" in capsys.readouterr().out
    assert len(losses(tmp_path / "w")) == 1


def test_another_config_in_the_same_folder_is_refused(tiny, tmp_path):
    loop.train(loop.prepare(tiny("train.steps=1"), tmp_path / "w"), quiet=True)
    with pytest.raises(UserError, match=r"another config \(train.lr: 0.001 -> 0.1\)"):
        loop.train(loop.prepare(tiny("train.steps=1", "train.lr=0.1"), tmp_path / "w"), quiet=True)


def test_changed_mixture_is_refused_unless_asked_for(tiny, tmp_path):
    loop.train(loop.prepare(tiny("train.steps=1"), tmp_path / "w"), quiet=True)
    run = loop.prepare(tiny("train.steps=2"), tmp_path / "w")
    sampler = dataclasses.replace(run.source.sampler, quotas=run.source.sampler.quotas[::-1])
    run = dataclasses.replace(run, source=dataclasses.replace(run.source, sampler=sampler))
    if run.source.sampler.quotas == run.source.sampler.quotas[::-1]:
        run = dataclasses.replace(run, source=dataclasses.replace(run.source, sampler=dataclasses.replace(sampler, seed=99)))
    with pytest.raises(UserError, match="the data changed since"):
        loop.train(run, quiet=True)
    run = dataclasses.replace(
        run, config=dataclasses.replace(run.config, train=dataclasses.replace(run.config.train, allow_new_mixture=True))
    )
    assert int(loop.train(run, quiet=True).step) == 2


def test_another_mixture_when_asked_for(tiny, tmp_path):
    """Named in the config: refused by the data's fingerprint, gone on with when asked for, and refused for good where the
    robots' states are wider than the model that was trained."""
    one = tmp_path / "one.yaml"
    one.write_text("name: one\nsource: none\nweight: per_dataset\ndatasets: {tabletop_bimanual: 1, tabletop_slider: 1}")
    loop.train(loop.prepare(tiny("train.steps=1", f"data.mixture={one}"), tmp_path / "w"), quiet=True)
    with pytest.raises(UserError, match="the data changed since .*allow_new_mixture"):
        loop.train(loop.prepare(tiny("train.steps=2"), tmp_path / "w"), quiet=True)
    with pytest.raises(UserError, match="the data changed since"):
        loop.train(loop.prepare(tiny("train.steps=2", f"data.mixture={one}", "data.holdout=0.4"), tmp_path / "w"), quiet=True)
    asked = tiny("train.steps=2", "train.allow_new_mixture=true", "data.read_ahead=8", "data.holdout=0.3")
    assert int(loop.train(loop.prepare(asked, tmp_path / "w"), quiet=True).step) == 2
    arm = tiny("train.steps=3", "train.allow_new_mixture=true", "data.mixture=tabletop_arm", "pack.targets=60")
    run = loop.prepare(arm, tmp_path / "w")
    assert run.source.shape[2] != 6
    with pytest.raises(UserError, match="was trained on states of 6 numbers"):
        loop.train(dataclasses.replace(run, config=dataclasses.replace(asked, train=arm.train)), quiet=True)


@pytest.mark.parametrize("mesh", [(8, 1, 1), (2, 4, 1), (1, 8, 1), (2, 2, 2)])
def test_meshes_agree(tiny, tmp_path, mesh):
    """The same two steps on one device and on eight, laid out in four ways. Float32: only summation orders differ, and a
    step of AdamW of size lr can turn where a gradient is nearly zero, hence the tolerance of a tenth of lr."""

    def two_steps(sizes, devices):
        c = tiny("train.lr=1e-3", "train.warmup=0", *(f"mesh.{k}={v}" for k, v in zip(("data", "fsdp", "tensor"), sizes)))
        run = loop.prepare(c, tmp_path / "tokenizer")
        where_mesh = (
            run.mesh
            if devices == 8
            else jax.make_mesh(
                (1, 1, 1), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3, devices=jax.devices()[:1]
            )
        )
        tx = optim.make(c.train)
        _, where = state.shardings(run.cfg, tx, where_mesh, with_ema=False)
        current = state.create(run.cfg, tx, where_mesh, seed=0, with_ema=False)
        train_step = step.make_train_step(c, run.cfg, tx, where_mesh, where, datasets=3)
        out = []
        with Stream(run.source) as stream, jax.set_mesh(where_mesh):
            for _ in range(2):
                current, m = train_step(current, feed.to_device(next(stream)[0], where_mesh))
                out.append((float(m["loss"]), float(m["grad_norm"])))
        return out, jax.tree.map(np.asarray, current.params)

    (one, a), (many, b) = two_steps((8, 1, 1), 1), two_steps(mesh, 8)
    np.testing.assert_allclose(one, many, rtol=1e-4)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        np.testing.assert_allclose(x, y, atol=1e-4)


def test_state_is_sharded_where_the_mesh_says(tiny, tmp_path):
    run = loop.prepare(tiny("mesh.data=1", "mesh.fsdp=4", "mesh.tensor=2"), tmp_path)
    tx = optim.make(run.config.train)
    current = state.create(run.cfg, tx, run.mesh, seed=0, with_ema=True)
    for group in (current.params, current.ema, current.opt_state.inner_states["train"].inner_state[1].mu):
        leaf = tree.flatten(group)["llm/layers/mlp/linear"]
        assert leaf.addressable_shards[0].data.shape == (leaf.shape[0], leaf.shape[1] // 2, leaf.shape[2] // 4)
    assert current.step.sharding.is_fully_replicated


def test_loss_does_not_reach_other_vocabulary(tiny, tmp_path):
    """No gradient on what has no target: state and image of padding, positions of weight zero."""
    run = loop.prepare(tiny(), tmp_path)
    with Stream(run.source) as stream:
        batch = next(stream)[0]
    params = vla.init(run.cfg, jax.random.key(0))
    loss = lambda b: step.loss_fn(params, run.config, run.cfg, b, jax.random.key(0), datasets=3)[0]
    changed = dataclasses.replace(batch, target=np.where(batch.loss_weight > 0, batch.target, 5), actions=batch.actions + 1)
    assert float(loss(batch)) == float(loss(changed))


def test_tokenizer_of_an_earlier_attempt_is_not_used(tiny, tmp_path):
    """Until a checkpoint holds it, a workdir's tokenizer is fitted again: settings may have changed since."""
    before = loop.prepare(tiny("tokens.action_vocab=64"), tmp_path).source.layout.action
    after = loop.prepare(tiny("tokens.action_vocab=80"), tmp_path).source.layout.action
    assert before.vocab_size == 64 and after.vocab_size == 80


def test_resume_with_another_tokenizer_is_refused(tiny, tmp_path):
    """Vocabularies are rounded up, so shapes would not tell: the meaning of the ids would change within one run."""
    loop.train(loop.prepare(tiny("train.steps=1"), tmp_path), quiet=True)
    loop.prepare(tiny("train.steps=1", "tokens.action_scale=2"), tmp_path / "other")
    (tmp_path / "action_tokenizer.json").write_bytes((tmp_path / "other" / "action_tokenizer.json").read_bytes())
    with pytest.raises(UserError, match="another action tokenizer"):
        loop.train(loop.prepare(tiny("train.steps=2"), tmp_path), quiet=True)


@pytest.mark.parametrize("path", sorted(p.name for p in (paths.assets("configs")).glob("*.py")))
def test_one_step_of_each_config(path, real_data, tabletop, tmp_path):
    """As written but for the mesh of these tests and a number of rows that it divides; the one for pods with a tiny model on one dataset."""
    small = ["data.mixture=bridge_dataset", "data.image_size=32", "model.preset=tiny", "model.vocab=0", "tokens.text_model=tiny"]
    small += ["pack.length=256", "train.eval_frames=1", "train.eval_batches=1", "tokens.action_vocab=128"]
    before = ["data.mixture=tabletop"]  # the robots of before are recorded here; tests/test_finetune.py begins with a policy
    data = {"debug.py": (real_data, []), "demo.py": (tabletop, []), "finetune.py": (tabletop, before), "oxe_3b.py": (real_data, small)}
    root, over = data[path]
    mesh = ["mesh.data=8", "mesh.fsdp=1", "mesh.tensor=1", "pack.rows=8", "pack.group=4"]
    c, _ = config.load(f"configs/{path}", [f"data.root={root}", f"data.index_dir={tmp_path / 'ix'}", "train.steps=1", *over, *mesh])
    state = loop.train(loop.prepare(c, tmp_path / "w"), quiet=True)
    assert int(state.step) == 1
    (line,) = [x for x in metrics.read(tmp_path / "w") if "train/loss" in x]
    assert np.isfinite(line["train/loss"]) and line["train/loss"] > 0
    about = metrics.read(tmp_path / "w")[0]
    assert about["step"] == 0 and all(v > 0 for k, v in about.items() if k.endswith(("/episodes", "/frames")))


def test_what_is_skipped_is_in_the_metrics(tabletop, tiny, tmp_path):
    """One episode damaged before the scan, pictures of others after it."""
    shutil.copytree(tabletop, tmp_path / "data")
    place = next(p for p in (tmp_path / "data").iterdir() if p.name.endswith("slider"))
    shard = sorted(next(place.iterdir()).glob("*.tfrecord*"))[0]
    flip(shard, 3000)
    c = tiny(
        "train.steps=3", "train.log_every=3", f"data.root={tmp_path / 'data'}", f"data.index_dir={tmp_path / 'ix'}", "data.max_skipped=0.5"
    )
    run = loop.prepare(c, tmp_path / "w")
    (ix,) = [ix for ix in run.source.indexes if ix.card.name == place.name]
    for frame in range(0, ix.frames, 4):
        at = sample.picture(ix, frame, ix.views[0])
        flip(shard.with_name(ix.shards[at.shard]), at.record + at.offset)
    loop.train(run, quiet=True)
    lines = metrics.read(tmp_path / "w")
    assert lines[0][f"data/{place.name}/skipped/payload checksum mismatch"] == 1
    skipped = {k: v for x in lines for k, v in x.items() if k.startswith("train/skipped/")}
    assert set(skipped) == {f"train/skipped/{place.name}/undecodable image"} and min(skipped.values()) >= 1


def flip(path, at):
    """One byte of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 0xFF
    path.write_bytes(data)


def test_bridge_learns_more_than_the_unigrams(real_data, tmp_path):
    """Few steps on the real sample: held-out token loss falls well below the entropy of the training tokens' unigrams:
    0.53 nats when this was written; order of sums and shards moves it by a few hundredths."""
    c, _ = config.load(
        "configs/debug.py:bridge",
        [f"data.root={real_data}", f"data.index_dir={tmp_path / 'ix'}", "train.save_every=60", "mesh.data=8"],
    )
    run = loop.prepare(c, tmp_path / "w")
    loop.train(run, quiet=True)
    nll = next(x["eval/bridge_dataset/nll"] for x in metrics.read(tmp_path / "w") if "eval/bridge_dataset/nll" in x)
    entropy = evaluate.action_unigram_entropy(run.source)["bridge_dataset"]
    assert nll < entropy - 0.35, (nll, entropy)
    found = evaluate.run(c, tmp_path / "w", frames=8)
    assert (
        found["step"] == 60 and found["bridge_dataset"]["valid"] == 1.0 and set(found["bridge_dataset"]["mae"]) == {"m", "rad", "gripper"}
    )
