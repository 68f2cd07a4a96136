"""Depthwise convolution by the compiled loops, on float32 arrays in C order that are already checked."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from gpucnn.ops.cpu.compiled.library import function
from gpucnn.ops.cpu.compiled.windows import windows
from gpucnn_kernels.problem import Conv2dProblem

_forward = function("depthwise_forward", "ppppp")
_backward_data = function("depthwise_backward_data", "pppp")
_backward_filter = function("depthwise_backward_filter", "pppp")


def forward(
    problem: Conv2dProblem, x: NDArray[Any], weight: NDArray[Any], bias: NDArray[Any] | None, out: NDArray[Any]
) -> None:
    """Y (N, K, P, Q) into ``out``."""
    _forward(windows(problem), x, weight, bias, out)


def backward_data(problem: Conv2dProblem, dy: NDArray[Any], weight: NDArray[Any], out: NDArray[Any]) -> None:
    """Dx (N, C, H, W) into ``out``."""
    _backward_data(windows(problem), dy, weight, out)


def backward_filter(problem: Conv2dProblem, dy: NDArray[Any], x: NDArray[Any], out: NDArray[Any]) -> None:
    """Dw (K, 1, R, S) into ``out``; the images are added in their order."""
    _backward_filter(windows(problem), dy, x, out)
