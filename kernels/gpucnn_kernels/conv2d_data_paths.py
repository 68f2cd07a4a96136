"""The paths of a convolution's input gradient, each a function that fills dx; the module ``conv2d`` chooses.

They also are the paths of a transposed convolution, whose bias comes with the epilogue, as does a residual.
"""

from __future__ import annotations

from gpucnn_kernels import conv2d_forward_paths as forward_paths
from gpucnn_kernels.arrays import DeviceArray
from gpucnn_kernels.columns import columns_shape, images, launch_col2im
from gpucnn_kernels.conv2d_forward_paths import (
    Epilogue,
    as_matrices,
    batches,
    filter_matrix,
    finish,
    is_pointwise,
    strides,
)
from gpucnn_kernels.launch import Call, blocks_for
from gpucnn_kernels.matmul import matmul
from gpucnn_kernels.problem import Conv2dProblem
from gpucnn_kernels.source import SCALARS

SOURCES: dict[str, tuple[dict[str, str], ...]] = {"conv2d_dilated": ({},)}


def phases(
    call: Call, problem: Conv2dProblem, dy: DeviceArray, weight: DeviceArray, dx: DeviceArray, epilogue: Epilogue
) -> None:
    """Fill dx by stride_h * stride_w stride-1 convolutions with parts of the filter, in one launch."""
    forward_paths.implicit_gemm(call, problem, dy, weight, dx, epilogue, transposed=True)


def depthwise(
    call: Call, problem: Conv2dProblem, dy: DeviceArray, weight: DeviceArray, dx: DeviceArray, epilogue: Epilogue
) -> None:
    """Fill dx where each input channel is a group of its own."""
    forward_paths.depthwise(call, problem, dy, weight, dx, epilogue, transposed=True)


def dilated(
    call: Call, problem: Conv2dProblem, dy: DeviceArray, weight: DeviceArray, dx: DeviceArray, epilogue: Epilogue
) -> None:
    """Fill dx by a stride-1 convolution of the dilated and padded dy with the rotated filter, all three made.

    The padded dy is a workspace of (N, K, H + dilation * (R - 1), W + dilation * (S - 1)).
    """
    extra = [d * (kernel - 1) for d, kernel in zip(problem.dilation, (problem.R, problem.S), strict=True)]
    height, width = problem.H + extra[0], problem.W + extra[1]
    padded = call.empty((problem.N, problem.K, height, width), dy.dtype, like=dy)
    call.launch(
        "conv2d_dilated",
        "conv2d_dilate_and_pad",
        blocks_for(padded.size),
        scalar=dy.dtype,
        dy=dy,
        dy_strides=strides(dy),
        P=problem.P,
        Q=problem.Q,
        padded=padded,
        padded_strides=strides(padded),
        channels=problem.K,
        height=height,
        width=width,
        before_h=extra[0] - problem.padding[0],
        before_w=extra[1] - problem.padding[2],
        stride_h=problem.stride[0],
        stride_w=problem.stride[1],
        count=padded.size,
    )
    outputs, depth = problem.K // problem.groups, problem.C // problem.groups
    rotated = call.empty((problem.C, outputs, problem.R, problem.S), weight.dtype)
    call.launch(
        "conv2d_dilated",
        "conv2d_rotate_filter",
        blocks_for(rotated.size),
        scalar=weight.dtype,
        filter=weight,
        filter_strides=strides(weight),
        rotated=rotated,
        depth=depth,
        outputs=outputs,
        R=problem.R,
        S=problem.S,
        count=rotated.size,
    )
    stride_one = Conv2dProblem.from_shapes(
        padded.shape, rotated.shape, dilation=problem.dilation, groups=problem.groups
    )
    forward_paths.implicit_gemm(call, stride_one, padded, rotated, dx, epilogue)


def col2im(
    call: Call, problem: Conv2dProblem, dy: DeviceArray, weight: DeviceArray, dx: DeviceArray, epilogue: Epilogue
) -> None:
    """Fill dx by a matrix product, the columns' gradient, and the sum of each pixel's columns in a fixed order."""
    _by_columns(call, problem, dy, weight, dx, epilogue, "gather")


def scatter(
    call: Call, problem: Conv2dProblem, dy: DeviceArray, weight: DeviceArray, dx: DeviceArray, epilogue: Epilogue
) -> None:
    """As :func:`col2im`, but columns add to their pixels by atomics: the last bits may change from run to run."""
    _by_columns(call, problem, dy, weight, dx, epilogue, "scatter")


def _by_columns(
    call: Call,
    problem: Conv2dProblem,
    dy: DeviceArray,
    weight: DeviceArray,
    dx: DeviceArray,
    epilogue: Epilogue,
    algorithm: str,
) -> None:
    wide = SCALARS[dx.dtype][1]
    # 16-bit sums stay in a float32 workspace until the epilogue is done, so that they are rounded once.
    apart = wide != dx.dtype and not epilogue.nothing
    if not apart:
        epilogue = epilogue.apart_from(call, dx)
    # A 1x1 kernel at stride 1 without padding has dx itself as columns.
    pointwise, matrix = is_pointwise(problem), filter_matrix(call, weight)
    outputs, depth = problem.K // problem.groups, matrix.shape[1]
    for first, last in batches(problem, wide, pointwise):
        part_dy, part_dx = images(dy, first, last), images(dx, first, last)
        gradients = as_matrices(part_dy)
        sums = call.empty(part_dx.shape, wide, like=part_dx, name=dx.name) if apart else part_dx
        workspace = None
        if pointwise:
            columns = as_matrices(sums)
        else:
            workspace = call.empty((last - first, *columns_shape(problem)[1:]), wide)
            columns = workspace.array
        for group in range(problem.groups):
            k, c = slice(group * outputs, (group + 1) * outputs), slice(group * depth, (group + 1) * depth)
            matmul(matrix[k].transpose()[None], gradients[:, k], out=columns[:, c])
        if workspace is not None:
            launch_col2im(call, workspace, sums, problem, algorithm)
        finish(call, part_dx, epilogue.of_images(first, last), sums if apart else None)
