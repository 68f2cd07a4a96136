"""Average pooling, with fixed windows and adaptive. A window's sum is taken over its columns, then its rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy
from numpy.typing import NDArray

from gpucnn.ops.checks import check_adaptive, check_pixels, require_floating, require_shape
from gpucnn.ops.cpu.blocks import SMALL, image_blocks
from gpucnn.ops.cpu.memory import FloatArray, calculation_dtype, result_array
from gpucnn.ops.cpu.threads import parallel_for
from gpucnn.ops.cpu.windows import rows_and_columns
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


def _reciprocal_divisor(problem: Pool2dProblem, count_include_pad: bool, dtype: Any) -> NDArray[Any]:
    divisor = numpy.multiply.outer(
        _lengths(problem, 0, count_include_pad), _lengths(problem, 1, count_include_pad)
    )
    return (1 / divisor).astype(dtype)


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
    rows, columns = rows_and_columns(problem)
    factor = _reciprocal_divisor(problem, count_include_pad, wide)
    blocks = image_blocks(x.shape, x.itemsize)

    def task(number: int) -> None:
        image = x[blocks[number]]
        with numpy.errstate(all="ignore"):
            across = numpy.zeros((*image.shape[:3], problem.Q), wide)
            for column in columns:
                across[..., column.windows] += image[..., column.pixels]
            total = numpy.zeros((*image.shape[:2], problem.P, problem.Q), wide)
            for row in rows:
                total[:, :, row.windows] += across[:, :, row.pixels]
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
    rows, columns = rows_and_columns(problem)
    factor = _reciprocal_divisor(problem, count_include_pad, wide)
    blocks = image_blocks(problem.input_shape, dy.itemsize)

    def task(number: int) -> None:
        with numpy.errstate(all="ignore"):
            share = dy[blocks[number]] * factor
            down = numpy.zeros((*share.shape[:2], problem.H, problem.Q), wide)
            for row in rows:
                down[:, :, row.pixels] += share[:, :, row.windows]
            total = numpy.zeros((*share.shape[:2], problem.H, problem.W), wide)
            for column in columns:
                total[..., column.pixels] += down[..., column.windows]
            dx[blocks[number]] = total

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
