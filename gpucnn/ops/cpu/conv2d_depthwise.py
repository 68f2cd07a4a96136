"""Depthwise convolution: every channel has a kernel of its own, so there is no sum over channels for a GEMM.

The compiled loops do it where they take the arrays. What follows is the NumPy way.

There is such a sum over the kernel. The padded channels are laid out as pictures, each a line of height times
width numbers, and beside them the same lines moved on by one kernel column after the other. A channel's kernel
times its S moved lines is a small matrix product, whose row r holds what kernel row r gives at every place; moved
down by r lines of the picture and added up, these are the output. At the end of each row the windows run over into
the next row; what they give there falls into gaps that nobody reads. The filter gradient is a dot product of the
line and the gradient laid out likewise, one a kernel position.

With a stride, pixels with the same remainders are kept together, and the same holds in each of those pictures.

Limit: reading x and writing y once, 0.27 ns a number at the speed of a copy. Measured on one thread in float32,
ns a number of y, forward, 64 channels of 56 x 56 and 256 of 28 x 28:

============================================================  =====  =====
one multiply and one add a kernel position                    3.9    9.0
three moved lines, a 3 x 3 product, three rows added (here)   2.5    2.9
============================================================  =====  =====

In the cache, and on their own: the lines 0.4, the product 0.5, adding its rows 0.3, writing y 0.2. An einsum over
the kernel rows took 2.0 and 2.9, nine moved lines and one row of products 1.9 and 2.2, both before lines are
laid out. Filter gradient: 2.4 with dot products; with R moved gradients times S moved lines, a product again, 2.8.
Smaller tasks lose more in calls, some 20 us a task, than they gain in the cache.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy
from numpy.typing import NDArray

from gpucnn.ops.cpu import compiled
from gpucnn.ops.cpu.compiled import depthwise
from gpucnn.ops.cpu.conv2d_blocks import SMALL_FLOPS
from gpucnn.ops.cpu.im2col import inside
from gpucnn.ops.cpu.threads import parallel_for, scratch
from gpucnn_kernels.problem import Conv2dProblem

_LAID_OUT = 1 << 25  # numbers of one channel, at most
_NUMBERS = 5 << 16  # in a task's moved lines and products: they fit the second-level cache


def is_depthwise(problem: Conv2dProblem) -> bool:
    """Whether each input channel is a group of its own; it may have several output channels."""
    return problem.groups == problem.C


def fits(problem: Conv2dProblem) -> bool:
    """Whether memory to work in is bounded: padding is laid out as zeros, so no thousands of pixels."""
    top, bottom, left, right = problem.padding
    rows = min(problem.H + top + bottom, 16 * problem.stride[0]) + problem.extent[0]
    return rows * (problem.W + left + right + 2 * problem.extent[1]) <= _LAID_OUT


class _Taps(NamedTuple):
    """Kernel rows (or columns) whose places leave one remainder modulo the stride."""

    numbers: list[int]
    first: int  # the first one's place in the image, before padding
    moves: list[int]  # how many rows (columns) of the picture each lies beyond the first


def _taps(count: int, dilation: int, stride: int) -> list[_Taps]:
    taps = []
    for remainder in sorted({i * dilation % stride for i in range(count)}):
        numbers = [i for i in range(count) if i * dilation % stride == remainder]
        first = numbers[0] * dilation
        taps.append(_Taps(numbers, first, [(i * dilation - first) // stride for i in numbers]))
    return taps


class _Pictures:
    """How the channels of a problem are laid out, and which of them a task takes."""

    def __init__(self, problem: Conv2dProblem) -> None:
        self._problem = problem
        self.multiplier = problem.K // problem.C
        self.rows = _taps(problem.R, problem.dilation[0], problem.stride[0])
        self.columns = _taps(problem.S, problem.dilation[1], problem.stride[1])
        self.height = problem.P + max(row.moves[-1] for row in self.rows)
        self.width = problem.Q + max(column.moves[-1] for column in self.columns)
        lines = max(len(row.numbers) for row in self.rows) * self.multiplier
        lines += max(len(column.numbers) for column in self.columns)
        count = max(1, _NUMBERS // (problem.P * problem.Q * lines))
        count = -(-problem.C // -(-problem.C // count))  # in equal parts
        channels = [slice(first, min(first + count, problem.C)) for first in range(0, problem.C, count)]
        self.work = [(n, part) for n in range(problem.N) for part in channels]

    def lines(self, images: NDArray[Any], row: _Taps, column: _Taps, count: int) -> NDArray[Any]:
        """Channels (c, H, W) as the taps meet them, the first ``count`` columns': (count, c, height * width)."""
        problem = self._problem
        lines = scratch("lines", (count, len(images), self.height * self.width), images.dtype)
        picture = lines[0].reshape(-1, self.height, self.width)
        rows, image_rows = inside(row.first - problem.padding[0], problem.stride[0], self.height, problem.H)
        columns, image_columns = inside(
            column.first - problem.padding[2], problem.stride[1], self.width, problem.W
        )
        lines[0] = 0
        picture[:, rows, columns] = images[:, image_rows, image_columns]
        for line, move in zip(lines[1:], column.moves[1:], strict=False):
            line[:, :-move] = lines[0, :, move:]
            line[:, -move:] = 0
        return lines


def forward(
    problem: Conv2dProblem, x: NDArray[Any], weight: NDArray[Any], bias: NDArray[Any] | None, out: NDArray[Any]
) -> None:
    """Y (N, K, P, Q) into ``out``, which may have any strides."""
    if compiled.usable(x, weight, bias, out):
        depthwise.forward(problem, x, weight, bias, out)
        return
    pictures = _Pictures(problem)
    multiplier, shape = pictures.multiplier, (problem.P, problem.Q)
    kernels = weight.reshape(problem.C, multiplier, problem.R, problem.S)
    parts = [
        (row, column, kernels[:, :, row.numbers][..., column.numbers].reshape(problem.C, -1, len(column.numbers)))
        for row in pictures.rows
        for column in pictures.columns
    ]
    offsets = None if bias is None else bias.reshape(problem.C, multiplier, 1, 1)
    targets = out.reshape(problem.N, problem.C, multiplier, *shape)

    def convolve(task: int) -> None:
        n, channels = pictures.work[task]
        count, length = channels.stop - channels.start, pictures.height * pictures.width
        total = None
        for row, column, kernel in parts:
            lines = pictures.lines(x[n, channels], row, column, len(column.moves))
            # The first products become the total, so others need a place of their own.
            name = "products" if total is None else "more_products"
            products = scratch(name, (multiplier, len(row.numbers), count * length), x.dtype)
            numpy.matmul(
                kernel[channels],
                lines.swapaxes(0, 1),
                out=products.reshape(kernel.shape[1], count, length).swapaxes(0, 1),
            )
            first = 0
            if total is None:
                total, first = products[:, 0], 1
            for product, move in zip(products.swapaxes(0, 1)[first:], row.moves[first:], strict=True):
                end = count * length - move * pictures.width
                total[:, :end] += product[:, move * pictures.width :]
        assert total is not None  # a kernel has at least one tap
        picture = total.reshape(multiplier, count, pictures.height, pictures.width).swapaxes(0, 1)
        if offsets is not None:
            picture += offsets[channels]
        targets[n, channels] = picture[..., : problem.P, : problem.Q]

    parallel_for(len(pictures.work), convolve, small=problem.flops < SMALL_FLOPS)


def backward_filter(problem: Conv2dProblem, dy: NDArray[Any], x: NDArray[Any], out: NDArray[Any]) -> None:
    """Dw (K, 1, R, S) into ``out``: a dot product a kernel position and image, then added in the images' order."""
    if compiled.usable(dy, x, out):
        depthwise.backward_filter(problem, dy, x, out)
        return
    pictures = _Pictures(problem)
    multiplier, width = pictures.multiplier, pictures.width
    length = (problem.P - 1) * width + problem.Q  # from the first output to the last, gaps included
    gradients = dy.reshape(problem.N, problem.C, multiplier, problem.P, problem.Q)
    partial = numpy.empty((problem.N, problem.C, multiplier, problem.R, problem.S), out.dtype)

    def sum_image(task: int) -> None:
        n, channels = pictures.work[task]
        gradient = scratch("gradient", (channels.stop - channels.start, multiplier, problem.P, width), dy.dtype)
        gradient[..., problem.Q :] = 0  # the gaps
        gradient[..., : problem.Q] = gradients[n, channels]
        slopes = gradient.reshape(-1, multiplier, problem.P * width)[..., :length]
        for row in pictures.rows:
            for column in pictures.columns:
                line = pictures.lines(x[n, channels], row, column, 1)[0][:, None]
                for r, down in zip(row.numbers, row.moves, strict=True):
                    for s, right in zip(column.numbers, column.moves, strict=True):
                        start = down * width + right
                        seen = line[..., start : start + length]
                        numpy.vecdot(slopes, seen, out=partial[n, channels, :, r, s])

    parallel_for(len(pictures.work), sum_image, small=problem.flops < SMALL_FLOPS)
    out[...] = partial.sum(axis=0).reshape(out.shape)
