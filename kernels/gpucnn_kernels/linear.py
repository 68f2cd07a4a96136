"""The fully connected layer: matrix products (see :mod:`gpucnn_kernels.matmul`) and the sums of the bias gradient.

Matrices may be stored by rows or by columns, and be part of a larger matrix. Shapes that do not fit raise
ProblemError, other strides LayoutError, an ``out`` that shares memory with an argument ArgumentError.
"""

from __future__ import annotations

from typing import Any

from gpucnn_kernels.arrays import DeviceArray
from gpucnn_kernels.channel_sums import launch_channel_sums
from gpucnn_kernels.launch import Call
from gpucnn_kernels.matmul import matmul
from gpucnn_kernels.overlap import require_apart
from gpucnn_kernels.problem import ProblemError

SOURCE = "linear"
SOURCES: dict[str, tuple[dict[str, str], ...]] = {SOURCE: ({},)}


def linear_forward(x: Any, weight: Any, bias: Any = None, *, out: Any = None, stream: Any = None) -> Any:
    """X (N, in) @ weight.T (weight is (out, in)) + bias (out,): (N, out)."""
    with Call(stream, x=x, weight=weight, bias=bias, out=out) as call:
        dtype = call.floating("x", "weight", "bias", "out")
        count, inputs = _matrix(call["x"], "(N, in features)")
        outputs, expected = _matrix(call["weight"], "(out features, in features)")
        if inputs != expected:
            raise ProblemError(
                f"x has {inputs} features (shape {call['x'].shape}) but the weight of shape "
                f"{call['weight'].shape} expects {expected}"
            )
        row = call.get("bias")
        y = call.output((count, outputs), dtype)
        if row is not None:
            if row.shape != (outputs,):
                raise ProblemError(f"bias must have shape {(outputs,)}, got {row.shape}")
            call.contiguous("bias")
            require_apart(y, row, call["x"], call["weight"])
            _fill_rows(call, row, y)
        matmul(call["x"].array, call["weight"].array.T, out=y.array, accumulate=row is not None)
        return call.give(y)


def linear_backward_data(dy: Any, weight: Any, *, out: Any = None, stream: Any = None) -> Any:
    """Dy (N, out) @ weight: (N, in)."""
    with Call(stream, dy=dy, weight=weight, out=out) as call:
        dtype = call.floating("dy", "weight", "out")
        count, outputs = _matrix(call["dy"], "(N, out features)")
        expected, inputs = _matrix(call["weight"], "(out features, in features)")
        if outputs != expected:
            raise ProblemError(
                f"dy has {outputs} features (shape {call['dy'].shape}) but the weight of shape "
                f"{call['weight'].shape} makes {expected}"
            )
        dx = call.output((count, inputs), dtype)
        matmul(call["dy"].array, call["weight"].array, out=dx.array)
        return call.give(dx)


def linear_backward_weight(dy: Any, x: Any, *, out: Any = None, stream: Any = None) -> Any:
    """dy.T @ x: (out, in). An empty batch gives zeros."""
    with Call(stream, dy=dy, x=x, out=out) as call:
        dtype = call.floating("dy", "x", "out")
        count, outputs = _matrix(call["dy"], "(N, out features)")
        expected, inputs = _matrix(call["x"], "(N, in features)")
        if count != expected:
            raise ProblemError(f"dy is of a batch of {count} (shape {call['dy'].shape}), x of {expected}")
        dweight = call.output((outputs, inputs), dtype)
        matmul(call["dy"].array.T, call["x"].array, out=dweight.array)
        return call.give(dweight)


def linear_backward_bias(dy: Any, *, out: Any = None, stream: Any = None) -> Any:
    """The sum of dy (N, out) over the batch: (out,). An empty batch gives zeros."""
    with Call(stream, dy=dy, out=out) as call:
        dtype = call.floating("dy", "out")
        gradient = call["dy"]
        count, outputs = _matrix(gradient, "(N, out features)")
        sums = call.output((outputs,), dtype)
        require_apart(sums, gradient)
        down, across = gradient.strides
        launch_channel_sums(call, gradient, sums, images=(1, 0), pixels=(count, down), channels=(outputs, across))
        return call.give(sums)


def _matrix(array: DeviceArray, axes: str) -> tuple[int, int]:
    if len(array.shape) != 2:
        raise ProblemError(f"{array.name} must have 2 dimensions {axes}, got shape {array.shape}")
    return array.shape[0], array.shape[1]


def _fill_rows(call: Call, row: DeviceArray, matrix: DeviceArray) -> None:
    rows, columns = matrix.shape
    down, across = matrix.strides
    width = 256 if matrix.contiguous else 1  # neighbouring threads write neighbouring numbers
    shape = {"rows": rows, "columns": columns, "down": down, "across": across}
    blocks = -(-columns // width), min(-(-rows // (256 // width)), 1024)
    call.launch(
        SOURCE, "fill_rows", blocks, (width, 256 // width), scalar=row.dtype, row=row, matrix=matrix, shape=shape
    )
