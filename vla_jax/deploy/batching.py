"""Requests of many connections, one model: whoever waits for the same robot is answered by one call. The calls run in one thread of their own.

Nothing is dropped: a request that was taken in is answered, by actions or by an error. A full queue takes none in.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable

from vla_jax.console import say


class Busy(Exception):
    """The queue is full, or the server is about to end."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """result: of one observation; queue_s until the call began, infer_s of the call, which answered `together` requests."""

    result: object
    queue_s: float
    infer_s: float
    together: int


@dataclasses.dataclass(frozen=True, eq=False)
class _Waiting:
    robot: str
    observation: dict
    future: asyncio.Future
    loop: asyncio.AbstractEventLoop
    since: float


class Batcher:
    """call(robot, observations) -> as many results; it may raise, and is then asked again for each observation alone, so that no request
    spoils another's. most: in one call; depth: waiting at once. prepare is called first, in the same thread (what jax compiles is found
    again fastest there); `prepared` is done when it is.
    """

    def __init__(self, call: Callable[[str, list[dict]], list], *, most: int, depth: int, prepare: Callable[[], object] = lambda: None):
        self._call, self.most, self.depth = call, most, depth
        self._queue: collections.deque[_Waiting] = collections.deque()
        self._changed, self._ending = threading.Condition(), False
        self._since: float | None = None
        self._prepare, self.prepared = prepare, concurrent.futures.Future()
        self.calls: collections.Counter[int] = collections.Counter()  # how many calls answered n requests
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)

    def start(self) -> None:
        self._thread.start()

    async def ask(self, robot: str, observation: dict, *, timeout_s: float) -> Answer:
        """Raises: Busy; TimeoutError, when no answer came in time (it is not computed then, if it has not begun); what `call` raised."""
        loop = asyncio.get_running_loop()
        waiting = _Waiting(robot, observation, loop.create_future(), loop, time.monotonic())
        with self._changed:
            if self._ending:
                raise Busy("the server is ending")
            if len(self._queue) >= self.depth:
                raise Busy(f"{self.depth} requests wait already")
            self._queue.append(waiting)
            self._changed.notify()
        try:
            return await asyncio.wait_for(waiting.future, timeout_s)
        finally:  # a request nobody waits for any more takes no place
            with self._changed:
                if waiting in self._queue:
                    self._queue.remove(waiting)

    @property
    def ending(self) -> bool:
        return self._ending

    @property
    def waiting(self) -> int:
        return len(self._queue)

    def running_s(self) -> float:
        """For how long the present call has been running; 0 where there is none."""
        since = self._since
        return 0.0 if since is None else time.monotonic() - since

    def end(self, timeout_s: float) -> bool:
        """Takes in no more, answers those that wait; -> whether that was done in time."""
        with self._changed:
            self._ending = True
            self._changed.notify()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _work(self) -> None:
        if not self.prepared.set_running_or_notify_cancel():  # from here on it cannot be cancelled
            return
        try:
            self.prepared.set_result(self._prepare())
        except Exception as e:
            self.prepared.set_exception(e)
            return
        while batch := self._next():
            self._since = started = time.monotonic()
            results = self._answers(batch)
            self._since, took = None, time.monotonic() - started
            self.calls[len(batch)] += 1
            for waiting, result in zip(batch, results):
                answer = result if isinstance(result, Exception) else Answer(result, started - waiting.since, took, len(batch))
                with contextlib.suppress(RuntimeError):  # its loop has ended
                    waiting.loop.call_soon_threadsafe(_deliver, waiting.future, answer)

    def _next(self) -> list[_Waiting]:
        """Those who wait for the same robot as the first in the queue; none: at the end."""
        with self._changed:
            while not self._queue and not self._ending:
                self._changed.wait()
            batch = [w for w in self._queue if w.robot == self._queue[0].robot][: self.most]
            for w in batch:
                self._queue.remove(w)
            return batch

    def _answers(self, batch: list[_Waiting]) -> list:
        observations = [w.observation for w in batch]
        try:
            return self._checked(batch[0].robot, observations)
        except Exception as e:
            if len(batch) == 1:
                return [e]
        say(f"a call for {len(batch)} observations failed; each is tried alone")
        return [self._answers([w])[0] for w in batch]

    def _checked(self, robot: str, observations: list[dict]) -> list:
        results = self._call(robot, observations)
        if len(results) != len(observations):
            raise RuntimeError(f"{len(observations)} observations, {len(results)} results")
        return results


def _deliver(future: asyncio.Future, answer: Answer | Exception) -> None:
    if future.done():  # nobody waits any more
        return
    if isinstance(answer, Exception):
        future.set_exception(answer)
    else:
        future.set_result(answer)
