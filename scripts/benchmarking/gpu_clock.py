"""How work on a GPU is timed: by events around each call with a cold cache, or by the wall clock around many.

A timed call finds a second-level cache that holds none of its arrays: before it, twice as many bytes as any GPU's
cache has are overwritten. That is done as often as it takes for Python to have queued the call by then, so what is
measured of an operation is the GPU's time and not Python's. Whole training steps are measured by the wall clock
instead, one after the other, as they are run: there Python's time counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

FLUSH_BYTES = 256 << 20
"""Twice the second-level cache of a B200, the largest so far (126 MB)."""

_MOST_FLUSHES = 32
_AHEAD = 2.0  # how many times as long as Python takes for a call the GPU is kept busy before it

Work = Callable[[], Any]


class Clock(Protocol):
    """Times work of one library."""

    def samples(self, work: Work, repeats: int) -> list[float]:
        """Seconds of each of ``repeats`` calls, with a cold cache."""

    def together(self, work: Work, repeats: int) -> float:
        """Wall-clock seconds a call of ``repeats`` calls, one after the other."""


class WallClock:
    """For work that is done when it returns, or when ``wait`` of its result does: JAX, and everything on a CPU."""

    def __init__(self, wait: Callable[[Any], Any] | None = None) -> None:
        self._wait = wait or (lambda result: None)

    def samples(self, work: Work, repeats: int) -> list[float]:
        """One number, the mean: there are no events to time single calls by, and nothing empties the cache."""
        return [self.together(work, repeats)]

    def together(self, work: Work, repeats: int) -> float:
        """Seconds a call."""
        began = time.perf_counter()
        for _ in range(repeats):
            result = work()
        self._wait(result)
        return (time.perf_counter() - began) / repeats


class EventClock:
    """For work that is queued on a GPU's current stream.

    ``make_event`` gives an event with ``record()``, ``elapsed`` the milliseconds between two of them, ``flush``
    overwrites FLUSH_BYTES of the GPU's memory and ``synchronize`` waits for all that was queued.
    """

    def __init__(
        self,
        make_event: Callable[[], Any],
        elapsed: Callable[[Any, Any], float],
        flush: Callable[[], Any],
        synchronize: Callable[[], Any],
    ) -> None:
        self._make_event, self._elapsed, self._flush, self._synchronize = make_event, elapsed, flush, synchronize
        self._flush_seconds: float | None = None

    def samples(self, work: Work, repeats: int) -> list[float]:
        """Seconds of each call, by events before and after it."""
        flushes = self._flushes(work)
        pairs = [(self._make_event(), self._make_event()) for _ in range(repeats)]
        self._synchronize()
        for before, after in pairs:
            for _ in range(flushes):
                self._flush()
            before.record()
            work()
            after.record()
        self._synchronize()
        return [self._elapsed(before, after) / 1e3 for before, after in pairs]

    def _flushes(self, work: Work) -> int:
        """How often the cache is overwritten before a call: at least once, and for longer than Python is busy."""
        if self._flush_seconds is None:
            first, last = self._make_event(), self._make_event()
            self._flush()
            first.record()
            self._flush()
            last.record()
            self._synchronize()
            self._flush_seconds = max(self._elapsed(first, last) / 1e3, 1e-6)
        self._synchronize()
        began = time.perf_counter()
        work()
        queued = time.perf_counter() - began
        return min(_MOST_FLUSHES, 1 + int(_AHEAD * queued / self._flush_seconds))

    def together(self, work: Work, repeats: int) -> float:
        """Seconds a call, by the wall clock."""
        self._synchronize()
        began = time.perf_counter()
        for _ in range(repeats):
            work()
        self._synchronize()
        return (time.perf_counter() - began) / repeats
