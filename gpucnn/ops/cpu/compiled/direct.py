"""Convolution and both its gradients straight from the images, without im2col: the sources are ``direct*.cpp``."""

from __future__ import annotations

from typing import Any

import numpy
from numpy.typing import NDArray

from gpucnn.ops.cpu import conv2d_im2col
from gpucnn.ops.cpu.compiled.library import function
from gpucnn_kernels.problem import Conv2dProblem

_forward = function("direct_forward", "ppppp")
_backward_data = function("direct_backward_data", "pppp")
_backward_filter = function("direct_backward_filter", "ppppp")


def forward(
    problem: Conv2dProblem,
    x: NDArray[Any],
    weight: NDArray[Any],
    bias: NDArray[Any] | None,
    out: NDArray[Any],
) -> None:
    """Write the convolution of x (N, C, H, W) with weight, plus bias, to ``out`` (N, K, P, Q); all float32."""
    _forward(_numbers(problem), numpy.ascontiguousarray(x), weight, _dense(bias), out)


def backward_data(problem: Conv2dProblem, dy: NDArray[Any], weight: NDArray[Any], out: NDArray[Any]) -> None:
    """Write the gradient for x to ``out`` (N, C, H, W), from dy (N, K, P, Q); all float32."""
    _backward_data(_numbers(problem), numpy.ascontiguousarray(dy), weight, out)


def backward_filter(problem: Conv2dProblem, dy: NDArray[Any], x: NDArray[Any], out: NDArray[Any]) -> None:
    """Write the gradient for the weight to ``out`` (K, C / groups, R, S), from dy and x; all float32.

    The loops multiply some pixels by zeros that others leave out: an infinity among them makes a NaN where there
    should be none. NaNs are rare, so where there is one im2col does it once more.
    """
    nan = numpy.zeros(1, numpy.int64)
    _backward_filter(_numbers(problem), numpy.ascontiguousarray(dy), numpy.ascontiguousarray(x), out, nan)
    if nan[0]:
        conv2d_im2col.backward_filter(problem, dy, x, out)


def _dense(bias: NDArray[Any] | None) -> NDArray[Any] | None:
    return None if bias is None else numpy.ascontiguousarray(bias)


def _numbers(problem: Conv2dProblem) -> NDArray[Any]:
    """The problem as direct.h's struct of that name."""
    p = problem
    sizes = (p.N, p.C, p.H, p.W, p.K, p.R, p.S, p.P, p.Q)
    return numpy.array((*sizes, *p.stride, p.padding[0], p.padding[2], *p.dilation, p.groups), numpy.int64)
