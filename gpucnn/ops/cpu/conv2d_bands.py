"""Convolution with a matrix product an output row: what overlaps vertically is copied once.

    band h (C S, images Q):   band[c s, n q] = x[n, c, h, q * stride + s * dilation]   (padded)

With the bands of an image one below the other, output row p meets the R consecutive bands from p * stride on. They
are one matrix of depth R * C * S as they lie in memory, so the products of all output rows are one stacked matmul
of overlapping views, and nothing is added up afterwards:

    forward:          y[p] = w (K, R C S) @ bands p * stride to p * stride + R - 1
    filter gradient:  dw = sum over p of those bands (R C S, images Q) @ dy[p]^T (images Q, K)

im2col copies each pixel R * S / stride^2 times and has products as wide as they like, which BLAS has to pack; this
copies S / stride times, and its products are small enough for BLAS to read the numbers where they are. With one
image in a block, BLAS writes to the output's rows directly.

Milliseconds of one thread, beside the limit (operations at 150 GFLOP/s):

    ======================  =====  ==============  ==============
    layer                   limit  forward         filter gradient
                                   im2col   bands  im2col   bands
    ======================  =====  ======  ======  ======  ======
    3->16 k3 s2 224 N32       2.3    15.5     9.5    17.7    11.6
    1->6 k5 28 N128           0.2     2.2     1.0     2.1     1.1
    6->16 k5 14 N128          0.4     1.9     1.1     2.4     1.5
    3->64 k3 224 N4           4.6    24.0    18.2    18.8    18.2
    3->64 k7 s2 224 N8       12.6    27.7    22.8    32.3    29.5
    3->64 k11 s4 224 N16     15.0    31.6    38.9    35.3    34.4
    16->32 k3 s2 55 N32       1.4     5.3     5.1     6.1     6.6
    64->128 k3 s2 56 N16     12.3    21.8    31.4    23.5    36.2
    ======================  =====  ======  ======  ======  ======

It pays where a band is shallow: the products' left factor, read anew for each output row, is then small.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy
from numpy.typing import NDArray

from gpucnn.ops.cpu.conv2d_blocks import SMALL_FLOPS, Block, runs
from gpucnn.ops.cpu.im2col import inside
from gpucnn.ops.cpu.threads import parallel_for, scratch
from gpucnn_kernels.problem import Conv2dProblem

_BYTES = 1 << 20  # of a block's bands: half of the second-level cache
_WIDTH = 512  # columns of a product, where images are narrow
_WIDE = 64  # output columns from which an image is a block of its own, which saves copying its output
_TASKS = 4  # blocks that there should be at least


def _shared(problem: Conv2dProblem) -> bool:
    """Whether neighbouring output rows share bands; if not, each has copies of its own."""
    return problem.dilation[0] == 1 and problem.stride[0] <= problem.R


def _work(problem: Conv2dProblem, itemsize: int) -> list[Block]:
    step = problem.stride[0] if _shared(problem) else problem.R
    row_bytes = problem.C * problem.S * problem.Q * step * itemsize
    count = 1
    if problem.Q < _WIDE:
        count = min(-(-_WIDTH // problem.Q), _BYTES // (row_bytes * problem.P), problem.N // _TASKS)
    if count > 1:
        return [Block(n, min(n + count, problem.N), 0, problem.P) for n in range(0, problem.N, count)]
    rows = min(max(_BYTES // row_bytes, 1), problem.P)
    rows = -(-problem.P // -(-problem.P // rows))  # of equal height
    return [
        Block(n, n + 1, top, min(top + rows, problem.P))
        for n in range(problem.N)
        for top in range(0, problem.P, rows)
    ]


def _windows(x: NDArray[Any], problem: Conv2dProblem, block: Block, ones: int = 0) -> NDArray[Any]:
    """What each output row of the block meets: (G, rows, R * depth, images * Q), a view of scratch memory.

    The depth of a band is C / G * S and, where ``ones`` is 1, a last row of ones.
    """
    g, images, rows = problem.groups, block.last - block.first, block.bottom - block.top
    channels = problem.C // g
    source = x[block.images]
    source = source.reshape(images, g, channels, problem.H, problem.W).transpose(1, 3, 2, 0, 4)
    depth = channels * problem.S + ones
    if _shared(problem):
        step, heights = problem.stride[0], [((rows - 1) * problem.stride[0] + problem.R, 0, 1)]
    else:
        step, heights = problem.R, [(rows, r * problem.dilation[0], problem.stride[0]) for r in range(problem.R)]
    count = heights[0][0] * len(heights)
    bands = scratch("bands", (g, count, depth, images, problem.Q), x.dtype)
    bands[:, :, depth - ones :] = 1
    pixels = bands[:, :, : depth - ones].reshape(g, count, channels, problem.S, images, problem.Q)
    for r, (height, down, apart) in enumerate(heights):
        part = pixels[:, r :: len(heights)]
        start = block.top * problem.stride[0] + down - problem.padding[0]
        _fill(part[:, :height], source, problem, start, apart)
    line = depth * images * problem.Q * x.itemsize  # of one band
    return numpy.ndarray(
        (g, rows, problem.R * depth, images * problem.Q),
        x.dtype,
        bands,
        strides=(count * line, step * line, images * problem.Q * x.itemsize, x.itemsize),
    )


def _fill(bands: NDArray[Any], source: NDArray[Any], problem: Conv2dProblem, start: int, apart: int) -> None:
    """Copy image rows ``start``, ``start + apart``, ... of ``source`` (G, H, C / G, N, W), or zeros."""
    rows, image_rows = inside(start, apart, bands.shape[1], problem.H)
    bands[:, : rows.start] = 0
    bands[:, rows.stop :] = 0
    for s in range(problem.S):
        left = s * problem.dilation[1] - problem.padding[2]
        columns, image_columns = inside(left, problem.stride[1], problem.Q, problem.W)
        band = bands[:, rows, :, s]
        if columns.start > 0:
            band[..., : columns.start] = 0
        if columns.stop < problem.Q:
            band[..., columns.stop :] = 0
        band[..., columns] = source[:, image_rows, :, :, image_columns]


def forward(
    problem: Conv2dProblem, x: NDArray[Any], weight: NDArray[Any], bias: NDArray[Any] | None, out: NDArray[Any]
) -> None:
    """Y (N, K, P, Q) into ``out``, which may have any strides."""
    g, k = problem.groups, problem.K // problem.groups
    depth = problem.C // g * problem.S
    # The bias is the weight of a row of ones in the first band: another pass over the output would cost more.
    matrices = numpy.zeros((g, k, problem.R, depth + 1), x.dtype)
    by_row = weight.reshape(g, k, problem.C // g, problem.R, problem.S).transpose(0, 1, 3, 2, 4)
    matrices[..., :depth].reshape(g, k, problem.R, problem.C // g, problem.S)[...] = by_row
    if bias is not None:
        matrices[:, :, 0, depth] = bias.reshape(g, k)
    matrices = matrices.reshape(g, 1, k, -1)
    work = _work(problem, x.itemsize)
    unit = out.strides[3] == out.itemsize  # BLAS can write to such rows

    def multiply(task: int) -> None:
        block = work[task]
        windows = _windows(x, problem, block, 1)
        images, rows = block.last - block.first, block.bottom - block.top
        if images == 1 and unit:
            target = out[block.first, :, block.top : block.bottom].reshape(g, k, rows, problem.Q)
            numpy.matmul(matrices, windows, out=target.transpose(0, 2, 1, 3))
            return
        product = scratch("product", (g, rows, k, images * problem.Q), x.dtype)
        numpy.matmul(matrices, windows, out=product)
        values = product.reshape(g, rows, k, images, problem.Q).transpose(3, 0, 2, 1, 4)
        out[block.images, :, block.top : block.bottom].reshape(values.shape)[...] = values

    parallel_for(len(work), multiply, small=problem.flops < SMALL_FLOPS)


def backward_filter(problem: Conv2dProblem, dy: NDArray[Any], x: NDArray[Any], out: NDArray[Any]) -> None:
    """Dw (K, C / G, R, S) into ``out``: partial sums over runs of blocks, then added in their order."""
    g, k = problem.groups, problem.K // problem.groups
    depth = problem.R * problem.C // g * problem.S
    work = _work(problem, x.itemsize)
    parts = runs(len(work), out.nbytes)
    partial = numpy.empty((len(parts), g, depth, k), out.dtype)
    unit = dy.strides[3] == dy.itemsize and dy.strides[1] >= problem.Q * dy.itemsize

    def sum_run(task: int) -> None:
        partial[task] = 0
        for number in parts[task]:
            block = work[number]
            windows = _windows(x, problem, block)
            images, rows = block.last - block.first, block.bottom - block.top
            gradient = dy[block.images, :, block.top : block.bottom].transpose(2, 1, 0, 3)  # (rows, K, images, Q)
            if images > 1 or not unit:
                copied = scratch("gradient", gradient.shape, dy.dtype)
                copied[...] = gradient
                gradient = copied
            by_group = gradient.reshape(rows, g, k, images * problem.Q).transpose(1, 0, 3, 2)
            product = scratch("product", (g, rows, depth, k), x.dtype)
            numpy.matmul(windows, by_group, out=product)
            partial[task] += product.sum(axis=1)

    parallel_for(len(parts), sum_run, small=problem.flops < SMALL_FLOPS)
    result = partial[0]
    for other in itertools.islice(partial, 1, None):
        result += other
    by_row = result.reshape(g, problem.R, problem.C // g, problem.S, k)
    out.reshape(g, k, problem.C // g, problem.R, problem.S)[...] = by_row.transpose(0, 4, 2, 1, 3)
