"""The token sequence of one sample: images, state, prompt (all see each other), then action tokens (causal); in two layouts."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import numpy as np

from vla_jax import config
from vla_jax.tokens.bins import state_bins, state_text
from vla_jax.tokens.grammar import Grammar
from vla_jax.tokens.text import KEPT, SEGMENTS, TextTokenizer
from vla_jax.types import IMAGE, STATE, ActionTokenizer, Dim, UserError

_COUNT = np.arange(1, 4097, dtype=np.int32)
LAYOUTS, STATES = ("native", "openpi"), ("continuous", "text", "none")


@dataclasses.dataclass(frozen=True)
class Sequence:
    """One sample's tokens i32[n], of which the first `prefix` are given and the others are to be predicted; `cut` more did not fit.

    From these follow position i32[n] (0, 1, ..), block i32[n] (0 = prefix, then 1, 2, ..), target i32[n] and loss_weight f32[n]:
    `target[i]` is the id that follows position i, and the last prefix position predicts the first action token. The weights of a
    sample sum to one, so that a robot with long chunks does not outweigh one with short ones (as in openpi).
    """

    tokens: np.ndarray
    prefix: int
    cut: int = 0

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
        if n:
            block[first:] = _COUNT[:n] if n <= len(_COUNT) else np.arange(1, n + 1)
            target[first - 1 : -1] = self.tokens[first:]
            loss_weight[first - 1 : -1] = 1 / n

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(position, block, target, loss_weight)."""
        out = np.zeros(self.length, np.int32), np.zeros(self.length, np.int32), np.zeros(self.length, np.float32)
        self.fill(*out)
        return np.arange(self.length, dtype=np.int32), *out


@dataclasses.dataclass(frozen=True)
class Embodiment:
    """The robot that a prompt speaks of. tag: the name of its dataset's card; steps: of a chunk; dims: of an action."""

    tag: str
    control_hz: float
    steps: int
    dims: tuple[Dim, ...]

    @functools.cached_property
    def name(self) -> str:
        return self.tag.removesuffix("_converted_externally_to_rlds")

    @functools.cached_property
    def described(self) -> str:
        """Who it is, its control rate, and what a chunk's numbers mean: `bridge_dataset, 5 Hz, 5 steps of 3 m delta base, ..`: how many
        numbers in a row are of one unit, kind and frame."""
        runs = itertools.groupby(self.dims, key=lambda d: " ".join([*([d.unit] if d.unit != "1" else []), d.kind, d.frame]))
        space = ", ".join(f"{len(list(run))} {what}" for what, run in runs)
        return f"{self.name}, {self.control_hz:g} Hz, {self.steps} steps of {space}"


@dataclasses.dataclass(frozen=True)
class Prompt:
    """The text that is given. Only `task` may be shortened."""

    head: str
    task: str
    tail: str

    @property
    def text(self) -> str:
        return self.head + self.task + self.tail


@dataclasses.dataclass(frozen=True)
class Layout:
    """How samples become sequences. Which images and whether a continuous state come first is the same in both layouts; then

    native: BOS, `{robot}: {task}{; state: bins}\\n`, actions, EOS. The robot is described in words (`describe`: with control rate and
    action space, else its name alone), so that one model can be told which robot it drives. Action ids have a range of their own
    behind the text's and the `behind` ids of earlier tokenizers, which robots of before go on to speak: token t is
    text.vocab_size + behind + t. `limit`: most tokens of the prompt; beyond them the task is cut.

    openpi: pi0-FAST's convention, byte for byte: BOS, `Task: {task}, State: {bins};\\n`, then predicted `Action: `, actions, `|`, EOS. Token
    t is text.vocab_size - 1 - 128 - t. `limit`: most tokens of all text (there 250; 180 with one arm); beyond them the end is cut.

    Source of openpi: its FASTTokenizer. limit 0: none. action may be None where only prompts are wanted.
    """

    text: TextTokenizer
    action: ActionTokenizer
    tokens_per_image: int
    state: str  # continuous (one projected token) | text (bins in the prompt) | none
    name: str = "native"
    describe: bool = True
    limit: int = 0
    behind: int = 0

    def __post_init__(self):
        """Raises: UserError for settings that contradict each other, or a text model that does not suit the layout."""
        for key, value, allowed in (("layout", self.name, LAYOUTS), ("state", self.state, STATES)):
            if value not in allowed:
                raise UserError(f"tokens.{key} is {value!r}; allowed: {', '.join(allowed)}")
        if self.openpi:
            if self.state != "text":
                raise UserError(f"tokens.layout=openpi writes the state into the prompt; set tokens.state=text, not {self.state}")
        self.text.check_writes("0123456789,:;-_.\n|")
        if self.openpi:
            self.text.check_paligemma(self.action.vocab_size if self.action else 0, "Task: , State: 0123456789-;\nAction: |")
            if len(self.closing) != 2 or self.closing[0] in self.opening:
                raise UserError("layout openpi ends its actions with `|`, which this text model does not write as one piece of its own")

    @classmethod
    def of(
        cls, settings: config.Tokens, text: TextTokenizer, action: ActionTokenizer | None, tokens_per_image: int, *, behind: int = 0
    ) -> Layout:
        """As a run's settings want it. Raises: UserError."""
        s = settings
        return cls(text, action, tokens_per_image, s.state, name=s.layout, describe=s.describe, limit=s.limit, behind=behind)

    @property
    def openpi(self) -> bool:
        return self.name == "openpi"

    @property
    def vocab_size(self) -> int:
        """Ids in use."""
        return self.text.vocab_size + (0 if self.openpi else self.behind + self.action.vocab_size)

    @functools.cached_property
    def opening(self) -> tuple[int, ...]:
        """What stands between prompt and actions, and is predicted."""
        return tuple(self.text.encode("Action: ")) if self.openpi else ()

    @functools.cached_property
    def closing(self) -> tuple[int, ...]:
        """What stands behind the actions."""
        return (*(self.text.encode("|") if self.openpi else ()), self.text.eos)

    @functools.cached_property
    def _around(self) -> tuple[np.ndarray, np.ndarray]:
        return np.array(self.opening, np.int32), np.array(self.closing, np.int32)

    @functools.cached_property
    def ids(self) -> np.ndarray:
        """i32[action.vocab_size]: the id of each action token."""
        count = np.arange(self.action.vocab_size, dtype=np.int32)
        return self.text.vocab_size - 1 - SEGMENTS - count if self.openpi else self.text.vocab_size + self.behind + count

    @property
    def grammar(self) -> Grammar:
        """Which action tokens may follow between `opening` and `closing`."""
        return self.action.grammar

    def prompt(self, who: Embodiment, instruction: str, state: np.ndarray | None = None) -> Prompt:
        """state: f32[s] normalised. Raises: ValueError when it is to be written into the prompt and is missing or holds NaN."""
        if self.state == "text" and state is None:
            raise ValueError("the state belongs into this layout's prompt (tokens.state=text), and none was given")
        cleaned = instruction.lower().strip().replace("_", " ")
        if self.openpi:
            return Prompt("Task: ", cleaned, f", State: {state_text(state)};\n")
        written = f"; state: {' '.join(map(str, np.clip(state_bins(state), 0, 255)))}" if self.state == "text" else ""
        return Prompt(f"{who.described if self.describe else who.name}: ", " ".join(cleaned.split()), f"{written}\n")

    def check_limit(self, who: Embodiment, state_dims: int) -> None:
        """Raises: UserError when `limit` leaves no token for the task (native), or none for an action (openpi)."""
        prompt = self.prompt(who, "", np.ones(state_dims))  # bins of three digits
        least = 2 + len(self.text.encode(prompt.head)) + len(self.text.encode(prompt.tail)) + len(self.opening)
        if self.limit and self.limit < least:
            raise UserError(
                f"tokens.limit {self.limit} is below the {least} tokens that a prompt of {who.tag} has without its task. Raise --config.tokens.limit, "
                "or set it to 0."
            )

    def prefix(self, *, images: int, prompt: Prompt) -> np.ndarray:
        """i32[n] of the part that is given when acting; not to be changed, it is kept."""
        return self._given(images, prompt)[0]

    def cut(self, *, images: int, prompt: Prompt) -> int:
        """How many tokens of a prompt do not fit `limit`."""
        return self._given(images, prompt)[1]

    def _given(self, images: int, prompt: Prompt) -> tuple[np.ndarray, int]:
        """(ids, how many did not fit)."""
        return (self._kept if len(prompt.task) <= KEPT else self._make_prefix)(images, prompt)

    @functools.cached_property
    def _kept(self):
        return functools.lru_cache(maxsize=1 << 12)(self._make_prefix)  # the same prompts come again and again

    def _make_prefix(self, images: int, prompt: Prompt) -> tuple[np.ndarray, int]:
        ids = [self.text.bos, *self.text.encode(prompt.text)]
        over = max(0, len(ids) - self.limit) if self.limit else 0
        if over and self.openpi:
            ids = ids[: self.limit]
        elif over:
            behind = len(self.text.encode(prompt.tail))
            keep = max(1 + len(self.text.encode(prompt.head)), self.limit - behind)  # only the task is cut
            ids, over = ids[:keep] + ids[len(ids) - behind :], len(ids) - behind - keep
        before = [IMAGE] * (images * self.tokens_per_image) + [STATE] * (self.state == "continuous")
        return np.array(before + ids, np.int32), max(0, over)

    def build(self, *, images: int, prompt: Prompt, action_tokens: np.ndarray | None) -> Sequence:
        """action_tokens: i32[t], a chunk as `action.encode` gives it; None: the prompt alone, as an action expert's flow needs it."""
        given, cut = self._given(images, prompt)
        if action_tokens is None:
            return Sequence(given, len(given), cut)
        opening, closing = self._around
        tokens = np.concatenate([given, opening, self.ids.take(action_tokens), closing])
        if self.openpi and self.limit:
            text = len(tokens) - images * self.tokens_per_image
            over = max(0, text - self.limit)
            tokens, cut = tokens[: len(tokens) - over], cut + over
        return Sequence(tokens, len(given), cut)

    def action_tokens(self, ids: np.ndarray) -> np.ndarray:
        """Generated ids i32[t] -> i64, the action tokens before the closing, for `action.decode`. An id that stands where it must not
        becomes -1, which no decoder takes for valid."""
        ids = np.asarray(ids, np.int64)
        begin = len(self.opening)
        opened = tuple(ids[:begin].tolist()) == self.opening
        ids = ids[begin:] if opened else ids
        end = np.flatnonzero(ids == self.closing[0])
        tokens = ids[: end[0] if end.size else len(ids)]
        tokens = self.ids[0] - tokens if self.openpi else tokens - self.ids[0]
        tokens = np.where((tokens >= 0) & (tokens < self.action.vocab_size), tokens, -1)
        return tokens if opened and end.size else np.append(tokens, -1)
