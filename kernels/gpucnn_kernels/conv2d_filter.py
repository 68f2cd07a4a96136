"""The gradients of a convolution's weight and bias: sums over the batch and all output positions.

Ways, all deterministic, to the weight's:

- "implicit_gemm": a matrix product over the N * P * Q positions that reads the windows of x where they lie. The
  positions are split into parts, so that a small weight keeps a GPU busy too.
- "direct": the same for few input channels a group, whose windows are read from shared memory; see
  conv2d_filter_direct.py.
- "im2col": the windows copied to columns, some images at a time, and a dense matrix product an image, added up in
  order.
- "depthwise": for one input channel a group, where a product of matrices would have nothing to share; the usual
  filters have kernels of their own, see conv2d_filter_depthwise.py.
- "tensor": as "implicit_gemm", on tensor cores; see conv2d_tensor.py.

Half precision is added up in float32 and rounded once. The bias's gradient can come with the weight's:
"implicit_gemm" and "direct" make it in the same pass over dy, other ways in launches of their own.
"""

from __future__ import annotations

from typing import Any

from gpucnn_kernels import conv2d_filter_depthwise, conv2d_filter_direct, conv2d_tensor, tuning
from gpucnn_kernels.arrays import DeviceArray, image_layout
from gpucnn_kernels.channel_sums import launch_channel_sums
from gpucnn_kernels.columns import columns_shape, images, launch_im2col
from gpucnn_kernels.conv2d_choice import chosen, least_precision
from gpucnn_kernels.conv2d_tiles import even_filter_parts, filter_tile
from gpucnn_kernels.errors import ArgumentError
from gpucnn_kernels.launch import Call
from gpucnn_kernels.matmul import matmul
from gpucnn_kernels.overlap import require_apart
from gpucnn_kernels.problem import Conv2dProblem, IntOrPair, Padding, ProblemError, pair
from gpucnn_kernels.runtime import itemsize
from gpucnn_kernels.source import SCALARS

SOURCE = "conv2d_filter_gradient"
SOURCES: dict[str, tuple[dict[str, str], ...]] = {SOURCE: ({},)}

_THREADS = 256
_BLOCKS = 512  # that the positions are split for: a few for each multiprocessor of any GPU
_LEAST = 256  # positions of a part: below, adding up the parts costs more than the parts save
_STEPS = {"filter_gradient_large": 8, "filter_gradient_wide": 16, "filter_gradient_narrow": 16}
"""Positions that a tile takes at a time."""
_PART = 1 << 30  # positions of a part at most: a block counts them in 32 bits
_PLACES = 9  # kernel positions that a block of the depthwise kernel takes
_PARTIAL_BYTES = 64 << 20  # of the workspace for the parts' sums
_COLUMN_BYTES = 128 << 20  # of the workspace for the columns


def filter_algorithms() -> tuple[str, ...]:
    """Names that ``algorithm`` of :func:`conv2d_backward_filter` takes, without "auto" and "tensor"."""
    return "implicit_gemm", "direct", "im2col", "depthwise"


def conv2d_backward_filter(
    dy: Any,
    x: Any,
    *,
    kernel_size: IntOrPair,
    stride: IntOrPair = 1,
    padding: Padding = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
    algorithm: str = "auto",
    precision: str | None = None,
    out: Any = None,
    bias_out: Any = None,
    stream: Any = None,
) -> Any:
    """The gradient for the weight, (K, C / groups, R, S), from dy (N, K, P, Q) and x (N, C, H, W).

    dw[k, c, r, s] is the sum over n, p, q of dy[n, k, p, q] times the input that weight[k, c, r, s] met there; an
    empty batch gives zeros. dy and x may each be contiguous or channels-last; the result is channels-last where x
    is that and not contiguous, or has the layout of ``out``. ``precision`` is :func:`conv2d_forward`'s.

    ``bias_out``, (K,), takes the gradient for the bias, the sum of dy over N, P and Q, made in the same pass where
    the way is "implicit_gemm" or "direct" and both results have one dtype. Its order of additions, and so its last
    bits, are the way's.

    Sums of 16-bit arrays are in float32, and rounded once unless ``out``, or ``bias_out``, is float32, too.

    Raises ProblemError where shapes do not fit together, ArgumentError for an ``algorithm`` that there is not or
    that cannot run for them, DtypeError and DeviceError where "tensor" cannot.
    """
    with Call(stream, dy=dy, x=x, out=out, bias_out=bias_out) as call:
        dtype = call.floating("dy", "x")
        problem = _problem(call["dy"], call["x"], kernel_size, stride, padding, dilation, groups)
        _check_algorithm(call, algorithm, problem, dtype, precision)
        if problem.N:  # the strides of an empty array say nothing
            image_layout(call["dy"])
            image_layout(call["x"])
        dw = call.output(problem.weight_shape, _kept(call, "out"), like=call["x"] if problem.N else None)
        channels_fastest = image_layout(dw) == "channels_last"
        require_apart(dw, call["dy"], call["x"])
        db = None
        if bias_out is not None:
            db = call.output((problem.K,), _kept(call, "bias_out"), name="bias_out")
            require_apart(db, call["dy"], call["x"], dw)
        together = db is not None and db.dtype == dw.dtype

        def run(name: str) -> None:
            fastest, bias = channels_fastest, None
            if problem.N == 0:
                partial, parts = call.scratch(0, SCALARS[dtype][1]), 0
            elif name == "tensor":
                partial, parts = conv2d_tensor.filter_sums(call, problem, call["dy"], call["x"], precision)
                fastest = True
            elif name == "im2col":
                partial, parts, fastest = _by_columns(call, problem), 1, False
            elif name == "direct":
                partial, bias, parts = conv2d_filter_direct.filter_sums(
                    call, problem, call["dy"], call["x"], fastest, together
                )
            elif name == "depthwise" and conv2d_filter_depthwise.takes(problem):
                partial, parts = conv2d_filter_depthwise.filter_sums(call, problem, call["dy"], call["x"])
            else:
                partial, bias, parts = _by_parts(call, problem, fastest, name, together)
            if db is not None and bias is None:
                _sum_channels(call, call["dy"], db)
            _finish(call, partial, parts, dw, bias, None if bias is None else db, problem, fastest)

        options: dict[str, Any] = {
            "precision": least_precision(dtype, precision),
            "channels_last": call["dy"].channels_last and call["x"].channels_last,
        }
        if algorithm != "auto":
            run(algorithm)
        elif tuning.enabled():
            tuning.start(call, "backward_filter", problem, dtype, run, **options)
        else:
            run(chosen("backward_filter", problem, dtype, gpu=call.gpu, **options))
        return call.give(dw)


def conv2d_backward_bias(dy: Any, *, out: Any = None, stream: Any = None) -> Any:
    """The gradient for the bias, (K,): the sum of dy (N, K, P, Q), in either layout, over N, P and Q.

    The order of the additions depends on the shape and the layout alone; an empty batch gives zeros. ``out`` is of
    dy's dtype, or float32 where that has 16 bits, whose sums are.
    """
    with Call(stream, dy=dy, out=out) as call:
        call.floating("dy")
        gradient = call["dy"]
        if len(gradient.shape) != 4:
            raise ProblemError(f"dy must have 4 dimensions (N, K, P, Q), got shape {gradient.shape}")
        sums = call.output(gradient.shape[1:2], _kept(call, "out"))
        require_apart(sums, gradient)
        _sum_channels(call, gradient, sums)
        return call.give(sums)


def _sum_channels(call: Call, dy: DeviceArray, sums: DeviceArray) -> None:
    """The sum of dy (N, K, P, Q), in either layout, over N, P and Q."""
    count, outputs, p, q = dy.shape
    last = count > 0 and image_layout(dy) == "channels_last"
    launch_channel_sums(
        call,
        dy,
        sums,
        images=(count, outputs * p * q),
        pixels=(p * q, outputs if last else 1),
        channels=(outputs, 1 if last else p * q),
    )


def _problem(
    dy: DeviceArray,
    x: DeviceArray,
    kernel_size: IntOrPair,
    stride: IntOrPair,
    padding: Padding,
    dilation: IntOrPair,
    groups: int,
) -> Conv2dProblem:
    if len(dy.shape) != 4:
        raise ProblemError(f"dy must have 4 dimensions (N, K, P, Q), got shape {dy.shape}")
    r, s = pair(kernel_size, "kernel_size")
    channels = x.shape[1] if len(x.shape) == 4 else 0
    if groups < 1 or channels % groups:
        raise ProblemError(f"groups={groups} must be at least 1 and divide the {channels} channels of x {x.shape}")
    problem = Conv2dProblem.from_shapes(
        x.shape,
        (dy.shape[1], channels // groups, r, s),
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
    )
    if problem.output_shape != dy.shape:
        raise ProblemError(
            f"dy has shape {dy.shape}, but convolving an input of shape {problem.input_shape} with weights of "
            f"shape {problem.weight_shape} gives {problem.output_shape}"
        )
    return problem


def _check_algorithm(
    call: Call, algorithm: str, problem: Conv2dProblem, dtype: str, precision: str | None
) -> None:
    """Raise where there is no algorithm of this name, or it cannot do this problem."""
    conv2d_tensor.check_precision(precision, dtype)
    if algorithm == "auto":
        return
    if algorithm == "tensor":
        conv2d_tensor.check(call, dtype)
        return
    if algorithm not in filter_algorithms():
        raise ArgumentError(
            f"algorithm of a filter gradient must be auto, {', '.join(filter_algorithms())}, got {algorithm!r}"
        )
    if algorithm == "direct":
        conv2d_filter_direct.check(problem, dtype)
    if algorithm == "depthwise" and problem.groups != problem.C:
        raise ArgumentError(
            f"algorithm 'depthwise' takes one input channel a group, got {problem.C // problem.groups}; use "
            "'implicit_gemm'"
        )


def _kept(call: Call, name: str) -> str:
    """The dtype of a result: dy's, or float32 where the array ``name`` has that and dy has 16 bits."""
    out = call.get(name)
    if out is not None and out.dtype == SCALARS[call["dy"].dtype][1]:
        return out.dtype
    return call.floating("dy", name)


# ---------------------------------------------------------------- the ways


def _by_parts(
    call: Call, problem: Conv2dProblem, channels_fastest: bool, name: str, bias: bool
) -> tuple[DeviceArray, DeviceArray | None, int]:
    """(a row of sums for every part of the positions, of the bias's, their number), where x is read in its place.

    The bias's are made where they are asked for, and not by "depthwise".
    """
    dy, x = call["dy"], call["x"]
    outputs, columns = problem.K // problem.groups, _columns(problem)
    positions = problem.N * problem.P * problem.Q
    across = image_layout(dy) == "channels_last"
    if name == "depthwise":
        width = min(32, 1 << (problem.K - 1).bit_length()) if across else 1
        blocks = -(-columns // _PLACES) * -(-problem.K // width)
        kernel, threads = "filter_gradient_depthwise", (width, _THREADS // width)
        step, parts = threads[1], min(-(-_BLOCKS // blocks), -(-positions // _LEAST))
    else:
        tile = filter_tile(call.gpu, x.dtype, outputs, columns, problem.groups, positions)
        blocks = tile.blocks(outputs, columns, problem.groups)
        kernel, threads = tile.name, (32 * tile.warps, 1)
        sizes = outputs, columns, problem.groups, positions
        step, parts = _STEPS[tile.name], even_filter_parts(call.gpu, tile, *sizes, _LEAST)
    elements = problem.K * columns
    accumulated = SCALARS[x.dtype][1]
    most = max(1, _PARTIAL_BYTES // (elements * itemsize(accumulated)))
    part = -(-positions // max(1, min(parts, most), -(-positions // _PART)))
    part += -part % 16
    parts = -(-positions // part)
    partial = call.scratch(parts * elements, accumulated)
    bias_partial = call.scratch(parts * problem.K, accumulated) if bias and name != "depthwise" else None
    others: dict[str, Any] = {} if name == "depthwise" else {"bias_partial": bias_partial}
    call.launch(
        SOURCE,
        kernel,
        (blocks, parts) if name == "depthwise" else blocks * parts,
        threads,
        scalar=x.dtype,
        x=x,
        dy=dy,
        partial=partial,
        **others,
        gradient={
            "positions": positions,
            "part": part,
            **dict(zip(("x_n", "x_c", "x_h", "x_w"), x.strides, strict=True)),
            **dict(zip(("dy_n", "dy_k", "dy_p", "dy_q"), dy.strides, strict=True)),
            **_stepping(problem, dy, x, step),
            "groups": problem.groups,
            "K": outputs,
            "C": problem.C // problem.groups,
            "columns": columns,
            **{letter: getattr(problem, letter) for letter in "HWRSPQ"},
            "stride_h": problem.stride[0],
            "stride_w": problem.stride[1],
            "top": problem.padding[0],
            "left": problem.padding[2],
            "dilation_h": problem.dilation[0],
            "dilation_w": problem.dilation[1],
            "channels_fastest": channels_fastest,
            "x_across": image_layout(x) == "channels_last",
            "dy_across": across,
        },
    )
    return partial, bias_partial, parts


def _stepping(problem: Conv2dProblem, dy: DeviceArray, x: DeviceArray, step: int) -> dict[str, int]:
    """How far ``step`` positions move in dy and x, and what to add where that leads beyond a row or an image."""
    rows, q = divmod(step, problem.Q)
    n, p = divmod(rows, problem.P)
    found = {"step_p": p, "step_q": q}
    for name, image, (down, across) in (("dy", dy, (1, 1)), ("x", x, problem.stride)):
        by_image, by_row, by_column = image.strides[0], image.strides[2] * down, image.strides[3] * across
        found[f"{name}_step"] = n * by_image + p * by_row + q * by_column
        found[f"{name}_next_row"] = by_row - problem.Q * by_column
        found[f"{name}_next_image"] = by_image - problem.P * by_row
    return found


def _by_columns(call: Call, problem: Conv2dProblem) -> DeviceArray:
    """The sums, columns ordered c, r, s, by im2col and dense products."""
    dy, x = call["dy"], call["x"]
    groups, outputs, columns = problem.groups, problem.K // problem.groups, _columns(problem)
    _, rows, positions = columns_shape(problem)
    total = call.scratch(problem.K * columns, SCALARS[x.dtype][1])
    target = total.array.reshape(groups, outputs, columns)
    chunk = min(problem.N, max(1, _COLUMN_BYTES // (rows * positions * itemsize(x.dtype))))
    space = call.scratch(chunk * rows * positions, x.dtype)
    windows = space.array.reshape(chunk, groups, columns, positions)
    if image_layout(dy) == "contiguous":
        slopes = dy.array.reshape(problem.N, groups, outputs, positions)
    else:
        by_pixel = dy.array.transpose(0, 2, 3, 1).reshape(problem.N, positions, groups, outputs)
        slopes = by_pixel.transpose(0, 2, 3, 1)
    for first in range(0, problem.N, chunk):
        last = min(first + chunk, problem.N)
        launch_im2col(call, images(x, first, last), space, problem)
        for n in range(first, last):
            matmul(slopes[n], windows[n - first].transpose(0, 2, 1), out=target, accumulate=n > 0)
    return total


def _finish(
    call: Call,
    partial: DeviceArray,
    parts: int,
    dw: DeviceArray,
    bias_partial: DeviceArray | None,
    db: DeviceArray | None,
    problem: Conv2dProblem,
    channels_fastest: bool,
) -> None:
    """Add the parts up into dw, and those of the bias, where there are any, into db. No parts give zeros."""
    lines = min(16, 1 << (parts - 1).bit_length()) if parts > 1 else 1
    width = _THREADS // lines
    outputs = 0 if db is None else db.size
    call.launch(
        SOURCE,
        "filter_gradient_finish",
        -(-(dw.size + outputs) // width),
        (width, lines),
        scalar=dw.dtype,
        partial=partial,
        dw=dw,
        bias_partial=bias_partial,
        db=db,
        finish={
            "elements": dw.size,
            "outputs": outputs,
            "bias_step": 0 if db is None else db.strides[0],
            **dict(zip("kcrs", dw.strides, strict=True)),
            "parts": parts,
            "columns": _columns(problem),
            "C": problem.C // problem.groups,
            "R": problem.R,
            "S": problem.S,
            "channels_fastest": channels_fastest,
        },
    )


def _columns(problem: Conv2dProblem) -> int:
    """What a group's output channel sums: C / groups * R * S numbers."""
    return problem.C // problem.groups * problem.R * problem.S
