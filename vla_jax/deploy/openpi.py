"""openpi's checkpoint folder: params/ as Orbax keeps it, assets/NAME/norm_stats.json for each robot."""

from __future__ import annotations

import json
from pathlib import Path

from vla_jax import tree
from vla_jax.deploy import hf_tokenizers
from vla_jax.deploy.trained import Trained
from vla_jax.models import presets
from vla_jax.models.weights_out import openpi_name
from vla_jax.types import UserError

PI0_FAST = presets.parts("3b")  # what openpi builds for gemma_2b
TEXT = 257152  # pieces of the text model that openpi fetches: PaliGemma's


def check(t: Trained, *, robot: str) -> list[str]:
    """What the model card must say. Raises: UserError for what openpi would misread."""
    if not t.layout.openpi:
        raise UserError(
            f"{t.run} was trained with tokens.layout={t.layout.name}, whose prompt and action ids openpi does not know. "
            "Only runs with tokens.layout=openpi can be exported to it."
        )
    if t.config.tokens.action != "fast" and not t.cfg.expert:
        raise UserError(f"{t.run} was trained with tokens.action={t.config.tokens.action}; openpi's pi0-FAST decodes FAST tokens only")
    if t.config.data.history > 1:
        raise UserError(f"{t.run} sees {t.config.data.history} steps (data.history); openpi's models see one")
    kind = "pi0_fast" if not t.cfg.expert else "pi05" if t.cfg.expert.ada else "pi0"
    notes = [f"Parameters are named as those of openpi's `{kind}`."]
    if (t.cfg.vision, t.cfg.language) != PI0_FAST or t.cfg.vocab != TEXT or t.cfg.image_size != 224:
        notes.append(
            f"**openpi builds no model of this size by itself**: preset {t.config.model.preset}, {t.cfg.vocab} rows of the embedding and "
            f"{t.cfg.image_size} pixels, where its gemma_2b has So400m/14, {TEXT} rows and 224. Its code must be given these numbers."
        )
    if t.layout.text.vocab_size != TEXT:
        notes.append(
            f"**Not PaliGemma's text model** ({t.layout.text.vocab_size} pieces), which openpi fetches by itself: give it `text.model`."
        )
    if not t.cfg.expert:
        notes.append(
            "openpi's FASTTokenizer must be given the tokenizer in `fast/` (fast_tokenizer_path). It decodes by way of text, which from "
            "id 1024 on loses some sequences, and answers a malformed one with zeros."
        )
    if t.cfg.expert:
        notes.append(
            "openpi's prompt differs from the one that this expert was trained with: pi0 gives the task and a newline, pi05 adds `Action: ` "
            "behind the state. Train a little with openpi, or act with a native export."
        )
    cameras = [f"{r.card.name}: {', '.join(r.views)}" for r in t.robots]
    return notes + [
        "openpi feeds three cameras, black ones where a robot has fewer, and they are seen; this run left absent ones out "
        f"(cameras in order: {'; '.join(cameras)}).",
        "States and actions beyond q01..q99 were clipped at 1.5 times the range in training; openpi does not clip. It adds 1e-6 to the range.",
    ]


def write(t: Trained, folder: Path, *, dtype: str, robot: str, shard_bytes: int, place: Path) -> None:
    """Into `folder`. shard_bytes: Orbax divides its files by itself. Raises: what `check` does."""
    import orbax.checkpoint as ocp

    check(t, robot=robot)
    named = tree.unflatten({openpi_name(path): w for path, w in t.cast(dtype).items()})
    with ocp.PyTreeCheckpointer() as writer:
        writer.save((folder / "params").absolute(), {"params": named})
    for r in t.robots:
        stats = {key: r.quantiles(group) for key, group in (("state", "state"), ("actions", "action"))}
        told = {key: {name: s[name].tolist() for name in ("mean", "std", "q01", "q99")} for key, s in stats.items()}
        place = folder / "assets" / r.card.name
        place.mkdir(parents=True)
        (place / "norm_stats.json").write_text(json.dumps({"norm_stats": told}, indent=2))
    (folder / "text.model").write_bytes(t.layout.text.model)
    if t.config.tokens.action == "fast":
        hf_tokenizers.fast(t.layout.action, folder / "fast")
