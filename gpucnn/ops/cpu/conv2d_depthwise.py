"""Depthwise convolution: every channel has a kernel of its own, so no sum over channels makes a GEMM worth while.

A GEMM with one row would spend its time on building columns. Instead each kernel position is one multiply and one
add over whole images, which stay in cache from one position to the next.
"""

from __future__ import annotations

from typing import Any

import numpy
from numpy.typing import NDArray

from gpucnn.ops.cpu.conv2d_im2col import SMALL_FLOPS
from gpucnn.ops.cpu.im2col import Overlaps, padded, positions
from gpucnn.ops.cpu.threads import parallel_for, scratch
from gpucnn_kernels.problem import Conv2dProblem


def is_depthwise(problem: Conv2dProblem) -> bool:
    """Whether each input channel is a group of its own; it may have several output channels."""
    return problem.groups == problem.C


def forward(
    problem: Conv2dProblem, x: NDArray[Any], weight: NDArray[Any], bias: NDArray[Any] | None, out: NDArray[Any]
) -> None:
    """Y (N, K, P, Q) into ``out``."""
    multiplier = problem.K // problem.C
    kernels = weight.reshape(problem.C, multiplier, problem.R, problem.S, 1, 1)

    def convolve(n: int) -> None:
        image = padded(x[n], problem)
        total = out[n].reshape(problem.C, multiplier, problem.P, problem.Q)
        total[...] = 0 if bias is None else bias.reshape(problem.C, multiplier, 1, 1)
        product = scratch("product", total.shape, x.dtype)
        for r in range(problem.R):
            for s in range(problem.S):
                rows, columns = positions(problem, r, s)
                total += numpy.multiply(image[:, None, rows, columns], kernels[:, :, r, s], out=product)

    parallel_for(problem.N, convolve, small=problem.flops < SMALL_FLOPS)


def backward_data(problem: Conv2dProblem, dy: NDArray[Any], weight: NDArray[Any], out: NDArray[Any]) -> None:
    """Dx (N, C, H, W) into ``out``."""
    multiplier = problem.K // problem.C
    kernels = weight.reshape(problem.C, multiplier, problem.R, problem.S, 1, 1)

    def scatter(n: int) -> None:
        gradient = dy[n].reshape(problem.C, multiplier, problem.P, problem.Q)
        overlaps = Overlaps(problem, out[n])
        product = scratch("product", (problem.C, problem.P, problem.Q), dy.dtype)
        for r in range(problem.R):
            for s in range(problem.S):
                rows, columns = positions(problem, r, s)
                for m in range(multiplier):
                    numpy.multiply(gradient[:, m], kernels[:, m, r, s], out=product)
                    overlaps.total[:, rows, columns] += product
        overlaps.finish()

    parallel_for(problem.N, scatter, small=problem.flops < SMALL_FLOPS)


def backward_filter(problem: Conv2dProblem, dy: NDArray[Any], x: NDArray[Any], out: NDArray[Any]) -> None:
    """Dw (K, 1, R, S) into ``out``: per image a product and its sum a kernel position, images added in order."""
    multiplier = problem.K // problem.C
    partial = numpy.empty((problem.N, problem.C, multiplier, problem.R, problem.S), out.dtype)

    def sum_image(n: int) -> None:
        image = padded(x[n], problem)
        gradient = dy[n].reshape(problem.C, multiplier, problem.P, problem.Q)
        product = scratch("product", gradient.shape, dy.dtype)
        for r in range(problem.R):
            for s in range(problem.S):
                rows, columns = positions(problem, r, s)
                numpy.multiply(image[:, None, rows, columns], gradient, out=product)
                partial[n, :, :, r, s] = product.reshape(problem.C, multiplier, -1).sum(axis=-1)

    parallel_for(problem.N, sum_image, small=problem.flops < SMALL_FLOPS)
    out[...] = partial.sum(axis=0).reshape(out.shape)
