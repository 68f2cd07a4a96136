"""Arrays that touch a page of memory that may not be read or written: a step beyond them ends the process."""

from __future__ import annotations

import ctypes
import ctypes.util
import math
import mmap
import sys
from collections.abc import Sequence
from typing import Any

import numpy
from numpy.typing import DTypeLike, NDArray

_PROT_NONE = 0


def guarded_empty(shape: Sequence[int] | int, dtype: DTypeLike = numpy.float32, end: bool = True) -> NDArray[Any]:
    """An uninitialized C-ordered array whose last byte, or first where ``end`` is false, touches such a page.

    There is one on either side; only on the chosen one does the array lie right at it. The memory lives as long as
    the array and its views.
    """
    size = (shape,) if isinstance(shape, int) else tuple(shape)
    item = numpy.dtype(dtype)
    count = math.prod(size)
    page = mmap.PAGESIZE
    inner = max(1, -(-count * item.itemsize // page)) * page
    # Anonymous, private; unmapped when the last array over it is gone.
    memory = mmap.mmap(-1, inner + 2 * page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for guard in (start, start + page + inner):
        _forbid(guard, page)
    offset = page + (inner - count * item.itemsize if end else 0)
    return numpy.frombuffer(memory, item, count, offset).reshape(size)


def guarded(array: NDArray[Any], end: bool = True) -> NDArray[Any]:
    """A copy of ``array`` in C order in such memory."""
    copy = guarded_empty(array.shape, array.dtype, end)
    copy[...] = array
    return copy


def _forbid(address: int, size: int) -> None:
    library = ctypes.CDLL(ctypes.util.find_library("c") if sys.platform == "darwin" else None, use_errno=True)
    library.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    if library.mprotect(address, size, _PROT_NONE) != 0:
        raise OSError(ctypes.get_errno(), "mprotect does not take a page's rights away")
