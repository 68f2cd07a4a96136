"""Max pooling: by the compiled loops where they take the arrays. Otherwise on blocks that stay in the cache,
contiguous images as :class:`WindowMaxima` says, others with a NumPy pass over all windows for each place in them.

The argmax is the place r * S + s in the window, one byte where it fits: a quarter of what an index into the image
would take, and enough, with the shapes, for the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy
from numpy.typing import NDArray

from gpucnn.ops.checks import BY_RESULT, check_argmax, check_ending, require_floating, require_shape
from gpucnn.ops.cpu import compiled
from gpucnn.ops.cpu.activations import leaky_relu_backward, relu_backward, sigmoid_backward, tanh_backward
from gpucnn.ops.cpu.blocks import SMALL, image_blocks
from gpucnn.ops.cpu.compiled import pooling
from gpucnn.ops.cpu.memory import FloatArray, calculation_dtype, is_channels_last, result_array
from gpucnn.ops.cpu.selection import keep
from gpucnn.ops.cpu.threads import parallel_for
from gpucnn.ops.cpu.window_maxima import WindowMaxima
from gpucnn.ops.cpu.windows import Reach, first_inside, readers, rows_and_columns
from gpucnn_kernels.problem import IntOrPair, Pool2dProblem

_BACKWARD = {"relu": relu_backward, "sigmoid": sigmoid_backward, "tanh": tanh_backward}


def argmax_dtype(problem: Pool2dProblem) -> numpy.dtype[Any]:
    """uint8 where the window has at most 256 places, otherwise int32."""
    return numpy.dtype(numpy.uint8 if problem.R * problem.S <= 256 else numpy.int32)


def max_pool2d_forward(
    x: FloatArray,
    *,
    kernel_size: IntOrPair,
    stride: IntOrPair | None = None,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    ceil_mode: bool = False,
    out: FloatArray | None = None,
) -> tuple[FloatArray, NDArray[Any]]:
    """(y, argmax), both (N, C, P, Q): the largest value of each window and its place r * S + s in it.

    Padding never wins. On ties the first place in row order wins; the first NaN of a window wins. argmax is uint8
    where the window has at most 256 places, otherwise int32.
    """
    require_floating(x, "the input")
    problem = Pool2dProblem.from_shapes(
        x.shape, kernel_size, stride=stride, padding=padding, dilation=dilation, ceil_mode=ceil_mode
    )
    y = result_array(out, problem.output_shape, x.dtype, like=x)
    argmax = result_array(None, problem.output_shape, argmax_dtype(problem), like=x)
    if compiled.usable(x) and pooling.usable_places(argmax):
        with pooling.target(y) as maxima:
            pooling.max_forward(problem, x, maxima, argmax)
        return y, argmax
    rows, columns = rows_and_columns(problem)
    starts = numpy.add.outer(
        [problem.S * r for r in first_inside(rows, problem.P)], first_inside(columns, problem.Q)
    ).astype(argmax.dtype)
    starts *= numpy.logical_and.outer(_any_inside(rows, problem.P), _any_inside(columns, problem.Q))
    blocks = image_blocks(x.shape, x.itemsize)
    channels_last = is_channels_last(x) and is_channels_last(y)  # slices are then long rows of channels
    window_maxima = WindowMaxima(problem)

    def scan(best: FloatArray, place: NDArray[Any], image: FloatArray, with_nan: bool) -> None:
        best[...] = -numpy.inf
        place[...] = starts
        for r, row in enumerate(rows):
            for s, column in enumerate(columns):
                value = image[:, :, row.pixels, column.pixels]
                top = best[:, :, row.windows, column.windows]
                at = place[:, :, row.windows, column.windows]
                better = value > top
                if with_nan:
                    better |= (value != value) & (top == top)
                # Places only grow, so the larger of the old place and better * new place is the winner's.
                numpy.maximum(at, better.view(numpy.uint8) * argmax.dtype.type(r * problem.S + s), out=at)
                numpy.maximum(top, value, out=top)

    def task(number: int) -> None:
        images, channels = blocks[number]
        best, place, image = y[images, channels], argmax[images, channels], x[images, channels]
        if channels_last:
            scan(best, place, image, False)
        else:
            window_maxima.find(image, best, place)
        if not best.min(initial=numpy.inf) > -numpy.inf:  # a NaN, or a window with nothing above minus infinity
            scan(best, place, image, True)

    parallel_for(len(blocks), task, small=x.size < SMALL)
    return y, argmax


def _any_inside(places: list[Reach], count: int) -> NDArray[numpy.bool_]:
    """Which of ``count`` windows along an axis reach the image at all: a dilated one may step over it."""
    inside = numpy.zeros(count, bool)
    for place in places:
        inside[place.windows] = True
    return inside


def max_pool2d_backward(
    dy: FloatArray,
    argmax: NDArray[Any],
    *,
    input_size: Sequence[int],
    kernel_size: IntOrPair,
    stride: IntOrPair | None = None,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    ceil_mode: bool = False,
    y: FloatArray | None = None,
    activation: str = "identity",
    negative_slope: float = 0.01,
    out: FloatArray | None = None,
) -> FloatArray:
    """The gradient for x, (N, C, H, W): each dy, through the activation before, added at its window's argmax."""
    require_floating(dy, "the output gradient")
    problem = Pool2dProblem.from_shapes(
        (*dy.shape[:2], *input_size),
        kernel_size,
        stride=stride,
        padding=padding,
        dilation=dilation,
        ceil_mode=ceil_mode,
    )
    require_shape(dy, problem.output_shape, "the output gradient")
    check_ending(activation, y, problem.output_shape, negative_slope, BY_RESULT)
    if y is not None and activation == "leaky_relu":
        dy = leaky_relu_backward(dy, y, negative_slope=negative_slope)
    elif y is not None and activation != "identity":
        dy = _BACKWARD[activation](dy, y)
    check_argmax(argmax, problem.output_shape, argmax_dtype(problem))
    dx = result_array(out, problem.input_shape, dy.dtype, like=dy)
    if compiled.usable(dy) and pooling.usable_places(argmax):
        with pooling.target(dx) as gradient:
            pooling.max_backward(problem, dy, argmax, gradient)
        return dx
    blocks = image_blocks(problem.input_shape, dy.itemsize)
    wide = calculation_dtype(dy.dtype)
    rows, columns = rows_and_columns(problem)
    row_readers, column_readers = readers(rows, problem.H), readers(columns, problem.W)
    overlapping = bool((row_readers > 1).any() or (column_readers > 1).any())
    # Only where every pixel lies in exactly one window does the loop below write all of them.
    tiling = bool((row_readers == 1).all() and (column_readers == 1).all())
    channels_last = is_channels_last(dy)  # slices are then long rows of channels
    maxima = WindowMaxima(problem)
    planes = 0 if channels_last else max((dx[block][..., :1, :1].size for block in blocks), default=0)
    addresses = maxima.addresses(planes)

    def task(number: int) -> None:
        block = blocks[number]
        place, slopes = argmax[block], dy[block].astype(wide, copy=False)
        total = dx[block] if wide == dx.dtype else numpy.empty(dx[block].shape, wide)
        if channels_last:
            add_slices(total, slopes, place)
        else:
            maxima.add(slopes, place, addresses, total)
        if total.dtype != dx.dtype:
            dx[block] = total

    def add_slices(total: FloatArray, gradient: FloatArray, place: NDArray[Any]) -> None:
        share = numpy.empty(place.shape, wide)
        if not tiling:
            total[...] = 0
        for r, row in enumerate(rows):
            for s, column in enumerate(columns):
                windows = (..., row.windows, column.windows)
                pixels = total[:, :, row.pixels, column.pixels]
                keep(gradient[windows], place[windows] == r * problem.S + s, share[windows])
                if overlapping:
                    pixels += share[windows]
                else:
                    pixels[...] = share[windows]

    parallel_for(len(blocks), task, small=dx.size < SMALL)
    return dx
