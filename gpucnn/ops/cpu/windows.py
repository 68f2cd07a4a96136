"""Where pooling windows meet the image: for each place in the window, the rows (or columns) that it reads."""

from __future__ import annotations

from typing import NamedTuple

import numpy
from numpy.typing import NDArray

from gpucnn_kernels.problem import Pool2dProblem


class Reach(NamedTuple):
    """One place of the window along one axis: ``windows`` whose place lies in the image, and ``pixels`` there."""

    windows: slice
    pixels: slice


def reach(offset: int, stride: int, size: int, count: int) -> Reach:
    """The windows i of 0 .. count with 0 <= i * stride + offset < size, and the slice of those positions."""
    first = max(0, -(offset // stride))
    last = min(count, (size - 1 - offset) // stride + 1)
    if last <= first:
        return Reach(slice(0, 0), slice(0, 0))
    start = first * stride + offset
    return Reach(slice(first, last), slice(start, start + (last - first - 1) * stride + 1, stride))


def rows_and_columns(problem: Pool2dProblem) -> tuple[list[Reach], list[Reach]]:
    """The reach of each of the R window rows and of each of the S window columns."""
    rows = [
        reach(r * problem.dilation[0] - problem.padding[0], problem.stride[0], problem.H, problem.P)
        for r in range(problem.R)
    ]
    columns = [
        reach(s * problem.dilation[1] - problem.padding[1], problem.stride[1], problem.W, problem.Q)
        for s in range(problem.S)
    ]
    return rows, columns


def readers(places: list[Reach], size: int) -> NDArray[numpy.int64]:
    """How many windows read each of ``size`` rows (or columns) of the image."""
    found = numpy.zeros(size, numpy.int64)
    for place in places:
        found[place.pixels] += 1
    return found


def first_inside(places: list[Reach], count: int) -> list[int]:
    """For each of ``count`` windows, its first place that lies in the image."""
    first = [0] * count
    for place in reversed(range(len(places))):
        windows = places[place].windows
        first[windows] = [place] * (windows.stop - windows.start)
    return first
