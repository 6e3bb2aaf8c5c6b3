"""Admission: how much work the server takes on, and what it says to the rest.

A few threads answer; a short queue stands before them. What does not fit is told at once when to come back, so that an
overloaded server spends its time on answers that somebody still waits for. All of this but the work itself runs on the
event loop, so plain numbers suffice.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter
from typing import TypeVar

__all__ = ["Admission", "Busy", "Watch"]

Answer = TypeVar("Answer")
FORGET = 0.1  #: share of the newest measurement in a running mean


class Busy(Exception):
    """The queue is full; `retry_after` seconds from now there should be room."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the queue is full; come back in {retry_after} s")
        self.retry_after = retry_after


class Admission:
    """`threads` questions are answered at a time and `queue` more wait. A question may cost several (a batch does)."""

    def __init__(self, threads: int, queue: int) -> None:
        if threads < 1 or queue < 0:
            raise ValueError(f"there must be 1 thread or more and a queue of 0 or more, received {threads} and {queue}")
        self.threads = threads
        self.queue = queue
        self.inside = 0  #: questions taken and not yet answered
        self.seconds = 0.01  #: of one question, a running mean
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="answer")

    def check(self, cost: int = 1) -> None:
        """Raises Busy when there is no room. One question always fits an idle server, whatever it costs."""
        if self.inside and self.inside + cost > self.threads + self.queue:
            raise Busy(max(1, math.ceil(self.inside * self.seconds / self.threads)))

    async def run(self, work: Callable[[], Answer], cost: int = 1) -> Answer:
        """The result of `work` in one of the threads. Raises Busy."""
        self.check(cost)
        self.inside += cost
        try:
            seconds, answer = await asyncio.get_running_loop().run_in_executor(self._pool, _timed, work)
            self.seconds += FORGET * (seconds / cost - self.seconds)
            return answer
        finally:
            self.inside -= cost

    def close(self) -> None:
        """No more work; what runs is finished."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def _timed(work: Callable[[], Answer]) -> tuple[float, Answer]:
    started = perf_counter()
    answer = work()
    return perf_counter() - started, answer


class Watch:
    """The pace of one question (serve/pipeline.py): there is time to rank if the ranker should be done by the deadline.

    `costs` is the running mean of the ranker's seconds, shared by all watches; a ranker that was left out is taken to
    have become a little quicker, so that one slow moment does not end it for good.
    """

    def __init__(self, arrived: float, deadline: float | None, costs: list[float], entries: int = 1) -> None:
        self.arrived = arrived
        self.deadline = deadline
        self.costs = costs
        self.entries = entries
        self.degraded = False
        self.refused = False
        self.seconds: dict[str, float] = {"queue": perf_counter() - arrived}
        self._last = perf_counter()

    def begin(self) -> None:
        """A thread has taken the question up."""
        self._last = perf_counter()
        self.seconds["queue"] = self._last - self.arrived

    def may_rank(self) -> bool:
        """False when the ranker would end after the deadline."""
        expected = self.costs[0] * self.entries
        if self.refused:
            return False
        if self.deadline is None or perf_counter() + expected <= self.deadline:
            return True
        self.costs[0] *= 1 - FORGET
        self.degraded = True
        return False

    def refuse_ranker(self) -> None:
        """Its scores are of no use; answer without it."""
        self.refused = self.degraded = True

    def done(self, stage: str) -> None:
        """A stage has ended."""
        now = perf_counter()
        taken = now - self._last
        self.seconds[stage] = self.seconds.get(stage, 0.0) + taken
        self._last = now
        if stage == "rank":
            self.costs[0] += FORGET * (taken / self.entries - self.costs[0])

    def timing(self) -> dict[str, float]:
        """Milliseconds of each stage and in total, for the answer."""
        total = perf_counter() - self.arrived
        return {name: round(1e3 * s, 3) for name, s in (*self.seconds.items(), ("total", total))}
