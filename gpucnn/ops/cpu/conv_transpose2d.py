"""Transposed convolution: the input gradient of a convolution, used as a layer of its own.

A transposed convolution with weight (C_in, C_out / groups, R, S) is the map whose transpose is the convolution
from C_out to C_in channels with the same weight. So its three operations are that convolution's three, with their
roles exchanged:

    forward          is the convolution's input gradient
    input gradient   is the convolution itself
    filter gradient  is the convolution's, with x in the place of its output gradient
"""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from gpucnn.ops.checks import check_bias, require_floating
from gpucnn.ops.cpu.conv2d import conv2d_backward_data, conv2d_backward_filter, conv2d_forward
from gpucnn_kernels.problem import IntOrPair, conv_transpose2d_problem, pair


def conv_transpose2d_forward(
    x: NDArray[Any],
    weight: NDArray[Any],
    bias: NDArray[Any] | None = None,
    *,
    stride: IntOrPair = 1,
    padding: IntOrPair = 0,
    output_padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
    algorithm: str = "auto",
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """Transposed convolution of x (N, C_in, H, W) with weight (C_in, C_out / groups, R, S), plus bias (C_out,).

    The output height is (H - 1) * stride - 2 * padding + dilation * (R - 1) + output_padding + 1. ``algorithm`` is
    one of "backward_data"'s. Raises what :func:`gpucnn.ops.cpu.conv2d.conv2d_forward` does.
    """
    require_floating(x, "x")
    require_floating(weight, "weight")
    problem = conv_transpose2d_problem(
        x.shape,
        weight.shape,
        stride=stride,
        padding=padding,
        output_padding=output_padding,
        dilation=dilation,
        groups=groups,
    )
    check_bias(bias, problem.C)
    y = conv2d_backward_data(
        x,
        weight,
        input_size=(problem.H, problem.W),
        stride=problem.stride,
        padding=problem.padding,
        dilation=problem.dilation,
        groups=groups,
        algorithm=algorithm,
        out=out,
    )
    if bias is not None:
        y += bias[:, None, None]
    return y


def conv_transpose2d_backward_data(
    dy: NDArray[Any],
    weight: NDArray[Any],
    *,
    stride: IntOrPair = 1,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
    algorithm: str = "auto",
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """The gradient for x of a transposed convolution, (N, C_in, H, W): a plain convolution of dy.

    ``algorithm`` is one of "forward"'s.
    """
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
    dy: NDArray[Any],
    x: NDArray[Any],
    *,
    kernel_size: IntOrPair,
    stride: IntOrPair = 1,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
    algorithm: str = "auto",
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """The gradient for the weight of a transposed convolution, (C_in, C_out / groups, R, S), over the batch.

    ``algorithm`` is one of "backward_filter"'s.
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
        out=out,
    )
