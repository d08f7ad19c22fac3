"""How a run ends before its last step: asked to by a signal, at the same step on every process; or because nothing moves any more."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time

import jax

from vla_jax import distributed
from vla_jax.console import say

HUNG = 124  # exit code of a run in which nothing moved any more; that of timeout(1)


class Interruption:
    """SIGTERM or SIGINT to any process, turned into one step at which all of them save and end. Use as a context manager, on the
    main thread (elsewhere signals are left alone). A second SIGINT ends the process at once.

    Several processes agree through jax's preemption service (`jax.experimental.multihost_utils.reached_preemption_sync_point`),
    which catches SIGTERM itself and takes about a second.
    """

    def __init__(self):
        self._asked = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            # of several processes SIGTERM belongs to jax: it is caught below Python
            for number in (signal.SIGINT,) if distributed.process_count() > 1 else (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *exc) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame) -> None:
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = True
        say(f"{signal.Signals(number).name}: saving, then ending{'; once more ends at once' if number == signal.SIGINT else ''}")
        if distributed.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def reached(self, step: int) -> bool:
        """Whether all processes are to save and end after this step. To be asked by all of them, at every step."""
        if distributed.process_count() == 1:
            return self._asked
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)


class Watch:
    """Ends the process, with the stacks of all its threads on stderr, when `beat` was not called for `seconds` (0: never): a
    peer that hangs makes every process wait in the same collective, and none would ever say so. Use as a context manager.

    A thread says what happened. Should Python itself be stuck, faulthandler's timer, which needs no Python, ends it a little later.
    """

    def __init__(self, seconds: float, *, end=os._exit):
        self._seconds, self._end = seconds, end
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.beat(0, "starting")

    def __enter__(self) -> Watch:
        if self._seconds:
            self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exc) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def beat(self, step: int, doing: str) -> None:
        """The run moves: it has come to this step, and does what `doing` says."""
        self._last = time.monotonic(), step, doing

    def _watch(self) -> None:
        every = min(self._seconds / 4, 10)
        while not self._stop.wait(every):
            since, step, doing = self._last
            if (waited := time.monotonic() - since) > self._seconds:
                say(
                    f"process {jax.process_index()} has not moved for {waited:.0f} s (train.hang_s={self._seconds:g}): step {step}, {doing}. "
                    f"Another process hangs, or storage does. Stacks of all threads follow; ending with exit code {HUNG}, to be started again."
                )
                faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
                self._end(HUNG)
                return
            faulthandler.dump_traceback_later(self._seconds + 60, exit=True, file=sys.__stderr__)
