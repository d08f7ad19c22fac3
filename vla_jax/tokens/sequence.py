"""The token sequence of one sample: images, state, prompt (all see each other), then action tokens (causal)."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from vla_jax.tokens.actions import FastTokenizer
from vla_jax.tokens.text import TextTokenizer
from vla_jax.types import IMAGE, STATE

_COUNT = np.arange(1, 4097, dtype=np.int32)


@dataclasses.dataclass(frozen=True)
class Sequence:
    """One sample's tokens i32[n], of which the first `prefix` are given and the others are to be predicted.

    From these follow block i32[n] (0 = prefix, then 1, 2, ..), target i32[n] and loss_weight f32[n]: `target[i]` is the id that
    follows position i, and the last prefix position predicts the first action token. The weights of a sample sum to one, so that
    a robot with long chunks does not outweigh one with short ones (as in openpi).
    """

    tokens: np.ndarray
    prefix: int

    @property
    def length(self) -> int:
        return len(self.tokens)

    @property
    def targets(self) -> int:
        """Positions with a loss."""
        return len(self.tokens) - self.prefix

    def fill(self, block: np.ndarray, target: np.ndarray, loss_weight: np.ndarray) -> None:
        """Writes them into arrays [n] of zeros."""
        first, n = self.prefix, self.targets
        block[first:] = _COUNT[:n] if n <= len(_COUNT) else np.arange(1, n + 1)
        target[first - 1 : -1] = self.tokens[first:]
        loss_weight[first - 1 : -1] = 1 / n

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(block, target, loss_weight)."""
        out = np.zeros(self.length, np.int32), np.zeros(self.length, np.int32), np.zeros(self.length, np.float32)
        self.fill(*out)
        return out


@functools.lru_cache(maxsize=1 << 14)
def _task(instruction: str) -> str:
    return " ".join(instruction.strip().lower().replace("_", " ").split())


@dataclasses.dataclass(frozen=True)
class Layout:
    """Layout `native`: the prompt says which robot acts, and action ids have a range of their own behind
    the text vocabulary: id of action token t = text.vocab_size + t; the sequence ends with the text's EOS."""

    text: TextTokenizer
    action: FastTokenizer
    tokens_per_image: int
    state: bool

    @property
    def action_offset(self) -> int:
        return self.text.vocab_size

    @property
    def vocab_size(self) -> int:
        """Ids in use."""
        return self.text.vocab_size + self.action.vocab_size

    def prompt(self, robot: str, instruction: str) -> str:
        return f"{robot}: {_task(instruction)}\n"

    def prefix(self, *, images: int, prompt: str) -> np.ndarray:
        """i32[n] of the part that is given when acting; not to be changed, it is kept."""
        return self._prefix(images, prompt)

    @functools.cached_property
    def _prefix(self):
        return functools.lru_cache(maxsize=1 << 12)(self._make_prefix)  # the same prompts come again and again

    def _make_prefix(self, images: int, prompt: str) -> np.ndarray:
        image = np.full(images * self.tokens_per_image, IMAGE, np.int32)
        state = [STATE] if self.state else []
        return np.concatenate([image, np.array([*state, self.text.bos, *self.text.encode(prompt)], np.int32)])

    def build(self, *, images: int, prompt: str, action_tokens: np.ndarray) -> Sequence:
        """action_tokens: i32[t], a chunk as `action.encode` gives it."""
        prefix = self.prefix(images=images, prompt=prompt)
        first, n = len(prefix), len(prefix) + len(action_tokens) + 1
        tokens = np.empty(n, np.int32)
        tokens[:first], tokens[n - 1] = prefix, self.text.eos
        np.add(action_tokens, self.action_offset, out=tokens[first : n - 1], casting="same_kind")
        return Sequence(tokens, first)

    def action_ids(self, ids: np.ndarray) -> np.ndarray:
        """Generated ids i32[t] -> the action tokens before the first EOS, for `FastTokenizer.decode`."""
        ids = np.asarray(ids)
        end = np.flatnonzero(ids == self.text.eos)
        return ids[: end[0] if end.size else len(ids)] - self.action_offset
