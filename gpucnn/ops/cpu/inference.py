"""A convolution together with what follows it in a network that only predicts.

What follows is done in place, in the convolution's result: no array is made for it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy
from numpy.typing import NDArray

from gpucnn.ops.checks import check_out, check_residual, forward_problem, require_choice
from gpucnn.ops.cpu.activations import (
    leaky_relu_forward,
    relu6_forward,
    relu_forward,
    sigmoid_forward,
    silu_forward,
    tanh_forward,
)
from gpucnn.ops.cpu.conv2d import conv2d_forward
from gpucnn.ops.cpu.gelu import gelu_forward
from gpucnn.ops.cpu.max_pooling import max_pool2d_forward
from gpucnn.ops.cpu.memory import FloatArray
from gpucnn_kernels.problem import IntOrPair, Padding

ACTIVATIONS: dict[str, Callable[..., FloatArray] | None] = {
    "identity": None,
    "relu": relu_forward,
    "leaky_relu": leaky_relu_forward,
    "sigmoid": sigmoid_forward,
    "tanh": tanh_forward,
    "gelu": gelu_forward,
    "gelu_tanh": partial(gelu_forward, approximate="tanh"),
    "silu": silu_forward,
    "relu6": relu6_forward,
}
"""The activations that an operation may end with."""

_RISING = ("relu", "leaky_relu", "sigmoid", "tanh", "relu6")
"""Activations f with max(f(a), f(b)) = f(max(a, b)), leaky ReLU where its slope is not negative."""


def conv2d_inference(
    x: FloatArray,
    weight: FloatArray,
    bias: FloatArray | None = None,
    residual: FloatArray | None = None,
    *,
    stride: IntOrPair = 1,
    padding: Padding = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
    algorithm: str = "auto",
    activation: str = "identity",
    negative_slope: float = 0.01,
    out: FloatArray | None = None,
) -> FloatArray:
    """activation(convolution + bias + residual), with residual (N, K, P, Q) or None."""
    require_choice(activation, tuple(ACTIVATIONS), "activation")
    options: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    problem = forward_problem(x, weight, bias, **options)
    check_residual(residual, problem.output_shape)
    apart = True
    if out is not None and residual is not None:
        check_out(out, problem.output_shape, x.dtype)
        apart = not numpy.may_share_memory(out, residual)  # what is still to be added must not be overwritten
    y = conv2d_forward(x, weight, bias, **options, algorithm=algorithm, out=out if apart else None)
    if residual is not None:
        y += residual
    activate(y, activation, negative_slope)
    if out is None or apart:
        return y
    out[...] = y
    return out


def conv2d_max_pool2d_inference(
    x: FloatArray,
    weight: FloatArray,
    bias: FloatArray | None = None,
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
    out: FloatArray | None = None,
) -> FloatArray:
    """The largest value of each window of activation(convolution + bias), (N, K, P', Q')."""
    # A fraction of the numbers is left for the activation behind the pooling.
    after = activation in _RISING and (activation != "leaky_relu" or negative_slope >= 0)
    y = conv2d_inference(
        x,
        weight,
        bias,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        activation="identity" if after else activation,
        negative_slope=negative_slope,
    )
    pooled, _ = max_pool2d_forward(
        y,
        kernel_size=pool_size,
        stride=pool_stride,
        padding=pool_padding,
        dilation=pool_dilation,
        ceil_mode=ceil_mode,
        out=out,
    )
    if after:
        activate(pooled, activation, negative_slope)
    return pooled


def conv2d_max_pool2d_forward(
    x: FloatArray,
    weight: FloatArray,
    bias: FloatArray | None = None,
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
    out: FloatArray | None = None,
) -> tuple[FloatArray, NDArray[Any]]:
    """(y, argmax), both (N, K, P', Q'): the largest values of windows, and their places."""
    y = conv2d_inference(
        x,
        weight,
        bias,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        activation=activation,
        negative_slope=negative_slope,
    )
    return max_pool2d_forward(
        y,
        kernel_size=pool_size,
        stride=pool_stride,
        padding=pool_padding,
        dilation=pool_dilation,
        ceil_mode=ceil_mode,
        out=out,
    )


def activate(y: FloatArray, activation: str, negative_slope: float) -> None:
    """``y``'s numbers through the activation, in place."""
    function = ACTIVATIONS[activation]
    if function is not None:
        function(y, **({"negative_slope": negative_slope} if activation == "leaky_relu" else {}), out=y)
