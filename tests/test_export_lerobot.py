"""The folder for LeRobot: names and shapes always; loaded by LeRobot itself where one is installed here, or in the Python that
launch/oracles.sh makes or VLA_LEROBOT_PYTHON names (LeRobot wants versions that the rest of the tests cannot have)."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from lively import lively, logits, other_python
from safetensors.numpy import load_file

from vla_jax.data.stats import Normalizer
from vla_jax.deploy import export, hf, lerobot, trained
from vla_jax.tokens.sequence import Embodiment
from vla_jax.types import UserError

ROBOT = "tabletop_arm"


@pytest.fixture(scope="module")
def made(openpi_run, tmp_path_factory):
    """(what was exported, the folder): the size that LeRobot builds is set to the run's."""
    t = lively(trained.read(openpi_run))
    with pytest.MonkeyPatch.context() as m:
        m.setattr(lerobot, "SHAPE", (t.cfg.vision, t.cfg.language, t.cfg.vocab, t.cfg.image_size))
        m.setattr(trained, "read", lambda *a, **k: t)
        out = export.export(openpi_run, tmp_path_factory.mktemp("lerobot") / "out", kind="lerobot", robot=ROBOT)
    return t, out


def expected_names(depth, layers):
    """All 604 of the full size, by hand: 27 and 18 layers."""
    root = "model.paligemma_with_expert.paligemma."
    seen, said = f"{root}model.vision_tower.vision_model.", f"{root}model.language_model."
    names = {f"{root}lm_head.weight", f"{said}embed_tokens.weight", f"{said}norm.weight"}
    names |= {f"{root}model.multi_modal_projector.linear.{x}" for x in ("weight", "bias")}
    names |= {f"{seen}embeddings.{x}" for x in ("patch_embedding.weight", "patch_embedding.bias", "position_embedding.weight")}
    names |= {f"{seen}post_layernorm.{x}" for x in ("weight", "bias")}
    for i in range(depth):
        parts = ["layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2", *(f"self_attn.{p}_proj" for p in ("q", "k", "v", "out"))]
        names |= {f"{seen}encoder.layers.{i}.{p}.{x}" for p in parts for x in ("weight", "bias")}
    for i in range(layers):
        parts = ["input_layernorm", "post_attention_layernorm", *(f"mlp.{p}_proj" for p in ("gate", "up", "down"))]
        names |= {f"{said}layers.{i}.{p}.weight" for p in [*parts, *(f"self_attn.{p}_proj" for p in ("q", "k", "v", "o"))]}
    return names


def test_names_and_shapes(made):
    t, out = made
    file, v, c = load_file(out / "model.safetensors"), t.cfg.vision, t.cfg.language
    assert len(expected_names(27, 18)) == 604
    assert file.keys() == expected_names(v.depth, c.depth)
    at = lambda name: next(x.shape for n, x in file.items() if n.endswith(name))
    assert at("patch_embedding.weight") == (v.width, 3, v.patch, v.patch)
    assert at("multi_modal_projector.linear.weight") == (c.width, v.width)
    assert at("language_model.layers.0.self_attn.q_proj.weight") == (c.heads * c.head_dim, c.width)
    assert at("language_model.layers.0.self_attn.v_proj.weight") == (c.kv_heads * c.head_dim, c.width)
    assert at("language_model.layers.1.self_attn.o_proj.weight") == (c.width, c.heads * c.head_dim)
    assert at("mlp.gate_proj.weight") == (c.mlp, c.width) and at("mlp.down_proj.weight") == (c.width, c.mlp)
    assert at("position_embedding.weight") == (t.cfg.tokens_per_image, v.width)
    assert np.array_equal(file[lerobot.HEAD], file[lerobot.EMBEDDING])


def test_what_lies_around_the_weights(made):
    t, out = made
    config = json.loads((out / "config.json").read_text())
    assert config["type"] == "pi0_fast" and config["chunk_size"] == config["n_action_steps"] == 2
    assert list(config["input_features"]) == ["observation.images.base", "observation.images.wrist", "observation.state"]
    before, after = (json.loads((out / f"policy_{x}processor.json").read_text())["steps"] for x in ("pre", "post"))
    for step in (before[2], after[0]):
        stats = load_file(out / step["state_file"])
        want = t.named(ROBOT).quantiles("action")
        assert all(np.array_equal(stats[f"action.{k}"], x) for k, x in want.items())
        assert set(step["config"]["norm_map"].values()) == {"IDENTITY", "QUANTILES"}
    assert before[5]["config"]["paligemma_tokenizer_name"] == config["text_tokenizer_name"] == str(out / "text")
    assert "second `<bos>`" in (out / "README.md").read_text()


def test_what_cannot_be_exported_is_refused_before_anything_is_written(openpi_run, tmp_path):
    with pytest.raises(UserError, match=r"which with --robot; there are: tabletop_slider, tabletop_arm"):
        export.export(openpi_run, tmp_path / "out", kind="lerobot")
    with pytest.raises(UserError, match=r"of one size .*rows of the embedding 8192 \(there: 257152\); pixels 48 \(there: 224\)"):
        export.export(openpi_run, tmp_path / "out", kind="lerobot", robot=ROBOT)
    assert not list(tmp_path.iterdir())


def test_lerobot_loads_it_and_says_the_same(made, tmp_path):
    """Every tensor; prompt ids; logits within 1e-4 (of a spread of units, float32 on both sides), behind pads too; the ids that its two
    samplers choose, which are ours if a second BOS ends the prompt; FAST decoding; and robot units."""
    python = other_python("lerobot")
    if not python:
        pytest.skip("no LeRobot here: sh launch/oracles.sh, or VLA_LEROBOT_PYTHON")
    t, out = made
    r, rng, layout = t.named(ROBOT), np.random.default_rng(3), t.layout
    state = r.stats["state"].mean + 0.3 * r.stats["state"].std
    images = rng.integers(0, 256, (2, t.cfg.image_size, t.cfg.image_size, 3), np.uint8)
    who = Embodiment(r.card.name, r.card.control_hz, r.steps, r.card.action.dims)
    prompt = layout.prompt(who, "push the red_block", Normalizer.make(r.stats["state"], r.card.state.dims).normalize(state))
    prefix = layout.prefix(images=0, prompt=prompt)
    normal = Normalizer.make(r.stats["action"], r.card.action.dims)
    actions = normal.denormalize(np.float32([[0.5, -0.25, 1.0], [-0.75, 0.1, -1.0]]))
    ids = layout.action.encode(normal.normalize(actions))
    chunk, valid = layout.action.decode(ids, steps=2, dims=3)
    postfix = np.array([*layout.opening, *layout.ids[ids], *layout.closing])
    ours, greedy = logits(t, images, prefix, postfix), []
    assert valid and ours.std() > 0.3
    begun = [logits(t, images, p, np.array([], int))[-1] for p in (prefix, np.append(prefix, layout.text.bos))]
    assert np.abs(begun[0] - begun[1]).max() > 0.3  # a second BOS is no small thing
    for _ in range(6):
        greedy.append(int(logits(t, images, np.append(prefix, layout.text.bos), np.array(greedy, int))[-1].argmax()))
    given = {"images": images, "state": state.astype(np.float32), "task": "push the red_block", "prompt": prefix, "postfix": postfix}
    given |= {"logits": ours[len(prefix) - 1 :], "greedy": greedy, "answer": postfix, "chunk": chunk, "actions": normal.denormalize(chunk)}
    given["size"] = json.dumps(hf.config(t.cfg, "float32"))
    np.savez(tmp_path / "given.npz", **given)
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ""}
    command = [python, str(Path(__file__).with_name("lerobot_reads.py")), str(out), str(tmp_path / "given.npz")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **quiet}, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    report = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("REPORT "))[7:])
    assert report.pop("names") == {"missing": [], "superfluous": [], "count": 16 * 2 + 7 + 9 * 2 + 3} and "differ" not in report
    assert report.pop("encoded") == [layout.text.bos, *postfix.tolist()], report
    report.pop("keys")
    assert len(report) == 7
    for name, found in report.items():
        assert found["shape"] and found["off"] <= found["tolerance"], (name, found)
    print(report)
