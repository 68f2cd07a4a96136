"""The fully connected layer: matrix products with the weight (out, in)."""

from __future__ import annotations

import gpucnn_kernels as kernels
from gpucnn.ops.checks import (
    check_linear_data,
    check_linear_forward,
    check_linear_gradient,
    check_linear_weight,
)
from gpucnn.ops.contract import Array
from gpucnn.ops.cuda.arrays import (
    call,
    check_devices,
    common_dtype,
    contiguous,
    finish,
    is_matrix,
    matrix,
    usable,
)


def linear_forward(x: Array, weight: Array, bias: Array | None = None, *, out: Array | None = None) -> Array:
    """X (N, in) @ weight.T (weight is (out, in)) + bias (out,): (N, out)."""
    check_devices(x=x, weight=weight, bias=bias, out=out)
    check_linear_forward(x, weight, bias)
    dtype = common_dtype(x, weight)
    given, factor = matrix(x, dtype), matrix(weight, dtype)
    row = None if bias is None else contiguous(bias, dtype)
    shape = (x.shape[0], weight.shape[0])
    target = usable(out, shape, x.dtype, dtype, given, factor, row, layout=is_matrix)
    return finish(call(kernels.linear_forward, given, factor, row, out=target), out, x.dtype)


def linear_backward_data(dy: Array, weight: Array, *, out: Array | None = None) -> Array:
    """Dy (N, out) @ weight: (N, in)."""
    check_devices(dy=dy, weight=weight, out=out)
    check_linear_data(dy, weight)
    dtype = common_dtype(dy, weight)
    gradient, factor = matrix(dy, dtype), matrix(weight, dtype)
    shape = (dy.shape[0], weight.shape[1])
    target = usable(out, shape, dy.dtype, dtype, gradient, factor, layout=is_matrix)
    return finish(call(kernels.linear_backward_data, gradient, factor, out=target), out, dy.dtype)


def linear_backward_weight(dy: Array, x: Array, *, out: Array | None = None) -> Array:
    """dy.T @ x: (out, in)."""
    check_devices(dy=dy, x=x, out=out)
    check_linear_weight(dy, x)
    dtype = common_dtype(dy, x)
    gradient, given = matrix(dy, dtype), matrix(x, dtype)
    shape = (dy.shape[1], x.shape[1])
    target = usable(out, shape, dy.dtype, dtype, gradient, given, layout=is_matrix)
    return finish(call(kernels.linear_backward_weight, gradient, given, out=target), out, dy.dtype)


def linear_backward_bias(dy: Array, *, out: Array | None = None) -> Array:
    """The sum of dy over the batch: (out,)."""
    check_devices(dy=dy, out=out)
    check_linear_gradient(dy)
    gradient = matrix(dy, dy.dtype)
    target = usable(out, dy.shape[1:], dy.dtype, dy.dtype, gradient)
    return finish(call(kernels.linear_backward_bias, gradient, out=target), out, dy.dtype)
