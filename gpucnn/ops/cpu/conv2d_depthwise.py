"""Depthwise convolution: every channel has a kernel of its own, so no sum over channels makes a GEMM worth while.

Each kernel position is one multiply and one add. Rows of some ten pixels would make those slow, so a padded
channel is laid out as one line: kernel position (r, s) then meets the same line from r * width + s on, a whole
image long. At the end of each row the windows run over into the next row; what they give there falls into gaps
that nobody reads.

With a stride, pixels with the same remainders are kept together, and the same holds in each of those pictures.
"""

from __future__ import annotations

from typing import Any

import numpy
from numpy.typing import NDArray

from gpucnn.ops.cpu.conv2d_blocks import SMALL_FLOPS
from gpucnn.ops.cpu.im2col import inside
from gpucnn.ops.cpu.threads import parallel_for, scratch
from gpucnn_kernels.problem import Conv2dProblem

_NUMBERS = 1 << 15  # in a task's output: a few arrays of this size fit the second-level cache


def is_depthwise(problem: Conv2dProblem) -> bool:
    """Whether each input channel is a group of its own; it may have several output channels."""
    return problem.groups == problem.C


def _work(problem: Conv2dProblem) -> list[tuple[int, slice]]:
    """(image, channels) of every task."""
    count = max(1, _NUMBERS // (problem.P * problem.Q))
    channels = [slice(first, min(first + count, problem.C)) for first in range(0, problem.C, count)]
    return [(n, part) for n in range(problem.N) for part in channels]


class _Lines:
    """Some padded channels of one image, each a line of height times width numbers, one set a remainder."""

    def __init__(self, x: NDArray[Any], problem: Conv2dProblem, n: int, channels: slice) -> None:
        self._problem = problem
        image = x[n, channels]
        below = (problem.R - 1) * problem.dilation[0] // problem.stride[0]
        beside = (problem.S - 1) * problem.dilation[1] // problem.stride[1]
        height, self.width = problem.P + below, problem.Q + beside
        self.length = (problem.P - 1) * self.width + problem.Q  # from the first output to the last, gaps included
        remainders = sorted({self._place(r, s)[0] for r in range(problem.R) for s in range(problem.S)})
        shape = (len(remainders), len(image), height, self.width)
        pictures = scratch("lines", shape, x.dtype)
        pictures[...] = 0
        self._lines: dict[tuple[int, int], NDArray[Any]] = {}
        for picture, (down, right) in zip(pictures, remainders, strict=True):
            rows, image_rows = inside(down - problem.padding[0], problem.stride[0], height, problem.H)
            columns, image_columns = inside(right - problem.padding[2], problem.stride[1], self.width, problem.W)
            picture[:, rows, columns] = image[:, image_rows, image_columns]
            self._lines[down, right] = picture.reshape(len(image), -1)

    def _place(self, r: int, s: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """For kernel position (r, s): its remainders modulo the stride, and its place in their picture."""
        down, row = divmod(r * self._problem.dilation[0], self._problem.stride[0])
        right, column = divmod(s * self._problem.dilation[1], self._problem.stride[1])
        return (row, column), (down, right)

    def at(self, r: int, s: int) -> NDArray[Any]:
        """What kernel position (r, s) meets: (channels, length), a view."""
        remainders, (down, right) = self._place(r, s)
        start = down * self.width + right
        return self._lines[remainders][:, start : start + self.length]


def forward(
    problem: Conv2dProblem, x: NDArray[Any], weight: NDArray[Any], bias: NDArray[Any] | None, out: NDArray[Any]
) -> None:
    """Y (N, K, P, Q) into ``out``, which may have any strides."""
    multiplier = problem.K // problem.C
    kernels = weight.reshape(problem.C, multiplier, problem.R, problem.S, 1)
    offsets = None if bias is None else bias.reshape(problem.C, multiplier, 1)
    targets = out.reshape(problem.N, problem.C, multiplier, problem.P, problem.Q)
    work = _work(problem)

    def convolve(task: int) -> None:
        n, channels = work[task]
        lines = _Lines(x, problem, n, channels)
        picture = (channels.stop - channels.start, problem.P, lines.width)
        total = scratch("total", picture, x.dtype)
        line = total.reshape(picture[0], -1)[:, : lines.length]
        product = scratch("product", line.shape, x.dtype)
        for m in range(multiplier):
            kernel = kernels[channels, m]
            numpy.multiply(lines.at(0, 0), kernel[:, 0, 0], out=line)
            for position in range(1, problem.R * problem.S):
                r, s = divmod(position, problem.S)
                numpy.multiply(lines.at(r, s), kernel[:, r, s], out=product)
                numpy.add(line, product, out=line)
            if offsets is not None:
                line += offsets[channels, m]
            targets[n, channels, m] = total[..., : problem.Q]

    parallel_for(len(work), convolve, small=problem.flops < SMALL_FLOPS)


def backward_filter(problem: Conv2dProblem, dy: NDArray[Any], x: NDArray[Any], out: NDArray[Any]) -> None:
    """Dw (K, 1, R, S) into ``out``: a dot product a kernel position and image, then added in the images' order."""
    multiplier = problem.K // problem.C
    gradients = dy.reshape(problem.N, problem.C, multiplier, problem.P, problem.Q)
    partial = numpy.empty((problem.N, problem.C, multiplier, problem.R, problem.S), out.dtype)
    work = _work(problem)

    def sum_image(task: int) -> None:
        n, channels = work[task]
        lines = _Lines(x, problem, n, channels)
        gradient = scratch("gradient", (channels.stop - channels.start, problem.P, lines.width), dy.dtype)
        gradient[..., problem.Q :] = 0  # the gaps
        line = gradient.reshape(gradient.shape[0], -1)[:, : lines.length]
        for m in range(multiplier):
            gradient[..., : problem.Q] = gradients[n, channels, m]
            for r in range(problem.R):
                for s in range(problem.S):
                    partial[n, channels, m, r, s] = numpy.vecdot(line, lines.at(r, s))

    parallel_for(len(work), sum_image, small=problem.flops < SMALL_FLOPS)
    out[...] = partial.sum(axis=0).reshape(out.shape)
