"""PaliGemma as `transformers` loads it: the model without anything of ours around it."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np

from vla_jax.deploy import hf_tokenizers
from vla_jax.deploy.trained import Trained
from vla_jax.models.presets import VLAConfig
from vla_jax.models.weights_out import hf_tensors, save_shards
from vla_jax.types import UserError

# as the published checkpoints have them, which every version of transformers reads
NAMES = {"vision": "vision_tower.vision_model.", "language": "language_model.model.", "projector": "multi_modal_projector.linear."}


def check(t: Trained, *, robot: str) -> list[str]:
    """What the model card must say. Raises: UserError for what PaliGemma has no place for."""
    refuse_parts(t, "PaliGemma")
    ids = (
        "Action tokens are those of layout openpi: `vocab_size - 1 - 128 - t` of the tokenizer."
        if t.layout.openpi
        else (f"Action token t is id {t.layout.text.vocab_size} + t, called `<action t>` in the tokenizer here.")
    )
    return [
        f"{ids} What they mean only a native export says: statistics, cards and the action tokenizer are not part of this format.",
        f"The image token is id {t.cfg.vocab}; an image takes {t.cfg.tokens_per_image} of them, before `<bos>` (no second newline behind the "
        "prompt: call the tokenizer, not PaliGemmaProcessor, which adds one).",
        "The prompt sees itself as a whole (token_type_ids 0), what is predicted is causal (1).",
    ]


def refuse_parts(t: Trained, target: str) -> None:
    """Raises: UserError for an action expert, or a state that is a projected token."""
    if t.cfg.expert:
        raise UserError(
            f"{t.run} has an action expert (model.expert={t.config.model.expert}), which {target} has no place for. Use --format native or openpi."
        )
    if t.cfg.state_dim:
        raise UserError(
            f"{t.run} reads the robot's state as a projected token (tokens.state=continuous), which {target} has no place for: only "
            "runs with tokens.state=text or none can be exported to it."
        )


def write(t: Trained, folder: Path, *, dtype: str, robot: str, shard_bytes: int, place: Path) -> None:
    """Into `folder`. All tensors in one dtype, since from_pretrained makes them so. Raises: what `check` does."""
    check(t, robot=robot)
    kind = ml_dtypes.bfloat16 if dtype == "bf16" else np.float32
    tensors = ((name, x.astype(kind)) for name, x in hf_tensors(t.cfg, t.params, NAMES))
    save_shards(tensors, folder, "model", shard_bytes=shard_bytes, about={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config(t.cfg, "bfloat16" if dtype == "bf16" else "float32"), indent=1))
    said = {"bos_token_id": t.layout.text.bos, "eos_token_id": t.layout.text.eos, "pad_token_id": t.layout.text.pad}
    (folder / "generation_config.json").write_text(json.dumps(said, indent=1))
    pixels = {"image_processor_type": "SiglipImageProcessor", "do_resize": True, "do_rescale": True, "do_normalize": True, "resample": 2}
    pixels |= {"size": dict.fromkeys(("height", "width"), t.cfg.image_size), "image_seq_length": t.cfg.tokens_per_image}
    pixels |= {"rescale_factor": 1 / 255, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels, indent=1))
    behind = {} if t.layout.openpi else {int(at): f"<action {i}>" for i, at in enumerate(t.layout.ids)}
    behind |= {t.layout.text.vocab_size + i: f"<earlier action {i}>" for i in range(t.layout.behind)}
    behind |= {i: f"<unused {i}>" for i in range(t.layout.vocab_size, t.cfg.vocab)}
    hf_tokenizers.text(t.layout.text, folder, behind | {t.cfg.vocab: "<image>"})


def config(cfg: VLAConfig, dtype: str) -> dict:
    """config.json of PaliGemmaForConditionalGeneration."""
    v, c = cfg.vision, cfg.language
    text = {
        "model_type": "gemma2" if c.post_norms else "gemma",
        "hidden_size": c.width,
        "intermediate_size": c.mlp,
        "num_hidden_layers": c.depth,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "vocab_size": cfg.vocab,
        "num_image_tokens": cfg.tokens_per_image,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
    }
    if c.post_norms:
        text |= {"query_pre_attn_scalar": c.head_dim, "attn_logit_softcapping": c.attn_cap, "final_logit_softcapping": c.logit_cap}
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": v.width,
        "intermediate_size": v.mlp,
        "num_hidden_layers": v.depth,
        "num_attention_heads": v.heads,
        "patch_size": v.patch,
        "image_size": cfg.image_size,
        "projection_dim": c.width,
        "num_image_tokens": cfg.tokens_per_image,
        "vision_use_head": False,
    }
    return {
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "model_type": "paligemma",
        "dtype": dtype,
        "torch_dtype": dtype,
        "image_token_index": cfg.vocab,
        "hidden_size": c.width,
        "projection_dim": c.width,
        "tie_word_embeddings": True,
        "text_config": text,
        "vision_config": vision,
    }
