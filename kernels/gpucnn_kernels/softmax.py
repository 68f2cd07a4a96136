"""Softmax along any axis of a dense array, forward and backward; ``out`` may be an input itself.

float32, float16, bfloat16 or float64 arrays of any dense layout; computed in float32 (float64 for float64).
"""

from __future__ import annotations

import operator
from typing import Any

from gpucnn_kernels.arrays import DeviceArray
from gpucnn_kernels.errors import ArgumentError
from gpucnn_kernels.launch import Call, blocks_for

SOURCE = "softmax"
SOURCES: dict[str, tuple[dict[str, str], ...]] = {SOURCE: ({},)}

_SHORT = 8  # numbers in a row that one thread takes by itself
_LONG = 1024  # numbers in a row from which on a block takes it, not a warp
_WARP, _BLOCK = 32, 256


def row_threads(length: int) -> tuple[int, int]:
    """(threads a row, rows a block) for rows of ``length`` neighbouring numbers: a warp each, a block if long."""
    return (_WARP, _BLOCK // _WARP) if length <= _LONG else (_BLOCK, 1)


def _launch(call: Call, direction: str, first: DeviceArray, axis: int, **arrays: Any) -> None:
    axes = len(first.shape)
    axis = operator.index(axis)
    if not -axes <= axis < axes:
        raise ArgumentError(f"softmax over axis {axis} of an array with {axes} axes, shape {first.shape}")
    length = first.shape[axis]
    if first.size == 0:
        return
    # An axis of length 1 may have any stride, and each of its numbers is a row.
    inner = first.strides[axis] if length > 1 else 1
    shape = {"rows": first.size // length, "length": length, "inner": inner}
    if inner == 1 and length > _SHORT:
        threads = row_threads(length)
        kernel, blocks = f"softmax_{direction}_rows", blocks_for(shape["rows"], threads[1])
        call.launch(SOURCE, kernel, blocks, threads, scalar=first.dtype, shape=shape, **arrays)
    else:
        kernel, blocks = f"softmax_{direction}_threads", blocks_for(shape["rows"])
        call.launch(SOURCE, kernel, blocks, scalar=first.dtype, shape=shape, **arrays)


def softmax_forward(x: Any, *, axis: int = -1, out: Any = None, stream: Any = None) -> Any:
    """exp(x - max) / sum, along ``axis``: no overflow at any x. A row of minus infinities becomes NaN.

    The result has x's shape, dtype and layout. Raises ArgumentError for an axis that x does not have, LayoutError
    where x has gaps or ``out`` another layout.
    """
    with Call(stream, x=x, out=out) as call:
        dtype = call.floating("x", "out")
        call.elementwise("x", "out")
        y = call.output(call["x"].shape, dtype, like=call["x"])
        _launch(call, "forward", call["x"], axis, x=call["x"], y=y)
        return call.give(y)


def softmax_backward(dy: Any, y: Any, *, axis: int = -1, out: Any = None, stream: Any = None) -> Any:
    """Y * (dy - sum(dy * y)), along ``axis``, with y the forward result; dy, y and out in one layout."""
    with Call(stream, dy=dy, y=y, out=out) as call:
        dtype = call.floating("dy", "y", "out")
        call.elementwise("dy", "y", "out")
        dx = call.output(call["dy"].shape, dtype, like=call["dy"])
        _launch(call, "backward", call["dy"], axis, dy=call["dy"], y=call["y"], dx=dx)
        return call.give(dx)
