"""Memory that a thread uses again for each image: fresh pages from the system cost more than the arithmetic."""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy
from numpy.typing import DTypeLike, NDArray


class Scratch(threading.local):
    """Named working arrays, a set for each thread; each :meth:`get` of a name overwrites what the last gave."""

    def __init__(self) -> None:
        self._memory: dict[str, NDArray[numpy.uint8]] = {}

    def get(self, name: str, shape: tuple[int, ...], dtype: DTypeLike = numpy.float32) -> NDArray[Any]:
        """An uninitialized contiguous array."""
        needed = math.prod(shape) * numpy.dtype(dtype).itemsize
        memory = self._memory.get(name)
        if memory is None or memory.size < needed:
            memory = self._memory[name] = numpy.empty(needed, numpy.uint8)
        return memory[:needed].view(dtype).reshape(shape)


scratch = Scratch()
