"""Pooling by the compiled loops, on float32 arrays in C order that are already checked; places are uint8.

Forward, windows side by side are compared or added in vectors, as source/windows.h lays them out; back, each
number of the image gathers from the windows that met it. ms on one thread, all in turns on a machine that had
other work as well, so that only a row's numbers compare (16 x 64 planes of 56 x 56; PyTorch 2.13's better layout):

=========================  =====  =====  =======
                           here   NumPy  PyTorch
=========================  =====  =====  =======
maximum, 2 x 2, forward    2.7    9.6    3.0
backward                   2.6    7.1    5.3
maximum, 3 x 3, s 2        2.7    11.9   3.6
backward                   3.9    7.2    5.3
average, 2 x 2, forward    1.8    4.7    1.4
backward                   3.4    7.3    4.8
=========================  =====  =====  =======

In the cache forward takes 0.23, 0.30 and 0.15 ns a number of x.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy
from numpy.typing import NDArray

from gpucnn.ops.cpu.compiled.library import function, usable
from gpucnn.ops.cpu.compiled.windows import windows
from gpucnn_kernels.problem import Pool2dProblem

_max_forward = function("max_pool_forward", "ppoo")
_max_backward = function("max_pool_backward", "pppo")
_average_forward = function("average_pool_forward", "pppo")
_average_backward = function("average_pool_backward", "pppo")
_plane_means = function("plane_means", "iipo")
_plane_shares = function("plane_shares", "iipo")


@contextmanager
def target(out: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """``out``, or memory for the loops that is copied to it at the end: results do not depend on its strides."""
    memory = out if usable(out) else numpy.empty(out.shape, numpy.float32)
    yield memory
    if memory is not out:
        out[...] = memory


def usable_places(argmax: NDArray[Any]) -> bool:
    """Whether the loops take these places: one byte each, in C order."""
    return argmax.dtype == numpy.uint8 and argmax.flags.c_contiguous


def max_forward(problem: Pool2dProblem, x: NDArray[Any], y: NDArray[Any], argmax: NDArray[numpy.uint8]) -> None:
    """Y and argmax (N, C, P, Q), the place r * S + s in the window."""
    _max_forward(windows(problem), x, y, argmax)


def max_backward(problem: Pool2dProblem, dy: NDArray[Any], argmax: NDArray[numpy.uint8], dx: NDArray[Any]) -> None:
    """Dx (N, C, H, W): each dy at its window's place."""
    _max_backward(windows(problem), dy, argmax, dx)


def average_forward(problem: Pool2dProblem, x: NDArray[Any], factor: NDArray[Any], y: NDArray[Any]) -> None:
    """Y (N, C, P, Q): windows' sums times factor (P, Q)."""
    _average_forward(windows(problem), x, factor, y)


def average_backward(problem: Pool2dProblem, dy: NDArray[Any], factor: NDArray[Any], dx: NDArray[Any]) -> None:
    """Dx (N, C, H, W): dy times factor (P, Q), on each place of the window."""
    _average_backward(windows(problem), dy, factor, dx)


def plane_means(x: NDArray[Any], y: NDArray[Any]) -> None:
    """Y (N, C, 1, 1): the mean of each plane of x (N, C, H, W)."""
    _plane_means(y.size, x.shape[2] * x.shape[3], x, y)


def plane_shares(dy: NDArray[Any], dx: NDArray[Any]) -> None:
    """Dx (N, C, H, W): each dy (N, C, 1, 1) over the number of its plane's pixels."""
    _plane_shares(dy.size, dx.shape[2] * dx.shape[3], dy, dx)
