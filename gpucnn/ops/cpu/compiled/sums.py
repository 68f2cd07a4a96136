"""Sums over whole float32 arrays, over images and pixels, and over the rows of a matrix."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy
from numpy.typing import NDArray

from gpucnn.ops.cpu.compiled.library import function
from gpucnn.ops.cpu.memory import FloatArray

_PART = 1 << 15  # numbers in one of the partial sums: ELEMENTS in source/elementwise.h

_sums_of_squares = function("sums_of_squares", "ipo")
_channel_sums = function("channel_sums", "iiipo")
_column_sums = function("column_sums", "iipo")


def partial_sums(count: int, loop: Callable[[NDArray[numpy.float64]], None]) -> float:
    """The total of what ``loop`` writes, a sum in float64 for each part of ``count`` numbers."""
    sums = numpy.empty(-(-count // _PART), numpy.float64)
    loop(sums)
    return math.fsum(sums) if numpy.isfinite(sums).all() else float(sums.sum())


def sum_of_squares(x: FloatArray) -> float:
    """The sum of x * x in float64, of x in C order."""
    return partial_sums(x.size, lambda sums: _sums_of_squares(x.size, x, sums))


def channel_sums(x: FloatArray, out: FloatArray) -> None:
    """Out (C,) = the sums of x (N, C, H, W) over images and pixels."""
    _channel_sums(x.shape[0], x.shape[1], math.prod(x.shape[2:]), x, out)


def column_sums(x: FloatArray, out: FloatArray) -> None:
    """Out (columns,) = the sums of x (rows, columns) over its rows."""
    _column_sums(*x.shape, x, out)
