"""A convolution together with what follows it in a network that only predicts, in one launch where that pays."""

from __future__ import annotations

from typing import Any

import gpucnn_kernels as kernels
from gpucnn.ops.checks import check_residual, forward_problem, own_precision, require_choice
from gpucnn.ops.contract import Array
from gpucnn.ops.cuda.arrays import (
    call,
    check_devices,
    common_dtype,
    contiguous,
    finish,
    image,
    is_image,
    ordered_as,
    usable,
)
from gpucnn.ops.cuda.convolution import algorithm_options
from gpucnn.ops.cuda.pooling import max_pool2d_forward
from gpucnn.ops.memory_format import is_channels_last, result_for
from gpucnn_kernels.activations import FUNCTIONS
from gpucnn_kernels.problem import IntOrPair, Padding, Pool2dProblem


def conv2d_inference(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    residual: Array | None = None,
    *,
    stride: IntOrPair = 1,
    padding: Padding = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
    algorithm: str = "auto",
    activation: str = "identity",
    negative_slope: float = 0.01,
    out: Array | None = None,
) -> Array:
    """activation(convolution + bias + residual), with residual (N, K, P, Q) or None: one launch."""
    check_devices(x=x, weight=weight, bias=bias, residual=residual, out=out)
    require_choice(activation, tuple(FUNCTIONS), "activation")
    options: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    problem = forward_problem(x, weight, bias, **options)
    check_residual(residual, problem.output_shape)
    dtype = common_dtype(x, weight)
    way = algorithm_options("forward", algorithm, problem, dtype)
    given, filters = image(x, dtype), image(weight, dtype)
    offset = None if bias is None else contiguous(bias, dtype)
    target = usable(out, problem.output_shape, x.dtype, dtype, given, filters, offset, residual, layout=is_image)
    y = call(
        kernels.conv2d_forward,
        given,
        filters,
        offset,
        **options,
        **way,
        residual=None if residual is None else ordered_as(given if target is None else target, residual, dtype),
        activation=activation,
        negative_slope=negative_slope,
        out=target,
    )
    return finish(y, out, x.dtype)


def conv2d_max_pool2d_inference(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    pool_size: IntOrPair,
    pool_stride: IntOrPair | None = None,
    pool_padding: IntOrPair = 0,
    pool_dilation: IntOrPair = 1,
    ceil_mode: bool = False,
    stride: IntOrPair = 1,
    padding: Padding = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
    activation: str = "identity",
    negative_slope: float = 0.01,
    out: Array | None = None,
) -> Array:
    """The largest value of each window of activation(convolution + bias), (N, K, P', Q').

    One launch where :func:`gpucnn_kernels.conv2d_max_pool2d_pays` says so, otherwise two.
    """
    y, _ = _pooled(
        x,
        weight,
        bias,
        {"pool_size": pool_size, "pool_stride": pool_stride, "pool_padding": pool_padding}
        | {"pool_dilation": pool_dilation, "ceil_mode": ceil_mode},
        {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups},
        {"activation": activation, "negative_slope": negative_slope},
        out,
        with_argmax=False,
    )
    return y


def conv2d_max_pool2d_forward(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    pool_size: IntOrPair,
    pool_stride: IntOrPair | None = None,
    pool_padding: IntOrPair = 0,
    pool_dilation: IntOrPair = 1,
    ceil_mode: bool = False,
    stride: IntOrPair = 1,
    padding: Padding = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
    activation: str = "identity",
    negative_slope: float = 0.01,
    out: Array | None = None,
) -> tuple[Array, Array]:
    """(y, argmax), both (N, K, P', Q'): that and the place r * S + s of each in its window."""
    return _pooled(
        x,
        weight,
        bias,
        {"pool_size": pool_size, "pool_stride": pool_stride, "pool_padding": pool_padding}
        | {"pool_dilation": pool_dilation, "ceil_mode": ceil_mode},
        {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups},
        {"activation": activation, "negative_slope": negative_slope},
        out,
        with_argmax=True,
    )


def _pooled(
    x: Array,
    weight: Array,
    bias: Array | None,
    pooling: dict[str, Any],
    options: dict[str, Any],
    epilogue: dict[str, Any],
    out: Array | None,
    *,
    with_argmax: bool,
) -> tuple[Array, Any]:
    check_devices(x=x, weight=weight, bias=bias, out=out)
    require_choice(epilogue["activation"], tuple(FUNCTIONS), "activation")
    problem = forward_problem(x, weight, bias, **options)
    apart = {name.removeprefix("pool_"): value for name, value in pooling.items() if name != "pool_size"}
    pool = Pool2dProblem.from_shapes(problem.output_shape, pooling["pool_size"], **apart)
    dtype = common_dtype(x, weight)
    how = {"precision": own_precision(dtype), "channels_last": is_channels_last(x)}
    if not call(kernels.conv2d_max_pool2d_pays, problem, pool, dtype, **how):
        between = None if out is None else result_for(problem.output_shape, x, is_channels_last(out))
        y = conv2d_inference(x, weight, bias, **options, **epilogue, out=between)
        return max_pool2d_forward(y, kernel_size=pooling["pool_size"], **apart, out=out)
    given, filters = image(x, dtype), image(weight, dtype)
    offset = None if bias is None else contiguous(bias, dtype)
    target = usable(out, pool.output_shape, x.dtype, dtype, given, filters, offset, layout=is_image)
    result = call(
        kernels.conv2d_max_pool2d_forward,
        given,
        filters,
        offset,
        **pooling,
        **options,
        **epilogue,
        with_argmax=with_argmax,
        out=target,
    )
    y, argmax = result if with_argmax else (result, None)
    return finish(y, out, x.dtype), argmax
