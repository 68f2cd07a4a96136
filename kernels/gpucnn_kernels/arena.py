"""Memory that is planned once for a sequence of calls which is made again and again, such as a network's forward.

Which arrays the calls make, and when each of them is dropped, is recorded while they run once. As the sequence is
the same every time, so are the arrays: each gets an offset in one piece of memory, where those that never live at
the same time may lie upon each other, and later runs take no memory at all. On a GPU that holds for every array
that is made inside, by CuPy too; on the host runtime for those that the kernels' functions make, workspaces among
them.

Offsets are found by going through the arrays from the largest to the smallest, and putting each to the lowest
place where nothing lies that lives at the same time: "greedy by size" of Pisarchyk and Lee, "Efficient memory
management for deep neural net inference", 2020.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from gpucnn_kernels.errors import ArgumentError
from gpucnn_kernels.recording import recording
from gpucnn_kernels.runtime import current

_SAME_CALLS = "the calls in an arena are the same every time: record them anew for other shapes"

ALIGNMENT = 512
"""Bytes that offsets are multiples of, as CuPy's own addresses are."""


@dataclass(slots=True)
class Lifetime:
    """An array of ``size`` bytes, made at ``birth`` and dropped at ``death``, by a clock that counts both."""

    size: int
    birth: int
    death: float = math.inf

    def meets(self, other: Lifetime) -> bool:
        """Whether both live at some time."""
        return self.birth < other.death and other.birth < self.death


def offsets_of(lifetimes: Sequence[Lifetime]) -> tuple[list[int], int]:
    """(an offset for each, the bytes that all of them take): arrays that live at the same time lie apart."""
    offsets = [0] * len(lifetimes)
    placed: list[int] = []
    for number in sorted(range(len(lifetimes)), key=lambda number: -lifetimes[number].size):
        one, start = lifetimes[number], 0
        for other in sorted(placed, key=offsets.__getitem__):
            if not lifetimes[other].meets(one):
                continue
            if start + one.size <= offsets[other]:
                break
            start = max(start, _aligned(offsets[other] + lifetimes[other].size))
        offsets[number] = start
        placed.append(number)
    return offsets, max((_aligned(offsets[number] + lifetimes[number].size) for number in placed), default=0)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


class Arena:
    """The memory of one sequence of calls on ``device``: recorded first, used afterwards.

    What a run makes is overwritten by the next one. Not for several threads at a time.
    """

    def __init__(self, device: int = 0) -> None:
        self._runtime, self._device = current(), device
        self._lifetimes: list[Lifetime] | None = None
        self._offsets: list[int] = []
        self._memory: Any = None
        self.size = 0
        """Bytes that it holds."""

    @property
    def lifetimes(self) -> tuple[Lifetime, ...]:
        """Of the arrays, in the order in which they are made. Raises ArgumentError where nothing was recorded."""
        return tuple(self._recorded())

    @property
    def memory(self) -> Any:
        """The piece of memory, as the runtime's own kind: to be kept as long as what was captured uses it."""
        self._recorded()
        return self._memory

    def _recorded(self) -> list[Lifetime]:
        if self._lifetimes is None:
            raise ArgumentError(
                "nothing was recorded in this arena yet; run the calls in `with arena.recorded():`"
            )
        return self._lifetimes

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """Inside, arrays get memory of their own, and it is noted when they are made and dropped.

        Afterwards the memory is there. What lives on beyond the block, its result, keeps its place to the end.
        """
        lifetimes: list[Lifetime] = []
        clock = iter(range(1 << 62))

        def died(number: int) -> None:
            lifetimes[number].death = next(clock)

        endings = []

        def take(size: int) -> tuple[Any, int, Any]:
            token = _Token()
            lifetimes.append(Lifetime(size, next(clock)))
            endings.append(weakref.finalize(token, died, len(lifetimes) - 1))
            return self._runtime.memory(size, self._device), 0, token

        try:
            with recording(), self._runtime.allocating(take, self._device):
                yield
        finally:
            for ending in endings:
                ending.detach()
        self._lifetimes = lifetimes
        self._offsets, self.size = offsets_of(lifetimes)
        self._memory = self._runtime.memory(self.size, self._device)

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Inside, arrays lie where they were planned to.

        Raises ArgumentError where they are others than those recorded, or one that should be gone is still held.
        """
        lifetimes, count = self._recorded(), 0
        living: dict[int, weakref.ref[_Token]] = {}

        def take(size: int) -> tuple[Any, int, Any]:
            nonlocal count
            if count == len(lifetimes) or lifetimes[count].size != size:
                recorded = f"one of {lifetimes[count].size}" if count < len(lifetimes) else "none"
                raise ArgumentError(
                    f"an array of {size} bytes is made where {recorded} was recorded (number {count}); "
                    f"{_SAME_CALLS}"
                )
            start = self._offsets[count]
            for other in [number for number, token in living.items() if token() is None]:
                del living[other]
            for other in living:
                if self._offsets[other] < start + size and start < self._offsets[other] + lifetimes[other].size:
                    raise ArgumentError(
                        f"array {other} of an arena is still held where array {count} takes its place, unlike "
                        "when they were recorded; copy what is to be kept"
                    )
            token = _Token()
            living[count] = weakref.ref(token)
            count += 1
            return self._memory, start, token

        with recording(), self._runtime.allocating(take, self._device):
            yield
        if count != len(lifetimes):
            raise ArgumentError(f"{count} arrays were made where {len(lifetimes)} were recorded; {_SAME_CALLS}")


class _Token:
    """Lives as long as the array that holds it."""

    __slots__ = ("__weakref__",)
