"""Windows of an image as the columns of a matrix, and back: what turns a convolution into a matrix product.

im2col copies; every kernel position is one strided view of the padded image, so there are no loops over windows.
col2im is its adjoint: it adds the columns up, one vectorised ``+=`` a kernel position, where windows overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from gpucnn.ops.checks import columns_problem, require_floating, window_problem
from gpucnn.ops.cpu.memory import calculation_dtype, result_array
from gpucnn.ops.cpu.threads import parallel_for, scratch
from gpucnn_kernels.problem import Conv2dProblem, IntOrPair, Padding

_SMALL = 1 << 15  # elements of the matrix below which one thread is quicker than two


def im2col(
    x: NDArray[Any],
    *,
    kernel_size: IntOrPair,
    stride: IntOrPair = 1,
    padding: Padding = 0,
    dilation: IntOrPair = 1,
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """Every window of x (N, C, H, W) as a column: (N, C * R * S, P * Q), rows ordered c, r, s.

    >>> im2col(numpy.arange(9.0).reshape(1, 1, 3, 3), kernel_size=2)[0]
    array([[0., 1., 3., 4.],
           [1., 2., 4., 5.],
           [3., 4., 6., 7.],
           [4., 5., 7., 8.]])

    A 227 x 227 image of 3 channels and 11 x 11 windows at stride 4 give 363 x 3025. Padding is zeros.
    Raises ProblemError where the window does not fit, ShapeError where ``out`` does not.
    """
    require_floating(x, "x")
    problem = window_problem(x.shape, kernel_size, stride, padding, dilation)
    shape = (problem.N, problem.C * problem.R * problem.S, problem.P * problem.Q)
    out = result_array(out, shape, x.dtype)
    windows = out.reshape(problem.N, problem.C, problem.R, problem.S, problem.P, problem.Q)

    def copy_image(n: int) -> None:
        windows[n] = windows_of(padded(x[n], problem), problem)

    parallel_for(problem.N, copy_image, small=out.size < _SMALL)
    return out


def col2im(
    columns: NDArray[Any],
    *,
    input_size: Sequence[int],
    kernel_size: IntOrPair,
    stride: IntOrPair = 1,
    padding: Padding = 0,
    dilation: IntOrPair = 1,
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """The adjoint of :func:`im2col`: columns (N, C * R * S, P * Q) added up where windows overlap: (N, C, H, W).

    ``input_size`` is (H, W). What falls on padding is dropped. Raises ShapeError where the columns are not
    those of such an image.
    """
    problem = columns_problem(columns, input_size, kernel_size, stride, padding, dilation)
    out = result_array(out, problem.input_shape, columns.dtype)
    windows = columns.reshape(problem.N, problem.C, problem.R, problem.S, problem.P, problem.Q)

    def add_image(i: int) -> None:
        add_windows(windows[i], problem, out[i])

    parallel_for(problem.N, add_image, small=columns.size < _SMALL)
    return out


# ---------------------------------------------------------------- what the convolutions build on


def padded(
    images: NDArray[Any], problem: Conv2dProblem, rows: tuple[int, int] | None = None, name: str = "padded"
) -> NDArray[Any]:
    """``images`` (..., H, W) with the problem's zeros around them, in scratch memory; themselves if it has none.

    ``rows`` gives only what output rows ``rows[0]`` up to ``rows[1]`` (exclusive) need.
    """
    top, bottom, left, right = problem.padding
    h, w = images.shape[-2:]
    first, last = 0, h + top + bottom
    if rows is not None:
        first, last = rows[0] * problem.stride[0], (rows[1] - 1) * problem.stride[0] + problem.extent[0]
    # In rows of the image: where the part that is wanted begins and ends.
    begin, end = min(max(first - top, 0), h), min(max(last - top, 0), h)
    above, below = min(max(top - first, 0), last - first), max(last - top - max(h, first - top), 0)
    if not (above or below or left or right):
        return images[..., begin:end, :]
    result = scratch(name, (*images.shape[:-2], last - first, w + left + right), images.dtype)
    result[..., :above, :] = 0
    result[..., last - first - below :, :] = 0
    inside = result[..., above : above + end - begin, :]
    inside[..., :left] = 0
    inside[..., left + w :] = 0
    inside[..., left : left + w] = images[..., begin:end, :]
    return result


def windows_of(images: NDArray[Any], problem: Conv2dProblem, rows: int | None = None) -> NDArray[Any]:
    """Padded images (..., H', W') seen as windows (..., R, S, P, Q): a read-only view, nothing is copied.

    ``rows`` is the number of output rows where the images hold less than all.
    """
    *leading, row, column = images.strides
    return as_strided(
        images,
        (*images.shape[:-2], problem.R, problem.S, problem.P if rows is None else rows, problem.Q),
        (
            *leading,
            row * problem.dilation[0],
            column * problem.dilation[1],
            row * problem.stride[0],
            column * problem.stride[1],
        ),
        writeable=False,
    )


def positions(problem: Conv2dProblem, r: int, s: int, rows: tuple[int, int] | None = None) -> tuple[slice, slice]:
    """The rows and columns of the padded image that kernel position (r, s) meets, one an output row or column.

    ``rows`` limits it to output rows ``rows[0]`` up to ``rows[1]`` (exclusive).
    """
    first, last = (0, problem.P) if rows is None else rows
    top, left = r * problem.dilation[0], s * problem.dilation[1]
    return (
        slice(top + first * problem.stride[0], top + (last - 1) * problem.stride[0] + 1, problem.stride[0]),
        slice(left, left + (problem.Q - 1) * problem.stride[1] + 1, problem.stride[1]),
    )


def inside(start: int, step: int, count: int, size: int) -> tuple[slice, slice]:
    """Of places start, start + step, ... (``count`` of them): which lie in 0 .. size - 1, and these places."""
    first = min(max(-(start // step), 0), count)
    last = max(min((size - 1 - start) // step + 1, count), first)
    begin = start + first * step
    return slice(first, last), slice(begin, begin + (last - first) * step, step)


class Overlaps:
    """Images (..., H, W) that windows are added up into; what falls on padding is dropped at the end.

    Half precision is added up in float32.
    """

    def __init__(self, problem: Conv2dProblem, out: NDArray[Any]) -> None:
        top, bottom, left, right = problem.padding
        self._out, self._origin = out, (top, left)
        self.dtype = calculation_dtype(out.dtype)
        if any(problem.padding) or self.dtype != out.dtype:
            shape = (*out.shape[:-2], problem.H + top + bottom, problem.W + left + right)
            self.total = scratch("overlaps", shape, self.dtype)
        else:
            self.total = out
        self.total[...] = 0

    def finish(self) -> None:
        """Write the images into ``out``."""
        if self.total is not self._out:
            (top, left), (h, w) = self._origin, self._out.shape[-2:]
            self._out[...] = self.total[..., top : top + h, left : left + w]


def add_windows(windows: NDArray[Any], problem: Conv2dProblem, out: NDArray[Any]) -> None:
    """Windows (..., R, S, P, Q) added up where they overlap, into ``out`` (..., H, W), which is overwritten."""
    overlaps = Overlaps(problem, out)
    for r in range(problem.R):
        for s in range(problem.S):
            rows, columns = positions(problem, r, s)
            overlaps.total[..., rows, columns] += windows[..., r, s, :, :]
    overlaps.finish()
