"""Model sizes as data, and the one frozen description that every function of a model takes."""

from __future__ import annotations

import dataclasses

from vla_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class Vision:
    """SigLIP-style encoder (Zhai et al., 2023): pre-LN transformer over patches, learned positions, no class token."""

    width: int
    depth: int
    heads: int
    mlp: int
    patch: int


@dataclasses.dataclass(frozen=True)
class Language:
    """Gemma-style decoder (Gemma Team, 2024): RMSNorm, rotary positions, GeGLU, shared key/value heads. The last three are Gemma 2's:
    a norm behind attention and MLP, too, and caps c * tanh(x / c) on attention's scores and on the logits (0: none). Its sliding
    window of 4,096 tokens is longer than any row here, and left out."""

    width: int
    depth: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    post_norms: bool = False
    attn_cap: float = 0.0
    logit_cap: float = 0.0


@dataclasses.dataclass(frozen=True)
class Expert:
    """Action expert (Black et al., "pi0", 2024): a second stream as deep as the decoder, with its heads, narrower. ada: the flow's time
    modulates the norms (pi0.5) instead of being mixed into the action tokens; the state is then no token of the stream either."""

    width: int
    mlp: int
    ada: bool
    action_dim: int = 32  # numbers of an action, and of a state; robots with fewer are filled up with zeros


@dataclasses.dataclass(frozen=True)
class Lora:
    """Adapters of this rank on the weights whose path a pattern of `on` matches, times alpha / rank; see lora.py."""

    rank: int
    alpha: float
    on: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class VLAConfig:
    vision: Vision
    language: Language
    vocab: int
    image_size: int
    state_dim: int  # width of the projected state; 0: no state input
    dtype: str
    remat: str
    expert: Expert | None = None
    lora: Lora | None = None

    @property
    def tokens_per_image(self) -> int:
        return (self.image_size // self.vision.patch) ** 2


_SO400M = Vision(1152, 27, 16, 4304, 14)
PRESETS = {
    "tiny": (Vision(32, 2, 2, 64, 16), Language(32, 2, 2, 1, 16, 64)),
    "debug": (Vision(96, 2, 3, 256, 8), Language(128, 4, 4, 1, 32, 384)),
    "demo": (Vision(96, 2, 3, 256, 16), Language(128, 2, 4, 1, 32, 256)),
    "100m": (Vision(384, 12, 6, 1536, 16), Language(640, 12, 8, 1, 128, 2560)),
    "300m": (Vision(768, 12, 12, 3072, 16), Language(1024, 14, 8, 1, 128, 4096)),
    "1b": (_SO400M, Language(1152, 18, 8, 1, 256, 6144)),
    "3b": (_SO400M, Language(2048, 18, 8, 1, 256, 16384)),  # PaliGemma: SigLIP So400m/14 and Gemma 2B
    "paligemma2_3b": (_SO400M, Language(2304, 26, 8, 4, 256, 9216, post_norms=True, attn_cap=50.0, logit_cap=30.0)),  # Gemma 2 2B
}
EXPERTS = {"none": None, "tiny": (24, 48), "debug": (64, 192), "demo": (64, 192), "300m": (1024, 4096)}  # width, mlp; the last is pi0's
DTYPES, REMAT = ("bfloat16", "float32"), ("none", "full", "dots")


def tokens_per_image(preset: str, image_size: int) -> int:
    """Raises: UserError for an unknown preset or an image size that its patch does not divide."""
    if preset not in PRESETS:
        raise UserError(f"model.preset is {preset!r}; there are: {', '.join(PRESETS)}")
    patch = PRESETS[preset][0].patch
    if image_size % patch or image_size < patch:
        near = max(patch, round(image_size / patch) * patch)
        raise UserError(f"data.image_size {image_size} is not a multiple of the patch size {patch} of preset {preset}. Nearest: {near}.")
    return (image_size // patch) ** 2


def resolve(
    preset: str, *, vocab: int, image_size: int, state_dim: int, dtype: str, remat: str, expert: str = "none", expert_dims: int = 32
) -> VLAConfig:
    """vocab is rounded up to a multiple of 128, so that it divides over meshes and fills matrix tiles. expert: a key of EXPERTS, with
    `:ada` behind it for pi0.5's norms. Raises: UserError for an unknown setting."""
    tokens_per_image(preset, image_size)
    if dtype not in DTYPES or remat not in REMAT:
        raise UserError(f"model.dtype is {dtype!r} (allowed: {', '.join(DTYPES)}), model.remat is {remat!r} (allowed: {', '.join(REMAT)})")
    size, _, kind = expert.partition(":")
    if size not in EXPERTS or kind not in ("", "ada"):
        raise UserError(f"model.expert is {expert!r}; there are: {', '.join(EXPERTS)}, and each with :ada behind it")
    made = EXPERTS[size] and Expert(*EXPERTS[size], kind == "ada", expert_dims)
    vision, language = PRESETS[preset]
    return VLAConfig(vision, language, -(-vocab // 128) * 128, image_size, state_dim, dtype, remat, made)
