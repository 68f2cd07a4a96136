"""Convolution, transposed convolution, and im2col and col2im."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gpucnn_kernels as kernels
from gpucnn.ops.checks import (
    backward_data_problem,
    backward_filter_problem,
    check_algorithm,
    check_bias,
    check_residual,
    columns_problem,
    forward_problem,
    own_precision,
    require_dimensions,
    require_floating,
    window_problem,
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
    image,
    is_contiguous,
    is_image,
    ordered_as,
    usable,
)
from gpucnn_kernels.problem import Conv2dProblem, IntOrPair, Padding, conv_transpose2d_problem, pair

# ---------------------------------------------------------------- which algorithm


TENSOR_CORES: dict[str, dict[str, Any]] = {
    "tensor": {"algorithm": "tensor"},
    "tensor_tf32": {"algorithm": "tensor", "precision": "tf32"},
}
"""Further names, of all directions, as gpucnn_kernels takes them: tensor cores, in the arrays' precision or, for
float32, in tf32. They are not for float64, nor for GPUs before compute capability 8.0, and say so there."""


def algorithm_options(direction: str, algorithm: str, problem: Conv2dProblem, dtype: Any) -> dict[str, Any]:
    """``algorithm``, checked, as gpucnn_kernels takes it for arrays of ``dtype``.

    "auto" says with it that products of 16-bit arrays may be those of tensor cores, which are exact.
    """
    if algorithm in TENSOR_CORES:
        return TENSOR_CORES[algorithm]
    check_algorithm(direction, algorithm, conv2d_algorithms(direction), problem)
    if algorithm == "auto" and (precision := own_precision(dtype)):
        return {"algorithm": algorithm, "precision": precision}
    return {"algorithm": algorithm}


def conv2d_algorithms(direction: str) -> tuple[str, ...]:
    """Names that ``algorithm`` takes for "forward", "backward_data" or "backward_filter", without "auto".

    And without those of TENSOR_CORES, which do not take every array.
    """
    names: tuple[str, ...] = call(kernels.conv2d_algorithms, direction)
    return names


def conv2d_choose(direction: str, problem: Conv2dProblem, dtype: Any) -> str:
    """The name that "auto" stands for, for this Conv2dProblem and dtype."""
    name: str = call(kernels.conv2d_choose, direction, problem, dtype)
    return name


# ---------------------------------------------------------------- convolution


def conv2d_forward(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    stride: IntOrPair = 1,
    padding: Padding = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
    algorithm: str = "auto",
    out: Array | None = None,
) -> Array:
    """Cross-correlation of x (N, C, H, W) with weight (K, C / groups, R, S), plus bias (K,): (N, K, P, Q)."""
    check_devices(x=x, weight=weight, bias=bias, out=out)
    options: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    problem = forward_problem(x, weight, bias, **options)
    dtype = common_dtype(x, weight)
    way = algorithm_options("forward", algorithm, problem, dtype)
    given, filters = image(x, dtype), image(weight, dtype)
    offset = None if bias is None else contiguous(bias, dtype)
    target = usable(out, problem.output_shape, x.dtype, dtype, given, filters, offset, layout=is_image)
    y = call(kernels.conv2d_forward, given, filters, offset, **options, **way, out=target)
    return finish(y, out, x.dtype)


def conv2d_backward_data(
    dy: Array,
    weight: Array,
    *,
    input_size: Sequence[int],
    stride: IntOrPair = 1,
    padding: Padding = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
    algorithm: str = "auto",
    residual: Array | None = None,
    out: Array | None = None,
) -> Array:
    """The gradient for x, (N, C, H, W), from dy (N, K, P, Q), plus ``residual``; ``input_size`` is (H, W)."""
    check_devices(dy=dy, weight=weight, residual=residual, out=out)
    options: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    problem = backward_data_problem(dy, weight, input_size, **options)
    check_residual(residual, problem.input_shape)
    dtype = common_dtype(dy, weight)
    way = algorithm_options("backward_data", algorithm, problem, dtype)
    gradient, filters = image(dy, dtype), image(weight, dtype)
    options |= {"input_size": (problem.H, problem.W), **way}
    apart = None if residual is out else residual
    target = usable(out, problem.input_shape, dy.dtype, dtype, gradient, filters, apart, layout=is_image)
    if residual is not None:
        options["residual"] = ordered_as(gradient if target is None else target, residual, dtype)
    return finish(call(kernels.conv2d_backward_data, gradient, filters, **options, out=target), out, dy.dtype)


def conv2d_backward_filter(
    dy: Array,
    x: Array,
    *,
    kernel_size: IntOrPair,
    stride: IntOrPair = 1,
    padding: Padding = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
    algorithm: str = "auto",
    out: Array | None = None,
    out_bias: Array | None = None,
) -> Array:
    """The gradient for the weight, (K, C / groups, R, S), summed over the batch, and that for the bias."""
    check_devices(dy=dy, x=x, out=out, out_bias=out_bias)
    options: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation}
    problem = backward_filter_problem(dy, x, kernel_size, groups, **options)
    dtype = common_dtype(x, dy)
    way = algorithm_options("backward_filter", algorithm, problem, dtype)
    gradient, given = image(dy, dtype), image(x, dtype)
    options |= {"kernel_size": kernel_size, "groups": groups, **way}
    target = _gradient_target(out, problem.weight_shape, x.dtype, dtype, gradient, given, layout=is_image)
    bias = _gradient_target(out_bias, dy.shape[1:2], dy.dtype, dtype, gradient, given, layout=is_contiguous)
    dw = call(kernels.conv2d_backward_filter, gradient, given, **options, out=target, bias_out=bias)
    if out_bias is not None and bias is None:
        conv2d_backward_bias(dy, out=out_bias)
    return finish(dw, out, x.dtype)


def conv2d_backward_bias(dy: Array, *, out: Array | None = None) -> Array:
    """The gradient for the bias, (K,): the sum of dy (N, K, P, Q) over N, P and Q."""
    check_devices(dy=dy, out=out)
    require_floating(dy, "dy")
    require_dimensions(dy, 4, "(N, K, P, Q)", "dy")
    gradient = image(dy, dy.dtype)
    target = _gradient_target(out, dy.shape[1:2], dy.dtype, dy.dtype, gradient, layout=is_contiguous)
    return finish(call(kernels.conv2d_backward_bias, gradient, out=target), out, dy.dtype)


def _gradient_target(
    out: Array | None, shape: Sequence[int], dtype: Any, computed: Any, *reads: Array, layout: Layout
) -> Array | None:
    """``out`` where a kernel may write a parameter's gradient to it, in float32 also beside arrays in 16 bits."""
    given = getattr(out, "dtype", None)  # what is no array is for ``usable`` to refuse
    if given is not None and given == accumulating_dtype(computed):
        dtype = computed = given
    return usable(out, shape, dtype, computed, *reads, layout=layout)


# ---------------------------------------------------------------- transposed convolution


def conv_transpose2d_forward(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    stride: IntOrPair = 1,
    padding: IntOrPair = 0,
    output_padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
    algorithm: str = "auto",
    out: Array | None = None,
) -> Array:
    """Transposed convolution of x (N, C_in, H, W) with weight (C_in, C_out / groups, R, S), plus bias (C_out,)."""
    check_devices(x=x, weight=weight, bias=bias, out=out)
    require_floating(x, "x")
    require_floating(weight, "weight")
    options: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    options["output_padding"] = output_padding
    problem = conv_transpose2d_problem(x.shape, weight.shape, **options)
    check_bias(bias, problem.C)
    dtype = common_dtype(x, weight)
    way = algorithm_options("backward_data", algorithm, problem, dtype)
    given, filters = image(x, dtype), image(weight, dtype)
    offset = None if bias is None else contiguous(bias, dtype)
    target = usable(out, problem.input_shape, x.dtype, dtype, given, filters, offset, layout=is_image)
    y = call(kernels.conv_transpose2d_forward, given, filters, offset, **options, **way, out=target)
    return finish(y, out, x.dtype)


def conv_transpose2d_backward_data(
    dy: Array,
    weight: Array,
    *,
    stride: IntOrPair = 1,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
    algorithm: str = "auto",
    out: Array | None = None,
) -> Array:
    """The gradient for x of a transposed convolution: a plain convolution of dy."""
    return conv2d_forward(
        dy,
        weight,
        stride=stride,
        padding=pair(padding, "padding", 0),
        dilation=dilation,
        groups=groups,
        algorithm=algorithm,
        out=out,
    )


def conv_transpose2d_backward_filter(
    dy: Array,
    x: Array,
    *,
    kernel_size: IntOrPair,
    stride: IntOrPair = 1,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
    algorithm: str = "auto",
    out: Array | None = None,
) -> Array:
    """The gradient for the weight of a transposed convolution, (C_in, C_out / groups, R, S)."""
    return conv2d_backward_filter(
        x,
        dy,
        kernel_size=kernel_size,
        stride=stride,
        padding=pair(padding, "padding", 0),
        dilation=dilation,
        groups=groups,
        algorithm=algorithm,
        out=out,
    )


# ---------------------------------------------------------------- windows as columns


def im2col(
    x: Array,
    *,
    kernel_size: IntOrPair,
    stride: IntOrPair = 1,
    padding: Padding = 0,
    dilation: IntOrPair = 1,
    out: Array | None = None,
) -> Array:
    """Every window of x (N, C, H, W) as a column: (N, C * R * S, P * Q), rows ordered c, r, s."""
    check_devices(x=x, out=out)
    require_floating(x, "x")
    options: dict[str, Any] = {"kernel_size": kernel_size, "stride": stride, "padding": padding}
    options["dilation"] = dilation
    problem = window_problem(x.shape, **options)
    given = image(x, x.dtype)
    shape = (problem.N, problem.C * problem.R * problem.S, problem.P * problem.Q)
    target = usable(out, shape, x.dtype, x.dtype, given)
    return finish(call(kernels.im2col, given, **options, out=target), out, x.dtype)


def col2im(
    columns: Array,
    *,
    input_size: Sequence[int],
    kernel_size: IntOrPair,
    stride: IntOrPair = 1,
    padding: Padding = 0,
    dilation: IntOrPair = 1,
    out: Array | None = None,
) -> Array:
    """The adjoint of im2col: columns (N, C * R * S, P * Q) added up where windows overlap: (N, C, H, W)."""
    check_devices(columns=columns, out=out)
    options: dict[str, Any] = {"input_size": input_size, "kernel_size": kernel_size, "stride": stride}
    options |= {"padding": padding, "dilation": dilation}
    problem = columns_problem(columns, **options)
    given = contiguous(columns)
    target = usable(out, problem.input_shape, columns.dtype, columns.dtype, given, layout=is_image)
    return finish(call(kernels.col2im, given, **options, out=target), out, columns.dtype)
