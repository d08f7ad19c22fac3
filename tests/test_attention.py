"""Every kernel against plain XLA: splash in interpret mode and compiled ahead of time for TPUs, cuDNN where there is a GPU."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vla_jax import sharding
from vla_jax.data import feed
from vla_jax.models import attention, presets, vla
from vla_jax.train import loop, optim, state, step
from vla_jax.types import Batch, UserError

assert feed
GPU = jax.default_backend() == "gpu"  # these run with JAX_PLATFORMS=cuda
# b, t, s, heads, kv, head_dim, masked, cap: Gemma's shared head, groups and odd lengths with Gemma 2's cap, SigLIP's heads of 72
CASES = [(2, 256, 256, 4, 1, 16, True, 0.0), (1, 130, 201, 4, 2, 24, True, 5.0), (2, 128, 128, 2, 2, 72, False, 0.0)]


def inputs(case, dtype=np.float32):
    b, t, s, heads, kv, hd, masked, _ = case
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(dtype)
    q, k, v, weight = draw(b, t, heads, hd) * 3 * hd**-0.5, draw(b, s, kv, hd), draw(b, s, kv, hd), draw(b, t, heads, hd)
    mask = None
    if masked:
        mask = rng.random((b, t, s)) < 0.4
        mask[:, :, -100:] = False  # a tile without anything to see
        mask[:, 5] = False  # a query that sees nothing, as in padding, whose result has no part in the loss
        weight[:, 5] = 0
    return (q, k, v), mask, weight


def value_and_grads(fn, arrays, weight):
    loss = lambda q, k, v: (fn(q, k, v).astype(jnp.float32) * weight).sum()
    return jax.tree.leaves(jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*arrays))


@pytest.mark.parametrize("case", CASES)
def test_splash_equals_xla(case):
    """Values and gradients, in float32: a softmax in tiles adds in another order."""
    arrays, mask, weight = inputs(case)
    want = value_and_grads(lambda q, k, v: attention._xla(q, k, v, mask, case[-1]), arrays, weight)
    got = value_and_grads(lambda q, k, v: attention._splash(q, k, v, mask, most=case[-1], interpret=True), arrays, weight)
    for g, w in zip(got, want):
        np.testing.assert_allclose(g, w, atol=1e-5 * max(1.0, np.abs(w).max()))


@pytest.mark.parametrize("mesh, kv", [((2, 2, 2), 1), ((1, 2, 4), 2), ((2, 1, 4), 4)])
def test_sharded_over_rows_and_heads(mesh, kv):
    """One head shared by all, groups that no device holds whole, and a head each."""
    case = (4, 128, 128, 4, kv, 16, True, 0.0)
    arrays, mask, weight = inputs(case)
    want = value_and_grads(lambda q, k, v: attention._xla(q, k, v, mask, 0.0), arrays, weight)
    kernel = functools.partial(attention._splash, most=0.0, interpret=True)
    with jax.set_mesh(sharding.make_mesh(*mesh)):
        got = value_and_grads(lambda q, k, v: attention._sharded(kernel, q, k, v, mask), arrays, weight)
    for g, w in zip(got, want):
        np.testing.assert_allclose(g, w, atol=1e-5 * max(1.0, np.abs(w).max()))


def test_chosen_by_platform_and_shape():
    pick = lambda where, t, *, hd=256, dtype="bfloat16", most=0.0, kernel="auto": attention.choose(
        kernel, where, (2, t, 8, hd), (2, t, 1, hd), dtype, most
    )
    assert [pick(p, 1024, hd=128) for p in ("cpu", "gpu", "tpu")] == ["xla", "cudnn", "splash"]
    assert [pick(p, 1024) for p in ("cpu", "gpu", "tpu")] == ["xla", "xla", "splash"]
    assert [pick(p, 1, hd=128) for p in ("cpu", "gpu", "tpu")] == ["xla"] * 3 and pick("tpu", 1, kernel="splash") == "xla"
    assert pick("gpu", 1024, hd=128, most=50.0) == pick("gpu", 1024, hd=128, dtype="float32") == pick("gpu", 1024, hd=100) == "xla"
    assert pick("tpu", 1024, most=50.0) == "splash" and pick("tpu", 256) == "xla"
    assert pick("cpu", 1024, kernel="cudnn") == "cudnn"  # named: used, or refused below


def test_a_kernel_that_cannot_be_used_says_why(tiny, tmp_path):
    with pytest.raises(UserError, match="'splash', which cannot be used here: splash attention is a TPU's, and this is cpu"):
        loop.prepare(tiny("model.attention=splash"), tmp_path)
    with pytest.raises(UserError, match="model.attention is 'flash'; allowed: auto, xla, cudnn, splash"):
        loop.prepare(tiny("model.attention=flash"), tmp_path)
    q = jnp.zeros((1, 128, 2, 16))
    with pytest.raises(UserError, match="cuDNN needs an NVIDIA GPU, and this is cpu"):
        attention.attention(q, q, q, None, kernel="cudnn")
    why = functools.partial(attention.why_not, "cudnn", "gpu")
    assert "caps them at 50" in why(256, "bfloat16", 50.0) and "model.dtype is float32" in why(256, "float32", 0.0)
    assert "these have 264" in why(264, "bfloat16", 0.0) and not why(72, "bfloat16", 0.0)


@pytest.fixture(scope="module")
def topology():
    """topology(name, data, fsdp, tensor) -> a mesh of TPUs that are described, not there."""
    pytest.importorskip("libtpu", reason="the extra `tpu` is not installed")
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

    def made(name, *sizes):
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
        return Mesh(np.array(devices).reshape(sizes), sharding.AXES, axis_types=(AxisType.Auto,) * 3)

    return made


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
@pytest.mark.parametrize("heads, kv, hd, masked, most", [(8, 1, 256, True, 0.0), (8, 4, 256, True, 50.0), (16, 16, 72, False, 0.0)])
def test_splash_compiles_for_tpus(topology, name, heads, kv, hd, masked, most):
    """Forward and backward of Gemma's, Gemma 2's and SigLIP's heads, divided over chips; three kernels are in the program."""
    mesh = topology(name, 1, -1, 2)
    rows = PartitionSpec(sharding.BATCH)
    given = lambda shape, axes, dtype: jax.ShapeDtypeStruct(
        shape, dtype, sharding=NamedSharding(mesh, sharding.RULES.spec(axes, shape, mesh) if axes else rows)
    )
    n, axes = 1024, ("batch", None, "heads", None)
    q, k = given((4, n, heads, hd), axes, jnp.bfloat16), given((4, n, kv, hd), axes, jnp.bfloat16)
    mask = given((4, n, n), None, jnp.bool_) if masked else None

    def grads(q, k, v, mask):
        return jax.grad(lambda q, k, v: attention.attention(q, k, v, mask, most=most).astype(jnp.float32).sum(), (0, 1, 2))(q, k, v)

    with jax.set_mesh(mesh):
        compiled = jax.jit(grads).lower(q, k, k, mask).compile()
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 3


@pytest.mark.slow
def test_a_training_step_with_splash_compiles_for_a_tpu(topology, tiny, tmp_path):
    """The whole step, layers scanned and made again in the backward pass, for four chips."""
    config = tiny("model.attention=auto", "model.dtype=bfloat16", "model.remat=full", "pack.length=512", "pack.rows=4")
    cfg = presets.resolve("debug", vocab=512, image_size=48, state_dim=4, dtype="bfloat16", remat="full", attention="splash")
    mesh, tx = topology("v5e:2x2", 1, 2, 2), optim.make(config.train)
    abstract, where = state.shardings(cfg, tx, mesh, with_ema=False)
    shaped = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    shape = {f: (4, 512) for f in ("tokens", "segment", "position", "block", "target", "loss_weight")}
    shape |= {"images": (4, 4, 48, 48, 3), "state": (4, 4, 4), "actions": (4, 4, 8, 7), "action_mask": (4, 4, 8, 7), "dataset": (4, 4)}
    kind = {"images": jnp.uint8, "loss_weight": jnp.float32, "state": jnp.float32, "actions": jnp.float32, "action_mask": jnp.bool_}
    place = sharding.batch_sharding(mesh)
    made = {f: jax.ShapeDtypeStruct(s, kind.get(f, jnp.int32), sharding=place) for f, s in shape.items()}
    batch = Batch(**made)
    with jax.set_mesh(mesh):
        attention.check(cfg)
        made = step.make_train_step(config, cfg, tx, mesh, where, datasets=3)
        text = made.lower(jax.tree.map(shaped, abstract, where), batch).compile().as_text()
    # forward, forward again, and the two of the backward pass
    assert text.count('custom_call_target="tpu_custom_call"') >= 4


@pytest.mark.skipif(not GPU, reason="no GPU")
@pytest.mark.parametrize(
    "case", [(2, 256, 256, 8, 1, 256, True, 0.0), (1, 131, 201, 4, 2, 64, True, 0.0), (4, 256, 256, 16, 16, 72, False, 0.0)]
)
def test_cudnn_equals_xla(case):
    """Values and gradients in bfloat16, each no further from float32's than twice as far as XLA's own bfloat16."""
    arrays, mask, weight = inputs(case)
    exact = value_and_grads(lambda q, k, v: attention._xla(q, k, v, mask, 0.0), arrays, weight)
    rough = [jnp.asarray(a, jnp.bfloat16) for a in arrays]
    plain = value_and_grads(lambda q, k, v: attention._xla(q, k, v, mask, 0.0), rough, weight)
    flash = value_and_grads(lambda q, k, v: attention.attention(q, k, v, mask, kernel="cudnn"), rough, weight)
    off = lambda a, b: np.sqrt(np.mean((np.asarray(a, np.float32) - np.asarray(b, np.float32)) ** 2))
    for e, p, f in list(zip(exact, plain, flash))[1:]:
        assert np.isfinite(np.asarray(f, np.float32)).all() and off(f, e) < 2 * off(p, e)


@pytest.mark.skipif(not GPU, reason="no GPU")
def test_a_gpu_takes_cudnn_by_itself():
    cfg = presets.resolve("debug", vocab=512, image_size=48, state_dim=0, dtype="bfloat16", remat="none")
    params = jax.jit(vla.init, static_argnums=0)(cfg, jax.random.key(0))
    ints = jnp.ones((2, 256), jnp.int32)
    position = jnp.broadcast_to(jnp.arange(256), (2, 256))
    images, robot = jnp.zeros((2, 1, 48, 48, 3), jnp.uint8), jnp.zeros((2, 1, 1))
    batch = Batch(images=images, tokens=ints, segment=ints, position=position, block=position, state=robot)
    text = jax.jit(functools.partial(vla.apply, cfg)).lower(params, batch).as_text()
    assert "cudnn$fmha" in text or "__cudnn" in text
