"""Winograd's convolution in C++: tiles of 6x6, as :mod:`gpucnn.ops.cpu.conv2d_winograd` has them.

Problems here have a 3x3 or 5x5 kernel, stride 1, no dilation and one group; arrays are float32 in C order, and the
result shares no memory with the others.
"""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from gpucnn.ops.cpu.compiled.library import function
from gpucnn_kernels.problem import Conv2dProblem

_forward = function("winograd_forward", "iiiiiiiiiiipppp")
_backward_filter = function("winograd_backward_filter", "iiiiiiiiiippp")


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
