"""Convolution one kernel position at a time: a loop over (r, s), everything else vectorised.

For kernel position (r, s), output pixel (p, q) meets input pixel (p * stride + r * dilation, ...): one strided
view of the padded image. So all three convolutions are sums over positions of small products with that view:

    forward ("tensordot"):           y += w[:, :, r, s] @ x[view]
    input gradient ("scatter"):      dx[view] += w[:, :, r, s]^T @ dy
    filter gradient ("tensordot"):   dw[:, :, r, s] = tensordot(dy, x[view], over n, p, q)

No matrix of columns is made. The scatter is the forward loop run with its assignment turned around; it multiplies
none of the zeros that dilating dy would bring.
"""

from __future__ import annotations

from typing import Any

import numpy
from numpy.typing import NDArray

from gpucnn.ops.cpu.conv2d_blocks import SMALL_FLOPS
from gpucnn.ops.cpu.im2col import Overlaps, padded, positions
from gpucnn.ops.cpu.threads import parallel_for, scratch
from gpucnn_kernels.problem import Conv2dProblem


def forward(
    problem: Conv2dProblem, x: NDArray[Any], weight: NDArray[Any], bias: NDArray[Any] | None, out: NDArray[Any]
) -> None:
    """Y (N, K, P, Q) into ``out``."""
    g, c, k = problem.groups, problem.C // problem.groups, problem.K // problem.groups
    kernels = weight.reshape(g, k, c, problem.R, problem.S)

    def convolve(n: int) -> None:
        image = padded(x[n], problem)
        total = out[n].reshape(g, k, -1)
        total[...] = 0 if bias is None else bias.reshape(g, k, 1)
        pixels = scratch("pixels", (problem.C, problem.P, problem.Q), x.dtype)
        product = scratch("product", total.shape, x.dtype)
        for r in range(problem.R):
            for s in range(problem.S):
                pixels[...] = image[:, *positions(problem, r, s)]
                total += numpy.matmul(kernels[..., r, s], pixels.reshape(g, c, -1), out=product)

    parallel_for(problem.N, convolve, small=problem.flops < SMALL_FLOPS)


def backward_data(problem: Conv2dProblem, dy: NDArray[Any], weight: NDArray[Any], out: NDArray[Any]) -> None:
    """Dx (N, C, H, W) into ``out``."""
    g, c, k = problem.groups, problem.C // problem.groups, problem.K // problem.groups
    kernels = weight.reshape(g, k, c, problem.R, problem.S).transpose(3, 4, 0, 2, 1)

    def scatter(n: int) -> None:
        gradient = numpy.ascontiguousarray(dy[n]).reshape(g, k, -1)
        overlaps = Overlaps(problem, out[n])
        product = scratch("product", (g, c, gradient.shape[2]), dy.dtype)
        for r in range(problem.R):
            for s in range(problem.S):
                numpy.matmul(kernels[r, s], gradient, out=product)
                rows, columns = positions(problem, r, s)
                overlaps.total[:, rows, columns] += product.reshape(problem.C, problem.P, problem.Q)
        overlaps.finish()

    parallel_for(problem.N, scatter, small=problem.flops < SMALL_FLOPS)


def backward_filter(problem: Conv2dProblem, dy: NDArray[Any], x: NDArray[Any], out: NDArray[Any]) -> None:
    """Dw (K, C / G, R, S) into ``out``: the articles' tensordot, with strides, dilation and groups."""
    g, c, k = problem.groups, problem.C // problem.groups, problem.K // problem.groups
    result = out.reshape(g, k, c, problem.R, problem.S)
    if problem.padding != (0, 0, 0, 0):
        top, bottom, left, right = problem.padding
        x = numpy.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))

    def sum_position(task: int) -> None:
        r, s = divmod(task, problem.S)
        view = x[:, :, *positions(problem, r, s)]
        for group in range(g):
            result[group, :, :, r, s] = numpy.tensordot(
                dy[:, group * k : (group + 1) * k],
                view[:, group * c : (group + 1) * c],
                axes=((0, 2, 3), (0, 2, 3)),
            )

    parallel_for(problem.R * problem.S, sum_position, small=problem.flops < SMALL_FLOPS)
