"""The maximum of each pooling window and its place, and the way back, on blocks of contiguous images.

Forward, a window's maximum is that of its columns first, then of its rows: R + S passes instead of R x S. The
first of equal numbers in row order wins either way, as the left one does in a row, and the upper one of two rows.
Columns are copied together, since NumPy compares strided numbers one at a time; rows are compared in the flat
array, as far apart as they lie, which between two windows' rows of a stride gives numbers that nobody reads, but
in one long run.

Backward, the places become addresses in the image, by a table, and the gradients are added there.

Limit: x, y and a byte of argmax each y, 0.4 ns a number of x at the speed of a copy. Measured on one thread, in
turns, ns a number of x (images of 56 x 56; forward and backward):

==========================================================  ==========  ==========
                                                            2 x 2       3 x 3, s 2
==========================================================  ==========  ==========
a pass for each place, on images dealt out by stride        1.7   1.3   2.5   2.9
here                                                        1.5   0.8   2.2   0.8
==========================================================  ==========  ==========

In the cache: strided columns 0.29 to compare, 0.07 to copy, then 0.035; addresses 0.17 and 0.06, the sum 0.26,
numpy.bincount 0.51, an assignment (where windows do not overlap) 0.22.
"""

from __future__ import annotations

from typing import Any

import numpy
from numpy.typing import NDArray

from gpucnn.ops.cpu.threads import scratch
from gpucnn.ops.cpu.windows import rows_and_columns
from gpucnn_kernels.problem import Pool2dProblem

_LONG_RUN = 3  # the largest stride whose rows are compared in one run


class WindowMaxima:
    """The windows of a pooling problem in a frame of padded coordinates that holds them all."""

    def __init__(self, problem: Pool2dProblem) -> None:
        self._problem = problem
        _, self._columns = rows_and_columns(problem)
        (top, left), (stride_h, stride_w), (dilation_h, dilation_w) = (
            problem.padding,
            problem.stride,
            problem.dilation,
        )
        # From the first window's first place to the last one's last.
        self._height = (problem.P - 1) * stride_h + (problem.R - 1) * dilation_h + 1
        breadth = (problem.Q - 1) * stride_w + (problem.S - 1) * dilation_w + 1
        self._width = problem.Q
        # Where all windows lie in the image and its width is a number of strides, its columns are runs of its flat
        # memory.
        inside = problem.padding == (0, 0) and self._height <= problem.H and breadth <= problem.W
        self._flat = inside and problem.W % stride_w == 0
        if self._flat:
            self._height, self._width = problem.H, problem.W // stride_w
        self._inner = min(problem.H, self._height - top)  # rows of the image that windows can reach
        self._frame = max(self._height, problem.H + top), max(breadth, problem.W + left)
        self._table = (
            numpy.arange(problem.R)[:, None] * (dilation_h * self._frame[1]) + numpy.arange(problem.S) * dilation_w
        ).reshape(-1)
        self._origins = (
            numpy.arange(problem.P)[:, None] * (stride_h * self._frame[1]) + numpy.arange(problem.Q) * stride_w
        ).reshape(-1)

    # ------------------------------------------------------------ forward

    def find(self, image: NDArray[Any], best: NDArray[Any], argmax: NDArray[Any]) -> None:
        """The maximum of each window of ``image`` (n, c, H, W) and its place, into (n, c, P, Q).

        For windows that hold a number above minus infinity and no NaN.
        """
        problem = self._problem
        (n, c), (stride, dilation) = image.shape[:2], (problem.stride[0], problem.dilation[0])
        shape = n, c, self._height, self._width
        top, at = scratch("top", shape, image.dtype), scratch("at", shape, argmax.dtype)
        if self._flat and image.flags.c_contiguous:
            self._maxima_of_runs(image.reshape(-1), top.reshape(-1), at.reshape(-1))
        else:
            self._maxima_of_columns(image, top, at)
        run = stride <= _LONG_RUN
        length = top.size - (problem.R - 1) * dilation * self._width

        def row(array: NDArray[Any], r: int) -> NDArray[Any]:
            start = r * dilation
            if run:
                return array.reshape(-1)[start * self._width :][:length]
            return array[:, :, start : start + (problem.P - 1) * stride + 1 : stride]

        if problem.R > 1:
            better, number = scratch("better", shape, numpy.bool_), scratch("number", shape, argmax.dtype)
            winner, found = scratch("winner", shape, image.dtype), scratch("found", shape, argmax.dtype)
            largest, first = row(winner, 0), row(found, 0)
            better, number = row(better, 0), row(number, 0)
            upper, place = row(top, 0), row(at, 0)
            for r in range(1, problem.R):
                lower = row(top, r)
                numpy.greater(lower, upper, out=better)
                numpy.maximum(lower, upper, out=largest)
                # Places only grow, so the larger of the old place and better * new place is the winner's.
                numpy.add(row(at, r), argmax.dtype.type(r * problem.S), out=number)
                numpy.multiply(better.view(numpy.uint8), number, out=number)
                numpy.maximum(number, place, out=first)
                upper, place = largest, first
            top, at = winner, found
        ends = slice(0, (problem.P - 1) * stride + 1, stride), slice(0, problem.Q)
        best[...], argmax[...] = top[:, :, *ends], at[:, :, *ends]

    def _maxima_of_runs(self, image: NDArray[Any], top: NDArray[Any], at: NDArray[Any]) -> None:
        """Over the columns of each window: maxima and numbers s. All arrays are flat."""
        problem = self._problem
        value = scratch("value", top.shape, image.dtype)
        better, number = scratch("better_column", top.shape, numpy.bool_), scratch("column", top.shape, at.dtype)
        numpy.copyto(top, image[:: problem.stride[1]])
        at.fill(0)
        for s in range(1, problem.S):
            run = image[s * problem.dilation[1] :: problem.stride[1]]
            part = slice(0, run.size)
            numpy.copyto(value[part], run)
            self._challenge(value[part], s, top[part], at[part], better[part], number[part])

    @staticmethod
    def _challenge(
        value: NDArray[Any],
        s: int,
        top: NDArray[Any],
        at: NDArray[Any],
        better: NDArray[numpy.bool_],
        number: NDArray[Any],
    ) -> None:
        numpy.greater(value, top, out=better)
        # Places only grow, so the larger of the old place and better * new place is the winner's.
        numpy.multiply(better.view(numpy.uint8), at.dtype.type(s), out=number)
        numpy.maximum(at, number, out=at)
        numpy.maximum(top, value, out=top)

    def _maxima_of_columns(self, image: NDArray[Any], top: NDArray[Any], at: NDArray[Any]) -> None:
        """Over the columns of each window: maxima and numbers s, (n, c, height, Q)."""
        problem = self._problem
        first = problem.padding[0]
        shape = top.shape
        value = scratch("value", shape, image.dtype)
        better, number = scratch("better_column", shape, numpy.bool_), scratch("column", shape, at.dtype)
        if not (first == 0 and self._inner == self._height and self._width == problem.Q):
            top[...] = -numpy.inf
            value[...] = -numpy.inf
        for s, column in enumerate(self._columns):
            target = top if s == 0 else value
            if column.windows != slice(0, problem.Q):
                target[...] = -numpy.inf
            target[:, :, first : first + self._inner, column.windows] = image[:, :, : self._inner, column.pixels]
            if s == 0:
                at[...] = 0
                continue
            self._challenge(value, s, top, at, better, number)

    # ------------------------------------------------------------ backward

    def addresses(self, planes: int) -> NDArray[numpy.intp]:
        """Where each window of ``planes`` images begins in frames that lie end to end, flat."""
        area = self._frame[0] * self._frame[1]
        found: NDArray[numpy.intp] = (numpy.arange(planes)[:, None] * area + self._origins).reshape(-1)
        return found

    def add(
        self, gradient: NDArray[Any], argmax: NDArray[Any], addresses: NDArray[numpy.intp], total: NDArray[Any]
    ) -> None:
        """Each ``gradient`` (n, c, P, Q) added at its window's place ``argmax``, into ``total`` (n, c, H, W)."""
        n, c, h, w = total.shape
        where = scratch("addresses", (gradient.size,), numpy.intp)
        numpy.take(self._table, argmax.reshape(-1), out=where, mode="clip")
        numpy.add(where, addresses[: where.size], out=where)
        framed = self._frame != (h, w) or not total.flags.c_contiguous
        image = scratch("frame", (n, c, *self._frame), total.dtype) if framed else total
        image.fill(0)
        numpy.add.at(image.reshape(-1), where, gradient.reshape(-1))
        if framed:
            first, left = self._problem.padding
            total[...] = image[:, :, first : first + h, left : left + w]
