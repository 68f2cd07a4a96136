"""The fully connected layer: matrix products with the weight (out, in)."""

from __future__ import annotations

import numpy

from gpucnn.errors import ShapeError
from gpucnn.ops.cpu.blocks import ranges
from gpucnn.ops.cpu.checks import require_dimensions, require_floating, require_shape
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
    require_floating(x, "the input")
    require_dimensions(x, 2, "(N, in features)", "the input")
    require_dimensions(weight, 2, "(out features, in features)", "the weight")
    if x.shape[1] != weight.shape[1]:
        raise ShapeError(
            f"the input has {x.shape[1]} features (shape {x.shape}) but the weight of shape {weight.shape} "
            f"expects {weight.shape[1]}"
        )
    if bias is not None:
        require_shape(bias, weight.shape[:1], "the bias")
        if out is not None and numpy.may_share_memory(out, bias):
            bias = bias.copy()  # the product overwrites it before it is added
    result = _product(x, weight.T, out)
    if bias is not None:
        numpy.add(result, bias, out=result, casting="same_kind")
    return result


def linear_backward_data(dy: FloatArray, weight: FloatArray, *, out: FloatArray | None = None) -> FloatArray:
    """Dy (N, out) @ weight: (N, in)."""
    require_floating(dy, "the output gradient")
    require_dimensions(dy, 2, "(N, out features)", "the output gradient")
    require_dimensions(weight, 2, "(out features, in features)", "the weight")
    require_shape(dy, (dy.shape[0], weight.shape[0]), "the output gradient")
    return _product(dy, weight, out)


def linear_backward_weight(dy: FloatArray, x: FloatArray, *, out: FloatArray | None = None) -> FloatArray:
    """dy.T @ x: (out, in)."""
    require_floating(dy, "the output gradient")
    require_dimensions(dy, 2, "(N, out features)", "the output gradient")
    require_dimensions(x, 2, "(N, in features)", "the input")
    require_shape(dy, (x.shape[0], dy.shape[1]), "the output gradient")
    return _product(dy.T, x, out)


def linear_backward_bias(dy: FloatArray, *, out: FloatArray | None = None) -> FloatArray:
    """The sum of dy over the batch: (out,)."""
    require_floating(dy, "the output gradient")
    require_dimensions(dy, 2, "(N, out features)", "the output gradient")
    result = result_array(out, dy.shape[1:], dy.dtype)
    with numpy.errstate(all="ignore"):
        result[...] = dy.sum(axis=0, dtype=numpy.float64)
    return result
