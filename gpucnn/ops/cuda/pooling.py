"""Max, average and adaptive average pooling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gpucnn_kernels as kernels
from gpucnn.ops.checks import (
    BY_RESULT,
    check_adaptive,
    check_argmax,
    check_ending,
    check_pixels,
    require_floating,
    require_shape,
)
from gpucnn.ops.contract import Array
from gpucnn.ops.cuda.arrays import call, check_devices, finish, image, is_image, laid_out_as, usable
from gpucnn_kernels.problem import IntOrPair, Pool2dProblem, pair


def max_pool2d_forward(
    x: Array,
    *,
    kernel_size: IntOrPair,
    stride: IntOrPair | None = None,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    ceil_mode: bool = False,
    out: Array | None = None,
) -> tuple[Array, Array]:
    """(y, argmax), both (N, C, P, Q): the largest value of each window and its place r * S + s in it."""
    check_devices(x=x, out=out)
    require_floating(x, "the input")
    options: dict[str, Any] = {"kernel_size": kernel_size, "stride": stride, "padding": padding}
    options |= {"dilation": dilation, "ceil_mode": ceil_mode}
    problem = Pool2dProblem.from_shapes(x.shape, **options)
    given = image(x, x.dtype)
    target = usable(out, problem.output_shape, x.dtype, x.dtype, given, layout=is_image)
    y, argmax = call(kernels.max_pool2d_forward, given, **options, out=target)
    return finish(y, out, x.dtype), argmax


def max_pool2d_backward(
    dy: Array,
    argmax: Array,
    *,
    input_size: Sequence[int],
    kernel_size: IntOrPair,
    stride: IntOrPair | None = None,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    ceil_mode: bool = False,
    y: Array | None = None,
    activation: str = "identity",
    negative_slope: float = 0.01,
    out: Array | None = None,
) -> Array:
    """The gradient for x, (N, C, H, W): each dy, through the activation before, added at its window's argmax."""
    check_devices(dy=dy, argmax=argmax, y=y, out=out)
    require_floating(dy, "the output gradient")
    options: dict[str, Any] = {"kernel_size": kernel_size, "stride": stride, "padding": padding}
    options |= {"dilation": dilation, "ceil_mode": ceil_mode}
    problem = Pool2dProblem.from_shapes((*dy.shape[:2], *input_size), **options)
    require_shape(dy, problem.output_shape, "the output gradient")
    check_argmax(argmax, problem.output_shape, "uint8" if problem.R * problem.S <= 256 else "int32")
    check_ending(activation, y, problem.output_shape, negative_slope, BY_RESULT)
    gradient, places = image(dy, dy.dtype), image(argmax, argmax.dtype)
    result = None if y is None else laid_out_as(gradient, y, dy.dtype)
    target = usable(out, problem.input_shape, dy.dtype, dy.dtype, gradient, places, result, layout=is_image)
    options |= {"input_size": (problem.H, problem.W), "y": result, "activation": activation}
    options["negative_slope"] = negative_slope
    return finish(call(kernels.max_pool2d_backward, gradient, places, **options, out=target), out, dy.dtype)


def avg_pool2d_forward(
    x: Array,
    *,
    kernel_size: IntOrPair,
    stride: IntOrPair | None = None,
    padding: IntOrPair = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    out: Array | None = None,
) -> Array:
    """The mean of each window, (N, C, P, Q)."""
    check_devices(x=x, out=out)
    require_floating(x, "the input")
    options: dict[str, Any] = {"kernel_size": kernel_size, "stride": stride, "padding": padding}
    options["ceil_mode"] = ceil_mode
    problem = Pool2dProblem.from_shapes(x.shape, **options)
    given = image(x, x.dtype)
    target = usable(out, problem.output_shape, x.dtype, x.dtype, given, layout=is_image)
    options["count_include_pad"] = count_include_pad
    return finish(call(kernels.avg_pool2d_forward, given, **options, out=target), out, x.dtype)


def avg_pool2d_backward(
    dy: Array,
    *,
    input_size: Sequence[int],
    kernel_size: IntOrPair,
    stride: IntOrPair | None = None,
    padding: IntOrPair = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    out: Array | None = None,
) -> Array:
    """The gradient for x, (N, C, H, W): dy over the divisor, added to each place of its window."""
    check_devices(dy=dy, out=out)
    require_floating(dy, "the output gradient")
    options: dict[str, Any] = {"kernel_size": kernel_size, "stride": stride, "padding": padding}
    options["ceil_mode"] = ceil_mode
    problem = Pool2dProblem.from_shapes((*dy.shape[:2], *input_size), **options)
    require_shape(dy, problem.output_shape, "the output gradient")
    gradient = image(dy, dy.dtype)
    target = usable(out, problem.input_shape, dy.dtype, dy.dtype, gradient, layout=is_image)
    options |= {"input_size": (problem.H, problem.W), "count_include_pad": count_include_pad}
    return finish(call(kernels.avg_pool2d_backward, gradient, **options, out=target), out, dy.dtype)


def adaptive_avg_pool2d_forward(x: Array, *, output_size: IntOrPair, out: Array | None = None) -> Array:
    """Means over windows floor(i * H / P) .. ceil((i + 1) * H / P): (N, C, P, Q) for any input size."""
    check_devices(x=x, out=out)
    check_adaptive(x, "the input", "(N, C, H, W)")
    check_pixels(x.shape)
    size = pair(output_size, "output_size")
    given = image(x, x.dtype)
    target = usable(out, (*x.shape[:2], *size), x.dtype, x.dtype, given, layout=is_image)
    return finish(call(kernels.adaptive_avg_pool2d_forward, given, output_size=size, out=target), out, x.dtype)


def adaptive_avg_pool2d_backward(dy: Array, *, input_size: Sequence[int], out: Array | None = None) -> Array:
    """The gradient for x, (N, C, H, W)."""
    check_devices(dy=dy, out=out)
    check_adaptive(dy, "the output gradient", "(N, C, P, Q)")
    shape = (*dy.shape[:2], int(input_size[0]), int(input_size[1]))
    check_pixels(shape)
    gradient = image(dy, dy.dtype)
    target = usable(out, shape, dy.dtype, dy.dtype, gradient, layout=is_image)
    dx = call(kernels.adaptive_avg_pool2d_backward, gradient, input_size=shape[2:], out=target)
    return finish(dx, out, dy.dtype)
