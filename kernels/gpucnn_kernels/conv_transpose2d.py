"""Transposed convolution: the input gradient of a convolution, used as a layer of its own.

A transposed convolution with weight (C_in, C_out / groups, R, S) is the map whose transpose is the convolution
from C_out to C_in channels with the same weight. So its three operations are that convolution's three, with their
roles exchanged: forward is the convolution's input gradient (the bias added where the sums are stored), the input
gradient is the convolution itself, and the filter gradient is the convolution's, with x for its output gradient.
"""

from __future__ import annotations

from typing import Any

from gpucnn_kernels.conv2d import conv2d_backward_filter, conv2d_forward, input_gradient
from gpucnn_kernels.launch import Call
from gpucnn_kernels.problem import IntOrPair, conv_transpose2d_problem, pair


def conv_transpose2d_forward(
    x: Any,
    weight: Any,
    bias: Any = None,
    *,
    stride: IntOrPair = 1,
    padding: IntOrPair = 0,
    output_padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
    algorithm: str = "auto",
    precision: str | None = None,
    out: Any = None,
    stream: Any = None,
) -> Any:
    """Transposed convolution of x (N, C_in, H, W) with weight (C_in, C_out / groups, R, S), plus bias (C_out,).

    The output height is (H - 1) * stride - 2 * padding + dilation * (R - 1) + output_padding + 1. ``algorithm`` is
    one of "backward_data"'s. ``precision`` and what is raised are :func:`gpucnn_kernels.conv2d_forward`'s.
    """
    with Call(stream, x=x, weight=weight, bias=bias, residual=None, out=out) as call:
        call.floating("x", "weight", "bias", "out")
        problem = conv_transpose2d_problem(
            call["x"].shape,
            call["weight"].shape,
            stride=stride,
            padding=padding,
            output_padding=output_padding,
            dilation=dilation,
            groups=groups,
        )
        return call.give(input_gradient(call, problem, call["x"], algorithm, precision))


def conv_transpose2d_backward_data(
    dy: Any,
    weight: Any,
    *,
    stride: IntOrPair = 1,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
    algorithm: str = "auto",
    precision: str | None = None,
    out: Any = None,
    stream: Any = None,
) -> Any:
    """The gradient for x of a transposed convolution, (N, C_in, H, W): a plain convolution of dy.

    ``algorithm`` is one of "forward"'s. Raises what :func:`gpucnn_kernels.conv2d_forward` does.
    """
    return conv2d_forward(
        dy,
        weight,
        stride=stride,
        padding=pair(padding, "padding", 0),
        dilation=dilation,
        groups=groups,
        algorithm=algorithm,
        precision=precision,
        out=out,
        stream=stream,
    )


def conv_transpose2d_backward_filter(
    dy: Any,
    x: Any,
    *,
    kernel_size: IntOrPair,
    stride: IntOrPair = 1,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
    algorithm: str = "auto",
    precision: str | None = None,
    out: Any = None,
    stream: Any = None,
) -> Any:
    """The gradient for the weight of a transposed convolution, (C_in, C_out / groups, R, S), over the batch.

    ``algorithm`` is one of "backward_filter"'s. Raises what :func:`gpucnn_kernels.conv2d_forward` does.
    """
    return conv2d_backward_filter(
        x,
        dy,
        kernel_size=kernel_size,
        stride=stride,
        padding=pair(padding, "padding", 0),
        dilation=dilation,
        groups=groups,
        algorithm=algorithm,
        precision=precision,
        out=out,
        stream=stream,
    )
