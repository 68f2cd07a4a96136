"""Dropout (Srivastava et al., JMLR 15, 2014), scaled while training so that evaluation is the identity.

float32, float16, bfloat16 or float64, on arrays of any shape that are contiguous, or (N, C, H, W) and
channels-last.
"""

from __future__ import annotations

import math
from typing import Any

from gpucnn_kernels.arrays import DeviceArray
from gpucnn_kernels.errors import ArgumentError, LayoutError
from gpucnn_kernels.launch import Call, blocks_for, blocks_for_packs
from gpucnn_kernels.overlap import require_apart, require_same_or_apart

SOURCE = "dropout"
SOURCES: dict[str, tuple[dict[str, str], ...]] = {SOURCE: ({},)}


def dropout_forward(
    x: Any,
    *,
    probability: float,
    seed: int,
    offset: int,
    per_channel: bool = False,
    start: Any = None,
    out: Any = None,
    stream: Any = None,
) -> Any:
    """(y, mask): x / (1 - probability) where the boolean mask holds, 0 elsewhere.

    Element i, in C order of the logical array (of (N, C) with ``per_channel``; the mask is then (N, C, 1, ...)),
    is kept where word i of the Philox4x32-10 stream of ``seed`` (0 to 2^64 - 1), from word ``offset`` on, is at
    least probability * 2^32. So neither the layout nor the GPU changes a mask. ``start``, an array of one uint64,
    is added to the offset when the kernel runs: in a captured graph, the words that were used before. y and a full
    mask are laid out as x; ``out`` may be x itself. Raises ArgumentError for a probability outside 0 .. 1, or
    ``per_channel`` with fewer than 2 axes.
    """
    with Call(stream, x=x, start=start, out=out) as call:
        dtype = call.floating("x", "out")
        call.require("start", "uint64", (1,))
        scale = _scale(probability)
        _known_layout(call["x"])
        call.elementwise("x", "out")
        source = call["x"]
        stream_words: dict[str, Any] = {
            "seed": seed,
            "offset": offset,
            "threshold": math.ceil(probability * 2**32),
            "start": call.get("start"),
        }
        y = call.output(source.shape, dtype, like=source)
        if per_channel:
            if len(source.shape) < 2:
                raise ArgumentError(
                    f"dropout of whole channels needs an input (N, C, ...), got shape {source.shape}"
                )
            mask = call.empty(source.shape[:2] + (1,) * (len(source.shape) - 2), "bool", name="mask")
            call.launch(
                SOURCE,
                "dropout_mask",
                blocks_for(mask.size),
                scalar=dtype,
                mask=mask,
                count=mask.size,
                **stream_words,
            )
            _apply(call, source, mask, y, scale)
            return call.give(y, mask)
        mask = call.empty(source.shape, "bool", like=source, name="mask")
        # A contiguous array is one plane: its words follow each other as its elements do.
        images, channels, size = _planes(source) if _interleaved(source) else (1, 1, source.size)
        blocks = (size + 6) // 4
        call.launch(
            SOURCE,
            "dropout_forward",
            blocks_for(images * channels * blocks) if source.size else 0,
            scalar=dtype,
            x=source,
            y=y,
            mask=mask,
            images=images,
            channels=channels,
            size=size,
            scale=scale,
            **stream_words,
        )
        return call.give(y, mask)


def dropout_backward(dy: Any, mask: Any, *, probability: float, out: Any = None, stream: Any = None) -> Any:
    """Dy / (1 - probability) where the mask holds, 0 elsewhere.

    ``mask`` is what :func:`dropout_forward` gave: boolean, of the shape of dy or (N, C, 1, ...), in any of the two
    layouts. ``out`` may be dy itself, and otherwise have either layout too.
    """
    with Call(stream, dy=dy, mask=mask, out=out) as call:
        dtype = call.floating("dy", "out")
        scale = _scale(probability)
        gradient, given = call["dy"], call["mask"]
        call.require("mask", "bool")
        channel_shape = gradient.shape[:2] + (1,) * (len(gradient.shape) - 2)
        if given.shape != gradient.shape and (len(gradient.shape) < 2 or given.shape != channel_shape):
            raise ArgumentError(
                f"a mask of shape {given.shape} does not fit dy of shape {gradient.shape}; it is of that "
                f"shape, or one value a channel, {channel_shape}"
            )
        dx = call.output(gradient.shape, dtype, like=gradient)
        if call.get("out") is not None:
            require_same_or_apart(dx, gradient)
            require_apart(dx, given)
        _apply(call, gradient, given, dx, scale)
        return call.give(dx)


# ---------------------------------------------------------------- planes


def _scale(probability: float) -> float:
    if not 0 <= probability <= 1:
        raise ArgumentError(f"the dropout probability must lie between 0 and 1, got {probability!r}")
    return 1 / (1 - probability) if probability < 1 else 0.0


def _known_layout(array: DeviceArray) -> None:
    if not array.contiguous and not array.channels_last:
        raise LayoutError(
            f"{array.name} of shape {array.shape} has strides {array.strides} (in elements), neither contiguous "
            "nor channels-last; copy it first with ascontiguousarray"
        )


def _interleaved(array: DeviceArray) -> bool:
    """Whether the channels are neighbours in memory: channels-last and not contiguous as well."""
    _known_layout(array)
    return not array.contiguous


def _planes(array: DeviceArray) -> tuple[int, int, int]:
    """(N, C, the size of a plane), of an array (N, C, ...); a vector is one image of one channel."""
    n, c = array.shape[:2] if len(array.shape) > 1 else (1, 1)
    return n, c, math.prod(array.shape[2:]) if len(array.shape) > 1 else array.size


def _plane_strides(array: DeviceArray, channels: int, size: int) -> dict[str, int]:
    if _interleaved(array):
        return {"n": channels * size, "c": 1, "s": channels}
    return {"n": channels * size, "c": size, "s": 1}


def _apply(call: Call, dy: DeviceArray, mask: DeviceArray, dx: DeviceArray, scale: float) -> None:
    _, channels, size = _planes(dx)
    _known_layout(mask)
    by_channel = mask.shape != dx.shape
    if dy.same_layout(dx) and mask.same_layout(dx):
        call.launch(
            SOURCE,
            "dropout_apply_elements",
            blocks_for_packs(dx.size, dx.dtype),
            scalar=dx.dtype,
            dy=dy,
            mask=mask,
            dx=dx,
            count=dx.size,
            scale=scale,
        )
        return
    call.launch(
        SOURCE,
        "dropout_apply",
        blocks_for(dx.size),
        scalar=dx.dtype,
        dy=dy,
        mask=mask,
        dx=dx,
        count=dx.size,
        channels=channels,
        size=size,
        scale=scale,
        dy_strides=_plane_strides(dy, channels, size),
        mask_strides={"n": channels, "c": 1, "s": 0} if by_channel else _plane_strides(mask, channels, size),
        dx_strides=_plane_strides(dx, channels, size),
    )
