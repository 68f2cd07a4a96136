"""The input gradient by columns that are added up in long runs, whatever the width of the image.

    columns (CRS, P Q) = w^T (CRS, K) @ dy (K, P Q);   dx = their sum where windows overlap

The rows of dy are first copied apart to the width of the padded image, so that output pixel (p, q) has the number
p * width + q. The input pixel that it meets through kernel position (r, s) is then a constant further on, and a
whole channel's column, over many rows and images, is added in one run. (NumPy needs some 50 ns to begin a run: for
rows of 10 pixels that was nearly all of the time.) The zeros between the rows add nothing.

With a stride, input pixels with the same remainders modulo the stride are kept together in a plane of their own.
A kernel position meets one of the stride_h * stride_w planes, again at a constant distance; the planes are woven
into each other at the end, once.

Milliseconds of one thread, beside the limit (operations at 150 GFLOP/s):

    ========================  =====  =========  ======  ======
    layer                     limit  by output  phases  this
                                     row
    ========================  =====  =========  ======  ======
    3->16 k3 s2 224 N32         2.3       23.2    42.1    17.9
    16->32 k3 s2 55 N32         1.4        7.8     6.9     5.0
    32->64 k3 s2 27 N32         1.3        5.5     4.9     3.3
    64->128 k3 s2 13 N32        1.1        4.3     3.8     2.6
    64->128 k3 s2 56 N16       12.3       23.4    24.0    23.4
    3->64 k7 s2 224 N8         12.6       41.7   158.9    26.2
    3->64 k11 s4 224 N16       15.0       75.0   201.1    36.3
    3->64 k3 224 N4             4.6       14.0    63.9    16.0
    1->6 k5 28 N128             0.2       10.1     6.2     2.0
    6->16 k5 14 N128            0.4       12.0     3.1     2.9
    64->64 k3 56 N16           24.7          -    38.4    54.7
    ========================  =====  =========  ======  ======
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy
from numpy.typing import NDArray

from gpucnn.ops.cpu import conv2d_wide
from gpucnn.ops.cpu.conv2d_blocks import SMALL_FLOPS
from gpucnn.ops.cpu.conv2d_im2col import is_pointwise
from gpucnn.ops.cpu.im2col import inside
from gpucnn.ops.cpu.threads import parallel_for, scratch
from gpucnn_kernels.problem import Conv2dProblem

_BYTES = 3 << 19  # of a block's columns: most of the second-level cache
_TASKS = 4  # blocks that there should be at least


def backward_data(problem: Conv2dProblem, dy: NDArray[Any], weight: NDArray[Any], out: NDArray[Any]) -> None:
    """Dx (N, C, H, W) into ``out``, which may have any strides."""
    if conv2d_wide.fits(problem):
        conv2d_wide.backward_data(problem, dy, weight, out)
        return
    g, k = problem.groups, problem.K // problem.groups
    depth = problem.C // g * problem.R * problem.S
    matrix = weight.reshape(g, k, depth).transpose(0, 2, 1)
    if is_pointwise(problem) and out.flags.c_contiguous:

        def multiply(n: int) -> None:
            numpy.matmul(matrix, dy[n].reshape(g, k, -1), out=out[n].reshape(g, depth, -1))

        parallel_for(problem.N, multiply, small=problem.flops < SMALL_FLOPS)
        return

    layout = _Planes(problem)
    row_bytes = g * depth * layout.width * dy.itemsize
    together = max(1, min(_BYTES // (row_bytes * layout.height), problem.N // _TASKS))
    rows = max(1, min(_BYTES // row_bytes, problem.P))
    firsts = range(0, problem.N, together)

    def add_images(task: int) -> None:
        images = slice(firsts[task], min(firsts[task] + together, problem.N))
        count = images.stop - images.start
        planes = scratch("planes", (len(layout.remainders), problem.C, count * layout.size), dy.dtype)
        planes[...] = 0
        if count > 1:
            layout.add(planes, dy[images], matrix, 0, layout.height)
        else:
            for top in range(0, problem.P, rows):
                layout.add(planes, dy[images, :, top : top + rows], matrix, top, min(rows, problem.P - top))
        layout.weave(planes, out[images])

    parallel_for(len(firsts), add_images, small=problem.flops < SMALL_FLOPS)


class _Planes:
    """The padded image, taken apart into one plane for each pair of remainders modulo the stride."""

    def __init__(self, problem: Conv2dProblem) -> None:
        self._problem = problem
        down, along = problem.stride
        top, bottom, left, right = problem.padding
        self.height = -(-(problem.H + top + bottom) // down)
        self.width = -(-(problem.W + left + right) // along)
        self.size = self.height * self.width
        self.remainders = list(itertools.product(range(down), range(along)))

    def add(self, planes: NDArray[Any], dy: NDArray[Any], matrix: NDArray[Any], top: int, height: int) -> None:
        """Add to ``planes`` (remainders, C, images * size) what dy (images, K, rows, Q) from row ``top`` gives.

        ``height`` is how many rows apart the images are laid out.
        """
        problem, (count, _, rows, q) = self._problem, dy.shape
        spread = scratch("spread", (problem.K, count, height, self.width), dy.dtype)
        spread[:, :, :rows, :q] = dy.transpose(1, 0, 2, 3)
        spread[:, :, :rows, q:] = 0
        spread[:, :, rows:] = 0
        gradient = spread.reshape(problem.groups, -1, count * height * self.width)
        length = gradient.shape[2]
        columns = scratch("columns", (problem.C, problem.R, problem.S, length), dy.dtype)
        numpy.matmul(matrix, gradient, out=columns.reshape(problem.groups, -1, length))
        for r, s in itertools.product(range(problem.R), range(problem.S)):
            below, row = divmod(r * problem.dilation[0], problem.stride[0])
            beside, column = divmod(s * problem.dilation[1], problem.stride[1])
            plane = planes[row * problem.stride[1] + column]
            start = (top + below) * self.width + beside
            part = plane[:, start : start + length]
            part += columns[:, r, s, : part.shape[1]]  # beyond the last plane's end there are zeros only

    def weave(self, planes: NDArray[Any], out: NDArray[Any]) -> None:
        """Write the image into ``out`` (images, C, H, W), without its padding."""
        problem = self._problem
        apart = planes.reshape(len(planes), problem.C, len(out), self.height, self.width).transpose(0, 2, 1, 3, 4)
        for plane, (row, column) in zip(apart, self.remainders, strict=True):
            rows, out_rows = inside(row - problem.padding[0], problem.stride[0], self.height, problem.H)
            columns, out_columns = inside(column - problem.padding[2], problem.stride[1], self.width, problem.W)
            out[:, :, out_rows, out_columns] = plane[:, :, rows, columns]
