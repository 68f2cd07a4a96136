"""The fully connected layer: matrix products with the weight (out, in)."""

from __future__ import annotations

from collections.abc import Callable

import numpy

from gpucnn.ops.checks import (
    BY_RESULT,
    check_ending,
    check_linear_data,
    check_linear_forward,
    check_linear_gradient,
    check_linear_weight,
    require_choice,
)
from gpucnn.ops.cpu import compiled
from gpucnn.ops.cpu.activations import leaky_relu_backward, relu_backward, sigmoid_backward, tanh_backward
from gpucnn.ops.cpu.blocks import ranges
from gpucnn.ops.cpu.compiled.sums import column_sums
from gpucnn.ops.cpu.inference import ACTIVATIONS, activate
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
    x: FloatArray,
    weight: FloatArray,
    bias: FloatArray | None = None,
    *,
    activation: str = "identity",
    negative_slope: float = 0.01,
    out: FloatArray | None = None,
) -> FloatArray:
    """activation(x (N, in) @ weight.T (weight is (out, in)) + bias (out,)): (N, out)."""
    check_linear_forward(x, weight, bias)
    require_choice(activation, tuple(ACTIVATIONS), "activation")
    if bias is not None and out is not None and numpy.may_share_memory(out, bias):
        bias = bias.copy()  # the product overwrites it before it is added
    result = _product(x, weight.T, out)
    if bias is not None:
        numpy.add(result, bias, out=result, casting="same_kind")
    activate(result, activation, negative_slope)
    return result


_BACK: dict[str, Callable[..., FloatArray]] = {
    "relu": relu_backward,
    "leaky_relu": leaky_relu_backward,  # by its result, which has the sign of what it was made of
    "sigmoid": sigmoid_backward,
    "tanh": tanh_backward,
}


def linear_backward(
    dy: FloatArray,
    x: FloatArray,
    weight: FloatArray,
    *,
    y: FloatArray | None = None,
    activation: str = "identity",
    negative_slope: float = 0.01,
    with_input: bool = True,
    with_bias: bool = True,
    weight_gradient: FloatArray | None = None,
    bias_gradient: FloatArray | None = None,
) -> tuple[FloatArray | None, FloatArray, FloatArray | None]:
    """(dx, dweight, dbias) of y = activation(x @ weight.T + bias)."""
    check_linear_weight(dy, x)
    check_linear_data(dy, weight)
    check_ending(activation, y, dy.shape, negative_slope, BY_RESULT)
    if activation != "identity":
        slope = {"negative_slope": negative_slope} if activation == "leaky_relu" else {}
        dy = _BACK[activation](dy, y, **slope)
    dbias = linear_backward_bias(dy, out=bias_gradient) if with_bias else None
    dweight = linear_backward_weight(dy, x, out=weight_gradient)
    return linear_backward_data(dy, weight) if with_input else None, dweight, dbias


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
