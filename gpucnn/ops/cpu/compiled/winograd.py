"""Winograd's convolution in C++: tiles of 6x6, as :mod:`gpucnn.ops.cpu.conv2d_winograd` has them.

Lanes are channels: rows of LANES planes are transposed into vectors over the channels, and back, so images of any
width cost the same. How the work is cut is in the sources, winograd.cpp and winograd_gradient.cpp.

Milliseconds of one thread, in turns in one process, beside PyTorch 2.13's better layout:

    ==========================  =====  =====  =====  =====  =====  =====  =====  =====  =====
    layer                       forward              input gradient       filter gradient
                                here   NumPy  torch  here   NumPy  torch  here   NumPy  torch
    ==========================  =====  =====  =====  =====  =====  =====  =====  =====  =====
    alexnet 64->192 k5 27 N16    28.7   74.2   44.7   30.7   87.8   43.3   32.1   76.9   46.8
    vgg 64->64 k3 224 N2         33.4   91.6   55.7   39.1  105.6   70.1   37.0  132.9   77.9
    vgg 512->512 k3 14 N8        30.6   70.6   56.0   33.8   76.2   64.0   31.4   68.6   74.0
    resnet 64->64 k3 56 N16      15.2   49.5   27.7   15.8   54.4   28.7   16.6   71.8   35.0
    resnet 128->128 k3 28 N16    12.7   46.5   25.8   13.4   45.6   27.3   18.4   51.6   28.6
    resnet 256->256 k3 14 N16    16.9   43.7   29.3   15.9   44.8   32.9   20.1   52.8   34.6
    resnet 512->512 k3 7 N16     16.1   44.4   29.2   16.6   49.1   30.7   17.3   41.6   53.3
    ==========================  =====  =====  =====  =====  =====  =====  =====  =====  =====

The largest error against float64, of such layers and their gradients, was 2 to 8 times that of im2col's (in the
mean square 2 to 5 times), which NumPy's transforms make as well; the tests hold it to 20.

Problems here have a 3x3 or 5x5 kernel, stride 1, no dilation and one group; arrays are float32 in C order, and the
result shares no memory with the others.
"""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from gpucnn.ops.cpu.compiled.library import function
from gpucnn_kernels.problem import Conv2dProblem

_forward = function("winograd_forward", "iiiiiiiiiiipppo")
_backward_filter = function("winograd_backward_filter", "iiiiiiiiiippo")


def _sizes(problem: Conv2dProblem) -> tuple[int, ...]:
    shape = (problem.N, problem.C, problem.H, problem.W, problem.K, problem.P, problem.Q, problem.R)
    return (*shape, problem.padding[0], problem.padding[2])


def convolve(
    problem: Conv2dProblem,
    x: NDArray[Any],
    weight: NDArray[Any],
    bias: NDArray[Any] | None,
    out: NDArray[Any],
    *,
    turned: bool,
) -> None:
    """Y (N, K, P, Q) into ``out``; a ``turned`` weight is (C, K, R, S), to be rotated by 180 degrees.

    Raises MemoryError where there is none left to work in.
    """
    _forward(*_sizes(problem), int(turned), x, weight, bias, out)


def backward_filter(problem: Conv2dProblem, dy: NDArray[Any], x: NDArray[Any], out: NDArray[Any]) -> None:
    """Dw (K, C, R, S) into ``out``. Raises MemoryError where there is none left to work in."""
    _backward_filter(*_sizes(problem), dy, x, out)
