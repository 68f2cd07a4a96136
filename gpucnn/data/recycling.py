"""Arrays whose memory is used again once nobody holds them any more.

A batch of photographs is some 20 MB. Fresh from the system, its pages are cleared before they are written, which
takes longer than normalizing the images; and the system gets them back when the batch is dropped.
"""

from __future__ import annotations

import collections
import math
from typing import Any

import numpy
from numpy.typing import DTypeLike, NDArray


class Recycler:
    """Makes arrays like :func:`numpy.empty`, of memory that earlier ones have left.

    An array's memory comes back when the last view of it is gone, whoever holds one, so nobody need give it back,
    and nobody's array changes under his hands. Any thread may ask and any may drop.

    Args:
        kept: how many pieces of memory may lie idle; what comes back beyond that goes to the system.
    """

    def __init__(self, kept: int) -> None:
        # Without a lock: the garbage collector may give memory back in the middle of anything.
        self._idle: collections.deque[NDArray[numpy.uint8]] = collections.deque(maxlen=kept)

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """An uninitialized contiguous array."""
        needed = math.prod(shape) * numpy.dtype(dtype).itemsize
        memory = self._idle_memory(needed)
        if memory is None:
            memory = numpy.empty(needed, numpy.uint8)
        loan = numpy.asarray(_Loan(memory, self._idle))
        return loan[:needed].view(dtype).reshape(shape)

    def _idle_memory(self, needed: int) -> NDArray[numpy.uint8] | None:
        """Idle memory of at least this many bytes; what is too small is given up, for batches are of one size."""
        while True:
            try:
                memory = self._idle.pop()
            except IndexError:
                return None
            if len(memory) >= needed:
                return memory


class _Loan:
    """What arrays of recycled memory have as their base; it goes when the last of them does."""

    def __init__(self, memory: NDArray[numpy.uint8], idle: collections.deque[NDArray[numpy.uint8]]) -> None:
        self._memory, self._idle = memory, idle
        self.__array_interface__ = memory.__array_interface__

    def __del__(self) -> None:
        self._idle.append(self._memory)
