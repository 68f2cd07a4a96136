"""The fully connected layer: matrix products with the weight (out, in)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gpucnn_kernels as kernels
from gpucnn.ops.checks import (
    BY_RESULT,
    check_ending,
    check_linear_data,
    check_linear_forward,
    check_linear_gradient,
    check_linear_weight,
    require_choice,
)
from gpucnn.ops.contract import Array
from gpucnn.ops.cuda.arrays import (
    Layout,
    accumulating_dtype,
    call,
    check_devices,
    common_dtype,
    contiguous,
    finish,
    is_contiguous,
    is_matrix,
    laid_out_as,
    matrix,
    usable,
)
from gpucnn_kernels.activations import FUNCTIONS


def linear_forward(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    activation: str = "identity",
    negative_slope: float = 0.01,
    out: Array | None = None,
) -> Array:
    """activation(x (N, in) @ weight.T (weight is (out, in)) + bias (out,)): (N, out)."""
    check_devices(x=x, weight=weight, bias=bias, out=out)
    check_linear_forward(x, weight, bias)
    require_choice(activation, tuple(FUNCTIONS), "activation")
    dtype = common_dtype(x, weight)
    given, factor = matrix(x, dtype), matrix(weight, dtype)
    row = None if bias is None else contiguous(bias, dtype)
    shape = (x.shape[0], weight.shape[0])
    target = usable(out, shape, x.dtype, dtype, given, factor, row, layout=is_matrix)
    options: dict[str, Any] = {"activation": activation, "negative_slope": negative_slope}
    return finish(call(kernels.linear_forward, given, factor, row, **options, out=target), out, x.dtype)


def linear_backward(
    dy: Array,
    x: Array,
    weight: Array,
    *,
    y: Array | None = None,
    activation: str = "identity",
    negative_slope: float = 0.01,
    with_input: bool = True,
    with_bias: bool = True,
    weight_gradient: Array | None = None,
    bias_gradient: Array | None = None,
) -> tuple[Array | None, Array, Array | None]:
    """(dx, dweight, dbias) of y = activation(x @ weight.T + bias), in one launch where the layer is small."""
    check_devices(dy=dy, x=x, weight=weight, y=y, weight_gradient=weight_gradient, bias_gradient=bias_gradient)
    check_linear_weight(dy, x)
    check_linear_data(dy, weight)
    check_ending(activation, y, dy.shape, negative_slope, BY_RESULT)
    dtype = common_dtype(dy, x, weight)
    gradient, given, factor = (matrix(array, dtype) for array in (dy, x, weight))
    reads = gradient, given, factor
    shapes = (dy.shape[1], x.shape[1]), dy.shape[1:]
    targets = [
        _parameter_target(target, shape, dtype, layout, *reads)
        for target, shape, layout in zip(
            (weight_gradient, bias_gradient), shapes, (is_matrix, is_contiguous), strict=True
        )
    ]
    dx, dweight, dbias = call(
        kernels.linear_backward,
        *reads,
        y=None if y is None or activation == "identity" else laid_out_as(gradient, y, dtype),
        activation=activation,
        negative_slope=negative_slope,
        with_input=with_input,
        with_bias=with_bias,
        weight_gradient=targets[0],
        bias_gradient=targets[1] if with_bias else None,
    )
    return (
        None if dx is None else finish(dx, None, dy.dtype),
        finish(dweight, weight_gradient, dweight.dtype),
        None if dbias is None else finish(dbias, bias_gradient, dbias.dtype),
    )


def _parameter_target(
    out: Array | None, shape: Sequence[int], dtype: Any, layout: Layout, *reads: Array
) -> Array | None:
    """``out`` where the kernel may write a parameter's gradient straight to it, also in the wider dtype."""
    if out is None:
        return None
    computed = out.dtype if out.dtype == accumulating_dtype(dtype) else dtype
    return usable(out, shape, out.dtype, computed, *reads, layout=layout)


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
