"""Arrays whose memory is used again once nobody holds them any more.

Training asks for the same large arrays over and over: activations, their gradients, batches. Fresh from the
system, each page of them is cleared when it is first touched, and the system gets them back when the array is
dropped. That took as long as all the rest: a training step of animalnet on 32 photographs fell from 216 to 108 ms
on one thread, one of lenet5 on 128 digits from 33 to 16, when memory was kept.
"""

from __future__ import annotations

import collections
import ctypes
import functools
import math
import os
import threading
from collections import OrderedDict
from typing import Any

import numpy
from numpy.typing import DTypeLike, NDArray

SMALL = 1 << 17
"""Bytes below which memory comes from NumPy, whose allocator keeps such pieces itself."""

ALIGNMENT = 64
"""Bytes: a line of the cache, and the widest register."""


class Recycler:
    """Makes arrays like :func:`numpy.empty`, of memory that earlier ones have left.

    An array's memory comes back when the last view of it is gone, whoever holds one, so nobody need give it back,
    and nobody's array changes under his hands. Any thread may ask and any may drop.

    Args:
        kept_bytes: how much memory may lie idle; beyond that, what was not asked for longest goes to the system.
    """

    def __init__(self, kept_bytes: int) -> None:
        self.kept_bytes = kept_bytes
        self._reset()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._reset)  # the lock may have been another thread's

    def _reset(self) -> None:
        self._lock = threading.RLock()
        self._inside = False
        self._returned: collections.deque[NDArray[numpy.uint8]] = collections.deque()
        self._idle: OrderedDict[int, list[NDArray[numpy.uint8]]] = OrderedDict()
        self._idle_bytes = 0

    @property
    def idle_bytes(self) -> int:
        """How much memory lies idle."""
        return self._idle_bytes

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """An uninitialized contiguous array. Raises MemoryError, with no memory left idle."""
        dtype = numpy.dtype(dtype)
        needed = math.prod(shape) * dtype.itemsize
        if needed < SMALL:
            return numpy.empty(shape, dtype)
        size = _rounded(needed)
        memory = self._take(size)
        if memory is None:
            try:
                memory = _aligned(size)
            except MemoryError:
                self.clear()
                memory = _aligned(size)
        loan = _loan_of(size).from_buffer(memory)
        loan.lender, loan.memory = self, memory
        return numpy.ndarray(shape, dtype, loan)

    # The garbage collector and signals' handlers may drop arrays in the middle of anything, the same thread's own
    # request too. ``_inside`` tells them so: they leave what they bring in ``_returned``.

    def clear(self) -> None:
        """Give all idle memory back to the system."""
        with self._lock:
            if not self._inside:
                self._returned.clear()
                self._idle.clear()
                self._idle_bytes = 0

    def give_back(self, memory: NDArray[numpy.uint8]) -> None:
        """Take memory that nobody holds a view of any more; arrays do it themselves."""
        self._returned.append(memory)
        with self._lock:
            if not self._inside:
                try:
                    self._inside = True
                    self._sort_in()
                finally:
                    self._inside = False

    def _take(self, size: int) -> NDArray[numpy.uint8] | None:
        with self._lock:
            if self._inside:
                return None
            try:
                self._inside = True
                self._sort_in()
                pieces = self._idle.get(size)
                if not pieces:
                    return None
                self._idle.move_to_end(size)
                self._idle_bytes -= size
                return pieces.pop()
            finally:
                self._inside = False

    def _sort_in(self) -> None:
        while self._returned:
            memory = self._returned.popleft()
            size = len(memory)
            self._idle.setdefault(size, []).append(memory)
            self._idle.move_to_end(size)
            self._idle_bytes += size
            while self._idle_bytes > self.kept_bytes:
                size, pieces = next(iter(self._idle.items()))
                if pieces:
                    pieces.pop()
                    self._idle_bytes -= size
                else:
                    del self._idle[size]


def _rounded(size: int) -> int:
    """The next of eight sizes between two powers of two, so that nearly equal arrays share memory."""
    step = 1 << max(0, size.bit_length() - 4)
    return -(-size // step) * step


def _aligned(size: int) -> NDArray[numpy.uint8]:
    memory = numpy.empty(size + ALIGNMENT, numpy.uint8)
    start = -memory.__array_interface__["data"][0] % ALIGNMENT
    return memory[start : start + size]


class _Loan:
    """What an array of recycled memory has as its base; it goes when the last view of the array does.

    No NumPy array: a view of a view refers to the first one's base, past arrays in between. A ctypes array is the
    cheapest object with a buffer, 1 us with the array around it.
    """

    lender: Recycler
    memory: NDArray[numpy.uint8]

    def __del__(self) -> None:
        self.lender.give_back(self.memory)


@functools.cache
def _loan_of(size: int) -> Any:
    return type("_LoanOf", (_Loan, ctypes.c_uint8 * size), {})


memory = Recycler(kept_bytes=1 << 30)
"""Where the operations on a CPU get the memory of their results, and the loader that of its batches."""
