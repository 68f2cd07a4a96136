"""Convolution as a matrix product: windows become columns (im2col), and a GEMM does the arithmetic.

    forward:          y (K, PQ) = w (K, CRS) @ columns (CRS, PQ)
    filter gradient:  dw (K, CRS) = dy (K, PQ) @ columns (CRS, PQ)^T, summed over images

The columns of a whole batch would be R * S times the input and fall out of every cache, so they are made for a
block at a time, a few output rows of one image or a few small images, and multiplied while they are there.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import NDArray

from gpucnn.ops.cpu.im2col import padded, windows_of
from gpucnn.ops.cpu.threads import parallel_for, scratch
from gpucnn_kernels.problem import Conv2dProblem

SMALL_FLOPS = 1 << 21  # a problem below this is done before another thread would have woken up

_BLOCK_BYTES = 768 << 10  # of columns: together with the GEMM's own copies they fit a 1 to 2 MiB cache
_BLOCK_PIXELS = 256  # columns that a GEMM should have to run near its full rate
_FILTER_PIXELS = 512  # the same for the filter gradient, where they are what is summed over
_PARTIAL_BYTES = 64 << 20  # memory for all partial filter gradients
_PARTIAL_COUNT = 8


@dataclass(frozen=True, slots=True)
class Block:
    """Part of the work: images ``first`` to ``last`` and output rows ``top`` to ``bottom``, ends exclusive."""

    first: int
    last: int
    top: int
    bottom: int

    @property
    def images(self) -> slice:
        return slice(self.first, self.last)

    @property
    def rows(self) -> tuple[int, int]:
        return self.top, self.bottom


def blocks(problem: Conv2dProblem, itemsize: int, pixels: int, first: int, last: int) -> list[Block]:
    """Images ``first`` to ``last`` cut into blocks whose columns fit the cache.

    A block is some rows of one image or, where images have fewer than ``pixels`` outputs, several whole images.
    """
    row_bytes = problem.C * problem.R * problem.S * problem.Q * itemsize
    area = problem.P * problem.Q
    if area < pixels:
        count = max(1, min(-(-pixels // area), last - first))
        return [Block(n, min(n + count, last), 0, problem.P) for n in range(first, last, count)]
    rows = min(max(_BLOCK_BYTES // row_bytes, -(-pixels // problem.Q), 1), problem.P)
    rows = -(-problem.P // -(-problem.P // rows))  # of equal height
    return [
        Block(n, n + 1, top, min(top + rows, problem.P))
        for n in range(first, last)
        for top in range(0, problem.P, rows)
    ]


def is_pointwise(problem: Conv2dProblem) -> bool:
    """Whether the image itself is the matrix of columns: a 1x1 kernel, stride 1, no padding."""
    return (problem.R, problem.S) == (1, 1) and problem.stride == (1, 1) and not any(problem.padding)


def columns_of(x: NDArray[Any], problem: Conv2dProblem, block: Block) -> NDArray[Any]:
    """The block's columns, (G, C / G * R * S, images * rows * Q), in scratch memory or a view of ``x``."""
    g, count, rows = problem.groups, block.last - block.first, block.bottom - block.top
    depth = problem.C // g * problem.R * problem.S
    if is_pointwise(problem) and count == 1:
        return x[block.first, :, block.top : block.bottom].reshape(g, depth, rows * problem.Q)
    images = padded(x[block.images], problem, block.rows)
    columns = scratch("columns", (problem.C, problem.R, problem.S, count, rows, problem.Q), x.dtype)
    numpy.copyto(columns, windows_of(images, problem, rows).transpose(1, 2, 3, 0, 4, 5))
    return columns.reshape(g, depth, count * rows * problem.Q)


def forward(
    problem: Conv2dProblem, x: NDArray[Any], weight: NDArray[Any], bias: NDArray[Any] | None, out: NDArray[Any]
) -> None:
    """Y (N, K, P, Q) into ``out``: per block, columns, one GEMM a group, and the bias while it is in cache."""
    g, k = problem.groups, problem.K // problem.groups
    area = problem.P * problem.Q
    matrix = weight.reshape(g, k, -1)
    work = blocks(problem, x.itemsize, _BLOCK_PIXELS, 0, problem.N)

    def multiply(task: int) -> None:
        block = work[task]
        columns = columns_of(x, problem, block)
        if block.last - block.first == 1:
            pixels = slice(block.top * problem.Q, block.bottom * problem.Q)
            part = out[block.first].reshape(g, k, area)[:, :, pixels]
            numpy.matmul(matrix, columns, out=part)
            if bias is not None:
                part += bias.reshape(g, k, 1)
            return
        product = scratch("product", (g, k, columns.shape[2]), x.dtype)
        numpy.matmul(matrix, columns, out=product)
        images = product.reshape(problem.K, -1, area).transpose(1, 0, 2)
        target = out[block.images].reshape(-1, problem.K, area)
        if bias is None:
            target[...] = images
        else:
            numpy.add(images, bias[:, None], out=target)

    parallel_for(len(work), multiply, small=problem.flops < SMALL_FLOPS)


def backward_filter(problem: Conv2dProblem, dy: NDArray[Any], x: NDArray[Any], out: NDArray[Any]) -> None:
    """Dw (K, C / G, R, S) into ``out``: partial sums over runs of images, then added in their order."""
    g, k = problem.groups, problem.K // problem.groups
    depth = problem.C // g * problem.R * problem.S
    count = max(1, min(problem.N, _PARTIAL_COUNT, _PARTIAL_BYTES // max(out.nbytes, 1)))
    bounds = [problem.N * i // count for i in range(count + 1)]
    partial = numpy.empty((count, g, k, depth), out.dtype)

    def sum_run(task: int) -> None:
        total = partial[task]
        total[...] = 0
        for block in blocks(problem, x.itemsize, _FILTER_PIXELS, bounds[task], bounds[task + 1]):
            columns = columns_of(x, problem, block)
            part = dy[block.images, :, block.top : block.bottom]
            if part.shape[0] == 1:
                gradient = part.reshape(g, k, -1)
            else:
                gradient = scratch("gradient", (g, k, columns.shape[2]), dy.dtype)
                gradient.reshape(problem.K, part.shape[0], *part.shape[2:])[...] = part.transpose(1, 0, 2, 3)
            product = scratch("product", (g, k, depth), out.dtype)
            numpy.matmul(gradient, columns.transpose(0, 2, 1), out=product)
            total += product

    parallel_for(count, sum_run, small=problem.flops < SMALL_FLOPS)
    result = out.reshape(g, k, depth)
    result[...] = partial[0]
    for total in itertools.islice(partial, 1, None):
        result += total
