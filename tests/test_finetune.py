"""Beginning with an exported policy: what is kept, what is new, what is refused, and that robots of before still act as before."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from vla_jax import config, tree
from vla_jax.config import Train
from vla_jax.data import prior, stats
from vla_jax.deploy import export, offline, policy
from vla_jax.tabletop.env import EVAL_SEED, TabletopEnv
from vla_jax.train import loop, optim
from vla_jax.types import UserError

OLD, NEW = ("tabletop_slider", "tabletop_arm"), "tabletop_bimanual"


def mixture(path, weights: dict) -> str:
    listed = "".join(f"  {name}: {w}\n" for name, w in weights.items())
    path.write_text(f"name: {path.stem}\nsource: ours\nweight: per_dataset\ndatasets:\n{listed}")
    return f"data.mixture={path}"


@pytest.fixture(scope="module")
def before(tabletop, tmp_path_factory):
    """(the export of a run of two steps on two robots, make(*overrides) -> Config that begins with it)."""
    base = tmp_path_factory.mktemp("before")
    small = [f"data.root={tabletop}", f"data.index_dir={base / 'ix'}", "model.preset=tiny", "pack.rows=8", "pack.group=2", "pack.length=96"]
    small += ["pack.images=4", "pack.targets=64", "train.warmup=0", "train.steps=2", "train.eval_batches=1", "mesh.data=-1", "mesh.fsdp=2"]
    made = lambda *more: config.load("configs/demo.py", [*small, *more])[0]
    run = loop.prepare(made(mixture(base / "two.yaml", dict.fromkeys(OLD, 1.0)), "data.holdout=0.2"), base / "run")
    loop.train(run, quiet=True)
    out = export.export(base / "run", base / "out")
    return out, lambda *more: made(f"model.init={out}", "tokens.text_model=", "data.holdout=0.4", f"data.mixture={NEW}", *more)


def exported(run, quiet=True):
    loop.train(run, quiet=quiet)
    return export.export(run.workdir, run.workdir / "out")


def body(folder):
    return json.loads((folder / "policy.json").read_text())


def robots(folder):
    told = {name: json.loads((folder / "robots" / f"{name}.json").read_text()) for name in body(folder)["robots"]}
    return {name: (of["card"], of["stats"]) for name, of in told.items()}


def test_robots_of_before_act_as_before_when_another_is_trained(before, tmp_path, capfd):
    """At learning rate zero, bit for bit, although the state's projection has grown from 3 numbers to 6; a robot that is trained on is new."""
    old, make = before
    run = loop.prepare(make("train.lr=0"), tmp_path / "run")
    told = capfd.readouterr().err
    assert "numbers 3..5 of the state have new rows" in told and "the action tokens are its own" in told
    assert "tabletop_slider, tabletop_arm can still be driven as before" in told and f"those of {NEW} are of this data" in told
    out = exported(run)
    assert list(robots(out)) == [NEW, *OLD] and {n: robots(out)[n] for n in OLD} == robots(old)
    assert robots(out)[NEW][1] == stats.to_json(stats.compute(run.source.indexes[0], 0.4))
    was, now = policy.load_all(old), policy.load_all(out)
    for name in OLD:
        seen = [TabletopEnv(name).reset(EVAL_SEED + i) for i in range(3)]
        for (a, _), (b, _) in zip(was[name].act(seen), now[name].act(seen)):
            np.testing.assert_array_equal(a, b)
    ((chunk, _),) = now[NEW].act([TabletopEnv(NEW).reset(EVAL_SEED)])
    assert chunk.shape == (5, 6)
    a, b = (tree.flatten(export.read(folder)[1]) for folder in (old, out))
    assert a.keys() == b.keys()
    ids = run.source.layout.vocab_size  # rows behind them fill up a multiple of 128
    for path, w in a.items():
        same = ids if path.endswith("input_embedding") else len(w)
        np.testing.assert_array_equal(w[:same], b[path][:same])
        assert w.shape == b[path].shape or path == "state/kernel" and np.abs(b[path][3:]).min() > 0


def test_statistics_of_known_robots_are_kept_unless_asked_for(before, tmp_path):
    old, make = before
    mix = mixture(tmp_path / "three.yaml", {NEW: 2.0, "tabletop_arm": 1.0})
    kept = loop.prepare(make(mix), tmp_path / "kept").source
    fresh = loop.prepare(make(mix, "data.refit_stats=true"), tmp_path / "fresh").source
    of = lambda source: [stats.to_json(s) for s in source.statistics]
    own = [stats.to_json(stats.compute(ix, 0.4)) for ix in kept.indexes]  # of other episodes than before: data.holdout differs
    assert of(kept) == [own[0], robots(old)["tabletop_arm"][1]] and of(fresh) == own and own[1] != of(kept)[1]
    drawn = kept.sampler.draw(np.arange(30000))[0]
    assert abs(np.mean(drawn == 0) - 2 / 3) < 0.01
    assert kept.layout.action == prior.load(old).action == fresh.layout.action


def test_a_refitted_tokenizer_has_new_rows_and_old_robots_speak_theirs(before, tmp_path, capfd):
    """Twice, so that there are three. The learning rate is 0: what an old robot does must be what it did, to the last bit of its chunk."""
    old, make = before
    first = prior.load(old)
    refit = lambda init, size: [f"model.init={init}", "tokens.refit=true", f"tokens.action_vocab={size}", "train.lr=0"]
    run = loop.prepare(make(*refit(old, 300)), tmp_path / "run")
    told = capfd.readouterr().err
    words, vocab, behind = run.source.layout.text.vocab_size, run.source.layout.action.vocab_size, first.action.vocab_size
    assert vocab > behind and f"{vocab} action tokens have new rows" in told and "will not be in the export" not in told
    assert run.source.layout.ids.tolist() == list(range(words + behind, words + behind + vocab))
    out = exported(run)
    assert list(robots(out)) == [NEW, *OLD] and body(out)["behind"] == behind and body(out)["earlier"][0]["robots"] == list(OLD)
    a, b = (tree.flatten(export.read(folder)[1])["llm/embedder/input_embedding"] for folder in (old, out))
    np.testing.assert_array_equal(a[: words + behind], b[: words + behind])
    fresh = b[words + behind : words + behind + vocab]
    assert len(fresh) == vocab and not np.isclose(fresh[:behind], a[words : words + behind]).any(axis=1).any()
    # as the text's rows are spread: 10 standard errors of a standard deviation over some hundred rows
    assert abs(fresh.std() / a[:words].std() - 1) < 10 / np.sqrt(2 * fresh.size)

    again = exported(loop.prepare(make(*refit(out, 290), f"data.mixture={OLD[0]}"), tmp_path / "again"))
    assert [g["robots"] for g in body(again)["earlier"]] == [[OLD[1]], [NEW]] and body(again)["behind"] == behind + vocab
    for folder, same in ((out, OLD), (again, OLD[1:])):
        was, now = policy.load_all(old), policy.load_all(folder)
        for name in same:
            seen = TabletopEnv(name).reset(EVAL_SEED)
            ((x, ok), (y, also)) = (of[name].act([seen])[0] for of in (was, now))
            np.testing.assert_array_equal(x, y)
            assert ok and also and now[name].layout.ids[0] == words
    was, now = (policy.load_all(folder)[NEW] for folder in (out, again))
    seen = TabletopEnv(NEW).reset(EVAL_SEED)
    np.testing.assert_array_equal(was.act([seen])[0][0], now.act([seen])[0][0])
    assert now.layout.ids[0] == words + behind
    (tmp_path / "alone").mkdir()
    alone = export.export(tmp_path / "again", tmp_path / "alone" / "out", robot=NEW)
    assert [g["robots"] for g in body(alone)["earlier"]] == [[NEW]]
    np.testing.assert_array_equal(policy.Policy.load(alone).act([seen])[0][0], now.act([seen])[0][0])

    # evaluated each with its own; of several in one mixture that is said
    c = make(f"data.mixture={NEW}")
    assert offline.run(c, again, frames=2)[NEW]["frames"] == 2
    both = mixture(tmp_path / "both.yaml", {NEW: 1.0, OLD[0]: 1.0})
    with pytest.raises(UserError, match="speak several action tokenizers"):
        offline.run(make(both), again, frames=2)


def test_a_run_goes_on_without_the_policy_it_began_with(before, tmp_path):
    old, make = before
    moved = tmp_path / "moved"
    shutil.copytree(old, moved)
    c = lambda steps: make(f"model.init={moved}", f"train.steps={steps}", "train.save_every=2", "train.lr_end=1.0")
    loop.train(loop.prepare(c(2), tmp_path / "run"), quiet=True)
    shutil.rmtree(moved)
    out = exported(loop.prepare(c(4), tmp_path / "run"))
    assert body(out)["step"] == 4 and {n: robots(out)[n] for n in OLD} == robots(old)


def test_settings_that_would_change_an_old_robot_lose_it_with_the_reason(before):
    old, make = before
    first, names = prior.load(old), (NEW,)
    assert first.carried(make(), names, first.action)[1] == {}
    keep, lost = first.carried(make("data.views=('base',)"), names, first.action)
    assert [card["name"] for card, _ in keep] == ["tabletop_slider"]  # which has no other camera
    assert lost == {"tabletop_arm": "data.views ['base', 'wrist'] -> ['base']"}
    assert first.carried(make("data.views=('base','wrist','side')"), names, first.action)[1] == {}
    assert first.carried(make("data.chunk_s=0.4"), names, first.action)[1] == {"tabletop_arm": "a chunk has 4 steps instead of 2"}
    for setting, why in (("tokens.describe=true", "tokens.describe False -> True"), ("data.image_size=64", "data.image_size 48 -> 64")):
        assert first.carried(make(setting), names, first.action)[1] == dict.fromkeys(OLD, why)
    flow = first.carried(make("train.objective=both", "model.expert=tiny"), names, first.action)
    assert flow[0] == [] and "not trained for flow" in flow[1]["tabletop_arm"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["model.preset=debug", "tokens.state=none"], "model.preset is debug, there tiny; tokens.state is none, there continuous"),
        (["tokens.layout=openpi"], "tokens.layout is openpi, there native"),
        (["tokens.text_model=default"], "is not the text model of model.init"),
        (["tokens.action=bins"], "tokens.action is bins: set --config.tokens.action=fast, or --config.tokens.refit=true"),
        (["tokens.refit=true", "tokens.action_vocab=300", "train.freeze=('llm/.*',)"], r"rows of the embedding for \d+ action tokens"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_step(before, tmp_path, settings, said):
    with pytest.raises(UserError, match=said):
        loop.prepare(before[1](*settings), tmp_path / "run")


def test_a_robot_that_means_something_else_now_is_refused(before):
    old, _ = before
    first = prior.load(old)
    from vla_jax.data import cards

    card = cards.load("tabletop_arm")
    assert first.statistics(card)["action"].count > 0 and first.statistics(cards.load(NEW)) is None
    with pytest.raises(UserError, match="another control_hz: 10; its card says 20"):
        first.statistics(dataclasses.replace(card, control_hz=20))
    other = dataclasses.replace(card.action, dims=(*card.action.dims[:2], dataclasses.replace(card.action.dims[2], kind="absolute")))
    with pytest.raises(UserError, match="another action.*gripper 1 ee binary; its card says.*gripper 1 ee absolute.*name of its own"):
        first.statistics(dataclasses.replace(card, action=other))


def test_a_mistyped_init_leaves_nothing_in_the_way_of_the_right_one(before, tmp_path):
    old, make = before
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for name, said in (("nope", "does not exist"), ("empty", "holds no weights"), ("file", "is a file")):
        with pytest.raises(UserError, match=rf"model.init .*{name} {said}.*`vla-jax export` .*`vla-jax import`"):
            loop.prepare(make(f"model.init={tmp_path / name}"), tmp_path / "run")
        assert not list((tmp_path / "run").glob("*"))
    loop.prepare(make(f"model.init={old}"), tmp_path / "run")


@pytest.mark.parametrize("name", ["params.safetensors", "policy.json", "action_tokenizer.json"])
def test_a_damaged_policy_is_refused(before, tmp_path, name):
    old, make = before
    copy = tmp_path / "copy"
    shutil.copytree(old, copy)
    file = copy / name
    content = bytearray(file.read_bytes())
    content[-20] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"{name} is damaged: its SHA-256 differs"):
        loop.train(loop.prepare(make(f"model.init={copy}"), tmp_path / "run"), quiet=True)


def test_an_expert_grows_with_the_robot(before, tabletop, tmp_path):
    """From 3 numbers to 6: known rows and columns stay, what is new is drawn, biases are zero."""
    old, make = before
    flow = ["model.expert=tiny", "train.objective=flow", "train.lr=0"]
    mix = mixture(tmp_path / "two.yaml", dict.fromkeys(OLD, 1.0))
    narrow = exported(loop.prepare(make(mix, *flow, "model.expert_dims=3"), tmp_path / "narrow"))
    wide = exported(loop.prepare(make(f"model.init={narrow}", *flow, "model.expert_dims=6"), tmp_path / "wide"))
    a, b = (tree.flatten(export.read(folder)[1]) for folder in (narrow, wide))
    for name, axis in (("action_in_proj/kernel", 0), ("state_proj/kernel", 0), ("action_out_proj/kernel", 1), ("action_out_proj/bias", 0)):
        x, y = a[f"expert/{name}"], b[f"expert/{name}"]
        known, new = np.split(y, [3], axis=axis)
        assert y.shape[axis] == 6
        np.testing.assert_array_equal(known, x)
        assert (new == 0).all() if "bias" in name else np.abs(new).min() > 0
    assert list(robots(wide)) == [NEW, *OLD]
    with pytest.raises(UserError, match="model.expert_dims is 3, there 6; it can only grow"):
        loop.prepare(make(f"model.init={wide}", mix, *flow, "model.expert_dims=3"), tmp_path / "less")


@pytest.mark.parametrize("adapters", [False, True])
def test_layers_learn_at_their_own_rates(adapters):
    """Against AdamW in numpy, two steps, with the factor of each leaf and layer counted out by hand (Bao et al., "BEiT", 2021)."""
    shapes = {
        "img/embedding/kernel": (2, 3),
        "img/pos_embedding": (1, 4, 3),
        "img/Transformer/encoderblock/MlpBlock_0/Dense_0/kernel": (3, 3, 5),
        "img/Transformer/encoder_norm/scale": (3,),
        "img/head/kernel": (3, 4),
        "llm/embedder/input_embedding": (7, 4),
        "llm/layers/mlp/linear": (2, 6, 4),
        "llm/layers/pre_ffw_norm/scale": (2, 4),
        "llm/final_norm/scale": (4,),
        "expert/layers/mlp/linear": (2, 5, 3),
        "state/kernel": (3, 4),
    }
    if adapters:
        shapes |= {"lora/llm/layers/mlp/linear/a": (2, 6, 1), "lora/llm/layers/mlp/linear/b": (2, 1, 4)}
    decay, rng = 0.5, np.random.default_rng(0)
    factors = {path: np.ones(shape) for path, shape in shapes.items()}
    factors["img/embedding/kernel"] *= 0.0625  # below three layers, and one more for itself
    factors["img/pos_embedding"] *= 0.0625
    for path in factors:
        if "encoderblock" in path:
            factors[path] *= np.array([0.125, 0.25, 0.5]).reshape(-1, *[1] * (len(shapes[path]) - 1))
        elif "llm/layers" in path:
            factors[path] *= np.array([0.25, 0.5]).reshape(-1, *[1] * (len(shapes[path]) - 1))
    train = Train(
        lr=1e-2,
        lr_end=1.0,
        warmup=0,
        steps=10,
        weight_decay=0.1,
        clip=1e9,
        lr_decay=decay,
        lr_vision=0.3,
        objective="both",
        lora_rank=int(adapters),
    )
    train = dataclasses.replace(train, lora_also=tuple(p for p in shapes if not p.startswith("lora/")))
    values = {p: rng.normal(size=s) for p, s in shapes.items()}
    moments = {p: (np.zeros(s), np.zeros(s)) for p, s in shapes.items()}
    tx = optim.make(train)
    params = tree.unflatten({p: np.asarray(v, np.float32) for p, v in values.items()})
    opt_state = tx.init(params)
    for t in (1, 2):
        grads = {p: rng.normal(size=s) for p, s in shapes.items()}
        updates, opt_state = tx.update(tree.unflatten({p: np.asarray(g, np.float32) for p, g in grads.items()}), opt_state, params)
        params = jax.tree.map(np.add, params, updates)
        for p, g in grads.items():
            m, v = (b * old + (1 - b) * x for b, old, x in zip((0.9, 0.95), moments[p], (g, g * g)))
            moments[p] = m, v
            step = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
            step += 0.1 * values[p] * (values[p].ndim > 1 and p.split("/")[-1] not in ("scale", "bias"))
            values[p] = values[p] - 1e-2 * factors[p] * (0.3 if p.startswith("img/") else 1.0) * step
    for path, got in tree.flatten(params).items():
        np.testing.assert_allclose(np.asarray(got), values[path], rtol=1e-5, atol=1e-6, err_msg=path)  # float32 against float64


@pytest.mark.parametrize("how", ["full", "lora", "expert", "frozen", "full,mix=true"])
def test_the_config_to_fork_trains_each_way(before, tmp_path, tabletop, how):
    """Two steps: what is said to be trained moves, and nothing else does."""
    old, _ = before
    small = [f"data.root={tabletop}", f"data.index_dir={tmp_path / 'ix'}", f"model.init={old}", "model.preset=tiny", "data.holdout=0.2"]
    small += ["train.steps=2", "train.warmup=0", "train.eval_batches=1", "mesh.fsdp=1", "mesh.data=-1", "pack.rows=8"]
    small += ["model.expert=tiny"] if how == "expert" else []
    c, _ = config.load(f"configs/finetune.py:how={how}", small)
    run = loop.prepare(c, tmp_path / "run")
    out = exported(run)
    a, b = (tree.flatten(export.read(folder)[1]) for folder in (old, out))
    kept = {p: run.source.layout.vocab_size if p.endswith("input_embedding") else len(w) for p, w in a.items()}
    moved = {p.split("/")[0] for p, n in kept.items() if not np.array_equal(a[p][:n], b[p][:n])}
    want = {"full": {"img", "llm", "state"}, "lora": {"img", "llm", "state"}, "expert": set(), "frozen": {"llm", "state"}}
    assert moved == want[how.partition(",")[0]]
    if how == "lora":
        assert np.array_equal(a["img/embedding/kernel"], b["img/embedding/kernel"]) and not np.array_equal(
            a["img/head/kernel"], b["img/head/kernel"]
        )
    names = list(robots(out))
    assert names[0] == "tabletop_omni"
    assert names[1:] == ([] if how == "expert" else ["tabletop_slider", "tabletop_arm", "tabletop_bimanual"] if "mix" in how else list(OLD))
    seen = TabletopEnv("tabletop_omni").reset(EVAL_SEED)
    ((chunk, _),) = policy.Policy.load(out, robot="tabletop_omni").act([seen])
    assert chunk.shape == (2, 4)


def test_a_misspelt_way_of_the_config_is_refused():
    with pytest.raises(UserError, match=r"write how=full\|lora\|expert\|frozen"):
        config.load("configs/finetune.py:how=all")
