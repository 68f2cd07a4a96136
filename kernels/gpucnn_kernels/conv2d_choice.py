"""Which way of a convolution "auto" is: what is usual for such a problem, unless another is reckoned much faster.

The usual way is the first line that fits:

=============  ============================================================  =============
direction      problem                                                       way
=============  ============================================================  =============
all            one channel a group, more than one group                      depthwise
forward        at most 4 channels a group                                    direct
all            any other, where tensor cores may be taken                    tensor
forward        1x1, stride 1, no padding, one group: a dense matrix product  im2col
data           the same                                                      col2im
forward        any other                                                     implicit_gemm
data           any other                                                     phases
filter         any other                                                     implicit_gemm
=============  ============================================================  =============

Tensor cores may be taken where a precision was asked for that is theirs (tf32, or the arrays' own 16 bits) and the
GPU has them. float32 without one stays float32-accurate without them, until three tf32 products were measured.

:mod:`gpucnn_kernels.conv2d_cost` reckons. What it may choose from gives the same bits every time, so "scatter" is
not among it, and needs no more than a workspace for columns.
"""

from __future__ import annotations

import functools
from typing import Any

from gpucnn_kernels import conv2d_cost, conv2d_filter_direct, conv2d_tensor
from gpucnn_kernels.conv2d_forward_paths import DIRECT_CHANNELS, is_pointwise
from gpucnn_kernels.gpu import H200, Gpu
from gpucnn_kernels.problem import Conv2dProblem

_CUBLAS_BFLOAT16 = (8, 0)  # the oldest compute capability whose cuBLAS multiplies bfloat16


def chosen(
    direction: str,
    problem: Conv2dProblem,
    dtype: Any,
    *,
    precision: str | None = None,
    channels_last: bool = False,
    gpu: Gpu = H200,
) -> str:
    """The name for a direction of forward, backward_data and backward_filter, for images of this layout."""
    return _chosen(direction, problem, str(dtype), precision, channels_last, gpu)


@functools.lru_cache(maxsize=4096)
def _chosen(
    direction: str, problem: Conv2dProblem, dtype: str, precision: str | None, channels_last: bool, gpu: Gpu
) -> str:
    names = candidates(direction, problem, dtype, precision, gpu)
    first = usual(direction, problem, dtype, precision, gpu)
    return conv2d_cost.choose(
        first, names, direction, problem, dtype, gpu, precision=precision, channels_last=channels_last
    )


def candidates(
    direction: str, problem: Conv2dProblem, dtype: str, precision: str | None, gpu: Gpu
) -> tuple[str, ...]:
    """All ways that can do the problem in at least this precision and give the same bits every time."""
    depth = problem.C // problem.groups
    columns, dense = {
        "forward": ("im2col", "implicit_gemm"),
        "backward_data": ("col2im", "phases"),
        "backward_filter": ("im2col", "implicit_gemm"),
    }[direction]
    names = [dense]
    if dtype != "bfloat16" or gpu.capability >= _CUBLAS_BFLOAT16:
        names.append(columns)
    if direction == "forward" and depth <= DIRECT_CHANNELS:
        names.append("direct")
    if direction == "backward_filter" and conv2d_filter_direct.takes(problem, dtype):
        names.append("direct")
    if depth == 1 and problem.groups > 1:
        names.append("depthwise")
    asked = precision not in (None, "float32") and dtype in conv2d_tensor.DTYPES
    if asked and gpu.capability >= conv2d_tensor.CAPABILITY:
        names.append("tensor")
    return tuple(names)


def usual(direction: str, problem: Conv2dProblem, dtype: str, precision: str | None, gpu: Gpu) -> str:
    """The first of the table's lines that fits the problem and is one of its candidates."""
    names = candidates(direction, problem, dtype, precision, gpu)
    lines = []
    if problem.groups == problem.C > 1:
        lines.append("depthwise")
    if direction == "forward" and problem.C // problem.groups <= DIRECT_CHANNELS:
        lines.append("direct")
    lines.append("tensor")
    if is_pointwise(problem) and problem.groups == 1 and direction != "backward_filter":
        lines.append("im2col" if direction == "forward" else "col2im")
    lines.append("phases" if direction == "backward_data" else "implicit_gemm")
    return next(name for name in lines if name in names)
