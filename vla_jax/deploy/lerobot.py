"""A policy folder of LeRobot (its type `pi0_fast`), for one robot. LeRobot returns a random model, with a line of text, where a file
does not fit: so what is written is held against its names and shapes in tests/test_export_lerobot.py."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from vla_jax.deploy import hf, hf_tokenizers
from vla_jax.deploy.openpi import PI0_FAST, TEXT
from vla_jax.deploy.trained import Robot, Trained
from vla_jax.models.weights_out import hf_tensors, save_shards
from vla_jax.types import UserError

ROOT = "model.paligemma_with_expert.paligemma."
NAMES = {
    "vision": f"{ROOT}model.vision_tower.vision_model.",
    "language": f"{ROOT}model.language_model.",
    "projector": f"{ROOT}model.multi_modal_projector.linear.",
}
EMBEDDING, HEAD = f"{ROOT}model.language_model.embed_tokens.weight", f"{ROOT}lm_head.weight"
SHAPE = (*PI0_FAST, TEXT, 224)  # what LeRobot builds, and nothing else: vision, language, rows of the embedding, pixels
_TEXT_TOKENS = 250


def check(t: Trained, *, robot: str) -> list[str]:
    """What the model card must say. Raises: UserError for what pi0_fast has no place for."""
    r, c = t.named(robot), t.config
    if not t.layout.openpi:
        raise UserError(
            f"{t.run} was trained with tokens.layout={c.tokens.layout}; LeRobot's pi0_fast knows pi0-FAST's: tokens.layout=openpi."
        )
    hf.refuse_parts(t, "LeRobot's pi0_fast")
    if c.tokens.action != "fast":
        raise UserError(f"{t.run} was trained with tokens.action={c.tokens.action}; LeRobot's pi0_fast decodes FAST tokens only")
    if c.data.history > 1:
        raise UserError(f"{t.run} sees {c.data.history} steps (data.history); LeRobot's pi0_fast sees one")
    if not r.card.state.dims or not r.views:
        raise UserError(f"robot {r.card.name} has no {'cameras' if r.card.state.dims else 'state'}, which LeRobot's pi0_fast needs")
    found = (t.cfg.vision, t.cfg.language, t.cfg.vocab, t.cfg.image_size)
    if wrong := [
        f"{name} {x} (there: {y})" for name, x, y in zip(("vision", "language", "rows of the embedding", "pixels"), found, SHAPE) if x != y
    ]:
        raise UserError(
            f"LeRobot's pi0_fast is of one size (preset 3b, model.vocab={TEXT}, data.image_size=224), and {t.run} differs: {'; '.join(wrong)}"
        )
    return [
        f"For the robot `{r.card.name}`; the run's others: {', '.join(o.card.name for o in t.robots if o is not r) or 'none'}.",
        "Loaded by `PI0FastPolicy.from_pretrained(FOLDER)` and `make_pre_post_processors(policy.config, FOLDER)`. `config.json` and "
        "`policy_preprocessor.json` name the tokenizers by this folder's path: after moving it, put the new one in (`sed -i`). The action "
        "tokenizer is the program `fast/fast_processor.py`, which LeRobot executes (trust_remote_code).",
        "**LeRobot puts a second `<bos>` between prompt and actions**, which this run has never seen there: expect worse actions than from a "
        "native export until it has been trained on with LeRobot.",
        "LeRobot does not lower the case of a task: give it in lower case, as it was trained on.",
        f"Cameras: {', '.join(camera(v) for v in r.views)}, in this order; one that is missing is masked. Pictures of another shape are padded to a "
        "square there, where this run stretched them.",
        "Prompts are padded to the right; positions count real tokens only, so this changes nothing.",
        "States and actions beyond q01..q99 were clipped at 1.5 times the range in training; LeRobot does not clip. A binary dimension comes "
        "back as any number: compare it with 0.5.",
        "A malformed answer is cut or filled up with zero coefficients there, without a word; answers are not kept to the grammar of actions.",
    ]


def camera(view: str) -> str:
    return f"observation.images.{view}"


def tensors(t: Trained, weights: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """All that its state_dict has; the tied table under both of its names, since it is loaded strictly."""
    for name, x in hf_tensors(t.cfg, weights, NAMES):
        yield name, x
        if name == EMBEDDING:
            yield HEAD, x


def write(t: Trained, folder: Path, *, dtype: str, robot: str, shard_bytes: int, place: Path) -> None:
    """Into `folder`, which will be moved to `place`. shard_bytes: LeRobot reads one file only. Raises: what `check` does."""
    check(t, robot=robot)
    r = t.named(robot)
    save_shards(tensors(t, t.cast(dtype)), folder, "model", shard_bytes=1 << 62, about={"format": "pt"})
    features = {camera(v): {"type": "VISUAL", "shape": [3, t.cfg.image_size, t.cfg.image_size]} for v in r.views}
    features |= {"observation.state": {"type": "STATE", "shape": [len(r.card.state.dims)]}}
    actions = {"action": {"type": "ACTION", "shape": [len(r.card.action.dims)]}}
    modes = {"VISUAL": "IDENTITY", "STATE": "QUANTILES", "ACTION": "QUANTILES"}
    names = {"text_tokenizer_name": str(place / "text"), "action_tokenizer_name": str(place / "fast")}
    limit = t.layout.limit or _TEXT_TOKENS
    config = {
        "type": "pi0_fast",
        "n_obs_steps": 1,
        "input_features": features,
        "output_features": actions,
        "device": None,
        "push_to_hub": False,
        "paligemma_variant": "gemma_2b",
        "dtype": "bfloat16" if dtype == "bf16" else "float32",
        "chunk_size": r.steps,
        "n_action_steps": r.steps,
        "max_state_dim": len(r.card.state.dims),
        "max_action_dim": len(r.card.action.dims),
        "image_resolution": [t.cfg.image_size] * 2,
        "tokenizer_max_length": limit,
        **names,
        "normalization_mapping": modes,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=4))
    pipelines(folder, r, features, actions, modes, names, limit)
    (folder / "text").mkdir()
    hf_tokenizers.text(t.layout.text, folder / "text", {})
    hf_tokenizers.fast(t.layout.action, folder / "fast")


def pipelines(folder: Path, r: Robot, features: dict, actions: dict, modes: dict, names: dict, limit: int) -> None:
    """policy_preprocessor.json and policy_postprocessor.json with their statistics."""
    norm = {"eps": 1e-8, "norm_map": modes}
    device = {"device": "cpu", "float_dtype": None}
    before = [
        ("rename_observations_processor", {"rename_map": {}}),
        ("to_batch_processor", {}),
        ("normalizer_processor", {**norm, "features": {**features, **actions}}),
        ("pi0_fast_prepare_state_tokenizer_processor_step", {"max_state_dim": len(r.card.state.dims)}),
        (
            "tokenizer_processor",
            {
                "max_length": limit,
                "task_key": "task",
                "padding_side": "right",
                "padding": "max_length",
                "truncation": True,
                "tokenizer_name": names["text_tokenizer_name"],
            },
        ),
        (
            "action_tokenizer_processor",
            {
                "trust_remote_code": True,
                "max_action_tokens": 256,
                "action_tokenizer_name": names["action_tokenizer_name"],
                "paligemma_tokenizer_name": names["text_tokenizer_name"],
            },
        ),
        ("device_processor", device),
    ]
    after = [("unnormalizer_processor", {**norm, "features": actions}), ("device_processor", device)]
    stats = {f"observation.state.{k}": v for k, v in r.quantiles("state").items()}
    stats |= {f"action.{k}": v for k, v in r.quantiles("action").items()}
    for name, steps in (("policy_preprocessor", before), ("policy_postprocessor", after)):
        told = [{"registry_name": step, "config": config} for step, config in steps]
        for i, entry in enumerate(told):
            if "normalizer" in entry["registry_name"]:
                entry["state_file"] = f"{name}_step_{i}_{entry['registry_name']}.safetensors"
                save_file(stats, folder / entry["state_file"])
        (folder / f"{name}.json").write_text(json.dumps({"name": name, "steps": told}, indent=2))
