"""The folder for openpi, restored by the calls that openpi makes: in the Python that launch/oracles.sh makes or VLA_OPENPI_PYTHON names (with jax
0.5.3, flax 0.10.2 and orbax-checkpoint 0.11.13, which openpi pins), or in this one."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from lively import lively, other_python

from vla_jax import sharding, tree
from vla_jax.data.stats import Normalizer
from vla_jax.deploy import export, trained
from vla_jax.models import presets, pretrained, vla, weight_files, weights_out
from vla_jax.types import UserError

# openpi's restore_params (models/model.py), and what it found, as one .npz
READS = """
import pathlib, sys
import jax, jax.numpy as jnp, numpy as np, orbax.checkpoint as ocp

path = pathlib.Path(sys.argv[1]).resolve() / "params"
place = jax.sharding.NamedSharding(jax.sharding.Mesh(jax.devices(), ("x",)), jax.sharding.PartitionSpec())
found = {}
for name, kind, dtype in (("as it is", np.ndarray, None), ("on devices", jax.Array, None), ("in bfloat16", jax.Array, jnp.bfloat16)):
    with ocp.PyTreeCheckpointer() as reader:
        told = reader.metadata(path)
        told = told.item_metadata.tree if hasattr(told, "item_metadata") else told  # as newer Orbax has it
        item = {"params": told["params"]}
        how = ocp.ArrayRestoreArgs(sharding=place if kind is jax.Array else None, restore_type=kind, dtype=dtype)
        tree = reader.restore(path, ocp.args.PyTreeRestore(item=item, restore_args=jax.tree.map(lambda _: how, item)))["params"]
    for keys, x in jax.tree_util.tree_flatten_with_path(tree)[0]:
        found[name + ":" + "/".join(k.key for k in keys)] = np.asarray(x).astype(np.float32)
np.savez(sys.argv[2], versions=str((jax.__version__, ocp.__version__)), **found)
"""


def write(t, out, monkeypatch, **how):
    monkeypatch.setattr(trained, "read", lambda *a, **k: t)
    return export.export("run", out, kind="openpi", **how)


def restored(out, tmp_path):
    python, file = other_python("openpi"), tmp_path / "found.npz"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": ""}
    done = subprocess.run(
        [python or sys.executable, "-c", READS, str(out), str(file)], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = dict(np.load(file))
    versions = str(found.pop("versions"))
    assert not python or versions == str(("0.5.3", "0.11.13")), versions
    return found


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_openpi_restores_every_leaf(openpi_run, tmp_path, monkeypatch, dtype):
    import ml_dtypes

    t = lively(trained.read(openpi_run))
    found = restored(write(t, tmp_path / "out", monkeypatch, dtype=dtype), tmp_path)
    assert len(t.params) == 32 and len(found) == 3 * 32  # pi0-FAST has 32 leaves
    half = lambda w: w.astype(ml_dtypes.bfloat16).astype(np.float32)
    for path, w in t.params.items():
        rounded = half(w) if dtype == "bf16" and "norm" not in path.lower() else w
        np.testing.assert_array_equal(found[f"as it is:PaliGemma/{path}"], rounded, err_msg=path)
        np.testing.assert_array_equal(found[f"on devices:PaliGemma/{path}"], rounded, err_msg=path)
        np.testing.assert_array_equal(found[f"in bfloat16:PaliGemma/{path}"], half(w), err_msg=path)


@pytest.mark.parametrize("ada", [False, True], ids=["pi0", "pi05"])
def test_an_action_expert_goes_where_openpi_has_it_and_comes_back(openpi_run, tmp_path, monkeypatch, ada):
    t = trained.read(openpi_run)
    t = lively(t, cfg=dataclasses.replace(t.cfg, expert=presets.Expert(24, 48, ada)))
    out = write(t, tmp_path / "out", monkeypatch)
    names = {p: weights_out.openpi_name(p) for p in t.params}
    assert all(weight_files._of_openpi(there) == p for p, there in names.items()) and len(set(names.values())) == len(names)
    assert names["expert/layers/mlp/gating_einsum"] == "PaliGemma/llm/layers/mlp_1/gating_einsum"
    assert names["expert/layers/attn/q_einsum/w"] == "PaliGemma/llm/layers/attn/q_einsum_1/w"
    norm = "final_norm/Dense_0/kernel" if ada else "final_norm/plain/scale"
    assert names[f"expert/{norm}"] == f"PaliGemma/llm/final_norm_1/{norm.rpartition('/')[2] if not ada else 'Dense_0/kernel'}"
    assert names["expert/action_in_proj/kernel"] == "action_in_proj/kernel"
    where = vla.shardings(t.cfg, sharding.make_mesh(2, 2, 2))
    again = tree.flatten(pretrained.load(out, "openpi", t.cfg, where))
    assert all(np.array_equal(np.asarray(again[p]), w) for p, w in t.params.items())
    assert f"openpi's `{'pi05' if ada else 'pi0'}`" in (out / "README.md").read_text()


def test_statistics_give_by_openpis_formula_what_training_saw(openpi_run, tmp_path, monkeypatch):
    """Also of a gripper that is binary, and of a dimension in which nothing varied."""
    t = trained.read(openpi_run)
    r = t.named("tabletop_arm")
    odd = dataclasses.replace(
        r.stats["action"], q01=np.float32([-1, 0.25, 0]), q99=np.float32([2, 0.25, 0]), mean=np.float32([0, 0.25, 0.1])
    )
    r = dataclasses.replace(r, stats=r.stats | {"action": odd})
    out = write(dataclasses.replace(t, robots=(r,)), tmp_path / "out", monkeypatch)
    told = json.loads((out / "assets" / "tabletop_arm" / "norm_stats.json").read_text())["norm_stats"]
    assert set(told) == {"state", "actions"} and set(told["state"]) == {"mean", "std", "q01", "q99"}
    low, high = (np.array(told["actions"][q]) for q in ("q01", "q99"))
    x = np.array([[-1, 0.25, 0], [2, 0.25, 1], [0.7, 0.25, 1]])
    theirs = (x - low) / (high - low + 1e-6) * 2 - 1
    ours = Normalizer.make(odd, r.card.action.dims)
    np.testing.assert_allclose(theirs, ours.normalize(x), atol=3e-6)
    np.testing.assert_allclose((theirs + 1) / 2 * (high - low + 1e-6) + low, ours.denormalize(ours.normalize(x)), atol=3e-6)


def test_their_tokenizer_of_actions(openpi_run, tmp_path, monkeypatch):
    """The program in fast/, by itself: our ids, and our chunks back; a malformed answer is cut or filled up."""
    t = trained.read(openpi_run)
    out = write(t, tmp_path / "out", monkeypatch)
    code = f"""
import sys, json
for name in ("vla_jax", "jax", "transformers", "tokenizers"):
    sys.modules[name] = None
sys.path.insert(0, {str(out / "fast")!r})
import numpy as np
from fast_processor import FastProcessor
p = FastProcessor.from_pretrained({str(out / "fast")!r}, trust_remote_code=True)
chunks = np.random.default_rng(0).normal(size=(20, 5, 3)) / 2
ids = p(chunks)
print(json.dumps([ids, p.decode([*ids, ids[0][:2], ids[0] * 9], time_horizon=5, action_dim=3).tolist()]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr
    ids, back = json.loads(done.stdout)
    chunks = np.random.default_rng(0).normal(size=(20, 5, 3)) / 2
    ours = t.layout.action.encode_batch(chunks)
    assert ids == [x.tolist() for x in ours]
    odd = [*ours, ours[0][:2], np.tile(ours[0], 9)]
    np.testing.assert_allclose(back, t.layout.action.decode_batch(odd, steps=5, dims=3)[0], atol=1e-6)


def test_a_published_tokenizer_goes_back_into_its_own_files(tmp_path):
    pytest.importorskip("tokenizers")
    pytest.importorskip("scipy.fft")
    from test_fast_published import Processor

    from vla_jax.deploy import fast_processor, hf_tokenizers
    from vla_jax.tokens import published

    chunks = np.random.default_rng(1).normal(size=(200, 6, 4)) / 2
    Processor(chunks, vocab_size=400).save(tmp_path / "there")
    ours = published.load(tmp_path / "there")
    hf_tokenizers.fast(ours, tmp_path / "fast")
    assert published.load(tmp_path / "fast") == ours
    made = fast_processor.FastProcessor.from_pretrained(tmp_path / "fast")
    assert made(chunks[:50]) == [x.tolist() for x in ours.encode_batch(chunks[:50])]
    back = made.decode(made(chunks[:50]), time_horizon=6, action_dim=4)
    np.testing.assert_allclose(back, ours.decode_batch(made(chunks[:50]), steps=6, dims=4)[0], atol=1e-6)


def test_what_openpi_would_misread_is_refused_before_anything_is_written(openpi_run, tmp_path, monkeypatch):
    t = trained.read(openpi_run)
    changed = lambda group, **to: dataclasses.replace(
        t, config=dataclasses.replace(t.config, **{group: dataclasses.replace(getattr(t.config, group), **to)})
    )
    native = dataclasses.replace(t, layout=dataclasses.replace(t.layout, name="native"))
    for odd, said in (
        (native, "tokens.layout=native, whose prompt and action ids openpi does not know"),
        (changed("tokens", action="bins"), "tokens.action=bins; openpi's pi0-FAST decodes FAST tokens only"),
        (changed("data", history=2), "sees 2 steps"),
    ):
        with pytest.raises(UserError, match=said):
            write(odd, tmp_path / "out", monkeypatch)
    assert not list(tmp_path.iterdir())
    told = (Path(write(t, tmp_path / "out", monkeypatch)) / "README.md").read_text()
    assert "builds no model of this size" in told and "Not PaliGemma's text model" in told and "three cameras" in told
