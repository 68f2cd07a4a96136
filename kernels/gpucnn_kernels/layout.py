"""Images (N, C, H, W) from one memory format to the other: contiguous, and channels-last (memory N, H, W, C).

float32, float16, bfloat16 or float64. The numbers and the shape stay; only their order in memory changes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from gpucnn_kernels.arrays import DeviceArray, image_layout
from gpucnn_kernels.errors import ArgumentError, LayoutError
from gpucnn_kernels.launch import Call, blocks_for
from gpucnn_kernels.overlap import require_apart

SOURCE = "layout"
SOURCES: dict[str, tuple[dict[str, str], ...]] = {SOURCE: ({},)}

_TILE = 32
_FEW = 8  # below so many lines or columns most of a tile would be empty
_MOST_BLOCKS = 2**31 - 1


def to_channels_last(x: Any, *, out: Any = None, stream: Any = None) -> Any:
    """The image x (N, C, H, W) with memory that runs N, H, W, C.

    x itself where it is so already and no ``out`` is given; ``out`` is always filled. Raises LayoutError where x
    has neither layout, or ``out`` not this one, ArgumentError where they differ in shape or share memory.
    """
    return _convert(x, "channels_last", out, stream)


def to_contiguous(x: Any, *, out: Any = None, stream: Any = None) -> Any:
    """The image x (N, C, H, W) with memory in that order.

    x itself where it is so already and no ``out`` is given; ``out`` is always filled. Raises LayoutError where x
    has neither layout, or ``out`` not this one, ArgumentError where they differ in shape or share memory.
    """
    return _convert(x, "contiguous", out, stream)


def _convert(given: Any, layout: str, out: Any, stream: Any) -> Any:
    with Call(stream, x=given, out=out) as call:
        dtype = call.floating("x", "out")
        x = call["x"]
        image_layout(x)
        same = _is(x, layout)
        if same and call.get("out") is None:
            return call.give(x)
        y = image_output(call, x, x.shape, dtype, layout)
        if not _is(y, layout):
            raise LayoutError(
                f"out must be {layout.replace('_', '-')}, but has shape {y.shape} and strides {y.strides} "
                "(in elements)"
            )
        require_apart(y, x)
        if same:
            call.launch(SOURCE, "copy_elements", blocks_for(y.size), scalar=dtype, x=x, y=y, count=y.size)
            return call.give(y)
        n, c, h, w = x.shape
        rows, columns = (c, h * w) if layout == "channels_last" else (h * w, c)
        arguments: dict[str, Any] = {"x": x, "y": y, "rows": rows, "columns": columns}
        if min(rows, columns) < _FEW:
            call.launch(SOURCE, "transpose_elements", blocks_for(y.size), scalar=dtype, count=y.size, **arguments)
        else:
            tiles = n * -(-rows // _TILE) * -(-columns // _TILE)
            if tiles > _MOST_BLOCKS:
                raise ArgumentError(f"x of shape {x.shape} has {tiles} tiles, a grid takes {_MOST_BLOCKS}")
            call.launch(SOURCE, "transpose_matrices", tiles, (_TILE, 8), scalar=dtype, **arguments)
        return call.give(y)


def _is(image: DeviceArray, layout: str) -> bool:
    return image.channels_last if layout == "channels_last" else image.contiguous


def image_output(call: Call, model: DeviceArray, shape: Sequence[int], dtype: str, layout: str) -> DeviceArray:
    """The argument ``out``, checked for shape and dtype, or a new image (N, C, H, W) of this layout.

    ``model`` is any argument of the call.
    """
    n, c, h, w = shape
    strides = (h * w * c, 1, w * c, c) if layout == "channels_last" else (c * h * w, h * w, w, 1)
    like = dataclasses.replace(model, shape=(n, c, h, w), strides=strides)
    return call.output(shape, dtype, like=like)
