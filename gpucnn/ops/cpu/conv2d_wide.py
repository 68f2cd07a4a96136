"""Convolution with more weights than columns, deep in a network or of one image: tasks are parts of channels.

Were tasks parts of the images, each would read all weights to multiply them by a few columns, and in a filter
gradient each would have a sum as large as the weights. So the columns of the whole batch are made once, and a task
is a part of the output channels (of the input channels in the input gradient). The images are moved to the last
axis, because the rows that would be copied and added are as short as the images are small: with N numbers at every
place, a run is N times longer.

Milliseconds of one thread, 16 images, beside the limit (operations at 150 GFLOP/s):

    ================  =====  =======  ==============  ===============
    layer             limit  forward  input gradient  filter gradient
                             before   before          before
    ================  =====  =======  ==============  ===============
    512->512 2x2        2.0  9.0 3.7        15.6 4.1         30.7 3.4
    256->512 4x4 s2     1.0  2.7 1.6         4.5 1.7         13.7 1.6
    512->512 14x14 *    6.2 14.7 10.8       19.0 9.8        26.8 11.1
    ================  =====  =======  ==============  ===============

(* one image.) Where Winograd's tiles are whole and not too few, "winograd" may be faster still.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy
from numpy.typing import NDArray

from gpucnn.ops.cpu.blocks import ranges
from gpucnn.ops.cpu.im2col import positions
from gpucnn.ops.cpu.threads import parallel_for, scratch
from gpucnn_kernels.problem import Conv2dProblem

_WEIGHTS = 1 << 19  # numbers, at least
_COLUMNS = 1 << 21  # numbers in the columns of the whole batch, at most
_TASKS = 4


def fits(problem: Conv2dProblem) -> bool:
    """Whether the weights are large and the outputs few."""
    depth, outputs = problem.C * problem.R * problem.S, problem.N * problem.P * problem.Q
    return problem.groups == 1 and problem.K * depth >= _WEIGHTS and depth * outputs <= _COLUMNS


def _padded_shape(problem: Conv2dProblem, channels: int) -> tuple[int, int, int, int]:
    top, bottom, left, right = problem.padding
    return channels, problem.H + top + bottom, problem.W + left + right, problem.N


def _image(problem: Conv2dProblem, padded: NDArray[Any]) -> NDArray[Any]:
    """What is not padding of (C, H', W', N)."""
    top, _, left, _ = problem.padding
    return padded[:, top : top + problem.H, left : left + problem.W]


def _columns(x: NDArray[Any], problem: Conv2dProblem) -> NDArray[Any]:
    """(C * R * S, P * Q * N), in scratch memory of this thread."""
    shape = (problem.C, problem.R, problem.S, problem.P, problem.Q, problem.N)
    columns = scratch("all columns", shape, x.dtype)
    parts = ranges(problem.C, -(-problem.C // _TASKS))

    def copy(task: int) -> None:
        part = parts[task]
        padded = scratch("padded", _padded_shape(problem, part.stop - part.start), x.dtype)
        padded[...] = 0
        _image(problem, padded)[...] = x[:, part].transpose(1, 2, 3, 0)
        for r, s in itertools.product(range(problem.R), range(problem.S)):
            columns[part, r, s] = padded[:, *positions(problem, r, s)]

    parallel_for(len(parts), copy)
    return columns.reshape(problem.C * problem.R * problem.S, -1)


def forward(
    problem: Conv2dProblem, x: NDArray[Any], weight: NDArray[Any], bias: NDArray[Any] | None, out: NDArray[Any]
) -> None:
    """Y (N, K, P, Q) into ``out``, which may have any strides."""
    columns = _columns(x, problem)
    parts = ranges(problem.K, -(-problem.K // _TASKS))

    def multiply(task: int) -> None:
        part = parts[task]
        product = scratch("product", (part.stop - part.start, columns.shape[1]), x.dtype)
        numpy.matmul(weight[part].reshape(len(product), -1), columns, out=product)
        if bias is not None:
            product += bias[part, None]
        out[:, part] = product.reshape(-1, problem.P, problem.Q, problem.N).transpose(3, 0, 1, 2)

    parallel_for(len(parts), multiply)


def backward_data(problem: Conv2dProblem, dy: NDArray[Any], weight: NDArray[Any], out: NDArray[Any]) -> None:
    """Dx (N, C, H, W) into ``out``, which may have any strides."""
    gradient = scratch("all columns", (problem.K, problem.P, problem.Q, problem.N), dy.dtype)
    gradient[...] = dy.transpose(1, 2, 3, 0)
    matrix = gradient.reshape(problem.K, -1)
    parts = ranges(problem.C, -(-problem.C // _TASKS))

    def add(task: int) -> None:
        part = parts[task]
        channels = part.stop - part.start
        shape = (channels, problem.R, problem.S, problem.P, problem.Q, problem.N)
        columns = scratch("columns", shape, dy.dtype)
        weights = weight[:, part].reshape(problem.K, -1)
        numpy.matmul(weights.T, matrix, out=columns.reshape(-1, matrix.shape[1]))
        total = scratch("padded", _padded_shape(problem, channels), dy.dtype)
        total[...] = 0
        for r, s in itertools.product(range(problem.R), range(problem.S)):
            total[:, *positions(problem, r, s)] += columns[:, r, s]
        out[:, part] = _image(problem, total).transpose(3, 0, 1, 2)

    parallel_for(len(parts), add)


def backward_filter(problem: Conv2dProblem, dy: NDArray[Any], x: NDArray[Any], out: NDArray[Any]) -> None:
    """Dw (K, C, R, S) into ``out``."""
    columns = _columns(x, problem)
    parts = ranges(problem.K, -(-problem.K // _TASKS))

    def multiply(task: int) -> None:
        part = parts[task]
        k = part.stop - part.start
        gradient = scratch("product", (k, problem.P, problem.Q, problem.N), dy.dtype)
        gradient[...] = dy[:, part].transpose(1, 2, 3, 0)
        numpy.matmul(gradient.reshape(k, -1), columns.T, out=out[part].reshape(k, -1))

    parallel_for(len(parts), multiply)
