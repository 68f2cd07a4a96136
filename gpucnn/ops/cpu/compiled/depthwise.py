"""Depthwise convolution by the compiled loops, on float32 arrays in C order that are already checked.

Planes are laid out with their padding in the first-level cache, columns of one remainder modulo the stride
together, so that each place of the kernel meets consecutive numbers. ms on one thread, all in turns on a machine
that had other work as well, so that only a row's numbers compare (3 x 3, 16 images; PyTorch 2.13's better layout):

=========================  =====  =====  =======
                           here   NumPy  PyTorch
=========================  =====  =====  =======
64 x 56 x 56, forward      3.8    13.2   3.9
input gradient             4.8    17.4   6.1
filter gradient            4.8    13.4   4.5
256 x 28 x 28, forward     3.8    15.2   4.5
input gradient             4.0    15.5   5.0
filter gradient            6.1    14.2   7.9
=========================  =====  =====  =======

In the cache forward takes 0.32 and 0.36 ns a number; a copy of memory, 0.29: what is left is waiting for memory.
"""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from gpucnn.ops.cpu.compiled.library import function
from gpucnn.ops.cpu.compiled.windows import windows
from gpucnn_kernels.problem import Conv2dProblem

_forward = function("depthwise_forward", "ppppo")
_backward_data = function("depthwise_backward_data", "pppo")
_backward_filter = function("depthwise_backward_filter", "pppo")


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
