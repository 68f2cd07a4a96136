"""Windows of images as the columns of a matrix, and back: what turns a convolution into a matrix product.

:func:`im2col` and :func:`col2im` are the functions for callers. The convolutions build on :func:`launch_im2col`
and :func:`launch_col2im`, which fill arrays that they hold, and on :func:`images`, a part of a batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from gpucnn_kernels.arrays import DeviceArray, image_layout
from gpucnn_kernels.errors import ArgumentError
from gpucnn_kernels.launch import Call, blocks_for
from gpucnn_kernels.overlap import require_apart
from gpucnn_kernels.problem import Conv2dProblem, IntOrPair, Padding, ProblemError, pair
from gpucnn_kernels.runtime import itemsize
from gpucnn_kernels.source import SCALARS

SOURCE = "im2col"
SOURCES: dict[str, tuple[dict[str, str], ...]] = {SOURCE: ({},)}

ALGORITHMS = ("gather", "scatter")
"""Of col2im: each pixel sums the columns that hold it, or each column adds to its pixels by atomics."""

_TILED_CHANNELS = 16  # from here on the tiles of the channels-last kernels are at least half full
_MOST_BLOCKS = 65535  # of a grid's y axis
_ENOUGH_BLOCKS = 4096  # several for every multiprocessor of the largest GPUs
_PLANES_WINDOW = (3, 3)  # that has kernels of its own for contiguous images


def im2col(
    x: Any,
    *,
    kernel_size: IntOrPair,
    stride: IntOrPair = 1,
    padding: Padding = 0,
    dilation: IntOrPair = 1,
    out: Any = None,
    stream: Any = None,
) -> Any:
    """Every window of x (N, C, H, W) as a column: (N, C * R * S, P * Q), contiguous, rows ordered c, r, s.

    Places in the padding are 0. Raises ProblemError where the window does not fit, LayoutError where x is neither
    contiguous nor channels-last or ``out`` is not contiguous.
    """
    with Call(stream, x=x, out=out) as call:
        dtype = call.floating("x", "out")
        image = call["x"]
        problem = _window_problem(image.shape, kernel_size, stride, padding, dilation)
        call.contiguous("out")
        columns = call.output(columns_shape(problem), dtype)
        require_apart(columns, image)
        if problem.N:
            launch_im2col(call, image, columns, problem)
        return call.give(columns)


def col2im(
    columns: Any,
    *,
    input_size: Sequence[int],
    kernel_size: IntOrPair,
    stride: IntOrPair = 1,
    padding: Padding = 0,
    dilation: IntOrPair = 1,
    algorithm: str = "gather",
    out: Any = None,
    stream: Any = None,
) -> Any:
    """The adjoint of :func:`im2col`: columns (N, C * R * S, P * Q) added up where windows overlap: (N, C, H, W).

    ``input_size`` is (H, W). What falls on padding is dropped. ``algorithm`` "gather" adds in a fixed order;
    "scatter" by atomics, in an order that changes, so the last bits may differ from run to run. Half precision is
    added up in float32 and rounded once. The result is contiguous, or has the layout of ``out``, which may be
    channels-last. Raises ProblemError where the columns are not those of such an image.
    """
    if algorithm not in ALGORITHMS:
        raise ArgumentError(f"algorithm must be one of {', '.join(ALGORITHMS)}, got {algorithm!r}")
    with Call(stream, columns=columns, out=out) as call:
        dtype = call.floating("columns", "out")
        given = call["columns"]
        r, s = pair(kernel_size, "kernel_size")
        if len(given.shape) != 3 or given.shape[1] % (r * s) or given.shape[1] == 0:
            raise ProblemError(f"col2im takes columns of shape (N, C * {r} * {s}, P * Q), got {given.shape}")
        shape = (given.shape[0], given.shape[1] // (r * s), *pair(input_size, "input_size"))
        problem = _window_problem(shape, (r, s), stride, padding, dilation)
        if given.shape != columns_shape(problem):
            raise ProblemError(
                f"col2im got columns of shape {given.shape}, but an input of {problem.H}x{problem.W} has "
                f"{problem.P}x{problem.Q} = {problem.P * problem.Q} windows"
            )
        image = call.output(shape, dtype)
        require_apart(image, given)
        if problem.N:  # the strides of an empty array say nothing
            call.contiguous("columns")
            launch_col2im(call, given, image, problem, algorithm)
        return call.give(image)


def _window_problem(
    shape: Sequence[int], kernel_size: IntOrPair, stride: IntOrPair, padding: Padding, dilation: IntOrPair
) -> Conv2dProblem:
    channels = shape[1] if len(shape) == 4 else 1
    weight_shape = (1, channels, *pair(kernel_size, "kernel_size"))
    return Conv2dProblem.from_shapes(shape, weight_shape, stride=stride, padding=padding, dilation=dilation)


# ---------------------------------------------------------------- what the convolutions build on


def columns_shape(problem: Conv2dProblem) -> tuple[int, int, int]:
    """(N, C * R * S, P * Q): of the columns of all channels, whatever the groups."""
    return problem.N, problem.C * problem.R * problem.S, problem.P * problem.Q


def images(array: DeviceArray, first: int, last: int) -> DeviceArray:
    """Images ``first`` up to ``last`` (exclusive) of a batch: a view."""
    offset = first * array.strides[0] * itemsize(array.dtype) if last > first else 0
    return dataclasses.replace(
        array,
        array=array.array[first:last],
        address=array.address + offset,
        shape=(last - first, *array.shape[1:]),
    )


def launch_im2col(call: Call, x: DeviceArray, columns: DeviceArray, problem: Conv2dProblem) -> None:
    """Fill contiguous ``columns``, of :func:`columns_shape` for x's N, with the windows of x.

    x has problem.C channels and any number of images, in either layout.
    """
    window, form = _window(x, problem)
    grid, block = _grid(problem.P * problem.Q, x.shape[0], problem.C, form)
    kernel = "im2col" + form
    call.launch(SOURCE, kernel, grid, block, scalar=x.dtype, x=x, columns=columns, window=window)


def launch_col2im(
    call: Call, columns: DeviceArray, x: DeviceArray, problem: Conv2dProblem, algorithm: str = "gather"
) -> None:
    """Fill x, in either layout, with the sums of contiguous ``columns``.

    The columns are of x's dtype or, for 16-bit images, float32: then only x is rounded. "scatter" of 16-bit images
    takes a float32 workspace of the size of x.
    """
    window, form = _window(x, problem)
    dtype, (_, wide) = x.dtype, SCALARS[x.dtype]
    narrow_columns, wide_columns = (columns, None) if columns.dtype == dtype else (None, columns)
    if algorithm == "gather":
        grid, block = _grid(problem.H * problem.W, x.shape[0], problem.C, form)
        kernel = "col2im_gather" + form
        call.launch(
            SOURCE,
            kernel,
            grid,
            block,
            scalar=dtype,
            columns=narrow_columns,
            wide=wide_columns,
            x=x,
            window=window,
        )
        return
    total = x if wide == dtype else call.scratch(x.size, wide)
    call.launch(SOURCE, "col2im_clear", blocks_for(x.size), scalar=dtype, image=total, count=x.size)
    grid, block = _grid(problem.P * problem.Q, x.shape[0], problem.C, "")
    call.launch(
        SOURCE,
        "col2im_scatter",
        grid,
        block,
        scalar=dtype,
        columns=narrow_columns,
        wide=wide_columns,
        image=total,
        window=window,
    )
    if total is not x:
        call.launch(SOURCE, "col2im_round", blocks_for(x.size), scalar=dtype, image=total, x=x, count=x.size)


def _window(x: DeviceArray, problem: Conv2dProblem) -> tuple[dict[str, int], str]:
    """(the kernels' struct for images laid out as x, what the names of the kernels to be used end with)."""
    form = ""
    if image_layout(x) == "channels_last" and problem.C >= _TILED_CHANNELS:
        form = "_channels_last"
    elif x.contiguous and (problem.R, problem.S) == _PLANES_WINDOW:
        form = "_planes" if problem.R * problem.S * problem.P * problem.Q < 2**31 else ""
    for positions, what in ((problem.P * problem.Q, "windows"), (problem.H * problem.W, "pixels")):
        if positions >= 2**31:
            raise ArgumentError(
                f"{x.name} has {positions} {what} an image and channel; kernels take fewer than 2^31"
            )
    fields = {"planes": x.shape[0] * problem.C, **dict(zip("nchw", x.strides, strict=True))}
    fields |= {letter: getattr(problem, letter) for letter in "CHWRSPQ"}
    fields["top"], fields["left"] = problem.padding[0], problem.padding[2]
    fields["stride_h"], fields["stride_w"] = problem.stride
    fields["dilation_h"], fields["dilation_w"] = problem.dilation
    return fields, form


def _grid(positions: int, batch: int, channels: int, form: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """(blocks, threads): positions of a plane along x, planes along y; a block takes several small planes."""
    if form == "_channels_last":
        return (-(-positions // 32), min(batch * -(-channels // 32), _MOST_BLOCKS)), (32, 8)
    width = min(256, 1 << (positions - 1).bit_length())
    height = 256 // width
    blocks = -(-positions // width)
    # What a thread works out once serves several planes, as long as the blocks are enough for any GPU.
    most = min(-(-_ENOUGH_BLOCKS // blocks), _MOST_BLOCKS) if form == "_planes" else _MOST_BLOCKS
    return (blocks, min(-(-batch * channels // height), most)), (width, height)
