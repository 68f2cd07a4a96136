"""Average pooling, with fixed windows and adaptive: by the compiled loops where they take the arrays. Otherwise:

A window's sum is taken over its rows, which are contiguous, then over its columns; the gradient goes the other way
round. Where windows do not overlap, columns are added by a matrix product with ones.

Limit: x and y once, 0.33 ns a number of x at the speed of a copy. Measured on one thread, in turns, 2 x 2 windows
on images of 56 x 56, ns a number of x:

===========================================  =======  ========
                                             forward  backward
===========================================  =======  ========
columns first, added to zeros                1.0      1.4
rows first, and as above (here)              0.6      1.1
===========================================  =======  ========

In the cache, rows take 0.24 forward, in pieces as short as theirs, strided columns 0.10, by the product 0.06; the
gradient's columns 0.14, as pairs of 64 bits 0.11, its rows 0.16.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy
from numpy.typing import NDArray

from gpucnn.ops.checks import check_adaptive, check_pixels, require_floating, require_shape
from gpucnn.ops.cpu import compiled
from gpucnn.ops.cpu.blocks import SMALL, image_blocks
from gpucnn.ops.cpu.compiled import pooling
from gpucnn.ops.cpu.memory import FloatArray, calculation_dtype, is_channels_last, result_array
from gpucnn.ops.cpu.threads import parallel_for, scratch
from gpucnn.ops.cpu.windows import Reach, readers, rows_and_columns
from gpucnn_kernels.problem import IntOrPair, Pool2dProblem, pair


def _lengths(problem: Pool2dProblem, axis: int, count_include_pad: bool) -> NDArray[numpy.int64]:
    """How many places of each window along one axis are counted."""
    size, window, stride, padding = (
        (problem.H, problem.W)[axis],
        (problem.R, problem.S)[axis],
        problem.stride[axis],
        problem.padding[axis],
    )
    start = numpy.arange((problem.P, problem.Q)[axis]) * stride - padding
    end = numpy.minimum(start + window, size + padding)
    if count_include_pad:
        return end - start
    return numpy.minimum(end, size) - numpy.maximum(start, 0)


@lru_cache(maxsize=16)
def _reciprocal_divisor(problem: Pool2dProblem, count_include_pad: bool, dtype: Any) -> NDArray[Any]:
    divisor = numpy.multiply.outer(
        _lengths(problem, 0, count_include_pad), _lengths(problem, 1, count_include_pad)
    )
    made = (1 / divisor).astype(dtype)
    made.flags.writeable = False
    return made


def _is_global(problem: Pool2dProblem) -> bool:
    """Whether there is one window, and it is the whole image."""
    return (problem.R, problem.S) == (problem.H, problem.W) and problem.padding == (0, 0)


def _scratch(name: str, shape: tuple[int, ...], dtype: Any, channels_last: bool) -> NDArray[Any]:
    """Scratch memory (n, c, h, w) with the layout of the arrays at hand."""
    n, c, h, w = shape
    if channels_last:
        return scratch(name, (n, h, w, c), dtype).transpose(0, 3, 1, 2)
    return scratch(name, shape, dtype)


def _covers(places: list[Reach], size: int) -> bool:
    """Whether each pixel of an axis lies in exactly one window."""
    return bool((readers(places, size) == 1).all())


def _add_up(total: NDArray[Any], image: NDArray[Any], places: list[Reach]) -> None:
    """The sums over each window's ``places`` along the last axis, into ``total``."""
    count = total.shape[-1]
    whole = [place for place in places if place.windows == slice(0, count)]
    rest = [place for place in places if place.windows != slice(0, count)]
    if len(whole) > 1:
        numpy.add(image[..., whole[0].pixels], image[..., whole[1].pixels], out=total, dtype=total.dtype)
    elif whole:
        numpy.copyto(total, image[..., whole[0].pixels])
    else:
        total[...] = 0
    for place in whole[2:] + rest:
        total[..., place.windows] += image[..., place.pixels]


def _hand_out(image: NDArray[Any], share: NDArray[Any], places: list[Reach]) -> None:
    """Each window's share to its ``places`` along the last axis; to others 0."""
    reached = readers(places, image.shape[-1])
    if not (reached == 1).all():
        image[...] = 0
    for place in places:
        if (reached > 1).any():
            image[..., place.pixels] += share[..., place.windows]
        else:
            image[..., place.pixels] = share[..., place.windows]


def avg_pool2d_forward(
    x: FloatArray,
    *,
    kernel_size: IntOrPair,
    stride: IntOrPair | None = None,
    padding: IntOrPair = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    out: FloatArray | None = None,
) -> FloatArray:
    """The mean of each window, (N, C, P, Q).

    The divisor counts the window's places inside the padded input (``count_include_pad``) or inside the input
    only, as in PyTorch.
    """
    require_floating(x, "the input")
    problem = Pool2dProblem.from_shapes(x.shape, kernel_size, stride=stride, padding=padding, ceil_mode=ceil_mode)
    y = result_array(out, problem.output_shape, x.dtype, like=x)
    wide = calculation_dtype(x.dtype)
    if compiled.usable(x):
        with pooling.target(y) as means:
            if _is_global(problem):
                pooling.plane_means(x, means)
            else:
                factor = _reciprocal_divisor(problem, count_include_pad, wide)
                pooling.average_forward(problem, x, factor, means)
        return y
    rows, columns = rows_and_columns(problem)
    factor = _reciprocal_divisor(problem, count_include_pad, wide)
    blocks = image_blocks(x.shape, x.itemsize)
    channels_last = is_channels_last(x)
    # Columns lie side by side in memory, each in one window: rows of a matrix with a number of them a row.
    tiled = not channels_last and problem.W == problem.Q * problem.S and _covers(columns, problem.W)
    ones = numpy.ones(problem.S, wide)

    def task(number: int) -> None:
        image = x[blocks[number]]
        n, c = image.shape[:2]
        with numpy.errstate(all="ignore"):
            down = _scratch("rows", (n, c, problem.P, problem.W), wide, channels_last)
            _add_up(down.swapaxes(2, 3), image.swapaxes(2, 3), rows)
            total = _scratch("windows", (n, c, problem.P, problem.Q), wide, channels_last)
            if tiled:
                numpy.matmul(down.reshape(-1, problem.S), ones, out=total.reshape(-1))
            else:
                _add_up(total, down, columns)
            numpy.multiply(total, factor, out=y[blocks[number]], casting="same_kind")

    parallel_for(len(blocks), task, small=x.size < SMALL)
    return y


def avg_pool2d_backward(
    dy: FloatArray,
    *,
    input_size: Sequence[int],
    kernel_size: IntOrPair,
    stride: IntOrPair | None = None,
    padding: IntOrPair = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    out: FloatArray | None = None,
) -> FloatArray:
    """The gradient for x, (N, C, H, W): dy over the divisor, added to each place of its window."""
    require_floating(dy, "the output gradient")
    problem = Pool2dProblem.from_shapes(
        (*dy.shape[:2], *input_size), kernel_size, stride=stride, padding=padding, ceil_mode=ceil_mode
    )
    require_shape(dy, problem.output_shape, "the output gradient")
    dx = result_array(out, problem.input_shape, dy.dtype, like=dy)
    wide = calculation_dtype(dy.dtype)
    if compiled.usable(dy):
        with pooling.target(dx) as shares:
            if _is_global(problem):
                pooling.plane_shares(dy, shares)
            else:
                factor = _reciprocal_divisor(problem, count_include_pad, wide)
                pooling.average_backward(problem, dy, factor, shares)
        return dx
    rows, columns = rows_and_columns(problem)
    factor = _reciprocal_divisor(problem, count_include_pad, wide)
    blocks = image_blocks(problem.input_shape, dy.itemsize)
    channels_last = is_channels_last(dy)

    def task(number: int) -> None:
        gradient, target = dy[blocks[number]], dx[blocks[number]]
        n, c = gradient.shape[:2]
        with numpy.errstate(all="ignore"):
            share = _scratch("windows", gradient.shape, wide, channels_last)
            numpy.multiply(gradient, factor, out=share)
            across = _scratch("rows", (n, c, problem.P, problem.W), wide, channels_last)
            _hand_out(across, share, columns)
            total = target if wide == dx.dtype else _scratch("image", target.shape, wide, channels_last)
            _hand_out(total.swapaxes(2, 3), across.swapaxes(2, 3), rows)
            if total is not target:
                target[...] = total

    parallel_for(len(blocks), task, small=dx.size < SMALL)
    return dx


# ---------------------------------------------------------------- adaptive


def _bounds(size: int, count: int) -> list[slice]:
    return [slice(i * size // count, -(-(i + 1) * size // count)) for i in range(count)]


def adaptive_avg_pool2d_forward(
    x: FloatArray, *, output_size: IntOrPair, out: FloatArray | None = None
) -> FloatArray:
    """Means over windows floor(i * H / P) .. ceil((i + 1) * H / P): (N, C, P, Q) for any input size."""
    check_adaptive(x, "the input", "(N, C, H, W)")
    check_pixels(x.shape)
    n, c, h, w = x.shape
    p, q = pair(output_size, "output_size")
    if compiled.usable(x) and h % p == w % q == 0:  # windows of one size, side by side
        return avg_pool2d_forward(x, kernel_size=(h // p, w // q), out=out)
    y = result_array(out, (n, c, p, q), x.dtype, like=x)
    wide = calculation_dtype(x.dtype)
    with numpy.errstate(all="ignore"):
        for i, rows in enumerate(_bounds(h, p)):
            for j, columns in enumerate(_bounds(w, q)):
                y[:, :, i, j] = x[:, :, rows, columns].mean(axis=(2, 3), dtype=wide)
    return y


def adaptive_avg_pool2d_backward(
    dy: FloatArray, *, input_size: Sequence[int], out: FloatArray | None = None
) -> FloatArray:
    """The gradient for x, (N, C, H, W)."""
    check_adaptive(dy, "the output gradient", "(N, C, P, Q)")
    n, c, p, q = dy.shape
    shape = (n, c, int(input_size[0]), int(input_size[1]))
    check_pixels(shape)
    if compiled.usable(dy) and p and q and shape[2] % p == shape[3] % q == 0:
        return avg_pool2d_backward(dy, input_size=shape[2:], kernel_size=(shape[2] // p, shape[3] // q), out=out)
    dx = result_array(out, shape, dy.dtype, like=dy)
    wide = calculation_dtype(dy.dtype)
    total = dx if wide == dx.dtype else numpy.empty(shape, wide)
    total[...] = 0
    with numpy.errstate(all="ignore"):
        for i, rows in enumerate(_bounds(shape[2], p)):
            for j, columns in enumerate(_bounds(shape[3], q)):
                window = total[:, :, rows, columns]
                share = dy[:, :, i : i + 1, j : j + 1].astype(wide) / wide.type(
                    window[0, 0].size if n and c else 1
                )
                window += share
        if total is not dx:
            dx[...] = total
    return dx
