"""The way "direct" of an input gradient: as a convolution of dy, or by columns in shared memory.

conv2d_direct.py has the former, cuda/conv2d_input_columns.cu the latter, for small images: a convolution would
multiply the zeros around their dy. How many images and input channels a block takes is planned here, by counting
instructions: the fewest that the busiest multiprocessor issues.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

from gpucnn_kernels import conv2d_direct
from gpucnn_kernels.arrays import DeviceArray
from gpucnn_kernels.conv2d_direct import MOST_BYTES, Plan
from gpucnn_kernels.conv2d_forward_paths import Epilogue, axes, channel_counts, filter_strides, strides
from gpucnn_kernels.conv2d_tiles import plain_rate
from gpucnn_kernels.gpu import Gpu
from gpucnn_kernels.launch import Call
from gpucnn_kernels.problem import Conv2dProblem

SOURCES: dict[str, tuple[dict[str, str], ...]] = {"conv2d_input_columns": ({},)}
SHARED_BYTES = {"conv2d_input_columns": MOST_BYTES}

_HIGH = 8  # columns of a thread, and positions, by the bytes of a number
_WIDE = {4: 8, 8: 4}
_QUAD = 4  # pixels of a row that a thread makes
_MOST_WARPS = 8
_RESIDENT_THREADS = 512  # of a multiprocessor, by registers
_MOST_IMAGES = 8
_WARP = 32

# Instructions of a warp, counted in the code for sm_90 (float32).
_OF_A_TERM = 11  # of the product, beside its multiply-adds
_OF_A_LINE = 140  # a position of dy, or a column of the filters, for all output channels of a slice
_OF_A_COPY = 9  # of a number from there on
_OF_A_STORE = 60  # of the columns
_OF_A_QUAD = 350
_OF_A_ROW = 25  # of the filter
_OF_A_TAP = 23
_BEGINNING = 200


@functools.lru_cache(maxsize=4096)
def plan(problem: Conv2dProblem, dtype: str, gpu: Gpu) -> Plan | None:
    """The plan that takes the least time; None where an image's columns of one channel do not fit."""
    item = 8 if dtype == "float64" else 4
    outer, inner = problem.C // problem.groups, problem.K // problem.groups
    plans = [
        made
        for images in range(1, min(problem.N, _MOST_IMAGES) + 1)
        for channels in sorted({-(-outer // parts) for parts in range(1, outer + 1)})
        for made in _plans(problem, gpu, dtype, item, images, channels, inner)
    ]
    return min(plans, key=lambda made: made.seconds(gpu), default=None)


def _plans(
    problem: Conv2dProblem, gpu: Gpu, dtype: str, item: int, images: int, channels: int, inner: int
) -> Iterator[Plan]:
    taps, positions = problem.R * problem.S, problem.P * problem.Q
    across = -(-images * positions // _WIDE[item])
    units = -(-channels * taps // _HIGH)
    busy = -(-across * units // _WARP)  # warps that have a share of the product
    pitch, columns = across * _WIDE[item], units * _HIGH
    most = MOST_BYTES // item
    room = most // (pitch + columns)
    pixels = problem.H * problem.W
    reach = (max(problem.H, problem.W) + max(problem.padding)) * max(problem.stride)
    reach += max(problem.dilation) * max(problem.stride) ** 2  # what the kernel divides by a multiplication
    if busy > _MOST_WARPS or pitch * columns > most or not room or images * channels * pixels >= 1 << 31:
        return
    if reach >= 1 << 32:
        return
    slices = -(-inner // room)
    slice_ = -(-inner // slices)
    blocks = -(-problem.N // images) * problem.groups * -(-problem.C // problem.groups // channels)
    clocks = 4 / (plain_rate(gpu, dtype) / (64 * gpu.multiprocessors * gpu.clock))
    product = inner * (clocks * _HIGH * _WIDE[item] + _OF_A_TERM)
    common = tuple(map(math.gcd, problem.stride, problem.dilation))
    down, right = (
        -(-kernel // (stride // shared))
        for kernel, stride, shared in zip((problem.R, problem.S), problem.stride, common, strict=True)
    )
    row_quads = problem.stride[1] * -(-problem.W // (problem.stride[1] * _QUAD))
    of_a_quad = _OF_A_QUAD + down * (_OF_A_ROW + right * _OF_A_TAP)
    patch = {
        "images": images,
        "channels": channels,
        "channel_blocks": -(-problem.C // problem.groups // channels),
        "units_across": across,
        "pitch": pitch,
        "columns": columns,
        "slice": slice_,
        "P": problem.P,
        "Q": problem.Q,
        "row_quads": row_quads,
        "by_stride_h": _reciprocal(problem.stride[0]),
        "by_stride_w": _reciprocal(problem.stride[1]),
    }
    for warps in range(busy, _MOST_WARPS + 1):
        threads = warps * _WARP
        staged = -(-(pitch + columns) // threads) * (slices * _OF_A_LINE + inner * _OF_A_COPY)
        summed = -(-images * channels * problem.H * row_quads // threads) * of_a_quad
        yield Plan(
            "conv2d_input_columns",
            _RESIDENT_THREADS,
            patch,
            threads,
            blocks,
            item * max(slice_ * (pitch + columns), pitch * columns),
            busy * (product + _OF_A_STORE) + warps * (staged + summed),
            warps * _BEGINNING,
            inner * (pitch + columns),
        )


def _reciprocal(divisor: int) -> int:
    """2^32 divided by it, rounded up, and 0 for 1: the source's ``divided`` multiplies by it."""
    return -(-(1 << 32) // divisor) if divisor > 1 else 0


def faster(problem: Conv2dProblem, dtype: str, gpu: Gpu) -> Plan:
    """Of the two ways the one that is reckoned faster."""
    convolved, columns = conv2d_direct.plan(problem, True, dtype, gpu), plan(problem, dtype, gpu)
    return columns if columns is not None and columns.seconds(gpu) < convolved.seconds(gpu) else convolved


def direct_backward_data(
    call: Call, problem: Conv2dProblem, dy: DeviceArray, weight: DeviceArray, dx: DeviceArray, epilogue: Epilogue
) -> None:
    """Fill dx, for few input channels a group: one launch."""
    made = faster(problem, dy.dtype, call.gpu)
    if made.kernel != "conv2d_input_columns":
        conv2d_direct.direct(call, problem, dy, weight, dx, epilogue, transposed=True)
        return
    vertical, horizontal = axes(problem, True)
    call.launch(
        "conv2d_input_columns",
        made.kernel,
        made.blocks,
        made.threads,
        scalar=dy.dtype,
        shared_bytes=made.shared_bytes,
        dy=dy,
        dy_strides=strides(dy),
        filter=weight,
        filter_strides=filter_strides(weight, problem, True),
        **epilogue.terms,
        output=dx,
        output_strides=strides(dx),
        channels=channel_counts(problem, True),
        vertical=vertical,
        horizontal=horizontal,
        epilogue=epilogue.fields,
        patch=made.patch,
    )
