"""The fully connected layer: matrix products with the weight (out, in)."""

from __future__ import annotations

import numpy

from gpucnn.ops.checks import (
    check_linear_data,
    check_linear_forward,
    check_linear_gradient,
    check_linear_weight,
)
from gpucnn.ops.cpu import compiled
from gpucnn.ops.cpu.blocks import ranges
from gpucnn.ops.cpu.compiled.sums import column_sums
from gpucnn.ops.cpu.memory import FloatArray, calculation_dtype, result_array
from gpucnn.ops.cpu.threads import parallel_for

_PART_FLOPS = 1 << 22  # what one task multiplies: below it, waking another thread costs more than it saves


def _product(a: FloatArray, b: FloatArray, out: FloatArray | None) -> FloatArray:
    """A @ b, in parts of rows or columns spread over our own threads.

    BLAS's threads are not used: they wait for more work by spinning for tens of milliseconds, in which they take
    the core from whatever comes next. And the parts depend on the shapes alone, so the sums do too.
    """
    wide = calculation_dtype(a.dtype)
    result = result_array(out, (a.shape[0], b.shape[1]), a.dtype)
    # A part may not overwrite what a later one reads.
    shared = out is not None and (numpy.may_share_memory(out, a) or numpy.may_share_memory(out, b))
    product = numpy.empty(result.shape, result.dtype) if shared else result
    left, right = a.astype(wide, copy=False), b.astype(wide, copy=False)
    rows, columns = result.shape
    flops = 2 * rows * columns * a.shape[1]
    longer = max(rows, columns)
    step = max(64, -(-longer * _PART_FLOPS // max(flops, 1)))
    parts = ranges(longer, step)

    def multiply(task: int) -> None:
        part = parts[task]
        x, y, target = (
            (left[part], right, product[part]) if rows >= columns else (left, right[:, part], product[:, part])
        )
        if wide == result.dtype:
            numpy.matmul(x, y, out=target)
        else:
            target[...] = x @ y

    parallel_for(len(parts), multiply, small=flops < 2 * _PART_FLOPS)
    if shared:
        result[...] = product
    return result


def linear_forward(
    x: FloatArray, weight: FloatArray, bias: FloatArray | None = None, *, out: FloatArray | None = None
) -> FloatArray:
    """X (N, in) @ weight.T (weight is (out, in)) + bias (out,): (N, out)."""
    check_linear_forward(x, weight, bias)
    if bias is not None and out is not None and numpy.may_share_memory(out, bias):
        bias = bias.copy()  # the product overwrites it before it is added
    result = _product(x, weight.T, out)
    if bias is not None:
        numpy.add(result, bias, out=result, casting="same_kind")
    return result


def linear_backward_data(dy: FloatArray, weight: FloatArray, *, out: FloatArray | None = None) -> FloatArray:
    """Dy (N, out) @ weight: (N, in)."""
    check_linear_data(dy, weight)
    return _product(dy, weight, out)


def linear_backward_weight(dy: FloatArray, x: FloatArray, *, out: FloatArray | None = None) -> FloatArray:
    """dy.T @ x: (out, in)."""
    check_linear_weight(dy, x)
    return _product(dy.T, x, out)


def linear_backward_bias(dy: FloatArray, *, out: FloatArray | None = None) -> FloatArray:
    """The sum of dy over the batch: (out,)."""
    check_linear_gradient(dy)
    result = result_array(out, dy.shape[1:], dy.dtype)
    if compiled.usable(dy, result):
        column_sums(dy, result)
        return result
    with numpy.errstate(all="ignore"):
        result[...] = dy.sum(axis=0, dtype=numpy.float64)
    return result
