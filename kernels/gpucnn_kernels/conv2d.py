"""Two-dimensional convolution on a GPU: forward, gradients for input, weight and bias, and which path "auto" is.

The arithmetic is in the modules beside this one and in cuda/conv2d_*.cu; every path of a direction gives the same
result up to rounding. 16-bit arrays are summed in float32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from gpucnn_kernels import conv2d_data_paths as data_paths
from gpucnn_kernels import conv2d_filter, conv2d_tensor, conv2d_wgmma, tuning
from gpucnn_kernels import conv2d_forward_paths as forward_paths
from gpucnn_kernels.arrays import DeviceArray, image_layout
from gpucnn_kernels.conv2d_choice import chosen, least_precision
from gpucnn_kernels.conv2d_direct import DIRECT_CHANNELS, direct
from gpucnn_kernels.conv2d_filter import conv2d_backward_bias, conv2d_backward_filter
from gpucnn_kernels.conv2d_forward_paths import Epilogue
from gpucnn_kernels.conv2d_input_columns import direct_backward_data
from gpucnn_kernels.errors import ArgumentError, LayoutError
from gpucnn_kernels.gpu import H200, Gpu
from gpucnn_kernels.launch import Call
from gpucnn_kernels.overlap import require_apart, require_same_or_apart
from gpucnn_kernels.problem import Conv2dProblem, IntOrPair, Padding, ProblemError, pair

__all__ = [
    "conv2d_algorithms",
    "conv2d_backward_bias",
    "conv2d_backward_data",
    "conv2d_backward_filter",
    "conv2d_choose",
    "conv2d_forward",
    "input_gradient",
]

Path = Callable[[Call, Conv2dProblem, DeviceArray, DeviceArray, DeviceArray, Epilogue], None]
"""(call, problem, x or dy, weight, the array to fill, what happens to a sum before it is stored)."""

_FORWARD: dict[str, Path] = {
    "implicit_gemm": forward_paths.implicit_gemm,
    "direct": direct,
    "depthwise": forward_paths.depthwise,
    "im2col": forward_paths.im2col,
}
_BACKWARD_DATA: dict[str, Path] = {
    "phases": data_paths.phases,
    "direct": direct_backward_data,
    "dilated": data_paths.dilated,
    "col2im": data_paths.col2im,
    "scatter": data_paths.scatter,
    "depthwise": data_paths.depthwise,
}


# ---------------------------------------------------------------- which path


def conv2d_algorithms(direction: str) -> tuple[str, ...]:
    """Names that ``algorithm`` takes for "forward", "backward_data" or "backward_filter", without "auto".

    They take every dtype on every GPU. "tensor" is one more, of all directions, that does not, and "wgmma" another
    of the first two: see :mod:`gpucnn_kernels.conv2d_tensor` and :mod:`gpucnn_kernels.conv2d_wgmma`. Raises
    ArgumentError for another direction.
    """
    if direction == "forward":
        return tuple(_FORWARD)
    if direction == "backward_data":
        return tuple(_BACKWARD_DATA)
    if direction == "backward_filter":
        return conv2d_filter.filter_algorithms()
    raise ArgumentError(f"direction must be one of forward, backward_data, backward_filter, got {direction!r}")


def conv2d_choose(
    direction: str,
    problem: Conv2dProblem,
    dtype: Any,
    *,
    precision: str | None = None,
    channels_last: bool = False,
    gpu: Gpu = H200,
) -> str:
    """The name that "auto" stands for, for this Conv2dProblem and dtype, with images of this layout.

    ``precision`` is the functions' argument, ``gpu`` what it is chosen for. How it is chosen is
    in :mod:`gpucnn_kernels.conv2d_choice`.
    """
    conv2d_algorithms(direction)
    return chosen(direction, problem, dtype, precision=precision, channels_last=channels_last, gpu=gpu)


def _start(
    call: Call,
    direction: str,
    algorithm: str,
    problem: Conv2dProblem,
    images: DeviceArray,
    precision: str | None,
    run: tuning.Run,
) -> None:
    """Do the work by the algorithm of this name, or by the one that "auto" is."""
    least = least_precision(images.dtype, precision)
    options: dict[str, Any] = {"precision": least, "channels_last": images.channels_last}
    if algorithm != "auto":
        run(algorithm)
    elif tuning.enabled():
        tuning.start(call, direction, problem, images.dtype, run, **options)
    else:
        run(conv2d_choose(direction, problem, images.dtype, gpu=call.gpu, **options))


def _check_algorithm(
    call: Call, direction: str, algorithm: str, problem: Conv2dProblem, dtype: str, precision: str | None
) -> None:
    """Raise where there is no algorithm of this name, or it cannot do this problem."""
    names = conv2d_algorithms(direction)
    conv2d_tensor.check_precision(precision, dtype)
    if algorithm == "auto":
        return
    if algorithm == "tensor":
        conv2d_tensor.check(call, dtype)
        return
    if algorithm == "wgmma" and direction != "backward_filter":
        conv2d_wgmma.check(call, dtype)
        return
    if algorithm not in names:
        raise ArgumentError(
            f"unknown algorithm {algorithm!r} for conv2d {direction}; choose auto or one of {', '.join(names)}"
        )
    depth = problem.C // problem.groups
    others = ", ".join(name for name in names if name not in ("direct", "depthwise"))
    if algorithm == "direct" and depth > DIRECT_CHANNELS:
        raise ArgumentError(
            f"algorithm 'direct' is for at most {DIRECT_CHANNELS} input channels a group, got {depth} "
            f"({problem.C} channels, groups={problem.groups}); choose auto or one of {others}"
        )
    if algorithm == "depthwise" and depth > 1:
        raise ArgumentError(
            f"algorithm 'depthwise' needs as many groups as input channels, got groups={problem.groups} for "
            f"{problem.C} channels; choose auto or one of {others}"
        )


# ---------------------------------------------------------------- the operations


def conv2d_forward(
    x: Any,
    weight: Any,
    bias: Any = None,
    *,
    stride: IntOrPair = 1,
    padding: Padding = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
    algorithm: str = "auto",
    precision: str | None = None,
    scale: Any = None,
    residual: Any = None,
    activation: str = "identity",
    negative_slope: float = 0.01,
    out: Any = None,
    stream: Any = None,
) -> Any:
    """Cross-correlation of x (N, C, H, W) with weight (K, C / groups, R, S), plus bias (K,): (N, K, P, Q).

    y[n, k, p, q] = activation(scale[k] * sum + bias[k] + residual[n, k, p, q]), where sum is that over c, r, s of
    x[n, c, p * stride_h - pad_top + r * dilation_h, q * stride_w - pad_left + s * dilation_w] * weight[k, c, r, s]

    with x zero outside the image, c over the channels of k's group, and
    P = floor((H + pad_top + pad_bottom - dilation_h * (R - 1) - 1) / stride_h) + 1.

    All of it is made before the sum is stored, which is rounded once. ``scale`` (K,) and ``residual``, of the
    result's shape and layout, may each be None. ``activation`` is one of identity, relu, leaky_relu (of
    ``negative_slope``), sigmoid, tanh, gelu, gelu_tanh, silu and relu6.

    ``precision`` is the least that products may have: "tf32" lets "auto" and "tensor" round float32 arrays to
    tf32, "float32", "float16" and "bfloat16" are the arrays' own; see :mod:`gpucnn_kernels.conv2d_tensor`. Without
    one "auto" may make each product of float32 arrays of three tf32 ones, as exact; with "float32" it does not. x,
    weight and ``out`` may each be contiguous or channels-last; the result is laid out as x. "im2col" takes a
    workspace for the columns, "tensor" one for what does not lie in pieces of 16 bytes.

    Raises ProblemError where shapes do not fit, DtypeError, DeviceError and LayoutError for arrays that do not,
    ArgumentError for an algorithm or activation that is unknown or an algorithm that cannot do this problem.
    """
    with Call(stream, x=x, weight=weight, bias=bias, scale=scale, residual=residual, out=out) as call:
        dtype = call.floating("x", "weight", "bias", "scale", "residual", "out")
        images, weights = call["x"], call["weight"]
        problem = Conv2dProblem.from_shapes(
            images.shape, weights.shape, stride=stride, padding=padding, dilation=dilation, groups=groups
        )
        _check_algorithm(call, "forward", algorithm, problem, images.dtype, precision)
        vectors = {name: by_channel(call, name, problem.K) for name in ("bias", "scale")}
        epilogue = Epilogue(
            activation=activation, negative_slope=negative_slope, residual=call.get("residual"), **vectors
        )
        y = result_array(call, problem.output_shape, dtype, images, *vectors.values())
        _check_residual(call, y)

        def run(name: str) -> None:
            if name == "tensor":
                conv2d_tensor.convolve(call, problem, images, weights, y, epilogue, precision=precision)
            elif name == "wgmma":
                conv2d_wgmma.convolve(call, problem, images, weights, y, epilogue)
            else:
                _FORWARD[name](call, problem, images, weights, y, epilogue)

        _start(call, "forward", algorithm, problem, images, precision, run)
        return call.give(y)


def conv2d_backward_data(
    dy: Any,
    weight: Any,
    *,
    input_size: Sequence[int],
    stride: IntOrPair = 1,
    padding: Padding = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
    algorithm: str = "auto",
    precision: str | None = None,
    residual: Any = None,
    out: Any = None,
    stream: Any = None,
) -> Any:
    """The gradient for x, (N, C, H, W), from dy (N, K, P, Q); ``input_size`` is (H, W).

    dx[n, c, h, w] is the sum of dy[n, k, p, q] * weight[k, c, r, s] over all k, p, q, r, s in which x[n, c, h, w]
    was multiplied by weight[k, c, r, s] for y[n, k, p, q]. The result is laid out as dy. All paths but "scatter"
    give the same bits every time; "dilated", "col2im", "scatter" and "tensor" take workspaces. ``precision`` and
    what is raised are :func:`conv2d_forward`'s.

    ``residual``, of the result's shape and layout, is added to the sums before they are rounded, once: another
    gradient for the same x, such as that of a residual block's shortcut. It may be ``out`` itself.
    """
    with Call(stream, dy=dy, weight=weight, bias=None, residual=residual, out=out) as call:
        call.floating("dy", "weight", "residual", "out")
        if len(call["weight"].shape) != 4:
            raise ProblemError(
                f"weight must have 4 dimensions (K, C / groups, R, S), got shape {call['weight'].shape}"
            )
        problem = Conv2dProblem.from_output(
            call["dy"].shape,
            call["weight"].shape,
            pair(input_size, "input_size"),
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
        )
        return call.give(input_gradient(call, problem, call["dy"], algorithm, precision))


def input_gradient(
    call: Call, problem: Conv2dProblem, dy: DeviceArray, algorithm: str, precision: str | None = None
) -> DeviceArray:
    """The gradient for the input of ``problem`` in a call that has arguments weight, bias (C,), residual and out.

    The last three may be None. The bias is the transposed convolution's, which this is too.
    """
    _check_algorithm(call, "backward_data", algorithm, problem, dy.dtype, precision)
    bias = by_channel(call, "bias", problem.C)
    dx = result_array(call, problem.input_shape, dy.dtype, dy, bias)
    _check_residual(call, dx, in_place=True)
    epilogue = Epilogue(bias, residual=call.get("residual"))
    if algorithm == "auto" and tuning.enabled():
        epilogue = epilogue.apart_from(call, dx)  # measuring does the work many times
    weight = call["weight"]

    def run(name: str) -> None:
        if name == "tensor":
            conv2d_tensor.convolve(call, problem, dy, weight, dx, epilogue, precision=precision, transposed=True)
        elif name == "wgmma":
            conv2d_wgmma.convolve(call, problem, dy, weight, dx, epilogue, transposed=True)
        else:
            _BACKWARD_DATA[name](call, problem, dy, weight, dx, epilogue)

    _start(call, "backward_data", algorithm, problem, dy, precision, run)
    return dx


def by_channel(call: Call, name: str, channels: int) -> DeviceArray | None:
    """The argument ``name``, bias or scale, where there is one, checked."""
    array = call.get(name)
    if array is not None:
        call.require(name, shape=(channels,))
        call.contiguous(name)
    return array


def _check_residual(call: Call, result: DeviceArray, *, in_place: bool = False) -> None:
    """Raise unless the residual, where there is one, is laid out as the result, and shares no memory with it.

    With ``in_place`` it may be the result itself.
    """
    residual = call.get("residual")
    if residual is None:
        return
    call.require("residual", shape=result.shape)
    if not residual.same_layout(result):
        raise LayoutError(
            f"residual has strides {residual.strides}, but the result has {result.strides} (in elements); bring "
            "both to the same memory format"
        )
    if in_place:
        require_same_or_apart(result, residual)
    else:
        require_apart(result, residual)


def result_array(
    call: Call, shape: tuple[int, ...], dtype: str, source: DeviceArray, *vectors: DeviceArray | None
) -> DeviceArray:
    """``out`` or a new array, checked against the arrays that are read, whose layouts are checked too."""
    for array in (source, call["weight"]):
        image_layout(array)
    output = call.output(shape, dtype, like=source)
    image_layout(output)
    require_apart(output, source, call["weight"], *vectors)
    return output
