"""Convolution as one matrix product a kernel row: a third of im2col's copying, and larger products.

im2col writes every input pixel R * S times. Here only the kernel's columns are unrolled, S times:

    strips (C S, rows, images, Q):   strips[c s, h, n, q] = x[n, c, h, q * stride + s * dilation]   (padded)

With whole rows one after the other, moving down by one row is moving along by images * Q numbers, so the matrix
that kernel row r meets is the same memory, seen from another place: no copy. A convolution is then R products of
depth C * S, added up, and a filter gradient R products that share their copies:

    forward:          y += w[:, :, r] (K, C S) @ strips from row r (C S, P images Q)
    filter gradient:  dw[:, :, r] = dy (K, P images Q) @ strips from row r (C S, P images Q)^T

With a vertical stride, input rows with the same remainder are kept together, and the same holds in each of those
stacks. Small images are taken several at a time, so that the products stay wide.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy
from numpy.typing import NDArray

from gpucnn.ops.cpu.conv2d_blocks import SMALL_FLOPS, Block, blocks, runs
from gpucnn.ops.cpu.im2col import inside
from gpucnn.ops.cpu.threads import parallel_for, scratch
from gpucnn_kernels.problem import Conv2dProblem

_BYTES = 3 << 20  # of strips in a block: they may leave the second-level cache but not the third
_PIXELS = 1536  # columns of a product, where images are small


class _Strips:
    """The strips of one block, in scratch memory: a stack for each remainder that a kernel row's place leaves."""

    def __init__(self, x: NDArray[Any], problem: Conv2dProblem, block: Block) -> None:
        self._problem = problem
        self.images, self.rows = block.last - block.first, block.bottom - block.top
        step = problem.stride[0]
        reach: dict[
            int, int
        ] = {}  # for each remainder, how many strip rows below the output row its kernel rows go
        for r in range(problem.R):
            reach[r * problem.dilation[0] % step] = r * problem.dilation[0] // step
        shape = (problem.C, problem.S, max(reach.values()) + self.rows, self.images, problem.Q)
        stacks = scratch("strips", (len(reach), *shape), x.dtype)
        self._stacks: dict[int, NDArray[Any]] = {}
        source = x[block.images].transpose(1, 2, 0, 3)
        for stack, (remainder, rows) in zip(stacks, reach.items(), strict=True):
            start = block.top * step + remainder - problem.padding[0]
            self._fill(stack[:, :, : rows + self.rows], source, start)
            self._stacks[remainder] = stack.reshape(problem.groups, -1, shape[2] * self.images * problem.Q)

    def _fill(self, stack: NDArray[Any], source: NDArray[Any], start: int) -> None:
        """Copy image rows ``start``, ``start + stride``, ... of ``source`` (C, H, N, W), or zeros."""
        problem = self._problem
        rows, image_rows = inside(start, problem.stride[0], stack.shape[2], problem.H)
        stack[:, :, : rows.start] = 0
        stack[:, :, rows.stop :] = 0
        for s in range(problem.S):
            left = s * problem.dilation[1] - problem.padding[2]
            columns, image_columns = inside(left, problem.stride[1], problem.Q, problem.W)
            strip = stack[:, s, rows]
            if columns.start > 0:
                strip[..., : columns.start] = 0
            if columns.stop < problem.Q:
                strip[..., columns.stop :] = 0
            strip[..., columns] = source[:, image_rows, :, image_columns]

    def from_row(self, r: int) -> NDArray[Any]:
        """What kernel row ``r`` meets: (G, C / G * S, rows * images * Q), a view."""
        down, remainder = divmod(r * self._problem.dilation[0], self._problem.stride[0])
        width = self.images * self._problem.Q
        return self._stacks[remainder][:, :, down * width : (down + self.rows) * width]


def _work(problem: Conv2dProblem, itemsize: int) -> list[Block]:
    row_bytes = problem.C * problem.S * problem.Q * problem.stride[0] * itemsize
    return blocks(problem, row_bytes, _BYTES, _PIXELS)


def forward(
    problem: Conv2dProblem, x: NDArray[Any], weight: NDArray[Any], bias: NDArray[Any] | None, out: NDArray[Any]
) -> None:
    """Y (N, K, P, Q) into ``out``, which may have any strides."""
    g, k = problem.groups, problem.K // problem.groups
    by_row = weight.reshape(g, k, problem.C // g, problem.R, problem.S).transpose(3, 0, 1, 2, 4)
    matrices = numpy.ascontiguousarray(by_row).reshape(problem.R, g, k, -1)
    offsets = None if bias is None else bias.reshape(g, k, 1)
    work = _work(problem, x.itemsize)

    def multiply(task: int) -> None:
        block = work[task]
        strips = _Strips(x, problem, block)
        pixels = strips.rows * strips.images * problem.Q
        total = scratch("total", (g, k, pixels), x.dtype)
        numpy.matmul(matrices[0], strips.from_row(0), out=total)
        if offsets is not None:
            total += offsets
        target = out[block.images, :, block.top : block.bottom].transpose(1, 2, 0, 3)
        total_view = total.reshape(target.shape)
        product = scratch("product", (g, k, pixels), x.dtype)
        for r in range(1, problem.R):
            numpy.matmul(matrices[r], strips.from_row(r), out=product)
            last = r == problem.R - 1  # its sum goes straight to where it belongs
            numpy.add(total_view, product.reshape(target.shape), out=target if last else total_view)
        if problem.R == 1:
            target[...] = total_view

    parallel_for(len(work), multiply, small=problem.flops < SMALL_FLOPS)


def backward_filter(problem: Conv2dProblem, dy: NDArray[Any], x: NDArray[Any], out: NDArray[Any]) -> None:
    """Dw (K, C / G, R, S) into ``out``: partial sums over runs of blocks, then added in their order."""
    g, k = problem.groups, problem.K // problem.groups
    depth = problem.C // g * problem.S
    work = _work(problem, x.itemsize)
    parts = runs(len(work), out.nbytes)
    flipped = k < depth  # BLAS is a sixth faster when the longer of the two comes first
    partial = numpy.empty((len(parts), problem.R, g, *((depth, k) if flipped else (k, depth))), out.dtype)

    def sum_run(task: int) -> None:
        total = target = partial[task]
        for number in parts[task]:
            block = work[number]
            strips = _Strips(x, problem, block)
            gradient = scratch("gradient", (problem.K, strips.rows, strips.images, problem.Q), dy.dtype)
            numpy.copyto(gradient, dy[block.images, :, block.top : block.bottom].transpose(1, 2, 0, 3))
            matrix = gradient.reshape(g, k, -1)
            for r in range(problem.R):
                if flipped:
                    numpy.matmul(strips.from_row(r), matrix.transpose(0, 2, 1), out=target[r])
                else:
                    numpy.matmul(matrix, strips.from_row(r).transpose(0, 2, 1), out=target[r])
            if target is not total:
                total += target
            else:
                target = scratch("product", total.shape, out.dtype)

    parallel_for(len(parts), sum_run, small=problem.flops < SMALL_FLOPS)
    result = partial[0]
    for other in itertools.islice(partial, 1, None):
        result += other
    if flipped:
        result = result.transpose(0, 1, 3, 2)
    by_row = result.reshape(problem.R, g, k, problem.C // g, problem.S)
    out.reshape(g, k, problem.C // g, problem.R, problem.S)[...] = by_row.transpose(1, 2, 3, 0, 4)
