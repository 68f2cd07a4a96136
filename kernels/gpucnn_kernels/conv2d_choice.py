"""Which way of a convolution "auto" is: what is usual for such a problem, unless another is reckoned much faster.

The usual way is the first line that fits:

=============  ============================================================  =============
direction      problem                                                       way
=============  ============================================================  =============
all            one channel a group, more than one group                      depthwise
forward        at most 4 channels a group                                    direct
all            any other, where products of tensor cores were asked for      tensor
forward        1x1, stride 1, no padding, one group: a dense matrix product  im2col
data           the same                                                      col2im
forward        any other                                                     implicit_gemm
data           any other                                                     phases
filter         any other                                                     implicit_gemm
=============  ============================================================  =============

"direct" is also there for up to 8 channels a group, and for their input gradient, where it is reckoned faster.

Tensor cores' products are asked for by a precision that is theirs: tf32, or the arrays' own 16 bits. float32
arrays without a precision may be multiplied there too, by three tf32 products for each, which are as exact: where
that is reckoned to be much faster, on GPUs from compute capability 8.0 on. ``precision="float32"`` is for those
who want products of float32 itself, and GPUCNN_KERNELS_THREE_PRODUCTS=0 in the environment for a whole program's.

:mod:`gpucnn_kernels.conv2d_cost` reckons. What it may choose from gives the same bits every time, so "scatter" is
not among it, and needs no more than a workspace for columns.
"""

from __future__ import annotations

import functools
import os
from typing import Any

from gpucnn_kernels import conv2d_cost, conv2d_direct, conv2d_filter_direct, conv2d_pieces, conv2d_tensor
from gpucnn_kernels.conv2d_direct import DIRECT_CHANNELS
from gpucnn_kernels.conv2d_forward_paths import is_pointwise
from gpucnn_kernels.errors import ArgumentError
from gpucnn_kernels.gpu import H200, Gpu
from gpucnn_kernels.problem import Conv2dProblem

VARIABLE = "GPUCNN_KERNELS_THREE_PRODUCTS"

_FIRST_LAYER_CHANNELS = 4
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
    least = least_precision(str(dtype), precision)
    return _chosen(direction, problem, str(dtype), least, channels_last, gpu)


def least_precision(dtype: str, precision: str | None) -> str | None:
    """What products must have: what was asked for; of float32, where nothing was, what the environment says.

    Raises ArgumentError for another value of the environment's variable than 0 and 1.
    """
    if precision is not None or dtype != "float32":
        return precision
    value = os.environ.get(VARIABLE) or "1"
    if value not in ("0", "1"):
        raise ArgumentError(f"{VARIABLE} must be 0 or 1, got {value!r}")
    return None if value == "1" else "float32"


@functools.lru_cache(maxsize=4096)
def _chosen(
    direction: str, problem: Conv2dProblem, dtype: str, precision: str | None, channels_last: bool, gpu: Gpu
) -> str:
    names = candidates(direction, problem, dtype, precision, gpu)
    first = usual(direction, problem, dtype, precision, gpu)
    # A grid that leaves most multiprocessors idle is a matter of latency, of which the estimates know little.
    if first == "direct" and conv2d_direct.plan(problem, False, dtype, gpu).blocks < gpu.multiprocessors:
        return first
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
    if direction != "backward_filter" and depth <= DIRECT_CHANNELS:
        names.append("direct")
    if direction == "backward_filter" and conv2d_filter_direct.takes(problem, dtype):
        names.append("direct")
    if depth == 1 and problem.groups > 1:
        names.append("depthwise")
    as_exact = dtype == "float32" and precision is None  # three products
    able = dtype in conv2d_pieces.DTYPES and gpu.capability >= conv2d_tensor.CAPABILITY
    if able and (as_exact or _tensor_cores_asked_for(precision)):
        names.append("tensor")
    return tuple(names)


def _tensor_cores_asked_for(precision: str | None) -> bool:
    return precision not in (None, "float32")


def usual(direction: str, problem: Conv2dProblem, dtype: str, precision: str | None, gpu: Gpu) -> str:
    """The first of the table's lines that fits the problem and is one of its candidates."""
    names = candidates(direction, problem, dtype, precision, gpu)
    lines = []
    if problem.groups == problem.C > 1:
        lines.append("depthwise")
    if direction == "forward" and problem.C // problem.groups <= _FIRST_LAYER_CHANNELS:
        lines.append("direct")
    if _tensor_cores_asked_for(precision):
        lines.append("tensor")
    if is_pointwise(problem) and problem.groups == 1 and direction != "backward_filter":
        lines.append("im2col" if direction == "forward" else "col2im")
    lines.append("phases" if direction == "backward_data" else "implicit_gemm")
    return next(name for name in lines if name in names)
