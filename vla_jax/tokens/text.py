"""Text tokens: a SentencePiece model, one of this project's or a user's own (Gemma, PaliGemma)."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from pathlib import Path

import numpy as np

from vla_jax import paths
from vla_jax.types import UserError

LOCATIONS, SEGMENTS = 1024, 128  # PaliGemma's pieces for places in a picture and shapes of a mask, last in its vocabulary
KEPT = 512  # characters of a text whose ids are kept: one that is longer seldom comes again, and thousands of them would fill memory
_SPECIAL = ("pad", "eos", "bos", "unk")


@dataclasses.dataclass(frozen=True)
class TextTokenizer:
    """`model` is the serialised SentencePiece model, so that it travels inside checkpoints and exports."""

    model: bytes = dataclasses.field(repr=False)

    @functools.cached_property
    def _sp(self):
        import sentencepiece

        try:
            sp = sentencepiece.SentencePieceProcessor(model_proto=self.model)
        except RuntimeError as e:
            raise UserError(f"text model is no SentencePiece model: {e}") from e
        missing = [name for name in _SPECIAL if getattr(sp, f"{name}_id")() < 0]
        if missing:
            raise UserError(
                f"text model lacks the special pieces {', '.join(missing)}; Gemma's and PaliGemma's have pad 0, eos 1, bos 2, unk 3. "
                f"Train it with {', '.join(f'--{name}_id' for name in missing)} set."
            )
        return sp

    def check_writes(self, text: str) -> None:
        """Raises: UserError naming the characters of `text` that this model cannot write and read back."""
        lost = [c for c in dict.fromkeys(text) if self.unk in self.encode(f"a{c}a") or self.decode(self.encode(f"a{c}a")) != f"a{c}a"]
        if lost:
            raise UserError(
                f"the text model cannot write {', '.join(map(repr, lost))}, which prompts hold. Train it with --byte_fallback and "
                "--normalization_rule_name=identity, or use Gemma's or the default one."
            )

    def check_paligemma(self, action_vocab: int, spoken: str) -> None:
        """Raises: UserError, naming what is missing, unless special ids and last pieces are as PaliGemma has them, and `action_vocab`
        ids fit below the segmentation pieces without reaching special ones, or those of the words `spoken` around actions."""
        sp, found = self._sp, {name: getattr(self, name) for name in _SPECIAL}
        wrong = [f"{name} is {i}, not {want}" for want, (name, i) in enumerate(found.items()) if i != want]
        first = sp.vocab_size() - SEGMENTS - LOCATIONS
        for start, name, count, digits in ((first, "loc", LOCATIONS, 4), (first + LOCATIONS, "seg", SEGMENTS, 3)):
            want = [f"<{name}{i:0{digits}}>" for i in range(count)]
            have = [sp.id_to_piece(i) if i >= 0 else "" for i in range(start, start + count)]
            if off := [w for w, h in zip(want, have) if w != h]:
                wrong.append(f"{len(off)} of the {count} pieces {want[0]}..{want[-1]} are not at ids {start}..{start + count - 1}")
        if wrong:
            raise UserError(
                f"the text model is not PaliGemma-shaped, as layout openpi needs it: {'; '.join(wrong)}. "
                "Use PaliGemma's tokenizer.model or the default one, or tokens.layout=native."
            )
        used = {i for i in range(sp.vocab_size()) if sp.is_byte(i) or sp.is_control(i)} | {i for c in spoken for i in self.encode(c)}
        room = sp.vocab_size() - SEGMENTS - 1 - max(used | set(self.encode(spoken)))
        if action_vocab > room:
            raise UserError(
                f"{action_vocab} action ids do not fit below the last {SEGMENTS} ids of this text model: from {room} on prompts use them"
            )

    @property
    def vocab_size(self) -> int:
        return self._sp.vocab_size()

    @property
    def pad(self) -> int:
        return self._sp.pad_id()

    @property
    def bos(self) -> int:
        return self._sp.bos_id()

    @property
    def eos(self) -> int:
        return self._sp.eos_id()

    @property
    def unk(self) -> int:
        return self._sp.unk_id()

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.model).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """Ids without BOS and EOS."""
        return (self._kept(text) if len(text) <= KEPT else self._encode(text)).tolist()

    @functools.cached_property
    def _kept(self):
        """The same few thousand prompts come again and again."""
        return functools.lru_cache(maxsize=1 << 12)(self._encode)

    def _encode(self, text: str) -> np.ndarray:
        """i32[n]: a tenth of the memory of a list of as many."""
        return np.array(self._sp.encode(text), np.int32)

    def piece(self, id: int) -> str:
        return self._sp.id_to_piece(id)

    def decode(self, ids: list[int]) -> str:
        return self._sp.decode(ids)


def load(path: str = "") -> TextTokenizer:
    """A `.model` file, or the name of one of this project's: default (8,192 pieces; also what "" means) or tiny (1,024, for models of
    a size that a CPU trains). Raises: UserError when it is absent or no SentencePiece model with pad, eos, bos and unk."""
    named = path in ("", "default", "tiny")
    file = paths.find("data", f"text/{path or 'default'}.model") if named else Path(path).expanduser()
    if not file.is_file():
        raise UserError(
            f"text model {file} {'is a folder' if file.is_dir() else 'does not exist'}. Set tokens.text_model to a SentencePiece .model file, to tiny, or leave it empty for the default."
        )
    tokenizer = TextTokenizer(file.read_bytes())
    tokenizer.vocab_size  # noqa: B018  a broken file is refused here, not in a thread later
    return tokenizer
