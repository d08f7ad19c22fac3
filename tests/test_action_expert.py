"""The action expert against pi0 and pi0.5 written anew in numpy, as openpi lays them out: one joint attention over both streams."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from vla_jax import cli, config, sharding, tree
from vla_jax.data import feed
from vla_jax.data.stream import Stream
from vla_jax.deploy import export, policy
from vla_jax.models import decode, presets, pretrained, vla
from vla_jax.models.presets import Expert, Language, Vision
from vla_jax.tabletop.env import EVAL_SEED, TabletopEnv
from vla_jax.train import evaluate, loop, losses, metrics, optim, state, step
from vla_jax.types import Batch, UserError

V, C, E = Vision(24, 1, 2, 40, 16), Language(32, 3, 4, 2, 12, 56), Expert(20, 36, False, action_dim=6)
LENGTH, STEPS, VOCAB = 12, 5, 128


def cfg_of(ada):
    return presets.VLAConfig(V, C, VOCAB, 16, 0, "float32", "none", dataclasses.replace(E, ada=ada))


def openpi_tree(ada, seed=0):
    """Random weights by openpi's names and shapes."""
    rng = np.random.default_rng(seed)
    w = lambda *shape: (rng.normal(size=shape) * 0.6 / np.sqrt(shape[-2] if len(shape) > 1 else 2)).astype(np.float32)
    out, depth = {}, C.depth
    for path, leaf in tree.flatten(
        jax.eval_shape(lambda: vla.init(dataclasses.replace(cfg_of(ada), expert=None), jax.random.key(0)))
    ).items():
        out[f"PaliGemma/{path}"] = w(*leaf.shape)
    at = "PaliGemma/llm/layers/"
    out[f"{at}attn/q_einsum_1/w"] = w(depth, C.heads, E.width, C.head_dim)
    out[f"{at}attn/kv_einsum_1/w"] = w(depth, 2, C.kv_heads, E.width, C.head_dim)
    out[f"{at}attn/attn_vec_einsum_1/w"] = w(depth, C.heads, C.head_dim, E.width)
    out[f"{at}mlp_1/gating_einsum"], out[f"{at}mlp_1/linear"] = w(depth, 2, E.width, E.mlp), w(depth, E.mlp, E.width)
    for norm, lead in (("layers/pre_attention_norm_1", (depth,)), ("layers/pre_ffw_norm_1", (depth,)), ("final_norm_1", ())):
        if ada:
            out[f"PaliGemma/llm/{norm}/Dense_0/kernel"] = w(*lead, E.width, 3 * E.width)
            out[f"PaliGemma/llm/{norm}/Dense_0/bias"] = w(*lead, 3 * E.width)
        else:
            out[f"PaliGemma/llm/{norm}/scale"] = w(*lead, E.width)
    sizes = {"action_in_proj": (6, 20), "action_out_proj": (20, 6)}
    sizes |= (
        {"time_mlp_in": (20, 20), "time_mlp_out": (20, 20)}
        if ada
        else {"state_proj": (6, 20), "action_time_mlp_in": (40, 20), "action_time_mlp_out": (20, 20)}
    )
    for name, shape in sizes.items():
        out[f"{name}/kernel"], out[f"{name}/bias"] = w(*shape), w(shape[1])
    return out


def reference(w, ada, prompt, noisy, time, robot_state):
    """One sample: prompt ids [n], noisy [k 6], time, state [6] -> velocity [k 6]. float64."""
    w = {name: x.astype(np.float64) for name, x in w.items()}
    get = lambda name, i: w[f"PaliGemma/llm/layers/{name}"][i]
    rms = lambda x: x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    swish = lambda x: x / (1 + np.exp(-x))
    gelu = lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    linear = lambda name, x: x @ w[f"{name}/kernel"] + w[f"{name}/bias"]

    def rope(x, position):
        half = x.shape[-1] // 2
        angle = position[:, None, None] / 1e4 ** (np.arange(half) / half)
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)

    fraction = np.linspace(0, 1, 10)
    angle = time / (4e-3 * (4.0 / 4e-3) ** fraction) * 2 * np.pi
    told = np.concatenate([np.sin(angle), np.cos(angle)])
    x = linear("action_in_proj", noisy)
    if ada:
        condition = swish(linear("time_mlp_out", swish(linear("time_mlp_in", told))))
    else:
        x = np.concatenate([x, np.tile(told, (len(x), 1))], -1)
        x = linear("action_time_mlp_out", swish(linear("action_time_mlp_in", x)))
        x = np.concatenate([linear("state_proj", robot_state)[None], x])

    def norm(name, x, i=None):
        """(normed, gate) of the second stream."""
        pick = lambda leaf: w[f"PaliGemma/llm/{name}/{leaf}"] if i is None else w[f"PaliGemma/llm/{name}/{leaf}"][i]
        if not ada:
            return rms(x) * (1 + pick("scale")), 1
        scale, shift, gate = np.split(condition @ pick("Dense_0/kernel") + pick("Dense_0/bias"), 3)
        return rms(x) * (1 + scale) + shift, gate

    streams = [w["PaliGemma/llm/embedder/input_embedding"][prompt] * np.sqrt(C.width), x]
    n, m = len(prompt), len(x)
    causal = np.cumsum([0] * n + ([1] if not ada else []) + [1] + [0] * (len(noisy) - 1))  # openpi's ar_mask
    mask = causal[None, :] <= causal[:, None]
    position = np.arange(n + m)
    for i in range(C.depth):
        first = rms(streams[0]) * (1 + get("pre_attention_norm/scale", i))
        second, gate = norm("layers/pre_attention_norm_1", streams[1], i)
        q, k, v = [], [], []
        for y, end in ((first, ""), (second, "_1")):
            q.append(np.einsum("td,hde->the", y, get(f"attn/q_einsum{end}/w", i)))
            kv = np.einsum("td,ckde->ctke", y, get(f"attn/kv_einsum{end}/w", i))
            k.append(kv[0]), v.append(kv[1])
        q, k, v = (np.concatenate(part) for part in (q, k, v))
        q, k = rope(q, position) / np.sqrt(C.head_dim), rope(k, position)
        k, v = (np.repeat(part, C.heads // C.kv_heads, axis=1) for part in (k, v))
        scores = np.where(mask[None], np.einsum("the,she->hts", q, k), -1e30)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        y = np.einsum("hts,she->the", scores / scores.sum(-1, keepdims=True), v)
        streams[0] = streams[0] + np.einsum("the,hed->td", y[:n], get("attn/attn_vec_einsum/w", i))
        streams[1] = streams[1] + gate * np.einsum("the,hed->td", y[n:], get("attn/attn_vec_einsum_1/w", i))
        feed = lambda y, end, i=i: (
            (gelu(y @ get(f"mlp{end}/gating_einsum", i)[0]) * (y @ get(f"mlp{end}/gating_einsum", i)[1])) @ get(f"mlp{end}/linear", i)
        )
        streams[0] = streams[0] + feed(rms(streams[0]) * (1 + get("pre_ffw_norm/scale", i)), "")
        y, gate = norm("layers/pre_ffw_norm_1", streams[1], i)
        streams[1] = streams[1] + gate * feed(y, "_1")
    return linear("action_out_proj", norm("final_norm_1", streams[1])[0][-len(noisy) :])


@pytest.fixture(scope="module", params=[False, True], ids=["pi0", "pi05"])
def model(request, tmp_path_factory):
    """(cfg, openpi's weights, ours as loaded from the folder that Orbax wrote of them)."""
    w, folder, cfg = openpi_tree(request.param), tmp_path_factory.mktemp("pi"), cfg_of(request.param)
    with ocp.PyTreeCheckpointer() as writer:
        writer.save(folder / "params", {"params": tree.unflatten({f"{name}/value": x for name, x in w.items()})})
    mesh = sharding.make_mesh(2, 2, 2)
    return cfg, w, pretrained.load(folder, "openpi", cfg, vla.shardings(cfg, mesh))


def sample(rng, prompt=6, suffix=3, steps=STEPS, dims=6):
    return {
        "ids": rng.integers(1, VOCAB, prompt + suffix),
        "prompt": prompt,
        "noisy": rng.normal(size=(steps, dims)).astype(np.float32),
        "time": np.float32(rng.uniform(0.05, 1)),
        "state": rng.normal(size=dims).astype(np.float32),
    }


def batch_of(rows, samples=3, dims=6, length=LENGTH * 3):
    b = len(rows)
    out = {k: np.zeros((b, length), np.int32) for k in ("tokens", "segment", "position", "block")}
    noisy, time = np.zeros((b, samples, STEPS, dims), np.float32), np.ones((b, samples), np.float32)
    robot, chunk = np.zeros((b, samples, dims), np.float32), np.zeros((b, samples), np.int32)
    for r, row in enumerate(rows):
        at = 0
        for g, s in enumerate(row):
            n = len(s["ids"])
            span = slice(at, at + n)
            out["tokens"][r, span], out["segment"][r, span], out["position"][r, span] = s["ids"], g + 1, np.arange(n)
            out["block"][r, span] = np.maximum(np.arange(n) - s["prompt"] + 1, 0)
            noisy[r, g, : len(s["noisy"])], time[r, g], robot[r, g], chunk[r, g] = s["noisy"], s["time"], s["state"], len(s["noisy"])
            at += n
    batch = Batch(**(out | {"images": np.zeros((b, 1, 16, 16, 3), np.uint8), "state": robot, "chunk": chunk}))
    return batch, jnp.asarray(noisy), jnp.asarray(time)


def test_velocities_equal_the_reference_alone_and_packed(model):
    """Several samples in a row, some with fewer steps, with action tokens behind their prompts that the expert must not see."""
    cfg, w, params = model
    rng = np.random.default_rng(1)
    made = [sample(rng), sample(rng, prompt=9, suffix=0, steps=3), sample(rng, prompt=4, suffix=5)]
    want = [reference(w, cfg.expert.ada, s["ids"][: s["prompt"]], s["noisy"], s["time"], s["state"]) for s in made]
    assert min(np.abs(x).std() for x in want) > 0.1
    flow = jax.jit(lambda *a: vla.flow(cfg, *a, insulated=False)[1])
    reuse = jax.jit(lambda p, b, x, t: vla.velocity(cfg, p, vla.prefill(cfg, p, b)[1], b, x, t))
    for rows in ([[s] for s in made], [made, [], []]):  # one shape, compiled once
        batch, noisy, time = batch_of(rows)
        got, cached = np.asarray(flow(params, batch, noisy, time)), np.asarray(reuse(params, batch, noisy, time))
        for i, (s, x) in enumerate(zip(made, want)):
            r, g = (i, 0) if rows[1] else (0, i)
            np.testing.assert_allclose(got[r, g, : len(s["noisy"])], x, atol=2e-5)  # float32 against float64
            np.testing.assert_allclose(cached[r, g, : len(s["noisy"])], x, atol=2e-5)


def test_the_decoder_is_as_without_an_expert(model):
    cfg, _, params = model
    batch, noisy, time = batch_of([[sample(np.random.default_rng(2))]])
    hidden = jax.jit(lambda *a: vla.flow(cfg, *a, insulated=False)[0])(params, batch, noisy, time)
    np.testing.assert_allclose(np.asarray(hidden), np.asarray(jax.jit(lambda *a: vla.apply(cfg, *a))(params, batch)), atol=1e-6)


def settings(**train):
    return config.Config(
        model=config.Model(expert="tiny"), pack=config.Pack(targets=12), train=config.Train(**({"objective": "flow"} | train))
    )


def test_the_loss_of_a_row_of_different_robots_is_that_of_each_alone(model):
    """Robots of 4 and 6 numbers, 3 and 5 steps, one past its episode's end, in a mixture of 5 numbers at most and an expert of 6: the reference on
    each robot's own numbers, filled up with noise. What stands where a robot has nothing cannot change anything."""
    cfg, w, params = model
    rng = np.random.default_rng(3)
    robots = [sample(rng, steps=3, dims=4), sample(rng, prompt=4, steps=5, dims=5)]
    rows = [
        {**s, "noisy": np.pad(s["noisy"], [(0, 0), (0, 5 - s["noisy"].shape[1])]), "state": np.pad(s["state"], (0, 5 - len(s["state"])))}
        for s in robots
    ]
    batch, actions, _ = batch_of([rows], dims=5)
    mask = np.zeros(actions.shape, bool)
    mask[0, 0, :3, :4], mask[0, 1, :4, :5] = True, True  # the second robot's episode ends a step earlier
    batch = dataclasses.replace(batch, actions=actions, action_mask=mask, dataset=np.array([[0, 1, -1]], np.int32))
    run = jax.jit(lambda p, b, key: step.loss_fn(p, settings(), cfg, b, key, datasets=2))
    key = jax.random.key(5)
    loss, sums = run(params, batch, key)
    noisy, time, target = (np.asarray(x) for x in losses.draw_flow(key, losses.widened(actions, 6)))
    want = []
    for g, s in enumerate(robots):
        k = len(s["noisy"])
        state6 = np.pad(s["state"], (0, 6 - len(s["state"])))
        assert np.abs(noisy[0, g, :k, len(s["state"]) :]).min() > 0  # noise where the robot has no number
        v = reference(w, cfg.expert.ada, s["ids"][: s["prompt"]], noisy[0, g, :k], time[0, g], state6)
        real = mask[0, g, :k]
        want.append(np.mean((v[:, :5] - target[0, g, :k, :5])[real] ** 2))
    np.testing.assert_allclose(loss, np.mean(want), rtol=1e-4)
    np.testing.assert_allclose(sums["flow_sum"], want, rtol=1e-4)
    # the two steps that the shorter robot does not have, and padding's sample
    other = dataclasses.replace(batch, actions=actions.at[0, 0, 3:].set(7.0).at[0, 2].set(-3.0))
    np.testing.assert_allclose(run(params, other, key)[0], loss, rtol=1e-6)
    assert abs(run(params, dataclasses.replace(batch, chunk=np.full((1, 3), 5, np.int32)), key)[0] - loss) > 1e-4
    # each step draws anew
    assert abs(run(params, batch, jax.random.key(6))[0] - loss) > 1e-3


def test_both_objectives_in_one_pass():
    """Insulated, the decoder's gradient is that of the tokens alone and the expert's that of the flow alone; otherwise all is their sum.
    flow_weight scales the flow's."""
    cfg = dataclasses.replace(cfg_of(False), language=dataclasses.replace(C, depth=1))
    params = jax.jit(vla.init, static_argnums=0)(cfg, jax.random.key(0))
    batch, actions, _ = batch_of([[sample(np.random.default_rng(4)), sample(np.random.default_rng(5))]])
    target = np.where(batch.block > 0, batch.tokens, 0).astype(np.int32)
    batch = dataclasses.replace(
        batch, actions=actions, action_mask=np.asarray(actions) != 0, target=target, loss_weight=(batch.block > 0).astype(np.float32),
        dataset=np.array([[0, 1, -1]], np.int32),
    )  # fmt: skip

    def gradient(**train):
        loss = lambda p: step.loss_fn(p, settings(**train), cfg, batch, jax.random.key(1), datasets=2)[0]
        return tree.flatten(jax.jit(jax.grad(loss))(params))

    tokens, flow = gradient(objective="tokens"), gradient(objective="flow")
    free, bound = gradient(objective="both", insulate=False, flow_weight=0.5), gradient(objective="both", flow_weight=0.5)
    for path in tokens:
        np.testing.assert_allclose(free[path], tokens[path] + 0.5 * flow[path], atol=2e-6, err_msg=path)
        np.testing.assert_allclose(bound[path], 0.5 * flow[path] if path.startswith("expert/") else tokens[path], atol=2e-6, err_msg=path)
    assert np.abs(flow["llm/layers/attn/kv_einsum/w"]).max() > 1e-4
    assert not any(np.asarray(g).any() for p, g in tokens.items() if p.startswith("expert/"))


def test_insulation_by_gradients(model):
    """With it the decoder gets exactly no gradient from the velocities, and the expert the same as without."""
    cfg, _, params = model
    batch, noisy, time = batch_of([[sample(np.random.default_rng(4)), sample(np.random.default_rng(5))]])
    weights = jnp.asarray(np.random.default_rng(6).normal(size=noisy.shape).astype(np.float32))

    def gradients(insulated):
        loss = lambda p: (vla.flow(cfg, p, batch, noisy, time, insulated=insulated)[1] * weights).sum()
        return tree.flatten(jax.jit(jax.grad(loss))(params))

    free, bound = gradients(False), gradients(True)
    for path, g in bound.items():
        if path.startswith("expert/"):
            np.testing.assert_allclose(np.asarray(g), np.asarray(free[path]), atol=1e-5, err_msg=path)
        else:
            assert not np.asarray(g).any(), path
    reached = [p for p in free if p.startswith("llm/layers") and np.abs(np.asarray(free[p])).max() > 1e-4]
    assert len(reached) >= 5


def test_integration_is_eulers(model):
    """Against the reference's velocities, step by step, from the same noise; prompts of different lengths in rows or in one row, robots
    of 6 and 4 numbers. Where a robot has no number the expert sees noise on its way to zero; companions change nothing."""
    cfg, w, params = model
    made = [sample(np.random.default_rng(i), prompt=5 + i, suffix=0) for i in range(2)]
    made[1]["state"][4:] = 0
    run = jax.jit(lambda p, b, key, dims: decode.integrate(cfg, p, b, key, chunk=STEPS, dims=dims, steps=4))
    key = jax.random.key(3)
    batch, _, _ = batch_of([[s] for s in made], samples=1)
    apart = np.asarray(run(params, batch, key, np.array([[6], [4]])))
    packed = np.asarray(run(params, batch_of([made], samples=2)[0], key, np.array([[6, 4]])))
    alone = np.asarray(run(params, batch_of([made[:1]], samples=1)[0], key, np.array([[6]])))
    np.testing.assert_allclose(alone[0], apart[0], atol=1e-5)
    for got, place in ((apart[0, 0], (0, 0)), (apart[1, 0], (1, 0)), (packed[0, 0], (0, 0)), (packed[0, 1], (0, 1))):
        s, dims = made[sum(place)], (6, 4)[sum(place)]
        at = jax.random.fold_in(jax.random.fold_in(key, place[0]), place[1])
        noise = np.stack([jax.random.normal(jax.random.fold_in(at, k), (6,)) for k in range(STEPS)]).astype(np.float64)
        x = noise.copy()
        for t in (1.0, 0.75, 0.5, 0.25):
            x[:, dims:] = t * noise[:, dims:]
            x = x - reference(w, cfg.expert.ada, s["ids"], x, t, s["state"]) / 4
        np.testing.assert_allclose(got[:, :dims], x[:, :dims], atol=5e-5)
        assert not got[:, dims:].any()


def test_flow_loss_never_touches_what_a_robot_does_not_have():
    """Its value is numpy's mean over real numbers; its gradient is exactly zero elsewhere."""
    rng = np.random.default_rng(0)
    velocity, target = rng.normal(size=(2, 3, 4, 5)).astype(np.float32), rng.normal(size=(2, 3, 4, 5)).astype(np.float32)
    mask = np.zeros((2, 3, 4, 5), bool)
    mask[0, 0, :3, :2], mask[0, 1], mask[1, 2, :1, :4] = True, True, True
    loss, real = losses.flow_loss(velocity, target, mask)
    assert np.asarray(real).tolist() == [[True, True, False], [False, False, True]]
    for at in ((0, 0), (0, 1), (1, 2)):
        np.testing.assert_allclose(loss[at], np.mean((velocity[at] - target[at])[mask[at]] ** 2), rtol=1e-6)
    grad = np.asarray(jax.grad(lambda v: losses.flow_loss(v, target, mask)[0].sum())(velocity))
    assert (grad[~mask] == 0).all() and (grad[mask] != 0).all()
    found = losses.flow_per_dataset(loss, real, np.array([[1, 0, -1], [-1, -1, 1]]), 2)
    np.testing.assert_allclose(found["flow_sum"], [loss[0, 1], loss[0, 0] + loss[1, 2]], rtol=1e-6)
    np.testing.assert_allclose(found["flow_samples"], [1, 2])


def test_times_and_noise_of_a_step():
    """Beta(1.5, 1) between 0.001 and 1, whose mean is 0.6; a straight path, whose slope is the target."""
    actions = jnp.asarray(np.random.default_rng(0).normal(size=(64, 64, 2, 1)).astype(np.float32))
    noisy, time, target = losses.draw_flow(jax.random.key(0), actions)
    assert 0.001 <= float(time.min()) and float(time.max()) <= 1 and abs(float(time.mean()) - 0.6) < 0.01
    at = np.asarray(time)[..., None, None]
    noise = np.asarray(target) + np.asarray(actions)
    np.testing.assert_allclose(np.asarray(noisy), at * noise + (1 - at) * np.asarray(actions), atol=1e-5)
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05


def test_import_command_brings_the_expert(model, tmp_path, monkeypatch, capsys):
    """A tree as openpi has it, through the command, is what a run with that expert begins with."""
    cfg, w, want = model
    ada = ":ada" * cfg.expert.ada
    monkeypatch.setitem(presets.PRESETS, "small", (V, C))
    monkeypatch.setitem(presets.EXPERTS, "small", (E.width, E.mlp))
    with ocp.PyTreeCheckpointer() as writer:
        writer.save(tmp_path / "pi" / "params", {"params": tree.unflatten(w)})
    out = tmp_path / "out"
    assert cli.main(["import", str(tmp_path / "pi"), "--format=openpi", "--preset=small", "--image-size=16", f"--out={out}"]) == 0
    assert f"model.expert=small{ada}, model.expert_dims=6" in capsys.readouterr().out
    wanted = presets.resolve(
        "small", vocab=VOCAB, image_size=16, state_dim=0, dtype="float32", remat="none", expert=f"small{ada}", expert_dims=6
    )
    assert wanted == cfg
    got = tree.flatten(pretrained.load(out, "native", cfg, vla.shardings(cfg, sharding.make_mesh(1, 8, 1))))
    for path, x in tree.flatten(want).items():
        np.testing.assert_array_equal(np.asarray(got[path]), np.asarray(x), err_msg=path)


FLOW = ["model.expert=tiny", "model.expert_dims=8"]


def first_step(actor, request):
    """Of a chunk that may be longer than the robot's."""
    batch = actor._batch([request], 1, 0)
    return np.asarray(actor._integrate(actor.params, batch, jax.random.key(0), chunk=4, dims=[[request.dims]]))[0, 0, 0]


def test_a_run_with_both_learns_and_its_policy_acts_both_ways(tiny, tmp_path):
    c = tiny(
        "data.mixture=tabletop_arm",
        "train.objective=both",
        "train.steps=24",
        "train.lr=5e-3",
        "train.log_every=1",
        "model.expert=tiny",
        "model.expert_dims=8",
    )
    run = loop.prepare(c, tmp_path / "run")
    loop.train(run, quiet=True)
    lines = [line for line in metrics.read(tmp_path / "run") if "train/loss" in line]
    for name in run.source.names:
        curve = [line[f"train/dataset/{name}/flow"] for line in lines if f"train/dataset/{name}/flow" in line]
        assert np.mean(curve[-8:]) < 0.9 * np.mean(curve[:4]), name
    # the same weights and the same batch at another step: other noise
    tx, flows = optim.make(c.train), []
    train_step = step.make_train_step(c, run.cfg, tx, run.mesh, state.shardings(run.cfg, tx, run.mesh, with_ema=False)[1], datasets=1)
    with Stream(run.source) as stream:
        batch = feed.to_device(next(stream)[0], run.mesh)
    with jax.set_mesh(run.mesh):
        for at in (0, 0, 1):
            now = state.create(run.cfg, tx, run.mesh, seed=0, with_ema=False)
            flows.append(float(train_step(dataclasses.replace(now, step=now.step + at), batch)[1]["datasets"]["flow_sum"][0]))
    assert flows[0] == flows[1] and abs(flows[0] - flows[2]) > 1e-3
    found = evaluate.run(c, tmp_path / "run", frames=2)
    assert all({"nll", "flow", "mae", "flow_mae", "baseline"} <= set(found[name]) for name in run.source.names)
    out = export.export(tmp_path / "run", tmp_path / "out")
    for head in ("", "tokens"):
        for name, robot in policy.load_all(out, head=head).items():
            ((chunk, valid),) = robot.act([TabletopEnv(name).reset(EVAL_SEED)])
            assert robot.actor.head == (head or "flow") and valid and chunk.shape == (robot.steps, len(robot.card.action.dims))
            assert np.isfinite(chunk).all()
            if robot.actor.head == "flow":  # the state and the length of the chunk reach the expert
                seen = robot._request(TabletopEnv(name).reset(EVAL_SEED))
                other = dataclasses.replace(seen, state=seen.state + 0.5), dataclasses.replace(seen, steps=4)
                first = [first_step(robot.actor, request) for request in (seen, *other)]
                assert min(np.abs(x - first[0]).max() for x in first[1:]) > 1e-4
                # its weights over eight devices: the same answer (of tokens: test_model)
                divided = policy.Policy.load(out, robot=name, head=head, mesh=sharding.make_mesh(1, 4, 2))
                assert not divided.actor.params["llm"]["layers"]["mlp"]["linear"].sharding.is_fully_replicated
                np.testing.assert_allclose(divided.act([TabletopEnv(name).reset(EVAL_SEED)])[0][0], chunk, atol=1e-4)


def test_rows_of_the_flow_alone_hold_prompts_alone(tiny, tmp_path):
    """What the expert cannot see is not computed; as many samples have a loss as in rows with action tokens."""
    loss, tokens = {}, {}
    for objective in ("flow", "both"):
        run = loop.prepare(tiny(f"train.objective={objective}", "pack.samples=2", "pack.length=128", *FLOW), tmp_path / objective)
        with Stream(run.source) as stream:
            batch = next(stream)[0]
        c = dataclasses.replace(run.config, train=dataclasses.replace(run.config.train, objective="flow"))
        params = jax.jit(vla.init, static_argnums=0)(run.cfg, jax.random.key(0))
        sums = jax.jit(lambda p, b, c=c, cfg=run.cfg: step.loss_fn(p, c, cfg, b, jax.random.key(1), datasets=3)[1])(params, batch)
        tokens[objective] = int((batch.segment > 0).sum())
        real = batch.dataset >= 0
        assert batch.chunk[real].tolist() == [run.source.steps(d) for d in batch.dataset[real]] and len(set(batch.chunk[real].tolist())) > 1
        seen = vla.prompts(batch.segment, batch.block, 2)[0]
        assert (int(seen.sum()) == tokens[objective]) == (objective == "flow")
        loss[objective] = sums["flow_samples"].sum()
        assert not batch.loss_weight.any() or objective == "both"
    assert tokens["flow"] < tokens["both"] and loss["flow"] == loss["both"] == 16


def test_refusals(tiny, tmp_path):
    with pytest.raises(UserError, match="train.objective=flow needs an action expert"):
        config.Config(train=config.Train(objective="flow"))
    with pytest.raises(UserError, match="model.expert is 'huge'"):
        loop.prepare(tiny("model.expert=huge"), tmp_path)
    with pytest.raises(UserError, match="more than model.expert_dims 4"):
        loop.prepare(tiny("model.expert=tiny", "model.expert_dims=4"), tmp_path)
