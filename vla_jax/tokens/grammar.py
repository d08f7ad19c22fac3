"""Which action ids may follow: what keeps a sampler inside the action language, however bad the model."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Grammar:
    """An automaton over a tokenizer's ids, with a budget: the numbers of a chunk (steps * dims) that are still to come.

    In state s (0 at first) id t may follow when `after[s, t]` is not -1 and its `count[s, t]`, with one more where it ends
    within a number (state above 0), is not above the budget. A sequence is complete in state 0 with nothing left. In every state that
    can be reached some id may follow or the sequence is complete, so that a sampler never gets stuck.

    after: i32[s v], the next state or -1; count: i32[s v], numbers that t completes. One state is enough where every id stands
    for whole numbers; published FAST files have ids that end within a number.
    """

    after: np.ndarray
    count: np.ndarray

    def need(self) -> np.ndarray:
        """i32[s v]: the budget that an id needs at least."""
        return self.count + (self.after > 0)

    def allowed(self, state: int, budget: int) -> np.ndarray:
        """bool[v]: the ids that may follow. None once the sequence is complete."""
        return (self.after[state] >= 0) & (self.need()[state] <= budget)

    def accepts(self, ids, numbers: int) -> bool:
        """Whether ids are a complete sequence of this many numbers."""
        state = 0
        for i in np.asarray(ids, np.int64).tolist():
            if not 0 <= i < self.after.shape[1] or not self.allowed(state, numbers)[i]:
                return False
            state, numbers = int(self.after[state, i]), numbers - int(self.count[state, i])
        return state == 0 and numbers == 0
