"""Convolution and both its gradients straight from the images, without im2col: the sources are ``direct*.cpp``.

Float32, any stride, dilation, padding and groups. Milliseconds on one thread of a Xeon with AVX-512, while
others worked on it: the three directions, and in brackets the better of PyTorch 2.13's eager and channels-last:

======================================  ===========  ===========  ===========
layer                                   forward      input        filter
======================================  ===========  ===========  ===========
3 to 16, 3x3, stride 2, 224, N32        7.3 (7.3)    11 (22)      9.6 (7.1)
16 to 32, 3x3, stride 2, 55, N32        2.6 (2.1)    2.7 (2.9)    3.2 (2.4)
32 to 64, 3x3, stride 2, 27, N32        2.3 (1.7)    2.5 (2.1)    3.0 (2.3)
64 to 128, 3x3, stride 2, 13, N32       1.9 (1.4)    2.9 (2.1)    2.5 (2.2)
1 to 6, 5x5, 28, N128                   0.55 (1.4)   0.81 (3.9)   0.61 (0.91)
6 to 16, 5x5, 14, N128                  0.82 (0.74)  1.4 (1.7)    0.94 (0.69)
3 to 64, 11x11, stride 4, 224, N16      20 (18)      29 (99)      25 (21)
3 to 64, 3x3, 224, N4                   20 (33)      17 (34)      14 (20)
3 to 64, 7x7, stride 2, 224, N8         19 (17)      25 (80)      21 (21)
64 to 128, 3x3, stride 2, 56, N16       18 (15)      19 (15)      24 (22)
64 to 256, 1x1, 56, N16                 29 (41)      23 (16)      23 (21)
1024 to 256, 1x1, 14, N16               17 (13)      17 (16)      23 (17)
======================================  ===========  ===========  ===========
"""

from __future__ import annotations

import math
from typing import Any

import numpy
from numpy.typing import NDArray

from gpucnn.ops.cpu import conv2d_im2col
from gpucnn.ops.cpu.compiled.library import function
from gpucnn_kernels.problem import Conv2dProblem

_NUMBERS = 1 << 25
"""Numbers that a task may lay out at most, 128 MiB: a row of outputs at least, and all that it meets."""

_forward = function("direct_forward", "ppppo")
_backward_data = function("direct_backward_data", "pppo")
_backward_filter = function("direct_backward_filter", "pppoo")


def fits(direction: str, problem: Conv2dProblem) -> bool:
    """Whether a task's memory is bounded: rows are not too long, nor is what padding adds to a small image.

    Padding is laid out as zeros, so a kernel that is dilated by thousands, and padded by as much, would need
    gigabytes for an image of a few pixels.
    """
    p = problem
    down, right = (p.extent[0] - 1) // p.stride[0], (p.extent[1] - 1) // p.stride[1]
    inputs, outputs = p.C // p.groups, p.K // p.groups
    if direction == "backward_data":
        row = p.W // p.stride[1] + 2 + right
        work = outputs * (1 + down) * row + min(inputs, 512) * p.stride[1] * row + 64 * p.stride[0] * p.stride[1]
    else:
        row = p.Q + right
        kernel, strides = (p.R, p.S), p.stride
        planes = math.prod(
            1 + max(i * p.dilation[axis] % strides[axis] for i in range(min(kernel[axis], strides[axis])))
            for axis in range(2)
        )
        channels = inputs if direction == "forward" else 1
        work = channels * planes * (1 + down) * row + min(outputs, 512) * row
    return work <= _NUMBERS


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
