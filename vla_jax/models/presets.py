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
    attention: str = "auto"  # a kernel of attention.py

    @property
    def tokens_per_image(self) -> int:
        return (self.image_size // self.vision.patch) ** 2


# SigLIP and SigLIP 2 (Tschannen et al., 2025) by patch size; they differ in training, not in shape
VISIONS = {
    "b16": Vision(768, 12, 12, 3072, 16),
    "l16": Vision(1024, 24, 16, 4096, 16),
    "so400m_14": Vision(1152, 27, 16, 4304, 14),
    "so400m_16": Vision(1152, 27, 16, 4304, 16),
    "g_opt_16": Vision(1536, 40, 16, 6144, 16),
}
_GEMMA_2 = {"post_norms": True, "attn_cap": 50.0, "logit_cap": 30.0}
LANGUAGES = {
    "gemma_2b": Language(2048, 18, 8, 1, 256, 16384),
    "gemma_7b": Language(3072, 28, 16, 16, 256, 24576),
    "gemma2_2b": Language(2304, 26, 8, 4, 256, 9216, **_GEMMA_2),
    "gemma2_9b": Language(3584, 42, 16, 8, 256, 14336, **_GEMMA_2),
}
# Any VISION+LANGUAGE of the above is a preset, too.
PRESETS = {
    "tiny": (Vision(32, 2, 2, 64, 16), Language(32, 2, 2, 1, 16, 64)),
    "debug": (Vision(96, 2, 3, 256, 8), Language(128, 4, 4, 1, 32, 384)),
    "demo": (Vision(96, 2, 3, 256, 16), Language(128, 2, 4, 1, 32, 256)),
    "100m": (Vision(384, 12, 6, 1536, 16), Language(640, 12, 8, 1, 128, 2560)),
    "300m": (VISIONS["b16"], Language(1024, 14, 8, 1, 128, 4096)),
    "1b": (VISIONS["so400m_14"], Language(1152, 18, 8, 1, 256, 6144)),
    "3b": (VISIONS["so400m_14"], LANGUAGES["gemma_2b"]),  # PaliGemma
    "paligemma2_3b": (VISIONS["so400m_14"], LANGUAGES["gemma2_2b"]),
    "paligemma2_10b": (VISIONS["so400m_14"], LANGUAGES["gemma2_9b"]),
}
EXPERTS = {"none": None, "tiny": (24, 48), "debug": (64, 192), "demo": (64, 192), "300m": (1024, 4096)}  # width, mlp; the last is pi0's
DTYPES, REMAT, ATTENTION = ("bfloat16", "float32"), ("none", "full", "attention", "dots", "offload"), ("auto", "xla", "cudnn", "splash")


def parts(preset: str) -> tuple[Vision, Language]:
    """Raises: UserError for an unknown preset."""
    vision, _, language = preset.partition("+")
    if vision in VISIONS and language in LANGUAGES:
        return VISIONS[vision], LANGUAGES[language]
    if preset not in PRESETS:
        pairs = f"{'|'.join(VISIONS)}+{'|'.join(LANGUAGES)}"
        raise UserError(f"model.preset is {preset!r}; there are: {', '.join(PRESETS)}, and {pairs}")
    return PRESETS[preset]


def tokens_per_image(preset: str, image_size: int) -> int:
    """Raises: UserError for an unknown preset or an image size that its patch does not divide."""
    patch = parts(preset)[0].patch
    if image_size % patch or image_size < patch:
        near = max(patch, round(image_size / patch) * patch)
        raise UserError(f"data.image_size {image_size} is not a multiple of the patch size {patch} of preset {preset}. Nearest: {near}.")
    return (image_size // patch) ** 2


def resolve(
    preset: str,
    *,
    vocab: int,
    image_size: int,
    state_dim: int,
    dtype: str,
    remat: str,
    expert: str = "none",
    expert_dims: int = 32,
    attention: str = "auto",
) -> VLAConfig:
    """vocab is rounded up to a multiple of 128, so that it divides over meshes and fills matrix tiles. expert: a key of EXPERTS, with
    `:ada` behind it for pi0.5's norms. Raises: UserError for an unknown setting."""
    tokens_per_image(preset, image_size)
    for key, value, allowed in (("dtype", dtype, DTYPES), ("remat", remat, REMAT), ("attention", attention, ATTENTION)):
        if value not in allowed:
            raise UserError(f"model.{key} is {value!r}; allowed: {', '.join(allowed)}")
    size, _, kind = expert.partition(":")
    if size not in EXPERTS or kind not in ("", "ada"):
        raise UserError(f"model.expert is {expert!r}; there are: {', '.join(EXPERTS)}, and each with :ada behind it")
    made = EXPERTS[size] and Expert(*EXPERTS[size], kind == "ada", expert_dims)
    vision, language = parts(preset)
    return VLAConfig(vision, language, -(-vocab // 128) * 128, image_size, state_dim, dtype, remat, made, attention=attention)
