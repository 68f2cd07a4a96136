"""How long work takes on a device, for tuning: the GPU's own time, and not Python's to start it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, Protocol

from gpucnn_kernels.runtime import current_name

_AREA_BYTES = 64 << 20
_AHEAD = 2.0  # how many times as long as Python takes to start the work the GPU is kept busy before it
_MOST_SECONDS = 0.02  # that it is kept busy: what takes Python longer than that has just been compiled

Work = Callable[[], None]


class Clock(Protocol):
    """What times ways on a device."""

    def seconds(self, work: Work, repeats: int) -> float:
        """Of a call of ``work``, the mean of so many, one after the other."""


class EventClock:
    """Events on CuPy's current stream.

    A small kernel takes the GPU less time than Python needs to start it, and events around such kernels would show
    Python's time, which is nearly the same for all ways. So the GPU first overwrites an area of memory, for about
    twice as long as Python took to start the work the last time; meanwhile all of it is queued.
    """

    def __init__(self, cupy: Any) -> None:
        self._cupy = cupy
        self._starting = 0.0  # seconds that Python took for a call of the work, the last time
        try:
            self._area: Any = cupy.empty(_AREA_BYTES, "uint8")
        except MemoryError:
            self._area = None
            return
        self._overwrite(1)
        self._overwriting = max(self._timed(lambda: self._overwrite(1)), 1e-6)

    def _overwrite(self, times: int) -> None:
        for _ in range(times):
            self._area.data.memset_async(0, _AREA_BYTES)

    def _timed(self, work: Work) -> float:
        before, after = self._cupy.cuda.Event(), self._cupy.cuda.Event()
        before.record()
        work()
        after.record()
        after.synchronize()
        return float(self._cupy.cuda.get_elapsed_time(before, after)) / 1e3

    def seconds(self, work: Work, repeats: int) -> float:
        """By the GPU."""
        if self._area is not None:
            busy = min(_AHEAD * self._starting * repeats, _MOST_SECONDS)
            self._overwrite(math.ceil(busy / self._overwriting))

        def start() -> None:
            began = time.perf_counter()
            for _ in range(repeats):
                work()
            self._starting = (time.perf_counter() - began) / repeats

        return self._timed(start) / repeats


class WallClock:
    """For launches that are done when they return."""

    def seconds(self, work: Work, repeats: int) -> float:
        """By the wall clock."""
        began = time.perf_counter()
        for _ in range(repeats):
            work()
        return (time.perf_counter() - began) / repeats


def make_clock() -> Clock:
    """The clock of the runtime in use."""
    if current_name() != "cuda":
        return WallClock()
    import cupy

    return EventClock(cupy)
