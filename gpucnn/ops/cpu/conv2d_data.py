"""The input gradient as a convolution: of the dilated gradient, or without the dilation's zeros.

"dilated": dy with stride - 1 zeros between its elements, padded by k - p - 1 (k dilated), convolved at stride 1
with the kernel rotated by 180 degrees and its input and output channels exchanged.

"phases": the same sum without the zeros, as stride_h * stride_w dense convolutions. At stride 1 it is "dilated".
"""

from __future__ import annotations

from typing import Any

import numpy
from numpy.typing import NDArray

from gpucnn.ops.cpu import conv2d_depthwise, conv2d_im2col, conv2d_rows
from gpucnn_kernels.problem import Conv2dProblem


def rotated(weight: NDArray[Any], groups: int) -> NDArray[Any]:
    """Weights (K, C / G, R, S) rotated by 180 degrees, input and output channels exchanged: (C, K / G, R, S)."""
    k, c, r, s = weight.shape
    by_group = weight.reshape(groups, k // groups, c, r, s)[..., ::-1, ::-1]
    return numpy.ascontiguousarray(by_group.transpose(0, 2, 1, 3, 4)).reshape(groups * c, k // groups, r, s)


def dilate_and_pad(dy: NDArray[Any], problem: Conv2dProblem) -> NDArray[Any]:
    """Dy (N, K, P, Q) with stride - 1 zeros between its elements and extent - padding - 1 around them.

    Below and on the right there are as many more as make the stride-1 convolution give H x W. Where the padding is
    larger than extent - 1, what touched padding alone is cropped instead.
    """
    before = (problem.extent[0] - 1 - problem.padding[0], problem.extent[1] - 1 - problem.padding[2])
    height, width = problem.H + problem.extent[0] - 1, problem.W + problem.extent[1] - 1
    rows, to_rows = _place(problem.P, problem.stride[0], before[0], height)
    columns, to_columns = _place(problem.Q, problem.stride[1], before[1], width)
    spread = numpy.zeros((problem.N, problem.K, height, width), dy.dtype)
    spread[:, :, to_rows, to_columns] = dy[:, :, rows, columns]
    return spread


def dilated(problem: Conv2dProblem, dy: NDArray[Any], weight: NDArray[Any], out: NDArray[Any]) -> None:
    """Dx (N, C, H, W) into ``out``: dilate and pad dy, rotate the kernel, convolve at stride 1."""
    spread = dilate_and_pad(dy, problem)
    turned = rotated(weight, problem.groups)
    convolution = Conv2dProblem.from_shapes(
        spread.shape, turned.shape, dilation=problem.dilation, groups=problem.groups
    )
    conv2d_im2col.forward(convolution, spread, turned, None, out)


def _place(count: int, step: int, start: int, size: int) -> tuple[slice, slice]:
    """Which of ``count`` elements, put ``step`` apart from place ``start`` on, lie in 0 .. size - 1, and where.

    Where the padding is larger than k - 1, ``start`` is negative: the outermost elements touch padding only.
    """
    first = max(0, -(start // step)) if start < 0 else 0
    last = min(count, (size - 1 - start) // step + 1)
    return slice(first, last), slice(start + first * step, start + (last - 1) * step + 1, step)


def phases(problem: Conv2dProblem, dy: NDArray[Any], weight: NDArray[Any], out: NDArray[Any]) -> None:
    """Dx (N, C, H, W) into ``out``: per remainder modulo the stride, a stride-1 convolution of dy itself.

    Input row h meets output row p through kernel row r where h + top = p * stride + r * dilation. So input rows
    whose h + top leaves the same remainder share the kernel rows whose r * dilation leaves that remainder, and
    step through dy one row at a time.
    """
    depthwise = problem.groups == problem.C == problem.K and conv2d_depthwise.fits(problem)
    convolve = conv2d_depthwise.forward if depthwise else conv2d_rows.forward
    turned = rotated(weight, problem.groups)
    vertical = [_Phase(problem, 0, remainder) for remainder in range(problem.stride[0])]
    horizontal = [_Phase(problem, 1, remainder) for remainder in range(problem.stride[1])]
    for row in vertical:
        for column in horizontal:
            target = out[:, :, row.inputs, column.inputs]
            if not target.size:
                continue
            if row.empty or column.empty:
                target[...] = 0
                continue
            part = numpy.ascontiguousarray(turned[:, :, row.kernel, column.kernel])
            source = dy[:, :, row.outputs, column.outputs]
            convolution = Conv2dProblem.from_shapes(
                source.shape,
                part.shape,
                padding=(*row.padding, *column.padding),
                dilation=(row.dilation, column.dilation),
                groups=problem.groups,
            )
            convolve(convolution, source, part, None, target)


class _Phase:
    """Along one axis: the input places with one remainder, and the convolution of dy that gives their gradient."""

    def __init__(self, problem: Conv2dProblem, axis: int, remainder: int) -> None:
        stride, dilation = problem.stride[axis], problem.dilation[axis]
        before = problem.padding[2 * axis]
        size, length = ((problem.H, problem.P), (problem.W, problem.Q))[axis]
        kernel = (problem.R, problem.S)[axis]
        # Padded place = remainder + stride * i; i runs from the first that is inside the image.
        first = max(0, -((remainder - before) // stride))
        start = remainder + stride * first - before
        self.inputs = slice(start, None, stride)
        count = len(range(start, size, stride))
        taps = [r for r in range(kernel) if r * dilation % stride == remainder]
        self.empty = not taps
        if self.empty:
            return
        # Tap r meets output place i - r * dilation // stride; turned around, from the last tap to the first.
        step = taps[1] - taps[0] if len(taps) > 1 else 1
        self.kernel = slice(kernel - 1 - taps[-1], kernel - taps[0], step)
        self.dilation = step * dilation // stride if len(taps) > 1 else 1
        begin = first - taps[-1] * dilation // stride
        end = first + count - taps[0] * dilation // stride
        self.outputs = slice(min(max(begin, 0), length), min(max(end, 0), length))
        self.padding = max(-begin, 0), max(end - length, 0)
        self.empty = self.outputs.start >= self.outputs.stop
