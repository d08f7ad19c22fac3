"""The types that cross a room's door, and the one exception whose message is meant for the user.

Letters used in shapes throughout: `b` rows, `n` sequence, `g` samples (segments) in a row, `m` images in a row,
`h w` pixels, `k` chunk steps, `a` action dims, `s` state dims, `d` width, `v` vocabulary.
"""

from __future__ import annotations

import dataclasses
import errno
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # `vla-jax --help` waits for nothing
    import numpy as np


class UserError(Exception):
    """What went wrong, where, and what to do, in one message. The CLI prints it alone and exits with 2, after which restarters do not start again;
    with 1, after which they do, where it `passes`: it may be gone then, as a peer that is late or a store that does not answer."""

    def __init__(self, message: str = "", *, passes: bool = False):
        super().__init__(message)
        self.passes = passes


def may_pass(message: str) -> UserError:
    return UserError(message, passes=True)


# errno of what a wrong path gives; others, such as a stale handle of a network's storage, may be gone at the next start
WRONG_PATH = frozenset(
    (
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.EACCES,
        errno.EPERM,
        errno.EEXIST,
        errno.EROFS,
        errno.ENAMETOOLONG,
        errno.ELOOP,
        errno.EINVAL,
    )
)


class Interrupted(Exception):
    """A run that was asked to end before its last step, and saved itself. The CLI prints it and exits with 0, or what
    VLA_RESUMABLE_EXIT says."""

    def __init__(self, step: int, steps: int, saved: int):
        again = "the same command goes on from there"
        super().__init__(f"stopped on request after step {step} of {steps}; resumable from step {saved}: {again}")


# Placeholder ids in `Batch.tokens`, replaced by continuous embeddings. Negative, so that no vocabulary collides with them.
PAD, IMAGE, STATE = 0, -1, -2


@dataclasses.dataclass(frozen=True)
class Dim:
    """One dimension of a state or action vector.

    unit: m, rad, 1, m/s, rad/s, N or N m. frame: base, ee, joint or world. kind: delta, absolute, velocity or binary (a gripper: 1 = open).
    """

    name: str
    unit: str
    frame: str
    kind: str


@dataclasses.dataclass(frozen=True)
class Stats:
    """Per-dimension statistics over the training episodes of one dataset, in robot units; f32[dims] each. change: the largest from one step
    of an episode to the next; None where nobody looked."""

    mean: np.ndarray
    std: np.ndarray
    q01: np.ndarray
    q99: np.ndarray
    min: np.ndarray
    max: np.ndarray
    count: int
    change: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Sample:
    """One training example, in robot units (numpy).

    images: {view: u8[h w 3]} of the cameras that exist, and with a history of t steps those of the steps before (base@-1),
    oldest first; state f32[t s] flattened; actions f32[k a], rows past the episode's end repeat its last action and are
    False in action_mask bool[k].
    """

    images: dict[str, np.ndarray]
    state: np.ndarray
    actions: np.ndarray
    action_mask: np.ndarray
    prompt: str
    dataset: int
    episode: int
    step: int
    sample_id: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Packed rows; a pytree. What only training and its metrics need may be left out. A row holds several samples one after another, told apart by `segment`.

    images u8[b m h w 3] stand in the order of their IMAGE placeholders in `tokens`; tokens i32[b n];
    segment i32[b n] (0 = padding, 1.. = sample); position i32[b n] counts within a sample; block i32[b n]: a token
    sees its own segment's tokens of the same or a lower block (prefix 0, then 1, 2, ..); target i32[b n] is the id to
    predict at a position and loss_weight f32[b n] its weight (0 = no loss); state f32[b g s] normalised;
    actions f32[b g k a] normalised with action_mask bool[b g k a]; chunk i32[b g]: steps of the robot's chunk, of k; dataset i32[b g] (-1 = empty slot);
    sample_id i64[b g] (numpy only: left behind before the device); change f32[b m 16], where pictures are augmented on the
    device: crop and colour of each (data.augment; likewise left behind).
    """

    images: Any
    tokens: Any
    segment: Any
    position: Any
    block: Any
    target: Any = None
    loss_weight: Any = None
    state: Any
    actions: Any = None
    action_mask: Any = None
    dataset: Any = None
    sample_id: Any = None
    change: Any = None
    chunk: Any = None


@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that training changes; a pytree, nothing static in it. step i32[]; key is the run's PRNG key (constant).

    tally, over the whole run: skipped i32[] steps and how many of them in_a_row i32[], norm f32[] (running mean of the gradient's norm
    over the others), samples and tokens that were learned from, each i32[2]: millions (2**20) and the rest.
    """

    step: Any
    params: Any
    opt_state: Any
    ema: Any
    key: Any
    tally: Any


class ActionTokenizer(Protocol):
    """Normalised action chunks in about [-1, 1] to token ids and back, for any number of steps and dimensions: both are said at each
    call and never remembered. Implemented by tokens.actions (FAST), tokens.published (FAST as published) and tokens.bins."""

    vocab_size: int
    grammar: Any  # tokens.grammar.Grammar: which ids may follow

    def encode(self, chunk: np.ndarray) -> np.ndarray:
        """[k a] of any real dtype -> i32[t]. Raises: ValueError for NaN, infinity or another rank."""
        ...

    def encode_batch(self, chunks: np.ndarray) -> list[np.ndarray]:
        """[n k a] -> n times i32[t], the same as one by one."""
        ...

    def clamps(self, chunks: np.ndarray) -> tuple[int, int]:
        """How many numbers of chunks [n k a] (coefficients, for FAST) lie (below, above) what can be written, and are clamped."""
        ...

    def decode(self, ids: np.ndarray, *, steps: int, dims: int, malformed: str = "repair", last=None) -> tuple[np.ndarray, bool]:
        """i32[t] -> (f32[steps dims], whether the sequence was well formed). malformed: repair, hold (`last` f32[dims]) or raise."""
        ...

    def decode_batch(self, ids, *, steps: int, dims: int, malformed: str = "repair", last=None) -> tuple[np.ndarray, np.ndarray]:
        """n times i32[t] -> (f32[n steps dims], valid bool[n]), the same as one by one."""
        ...

    def to_json(self) -> dict:
        """All of it; tokens.files adds the digest."""
        ...
