"""Depthwise convolution's input gradient.

In the compiled loops it is a depthwise convolution of its own: at stride 1 of dy under the kernel turned round,
otherwise each pixel gathers from the windows that met it. Without them it is what "phases" does.
"""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from gpucnn.ops.cpu import compiled, conv2d_data
from gpucnn.ops.cpu.compiled import depthwise
from gpucnn_kernels.problem import Conv2dProblem


def backward_data(problem: Conv2dProblem, dy: NDArray[Any], weight: NDArray[Any], out: NDArray[Any]) -> None:
    """Dx (N, C, H, W) into ``out``."""
    if compiled.usable(dy, weight, out):
        depthwise.backward_data(problem, dy, weight, out)
    else:
        conv2d_data.phases(problem, dy, weight, out)
