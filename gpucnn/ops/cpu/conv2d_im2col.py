"""Convolution as a matrix product: windows become columns (im2col), and a GEMM does the arithmetic.

    forward:          y (K, PQ) = w (K, CRS) @ columns (CRS, PQ)
    filter gradient:  dw (K, CRS) = dy (K, PQ) @ columns (CRS, PQ)^T, summed over images

The columns of a whole batch would be R * S times the input and fall out of every cache, so they are made for a
block at a time, a few output rows of one image or a few small images, and multiplied while they are there. Where
the weights are larger than that, :mod:`gpucnn.ops.cpu.conv2d_wide` does it.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy
from numpy.typing import NDArray

from gpucnn.ops.cpu import conv2d_wide
from gpucnn.ops.cpu.conv2d_blocks import SMALL_FLOPS, Block, blocks, runs
from gpucnn.ops.cpu.im2col import padded, windows_of
from gpucnn.ops.cpu.threads import parallel_for, scratch
from gpucnn_kernels.problem import Conv2dProblem

# By measurement, on 1 to 2 MiB of second-level cache: larger blocks have fewer calls, smaller ones stay nearer.
_BYTES = 2 << 20  # of a block's columns and products
_PIXELS = 2048  # columns of a GEMM, where images are small


def _work(problem: Conv2dProblem, itemsize: int) -> list[Block]:
    row_bytes = (problem.C * problem.R * problem.S + problem.K) * problem.Q * itemsize
    return blocks(problem, row_bytes, _BYTES, _PIXELS)


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
    if conv2d_wide.fits(problem):
        conv2d_wide.forward(problem, x, weight, bias, out)
        return
    g, k = problem.groups, problem.K // problem.groups
    area = problem.P * problem.Q
    matrix = weight.reshape(g, k, -1)
    work = _work(problem, x.itemsize)

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
    """Dw (K, C / G, R, S) into ``out``: partial sums over runs of blocks, then added in their order."""
    if conv2d_wide.fits(problem):
        conv2d_wide.backward_filter(problem, dy, x, out)
        return
    g, k = problem.groups, problem.K // problem.groups
    depth = problem.C // g * problem.R * problem.S
    work = _work(problem, x.itemsize)
    parts = runs(len(work), out.nbytes)
    flipped = k < depth  # BLAS is a sixth faster when the longer of the two comes first
    partial = numpy.empty((len(parts), g, *((depth, k) if flipped else (k, depth))), out.dtype)

    def sum_run(task: int) -> None:
        total = target = partial[task]
        for number in parts[task]:
            block = work[number]
            columns = columns_of(x, problem, block)
            part = dy[block.images, :, block.top : block.bottom]
            if part.shape[0] == 1:
                gradient = part.reshape(g, k, -1)
            else:
                gradient = scratch("gradient", (g, k, columns.shape[2]), dy.dtype)
                gradient.reshape(problem.K, part.shape[0], *part.shape[2:])[...] = part.transpose(1, 0, 2, 3)
            if flipped:
                numpy.matmul(columns, gradient.transpose(0, 2, 1), out=target)
            else:
                numpy.matmul(gradient, columns.transpose(0, 2, 1), out=target)
            if target is not total:
                total += target
            else:
                target = scratch("product", total.shape, out.dtype)

    parallel_for(len(parts), sum_run, small=problem.flops < SMALL_FLOPS)
    result = partial[0]
    for other in itertools.islice(partial, 1, None):
        result += other
    out.reshape(g, k, depth)[...] = result.transpose(0, 2, 1) if flipped else result
