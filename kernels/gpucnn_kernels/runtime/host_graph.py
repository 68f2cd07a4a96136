"""Graphs on the host runtime: what a function starts is recorded, and done again, on the same memory, by a launch.

It stands for CUDA's capture of a stream, and is as strict, so that a program whose capture would fail or, worse,
go wrong on a GPU shows it in a test without one:

- Nothing is computed while recording. New arrays hold bytes of 0xFF, old ones what they held.
- What looks at a device array's values, copies between the host and the device or compiles a kernel raises.
- Numbers that a kernel was started with are those of the recording, in every launch.
- Memory that was neither made while recording nor named as kept raises: by the time of a launch it may be gone.

Only the thread that records is recorded, as on a GPU, where other threads use other streams.
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import numpy

Result = TypeVar("Result")
PlainArray = numpy.ndarray[Any, numpy.dtype[Any]]

_local = threading.local()


class HostGraph:
    """Recorded work, in its order, and the memory that it needs."""

    def __init__(self, actions: list[Callable[[], Any]], memory: list[Any]) -> None:
        self._actions, self._memory = actions, memory

    def __len__(self) -> int:
        return len(self._actions)

    def launch(self) -> None:
        """Do the work again."""
        refuse("launch a graph")
        with numpy.errstate(all="ignore"):
            for action in self._actions:
                action()


def capture(run: Callable[[], Result], keep: Iterable[Any] = ()) -> tuple[HostGraph, Result]:
    """(the graph of what ``run`` starts, what it returns), without doing any of it.

    ``keep`` are the arrays, made before, that it reads and writes; the graph holds on to them. Raises RuntimeError
    for what cannot be captured.
    """
    refuse("begin another capture")
    recorder = _local.recorder = Recorder(keep)
    try:
        with numpy.errstate(all="ignore"):
            result = run()
    finally:
        _local.recorder = None
    return HostGraph(recorder.actions, recorder.memory), result


def recording() -> Recorder | None:
    """What records this thread's work now; None for nothing."""
    return getattr(_local, "recorder", None)


def perform(work: Callable[[], None], *arrays: PlainArray) -> None:
    """Do work that reads and writes these arrays; or, while work is captured, record it."""
    recorder = recording()
    if recorder is None:
        work()
    else:
        recorder.in_place(work, arrays)


def refuse(what: str) -> None:
    """Raise RuntimeError where this thread's work is recorded: a GPU could not ``what`` then."""
    if recording() is not None:
        raise RuntimeError(
            f"cannot {what} while work is captured: nothing is computed before the graph is launched"
        )


class Recorder:
    """The work of one capture: ``actions`` in their order, ``memory`` that they need."""

    def __init__(self, keep: Iterable[Any]) -> None:
        self.actions: list[Callable[[], Any]] = []
        self.memory: list[Any] = list(keep)
        self._starts: list[int] = []
        self._ends: dict[int, int] = {}
        for array in self.memory:
            self._know(array)

    def _know(self, array: PlainArray) -> None:
        start, end = _extent(_root(array))
        if start not in self._ends:
            bisect.insort(self._starts, start)
        self._ends[start] = max(end, self._ends.get(start, end))

    def own(self, array: PlainArray) -> None:
        """Keep an array that was made while recording, its values undefined."""
        self.memory.append(array)
        self._know(array)
        _octets(array).fill(0xFF)

    def uses(self, address: int, size: int) -> None:
        """Raise RuntimeError unless the bytes from ``address`` on were made while recording or are kept."""
        if size == 0:
            return
        place = bisect.bisect_right(self._starts, address) - 1
        if place < 0 or address + size > self._ends[self._starts[place]]:
            raise RuntimeError(
                f"the captured work uses {size} bytes of memory that were neither made in it nor given as keep; "
                "by the time of the graph's launch they may be another array's"
            )

    def in_place(self, work: Callable[[], Any], arrays: Iterable[PlainArray]) -> None:
        """Record work that reads and writes these arrays."""
        for array in arrays:
            start, end = _extent(array)
            self.uses(start, end - start)
        self.actions.append(work)

    def result(self, function: Callable[[], Any], inputs: list[PlainArray]) -> Any:
        """What ``function`` makes of ``inputs``: views as they are, new arrays undefined until a launch."""
        made = function()
        several = isinstance(made, (tuple, list))
        parts = [numpy.asarray(part) if isinstance(part, numpy.generic) else part for part in _listed(made)]
        roots = {id(_root(array)) for array in inputs}
        new = [
            number
            for number, part in enumerate(parts)
            if isinstance(part, numpy.ndarray) and id(_root(part)) not in roots
        ]
        if new:
            for number in new:
                self.own(parts[number])

            def again() -> None:
                values = _listed(function())
                for number in new:
                    parts[number][...] = values[number]

            self.in_place(again, inputs)
        return type(made)(parts) if several and type(made) in (tuple, list) else parts[0] if not several else made


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (tuple, list)) else [value]


def arrays_in(value: Any) -> Iterator[PlainArray]:
    """The arrays among arguments."""
    if isinstance(value, numpy.ndarray):
        yield value
    elif isinstance(value, dict):
        yield from arrays_in(list(value.values()))
    elif isinstance(value, (tuple, list)):
        for entry in value:
            yield from arrays_in(entry)


def _root(array: PlainArray) -> PlainArray:
    """The array whose memory it is a view of."""
    while isinstance(array.base, numpy.ndarray):
        array = array.base
    return array


def _extent(array: PlainArray) -> tuple[int, int]:
    """(first address, the one behind the last) of an array."""
    if array.size == 0:
        return array.ctypes.data, array.ctypes.data
    steps = [(length - 1) * stride for length, stride in zip(array.shape, array.strides, strict=True)]
    first = array.ctypes.data + sum(step for step in steps if step < 0)
    return first, array.ctypes.data + sum(step for step in steps if step > 0) + array.itemsize


def _octets(array: PlainArray) -> PlainArray:
    root = _root(array).view(numpy.ndarray)
    flat = numpy.lib.stride_tricks.as_strided(root, (root.size,), (root.itemsize,))
    return flat.view(numpy.uint8)
