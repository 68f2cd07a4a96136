"""Two-dimensional convolution on NumPy: the public operations, and which algorithm "auto" stands for.

The arithmetic is in the modules beside this one, an idea each; every algorithm of a direction gives the same
result up to rounding. ``algorithm="auto"`` is :func:`conv2d_choose`. float16 arrays are computed in float32.
"tensor_tf32" is what GPUs do in TF32: "auto" with factors that are rounded to it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy
from numpy.typing import DTypeLike, NDArray

from gpucnn.errors import ArgumentError
from gpucnn.ops.checks import (
    backward_data_problem,
    backward_filter_problem,
    check_algorithm,
    check_residual,
    forward_problem,
    require_dimensions,
    require_floating,
)
from gpucnn.ops.cpu import (
    compiled,
    conv2d_bands,
    conv2d_col2im,
    conv2d_data,
    conv2d_depthwise,
    conv2d_depthwise_data,
    conv2d_im2col,
    conv2d_positions,
    conv2d_rows,
    conv2d_wide,
    conv2d_winograd,
    tf32,
)
from gpucnn.ops.cpu.compiled import direct
from gpucnn.ops.cpu.compiled.sums import channel_sums
from gpucnn.ops.cpu.memory import calculation_dtype, result_array
from gpucnn_kernels.problem import Conv2dProblem, IntOrPair, Padding

Forward = Callable[
    [Conv2dProblem, NDArray[Any], NDArray[Any], NDArray[Any] | None, NDArray[Any]], None
]  # (problem, x, weight, bias, out)
Backward = Callable[
    [Conv2dProblem, NDArray[Any], NDArray[Any], NDArray[Any]], None
]  # (problem, dy, weight or x, out)

_FORWARD: dict[str, Forward] = {
    "im2col": conv2d_im2col.forward,
    "rows": conv2d_rows.forward,
    "bands": conv2d_bands.forward,
    "tensordot": conv2d_positions.forward,
    "depthwise": conv2d_depthwise.forward,
    "winograd": conv2d_winograd.forward,
    "direct": direct.forward,
}
_BACKWARD_DATA: dict[str, Backward] = {
    "col2im": conv2d_col2im.backward_data,
    "dilated": conv2d_data.dilated,
    "phases": conv2d_data.phases,
    "scatter": conv2d_positions.backward_data,
    "depthwise": conv2d_depthwise_data.backward_data,
    "winograd": conv2d_winograd.backward_data,
    "direct": direct.backward_data,
}
_BACKWARD_FILTER: dict[str, Backward] = {
    "im2col": conv2d_im2col.backward_filter,
    "rows": conv2d_rows.backward_filter,
    "bands": conv2d_bands.backward_filter,
    "tensordot": conv2d_positions.backward_filter,
    "depthwise": conv2d_depthwise.backward_filter,
    "winograd": conv2d_winograd.backward_filter,
    "direct": direct.backward_filter,
}
_DIRECTIONS: dict[str, tuple[str, ...]] = {
    "forward": tuple(_FORWARD),
    "backward_data": tuple(_BACKWARD_DATA),
    "backward_filter": tuple(_BACKWARD_FILTER),
}


# ---------------------------------------------------------------- which algorithm


def conv2d_algorithms(direction: str) -> tuple[str, ...]:
    """Names that ``algorithm`` takes for "forward", "backward_data" or "backward_filter", without "auto".

    Raises ArgumentError for another direction.
    """
    if direction not in _DIRECTIONS:
        raise ArgumentError(f"direction must be one of {', '.join(_DIRECTIONS)}, got {direction!r}")
    return _DIRECTIONS[direction]


def conv2d_choose(direction: str, problem: Conv2dProblem, dtype: DTypeLike) -> str:
    """The name that "auto" stands for, for this Conv2dProblem and dtype.

    The first line that fits, where depth is input channels a group times kernel columns, "winograd pays" is
    conv2d_winograd.pays (3x3 or 5x5 of stride 1, wide enough, and no float64; without compiled loops, 5x5 forward
    only), "compiled" says that there are compiled loops and the computation is in float32, and "direct fits" is
    compiled.direct.fits, "small pads" conv2d_depthwise.fits (all but kernels dilated and padded by thousands):

    =================  ===========================================  ==========
    direction          problem                                      algorithm
    =================  ===========================================  ==========
    any                one channel a group, > 1 group, small pads   depthwise
    any                compiled, winograd pays, >= 16 channels      winograd
    any                compiled, direct fits                        direct
    backward_data      winograd pays, >= 16 channels a group        winograd
    backward_data      1x1, or few outputs and large weights        col2im
    backward_data      1 group: stride > 1, or < 16 channels        col2im
    backward_data      any other                                    phases
    forward, _filter   depth < 32, larger than 1x1                  bands
    forward, _filter   winograd pays                                winograd
    forward, _filter   1x1, or few outputs and large weights        im2col
    forward, _filter   stride > 1                                   im2col
    forward, _filter   any other                                    rows
    =================  ===========================================  ==========
    """
    conv2d_algorithms(direction)
    return _choice(direction, problem, numpy.dtype(dtype), compiled.available(), conv2d_winograd.is_wanted())


@functools.lru_cache(maxsize=1024)
def _choice(direction: str, problem: Conv2dProblem, dtype: numpy.dtype[Any], loops: bool, wanted: bool) -> str:
    if conv2d_depthwise.is_depthwise(problem) and problem.groups > 1 and conv2d_depthwise.fits(problem):
        return "depthwise"
    pointwise = problem.R == problem.S == 1
    strided = problem.stride != (1, 1)
    channels = problem.C // problem.groups
    wide = conv2d_wide.fits(problem)
    winograd = wanted and conv2d_winograd.pays(direction, problem, dtype)
    if calculation_dtype(dtype) == numpy.float32 and loops:
        if winograd and channels >= 16:
            return "winograd"
        if direct.fits(direction, problem):
            return "direct"
    if direction == "backward_data":
        if winograd and channels >= 16:
            return "winograd"
        if pointwise or wide or (problem.groups == 1 and (strided or channels < 16)):
            return "col2im"
        return "phases"
    if channels * problem.S < 32 and not pointwise:
        return "bands"
    if winograd:
        return "winograd"
    return "im2col" if pointwise or wide or strided else "rows"


def _resolve(direction: str, algorithm: str, problem: Conv2dProblem, dtype: DTypeLike) -> str:
    names = conv2d_algorithms(direction)
    check_algorithm(direction, algorithm, names, problem)
    if algorithm == "auto":
        return conv2d_choose(direction, problem, dtype)
    if algorithm == "direct":
        others = ", ".join(name for name in names if name not in ("depthwise", "winograd", "direct"))
        if calculation_dtype(dtype) != numpy.float32:
            raise ArgumentError(
                f"algorithm 'direct' computes in float32, got {numpy.dtype(dtype)}; choose auto or one of {others}"
            )
        if not compiled.available():
            raise ArgumentError(
                f"algorithm 'direct' is not there: {compiled.why_not()}; choose auto or one of {others}"
            )
        if not direct.fits(direction, problem):
            raise ArgumentError(
                f"algorithm 'direct' lays rows out with their padding, which is too much memory for {problem}; "
                f"choose auto or one of {others}"
            )
    if algorithm == "winograd" and not conv2d_winograd.is_possible(direction, problem):
        others = ", ".join(name for name in names if name not in ("depthwise", "winograd"))
        raise ArgumentError(
            "algorithm 'winograd' needs a 3x3 or 5x5 kernel with stride 1, dilation 1, one group and, for "
            f"backward_data, padding below the kernel's size, got {problem}; choose auto or one of {others}"
        )
    return algorithm


# ---------------------------------------------------------------- the operations


def conv2d_forward(
    x: NDArray[Any],
    weight: NDArray[Any],
    bias: NDArray[Any] | None = None,
    *,
    stride: IntOrPair = 1,
    padding: Padding = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
    algorithm: str = "auto",
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """Cross-correlation of x (N, C, H, W) with weight (K, C / groups, R, S), plus bias (K,): (N, K, P, Q).

    y[n, k, p, q] = bias[k] + sum over c, r, s of
    x[n, c, p * stride_h - pad_top + r * dilation_h, q * stride_w - pad_left + s * dilation_w] * weight[k, c, r, s]

    with x zero outside the image, c over the channels of k's group, and
    P = floor((H + pad_top + pad_bottom - dilation_h * (R - 1) - 1) / stride_h) + 1.

    Raises ProblemError or ShapeError where shapes do not fit, DtypeError where an array is not floating-point,
    ArgumentError for an algorithm that is unknown or cannot do this problem.
    """
    problem = forward_problem(x, weight, bias, stride=stride, padding=padding, dilation=dilation, groups=groups)
    if algorithm == tf32.ALGORITHM:
        x, weight, algorithm = tf32.rounded(x), tf32.rounded(weight), "auto"
    dtype = _common_dtype(x, weight)
    name = _resolve("forward", algorithm, problem, dtype)

    def compute(target: NDArray[Any]) -> None:
        offset = None if bias is None else bias.astype(dtype, copy=False)
        _FORWARD[name](problem, x.astype(dtype, copy=False), _dense(weight, dtype), offset, target)

    return _compute_into(out, problem.output_shape, x.dtype, dtype, (x, weight, bias), compute)


def conv2d_backward_data(
    dy: NDArray[Any],
    weight: NDArray[Any],
    *,
    input_size: Sequence[int],
    stride: IntOrPair = 1,
    padding: Padding = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
    algorithm: str = "auto",
    residual: NDArray[Any] | None = None,
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """The gradient for x, (N, C, H, W), from dy (N, K, P, Q), plus ``residual``; ``input_size`` is (H, W).

    dx[n, c, h, w] is the sum of dy[n, k, p, q] * weight[k, c, r, s] over all k, p, q, r, s in which x[n, c, h, w]
    was multiplied by weight[k, c, r, s] for y[n, k, p, q]. Raises what :func:`conv2d_forward` does.
    """
    problem = backward_data_problem(
        dy, weight, input_size, stride=stride, padding=padding, dilation=dilation, groups=groups
    )
    check_residual(residual, problem.input_shape)
    if algorithm == tf32.ALGORITHM:
        dy, weight, algorithm = tf32.rounded(dy), tf32.rounded(weight), "auto"
    dtype = _common_dtype(dy, weight)
    name = _resolve("backward_data", algorithm, problem, dtype)

    def compute(target: NDArray[Any]) -> None:
        _BACKWARD_DATA[name](problem, dy.astype(dtype, copy=False), _dense(weight, dtype), target)
        if residual is not None:
            with numpy.errstate(all="ignore"):
                target += residual

    return _compute_into(out, problem.input_shape, dy.dtype, dtype, (dy, weight, residual), compute)


def conv2d_backward_filter(
    dy: NDArray[Any],
    x: NDArray[Any],
    *,
    kernel_size: IntOrPair,
    stride: IntOrPair = 1,
    padding: Padding = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
    algorithm: str = "auto",
    out: NDArray[Any] | None = None,
    out_bias: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """The gradient for the weight, (K, C / groups, R, S), summed over the batch.

    The gradient for the bias goes to ``out_bias`` where that is given: a pass of its own here.

    dw[k, c, r, s] is the sum over n, p, q of dy[n, k, p, q] times the input that weight[k, c, r, s] met there.
    Whether it is a mean over the batch is for the loss to say, through dy. Raises what :func:`conv2d_forward`
    does.
    """
    problem = backward_filter_problem(
        dy, x, kernel_size, groups, stride=stride, padding=padding, dilation=dilation
    )
    if out_bias is not None:
        conv2d_backward_bias(dy, out=out_bias)
    if algorithm == tf32.ALGORITHM:
        dy, x, algorithm = tf32.rounded(dy), tf32.rounded(x), "auto"
    dtype = _common_dtype(dy, x)
    name = _resolve("backward_filter", algorithm, problem, dtype)

    def compute(target: NDArray[Any]) -> None:
        if problem.N == 0:
            target[...] = 0
        else:
            _BACKWARD_FILTER[name](problem, dy.astype(dtype, copy=False), x.astype(dtype, copy=False), target)

    return _compute_into(out, problem.weight_shape, x.dtype, dtype, (dy, x), compute)


def conv2d_backward_bias(dy: NDArray[Any], *, out: NDArray[Any] | None = None) -> NDArray[Any]:
    """The gradient for the bias, (K,): the sum of dy (N, K, P, Q) over N, P and Q."""
    require_floating(dy, "dy")
    require_dimensions(dy, 4, "(N, K, P, Q)", "dy")
    out = result_array(out, (dy.shape[1],), dy.dtype)
    if compiled.usable(dy, out):
        channel_sums(dy, out)
        return out
    # Pixels first: those are contiguous, and NumPy sums contiguous numbers pairwise, which keeps rounding small.
    with numpy.errstate(all="ignore"):
        out[...] = dy.sum(axis=(2, 3), dtype=calculation_dtype(dy.dtype)).sum(axis=0)
    return out


# ---------------------------------------------------------------- arrays in, arrays out


def _common_dtype(a: NDArray[Any], b: NDArray[Any]) -> numpy.dtype[Any]:
    return calculation_dtype(numpy.result_type(a, b))


def _dense(weight: NDArray[Any], dtype: DTypeLike) -> NDArray[Any]:
    return numpy.ascontiguousarray(weight, dtype)


def _compute_into(
    out: NDArray[Any] | None,
    shape: tuple[int, ...],
    dtype: DTypeLike,
    compute_dtype: DTypeLike,
    inputs: Sequence[NDArray[Any] | None],
    compute: Callable[[NDArray[Any]], None],
) -> NDArray[Any]:
    """The result of ``compute``, in ``out`` where it is given.

    The algorithms write to contiguous arrays of the type they compute in, which no input shares memory with; where
    ``out`` is none such, the result goes through a temporary one.
    """
    result = result_array(out, shape, dtype)
    direct = (
        result.flags.c_contiguous
        and result.dtype == compute_dtype
        and (out is None or not any(array is not None and numpy.may_share_memory(out, array) for array in inputs))
    )
    target = result if direct else numpy.empty(shape, compute_dtype)
    if target.size:
        compute(target)
    if not direct:
        with numpy.errstate(all="ignore"):  # what float16 cannot hold is infinite in it
            result[...] = target
    return result
